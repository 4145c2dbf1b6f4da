"""Other people's ``forward`` with ``relu(conv(x))`` in one pass, by a subclass of their class."""

import copyreg
import functools
from types import FunctionType

import torch

from . import _rewrite, functional, nn


def _chain(steps, layer, /, *args, **kwargs):
    """layer(*args, **kwargs), and then each step on the result: (function, or the name of a method,
    its other arguments, its keyword arguments). Whatever layer and steps have become since."""
    is_layer = type(layer) is nn.Linear or type(layer) is nn.Conv2d
    is_plain = len(args) == 1 and not kwargs
    if is_layer and is_plain and _is_relu(steps[0][0]) and nn.is_bare(layer):
        y, steps = _relu_of(layer, args[0], steps[1:])
    else:
        y = layer(*args, **kwargs)
    for f, args, kwargs in steps:
        y = getattr(y, f)() if isinstance(f, str) else f(y, *args, **kwargs)
    return y


def _relu_of(layer, x, steps):
    """relu(layer(x)), the next step included if it is a pool, and the steps that remain."""
    if type(layer) is nn.Linear:
        return functional.linear_relu(x, layer.weight, layer.bias), steps
    window = _window(*steps[0]) if steps else None
    if window is None:
        return layer._convolve(functional.conv2d_relu, x, layer.weight, layer.bias), steps
    conv2d = functional.conv2d_relu_max_pool2d
    return layer._convolve(conv2d, x, layer.weight, layer.bias, *window), steps[1:]


def _is_relu(f):
    if isinstance(f, torch.nn.Module):
        return type(f) in _rewrite.RELU_MODULES and nn.is_bare(f)
    return isinstance(f, str) or any(f is relu for relu in _rewrite.RELUS)


def _window(f, args, kwargs):
    """The arguments of a pool from kernel_size to ceil_mode, or None if that is not all it does."""
    if isinstance(f, torch.nn.Module):
        is_pool = type(f) in _rewrite.POOL_MODULES and not f.return_indices and nn.is_bare(f)
        return (f.kernel_size, f.stride, f.padding, f.dilation, f.ceil_mode) if is_pool else None
    if not any(f is pool for pool in _rewrite.POOLS):
        return None
    if "return_indices" in kwargs or not (len(args) in range(1, 6) or "kernel_size" in kwargs):
        return None
    return _pool_arguments(*args, **kwargs)


def _pool_arguments(kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    return kernel_size, stride, padding, dilation, ceil_mode


class _Fused(type):
    """The class of the subclasses. They exist in one process, so pickle writes their base."""


def _itself(cls):
    return cls


copyreg.pickle(_Fused, lambda cls: (_itself, (base_of(cls),)))


def base_of(cls):
    """The class that a subclass from here was made of; any other class itself."""
    return vars(cls).get("_dlkernels_base", cls)


def fused(module, becomes):
    """The class for `module` in which the ReLUs and pools after its layers are fused with them.

    Args:
        module: may be of any class
        becomes: {module: the class it is going to be of}

    Returns:
        a subclass of the module's class, or where nothing can be fused that class; and, if it calls
        PyTorch's ReLU as a function and nothing could be fused, the reason
    """
    cls = base_of(type(module))
    if cls.__module__.partition(".")[0] in ("torch", "dlkernels"):
        return cls, None
    names = {name for name, m in module._modules.items() if type(m) in _rewrite.RELU_MODULES}
    names |= {name for name, f in vars(module).items() if any(f is relu for relu in _rewrite.RELUS)}
    # Python calls these for a subclass, and they may do anything.
    has_a_say = type(cls) is not type or any(
        "__init_subclass__" in vars(c) for c in cls.__mro__[:-1]
    )
    functions, count, reason = [], 0, None
    for name, f in _functions(cls).items():
        called = _rewrite.names(f.__code__)
        if not called & {*names, *_rewrite.METHODS}:
            continue
        code, relus, why = _rewrite.rewrite(f, module, becomes)
        if relus and has_a_say:
            reason = "its class has a metaclass or __init_subclass__, which fusing would call"
        elif relus:
            functions.append((name, f, code))
            count += relus
        elif called & {*_rewrite.METHODS} - names:
            reason = why
    return (_subclass(cls, tuple(functions), count), None) if functions else (cls, reason)


def _functions(cls):
    """{name: function} of what a class and those of its bases that are not torch's define."""
    functions = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            for name, f in vars(base).items():
                functions.setdefault(name, f)
    return {n: f for n, f in functions.items() if isinstance(f, FunctionType) and n != "__init__"}


@functools.lru_cache(maxsize=256)
def _subclass(cls, functions, count):
    members = {
        "_dlkernels_base": cls,
        "_dlkernels_text": f" ({count} ReLU{'s' * (count > 1)} fused)",
        "_dlkernels_chain": staticmethod(_chain),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    for name, f, code in functions:
        cells = dict(zip(f.__code__.co_freevars, f.__closure__ or ()))
        closure = tuple(cells[variable] for variable in code.co_freevars)
        new = FunctionType(code, f.__globals__, f.__name__, f.__defaults__, closure)
        functools.update_wrapper(new, f)
        del new.__wrapped__
        new.__kwdefaults__ = f.__kwdefaults__
        members[name] = new
    return _Fused(cls.__name__, (cls,), members)
