"""Classes that replace PyTorch's, and methods that replace other people's.

A replacement runs while the method that it replaces is what it was. So a new forward set on
``torch.nn.Linear``, or on a user's own class, reaches the modules that were converted before.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.fx import Proxy

Module = type[torch.nn.Module]
Methods = tuple[tuple[type, str, object], ...]  # (class, name, function)
C = TypeVar("C", bound=Module)
F = TypeVar("F", bound=Callable[..., Any])

REPLACEMENTS: dict[Module, Module] = {}  # {a class of torch.nn: the one that replaces it}
ORIGINALS: dict[Module, Module] = {}  # {one of our classes: the class of torch.nn}
# {one of our classes: (the class of torch.nn, methods, whether it has weight and bias)}: while all
# of these methods are what they were, both classes compute the same.
KNOWN: dict[Module, tuple[Module, Methods, bool]] = {}


def are_unchanged(methods: Methods) -> bool:
    """Whether each (class, name, function) is what it was."""
    return all(getattr(cls, name) is function for cls, name, function in methods)


def in_place_of(cls: type, name: str, replacement: F) -> F:
    """`replacement`; or the method `name` of `cls`, where that was changed since."""
    was = getattr(cls, name)
    code = was.__code__

    @functools.wraps(replacement)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = getattr(cls, name)
        if now is was and now.__code__ is code:
            return replacement(self, *args, **kwargs)
        return now(self, *args, **kwargs)

    return cast(F, method)


def replaces(original: Module) -> Callable[[C], C]:
    """Decorates a subclass of `original`, a class of torch.nn, that computes the same: convert()
    replaces `original` by it."""

    def register(replacement: C) -> C:
        names = [name for name in ("forward", "_conv_forward") if name in vars(replacement)]
        for name in names:
            setattr(replacement, name, in_place_of(original, name, vars(replacement)[name]))
        REPLACEMENTS[original], ORIGINALS[replacement] = replacement, original
        methods = tuple((cls, n, getattr(cls, n)) for n in names for cls in (original, replacement))
        is_layer = issubclass(original, (torch.nn.Linear, torch.nn.Conv2d))
        KNOWN[replacement] = original, methods, is_layer
        return replacement

    return register


def is_leaf_in_fx(forward: F) -> F:
    """Decorates a forward: torch.fx traces it as one node, where it would do so with PyTorch's.

    Its rule, ``Tracer.is_leaf_module``, knows PyTorch's classes alone: it is asked about a module
    of PyTorch's class with the same state.
    """

    @functools.wraps(forward)
    def leaf(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Proxy):
            tracer: Any = input.tracer
            cls: Any = next(c for c in type(self).__mro__ if c.__module__.startswith("torch.nn"))
            twin, path = cls.__new__(cls), tracer.path_of_module(self)
            object.__setattr__(twin, "__dict__", self.__dict__)
            if tracer.is_leaf_module(twin, path):
                return tracer.create_proxy("call_module", path, (input, *args), kwargs)
            if type(self) in ORIGINALS:
                return cls.forward(twin, input, *args, **kwargs)
        return forward(self, input, *args, **kwargs)

    return cast(F, leaf)
