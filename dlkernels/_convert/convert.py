"""Turn the modules of a model into those of :mod:`dlkernels.nn` and back, in place.

Only ``module.__class__`` changes: Parameters, tied weights, optimizers, hooks and state_dict keys
stay what they are.
"""

from typing import TypeVar

import torch

from . import forward
from .classes import ORIGINALS, REPLACEMENTS
from .report import check, report, why_kept

M = TypeVar("M", bound=torch.nn.Module)


def convert(model: M, *, fuse: bool = True, verbose: bool = False) -> M:
    """Makes the modules of `model` run on dlkernels' kernels, in place: ``model = convert(model)``.

    Modules of exactly a class of :mod:`torch.nn` that :mod:`dlkernels.nn` has too (``Linear``,
    ``Conv2d``, ``Sequential``, ...) become modules of that class, on any device and in any dtype.
    Each module still computes what it did, also after changes to the model. Modules that are added
    later are converted by another call.

    An ``nn.Sequential``, and the forward of another class, runs ``relu(linear(x))``,
    ``relu(conv2d(x))``, ``max_pool2d(relu(conv2d(x)))`` and stacks of linear layers with ReLUs as
    one op. It decides so at each call: where a hook or a change would show, its modules are called.
    A class with such a forward is replaced by a subclass, its methods compiled again from their
    source. Pickle writes the class itself.

    Args:
        model: any module
        fuse: whether containers and forwards run several modules as one op
        verbose: whether to print the :func:`dlkernels.report`

    Returns:
        `model`

    Raises:
        TypeError: if `model` is no module.
    """
    check("convert", model)
    for m in model.modules():
        if type(m) in REPLACEMENTS and not why_kept(m):
            m.__class__ = REPLACEMENTS[type(m)]
        if type(m) is REPLACEMENTS[torch.nn.Sequential] and not fuse:
            m.__class__ = torch.nn.Sequential
    for m in model.modules():
        if "forward" not in vars(m):
            _set_class(m, forward.fused(m)[0] if fuse else forward.base_of(type(m)))
    if verbose:
        print(report(model))
    return model


def revert(model: M) -> M:
    """Undoes :func:`convert`, in place: ``model = revert(model)``.

    Every module of :mod:`dlkernels.nn` becomes PyTorch's, also one that was constructed as such. It
    works in any later state of the model, and on copies and parts of it. ``LinearReLU``,
    ``Conv2dReLU`` and ``Conv2dReLUMaxPool2d``, which PyTorch does not have, and subclasses that
    others made stay.

    Returns:
        `model`

    Raises:
        TypeError: if `model` is no module.
    """
    check("revert", model)
    for m in model.modules():
        _set_class(m, _reverted(type(m)))
    return model


def _set_class(m: torch.nn.Module, cls: type) -> None:
    if cls is not type(m):
        m.__class__ = cls


def _reverted(cls: type) -> type:
    """PyTorch's class in whose place `cls` is, or the one that `cls` was derived from here."""
    cls = forward.base_of(cls)
    if cls in ORIGINALS:
        return ORIGINALS[cls]
    bases = tuple(map(_reverted, cls.__bases__)) if cls.__module__.startswith("torch.") else ()
    if bases == cls.__bases__ or not bases:
        return cls
    # What torch makes of the class of a module that is parametrized or sharded.
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, members)
