"""Other people's ``forward`` with ``relu(conv(x))`` in one pass, by a subclass of their class."""

import copyreg
import functools
from types import FunctionType

import torch

from . import patterns, rewrite
from .classes import in_place_of
from .patterns import METHOD_RELUS, RELUS, is_one_of


def _chain(steps, layer, /, *args, **kwargs):
    """layer(*args, **kwargs), and then each step on the result: (function, or the name of a method,
    its other arguments, its keyword arguments). Whatever layer and steps have become since."""
    found = None
    if len(args) == 1 and not kwargs:
        row = [layer, *[patterns.as_step(*step) for step in steps]]
        found = patterns.find()(row, 0, args[0])
    if found:
        op, end, weights, biases = found
        y, steps = op(args[0], row[:end], weights, biases), steps[end - 1 :]
    else:
        y = layer(*args, **kwargs)
    for f, args, kwargs in steps:
        y = getattr(y, f)() if isinstance(f, str) else f(y, *args, **kwargs)
    return y


class _Fused(type):
    """The class of the subclasses. They exist in one process, so pickle writes their base. Their
    attributes are those of their base, which a method may set by ``self.__class__``."""

    def __setattr__(cls, name, value):
        base = base_of(cls)
        if base is cls or name in vars(cls):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def __delattr__(cls, name):
        base = base_of(cls)
        if base is cls or name in vars(cls):
            super().__delattr__(name)
        else:
            delattr(base, name)


def _itself(cls):
    return cls


def _reduce(cls):
    base = base_of(cls)
    return cls.__qualname__ if base is cls else (_itself, (base,))


copyreg.pickle(_Fused, _reduce)


def base_of(cls):
    """The class that a subclass from here was made of; any other class itself."""
    return vars(cls).get("_dlkernels_base", cls)


def fused(module):
    """The class for `module`, of whatever class, that runs its layers and the ReLUs and pools after
    them as one op.

    Returns:
        a subclass of the module's class, or where nothing can be fused that class; and, if it calls
        PyTorch's ReLU as a function and nothing could be fused, the reason
    """
    cls = base_of(type(module))
    methods, reason = _rewritten(cls, module)
    if methods:
        reason = _why_no_subclass(cls)
    if reason or not methods:
        return cls, reason
    return _subclass(cls, tuple((name, f, code) for name, f, code, _ in methods)), None


def chains(module):
    """What the methods of a module of such a subclass run in one call, as it is now: a list of
    (the source of each step, the steps)."""
    cls = type(module)
    if base_of(cls) is cls:
        return []
    return [
        chain
        for name, f, _, chains in _rewritten(base_of(cls), module)[0]
        if (name, f, f.__code__) in cls._dlkernels_methods
        for chain in chains
    ]


def _rewritten(cls, module):
    """[(name, function, its new code, its chains)] of the methods of cls that have any; and why
    others have none."""
    if cls.__module__.partition(".")[0] in ("torch", "dlkernels"):
        return [], None
    relus = {name for name, m in module._modules.items() if isinstance(m, torch.nn.ReLU)}
    relus |= {name for name, f in vars(module).items() if is_one_of(f, RELUS)}
    methods, reason = [], None
    for name, f in _functions(cls).items():
        used = rewrite.names(f.__code__)
        if name == "__init__" or not used & {*relus, *METHOD_RELUS}:
            continue
        code, chains, why = rewrite.rewrite(f, module)
        if chains:
            methods.append((name, f, code, chains))
        elif used & {*METHOD_RELUS} - relus:
            reason = why
    return methods, reason


def _why_no_subclass(cls):
    """Why a subclass can't pass for a class, or None."""
    # Python calls these for a subclass, and they may do anything.
    if type(cls) is not type or any("__init_subclass__" in vars(c) for c in cls.__mro__[:-1]):
        return "its class has a metaclass or __init_subclass__, which fusing would call"
    return next(filter(None, map(rewrite.uses_its_class, _functions(cls).values())), None)


def _functions(cls):
    """{name: function} of what a class and those of its bases that are not torch's define."""
    functions = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            for name, f in vars(base).items():
                functions.setdefault(name, f)
    return {name: f for name, f in functions.items() if isinstance(f, FunctionType)}


@functools.lru_cache(maxsize=256)
def _subclass(cls, methods):
    members = {
        "_dlkernels_base": cls,
        "_dlkernels_methods": [(name, f, f.__code__) for name, f, _ in methods],
        "_dlkernels_chain": staticmethod(_chain),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    if "__firstlineno__" in vars(cls):  # since Python 3.13, inspect.getsource looks for it
        members["__firstlineno__"] = cls.__firstlineno__
    for name, f, code in methods:
        cells = dict(zip(f.__code__.co_freevars, f.__closure__ or ()))
        closure = tuple(cells[variable] for variable in code.co_freevars)
        new = FunctionType(code, f.__globals__, f.__name__, f.__defaults__, closure)
        functools.update_wrapper(new, f)
        del new.__wrapped__
        new.__kwdefaults__ = f.__kwdefaults__
        members[name] = in_place_of(cls, name, new)
    return _Fused(cls.__name__, (cls,), members)
