"""Turn the modules of a model into those of :mod:`dlkernels.nn` and back, in place.

Only ``module.__class__`` changes: Parameters, tied weights, optimizers, hooks and state_dict keys
stay what they are.
"""

from collections import Counter
from typing import NamedTuple

import torch

from . import _forward, functional, nn

# Exact types: a subclass may compute anything.
_OURS = {
    torch.nn.Linear: nn.Linear,
    torch.nn.ReLU: nn.ReLU,
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.MaxPool2d: nn.MaxPool2d,
    torch.nn.CrossEntropyLoss: nn.CrossEntropyLoss,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}
_WITH_RELU = {nn.Linear: nn.LinearReLU, nn.Conv2d: nn.Conv2dReLU}
_WITHOUT_RELU = {fused: plain for plain, fused in _WITH_RELU.items()}
_WITHOUT_RELU[nn.Conv2dReLUMaxPool2d] = nn.Conv2d
_SEQUENTIALS = (torch.nn.Sequential, nn.Sequential)
_RELUS = (torch.nn.ReLU, nn.ReLU, nn.FusedReLU)
_POOLS = (torch.nn.MaxPool2d, nn.MaxPool2d, nn.FusedMaxPool2d)
_PLACES = (nn.FusedReLU, nn.FusedMaxPool2d)


class Changed(NamedTuple):
    name: str  # as in model.named_modules(); "" is the model itself
    before: str
    after: str


class Left(NamedTuple):
    name: str
    type: str
    reason: str


class Report:
    """What convert() or revert() did: ``changed`` and ``left``; true where anything changed."""

    def __init__(self, verb, changed, left):
        self._verb, self.changed, self.left = verb, changed, left

    def __len__(self):
        return len(self.changed)

    def __str__(self):
        changed = [(c.name or "(model)", c.before, "-> " + c.after) for c in self.changed]
        left = [(m.name or "(model)", m.type, m.reason) for m in self.left]
        widths = [max((len(row[i]) for row in changed + left), default=0) for i in (0, 1)]
        lines = [f"{self._verb} {len(changed)}, left {len(left)}"]
        for title, rows in (("changed", changed), ("left", left)):
            lines += [f"{title}:"] if rows else []
            lines += [f"  {n:{widths[0]}}  {t:{widths[1]}}  {text}" for n, t, text in rows]
        return "\n".join(lines)

    __repr__ = __str__


def convert(model, *, fuse=True):
    """Makes the modules of `model` run on kernels of ours, in place.

    ``Linear``, ``ReLU``, ``Conv2d``, ``MaxPool2d`` and ``CrossEntropyLoss`` of :mod:`torch.nn`
    become those of :mod:`dlkernels.nn`, on any device and in any dtype (each call decides).
    Subclasses, parametrized and pruned modules are left, and so is ``ReLU(inplace=True)``, which
    already takes a single pass.

    In an ``nn.Sequential``, a Linear or Conv2d and the ReLU after it become one pass: the first
    applies the ReLU, and the second, a ``FusedReLU``, keeps its place; and so does a
    ``FusedMaxPool2d`` after a Conv2d and its ReLU, if its windows are 2x2 side by side. The values
    in between then no longer exist. So neighbours with a hook on one of them, or used in a second
    place, are not fused; a hook added later, ``model[0](x)`` and ``model[:1](x)`` see values after
    the last of them, and putting another module in the first one's place loses what it applied,
    until convert or revert is called on the whole model again. Revert before another module takes
    the place of a ReLU. Where a model's own code takes out the values in between, say
    ``fuse=False``.

    In the forward of other classes, ``relu(conv(x))`` becomes one pass too, and so does
    ``max_pool2d(relu(conv(x)))``, where ``conv`` is a Linear or Conv2d and ``relu`` a function, a
    method or a module of PyTorch's. Such a module gets a subclass of its class, with its functions
    compiled again from their source; where that is not to be had, it is left. Hooks added later
    see the values in between. Copies are of the subclass too; pickle writes the class itself, so
    convert what was loaded.

    Where linear layers remain with only ReLUs in between, the ``nn.Sequential`` becomes a
    :class:`dlkernels.nn.Sequential`, which runs them as one op while none of them has a hook.

    Args:
        model: any module; convert the whole model, because only there can it be seen that a
            module is used twice. Converting again converts what was added.
        fuse: whether to fuse; False also takes apart what was fused before.

    Returns:
        Report: ``changed`` (name, before, after) and ``left`` (name, type, reason); prints as a
        table.

    Raises:
        TypeError: if `model` is no module.
    """
    _check("convert", model)
    becomes, left = {}, {}
    for m in model.modules():
        if type(m) in _OURS:
            reason = _why_left(m)
            if reason:
                left[m] = reason
            else:
                becomes[m] = _OURS[type(m)]
        elif isinstance(m, tuple(_OURS)):
            if not isinstance(m, (*_TORCHS, *_PLACES)):
                left[m] = "not exactly PyTorch's class: a subclass may compute something else"
        elif not list(m.children()):
            left[m] = "no kernel of ours for this class"

    pools = _plan_fusing(model, fuse, becomes, left)
    _plan_forwards(model, fuse, becomes, left)
    return _apply("converted", model, becomes, left, pools)


def revert(model):
    """Undoes :func:`convert`, in place: every module of ours becomes PyTorch's again.

    Works on copies, on unpickled models and on parts. Modules of ours that were constructed as such
    become PyTorch's too, but for ``LinearReLU``, ``Conv2dReLU`` and ``Conv2dReLUMaxPool2d``, which
    PyTorch does not have.

    Returns:
        Report: ``changed`` (name, before, after) and ``left`` (name, type, reason) with the modules
        of ours that stay.

    Raises:
        TypeError: if `model` is no module.
    """
    _check("revert", model)
    becomes, left = {}, {}
    for m in model.modules():
        if type(m) in _TORCHS:
            becomes[m] = _TORCHS[type(m)]
        elif type(m) is nn.Sequential:
            becomes[m] = torch.nn.Sequential
        elif type(m) is not _forward.base_of(type(m)):
            becomes[m] = _forward.base_of(type(m))
        elif type(m) in _PLACES:
            left[m] = "the module that applies it is not in this part: revert the nn.Sequential"
        elif type(m) in _WITHOUT_RELU:
            left[m] = "PyTorch has no such class, and nothing fused by convert() comes after it"
        elif isinstance(m, (*_TORCHS, *_PLACES)):
            left[m] = "a subclass: only its author knows what it was"
    for _, first, relu, pool in _neighbours(model):
        is_pooled = type(first) is nn.Conv2dReLUMaxPool2d
        if type(relu) is not nn.FusedReLU or (is_pooled and pool is None):
            continue
        becomes[relu] = torch.nn.ReLU
        if type(first) in _WITHOUT_RELU:
            becomes[first] = _TORCHS[_WITHOUT_RELU[type(first)]]
        if type(pool) is nn.FusedMaxPool2d:
            becomes[pool] = torch.nn.MaxPool2d
    left = {m: reason for m, reason in left.items() if m not in becomes}
    return _apply("reverted", model, becomes, left, pools={})


def _check(function, model):
    if not isinstance(model, torch.nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {got}")


def _why_left(m):
    """Why a module of an exact type of PyTorch's stays what it is, or None."""
    if "forward" in m.__dict__:
        return "its forward was replaced on the instance"
    if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and "weight" not in m._parameters:
        return "its weight is computed by a hook (pruned or normalised)"
    if isinstance(m, torch.nn.ReLU) and m.inplace:
        return "in place, PyTorch's own op already takes a single pass"
    return None


def _plan_fusing(model, fuse, becomes, left):
    """Adds to `becomes` which neighbours are put together or taken apart.

    Returns:
        {Conv2d: the MaxPool2d that it is to apply}
    """
    uses = Counter(id(child) for m in model.modules() for child in m._modules.values())

    def alone(m):
        """Whether nobody but its nn.Sequential sees what goes in or comes out."""
        return uses[id(m)] == 1 and not _has_hooks(m) and "forward" not in m.__dict__

    pools = {}
    for sequential, first, relu, pool in _neighbours(model):
        if type(relu) not in _RELUS:
            continue
        together = (
            fuse
            and type(sequential) in _SEQUENTIALS
            and "forward" not in sequential.__dict__
            and alone(first)
            and alone(relu)
        )
        kind = becomes.get(first, type(first))
        was_fused = kind in _WITHOUT_RELU and type(relu) is nn.FusedReLU
        if was_fused and kind is nn.Conv2dReLUMaxPool2d and pool is None:
            continue  # a part, which says nothing about what comes after it
        plain = _WITHOUT_RELU[kind] if was_fused else kind
        if together and plain in _WITH_RELU:
            becomes[first], becomes[relu] = _WITH_RELU[plain], nn.FusedReLU
            left.pop(relu, None)
            if plain is nn.Conv2d and type(pool) in _POOLS and alone(pool) and _is_one_op(pool):
                becomes[first], becomes[pool] = nn.Conv2dReLUMaxPool2d, nn.FusedMaxPool2d
                pools[first] = pool
        elif was_fused:
            becomes[first], becomes[relu] = plain, _own_relu(relu)
        elif type(relu) is nn.FusedReLU:  # the first one was replaced
            becomes[relu] = _own_relu(relu)
        if type(pool) is nn.FusedMaxPool2d and first not in pools:
            becomes[pool] = nn.MaxPool2d
    for sequential in model.modules():
        if type(sequential) in _SEQUENTIALS:
            stacks = fuse and _has_stack(sequential, becomes)
            becomes[sequential] = nn.Sequential if stacks else torch.nn.Sequential
    return pools


def _plan_forwards(model, fuse, becomes, left):
    """Adds to `becomes` which modules get a forward with its ReLUs fused, or their own again."""
    for m in model.modules():
        if m not in becomes and "forward" not in m.__dict__:
            becomes[m], reason = _forward.base_of(type(m)), None
            if fuse:
                becomes[m], reason = _forward.fused(m, becomes)
            if reason:
                left.setdefault(m, reason)


def _has_stack(sequential, becomes):
    """Whether linear layers with a ReLU in between stand in a Sequential."""
    modules = list(sequential._modules.values())

    def kind(m):
        return becomes.get(m, type(m))

    return any(len(nn.find_mlp(modules, i, kind)[0]) > 1 for i in range(len(modules)))


def _is_one_op(pool):
    return not pool.return_indices and functional._are_2x2(*_window(pool))


def _window(pool):
    return pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode


def _has_hooks(m):
    return bool(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    )


def _own_relu(fused):
    """The class of a ReLU that is no longer fused."""
    return torch.nn.ReLU if fused.inplace else nn.ReLU


def _neighbours(model):
    """(sequential, module, the next, the one after that or None) in every nn.Sequential."""
    for m in model.modules():
        if isinstance(m, torch.nn.Sequential):
            children = [child for child in m._modules.values() if child is not None]
            for three in zip(children, children[1:], [*children[2:], None]):
                yield m, *three


def _class_name(cls):
    module = "torch.nn" if cls.__module__.startswith("torch.nn.modules.") else cls.__module__
    return f"{module}.{cls.__qualname__}" + vars(cls).get("_dlkernels_text", "")


def _apply(verb, model, becomes, left, pools):
    report = Report(verb, [], [])
    for name, m in model.named_modules():
        cls = becomes.get(m, type(m))
        if cls is not type(m):
            report.changed.append(Changed(name, _class_name(type(m)), _class_name(cls)))
            if type(m) is nn.Conv2dReLUMaxPool2d:
                del m._pool
            m.__class__ = cls
        elif m in left:
            report.left.append(Left(name, _class_name(type(m)), left[m]))
    for conv, pool in pools.items():
        conv._pool = _window(pool)
    return report
