"""Our classes in the place of PyTorch's, and methods of ours in the place of others'.

A method of ours runs while the method that it replaces is what it was. So a new forward set on
``torch.nn.Linear``, or on a user's own class, reaches the modules that were converted before.
"""

import functools

import torch
from torch.fx import Proxy

OURS = {}  # {a class of torch.nn: ours}
TORCHS = {}  # {our class: PyTorch's}
# {our class: (PyTorch's, methods, whether it has weight and bias)}, where methods is ((class, name,
# function), ...): while all of these are what they were, the class computes what PyTorch's does.
KNOWN = {}


def are_unchanged(methods):
    """Whether each (class, name, function) is what it was."""
    return all(getattr(cls, name) is function for cls, name, function in methods)


def in_place_of(cls, name, ours):
    """`ours`, or where the method `name` of `cls` was changed since, that one."""
    was = getattr(cls, name)
    code = was.__code__

    @functools.wraps(ours)
    def method(self, *args, **kwargs):
        now = getattr(cls, name)
        if now is was and now.__code__ is code:
            return ours(self, *args, **kwargs)
        return now(self, *args, **kwargs)

    return method


def replaces(torchs):
    """Decorates a subclass of `torchs`, a class of torch.nn, which computes the same: convert()
    puts it in that one's place."""

    def register(ours):
        names = [name for name in ("forward", "_conv_forward") if name in vars(ours)]
        for name in names:
            setattr(ours, name, in_place_of(torchs, name, vars(ours)[name]))
        OURS[torchs], TORCHS[ours] = ours, torchs
        methods = tuple((cls, n, getattr(cls, n)) for n in names for cls in (torchs, ours))
        is_layer = issubclass(torchs, (torch.nn.Linear, torch.nn.Conv2d))
        KNOWN[ours] = torchs, methods, is_layer
        return ours

    return register


def is_leaf_in_fx(forward):
    """Decorates a forward: torch.fx traces it as one node, where it would do so with PyTorch's.

    Its rule, ``Tracer.is_leaf_module``, knows PyTorch's classes alone: it is asked about a module
    of PyTorch's class with the same state.
    """

    @functools.wraps(forward)
    def leaf(self, input, *args, **kwargs):
        if isinstance(input, Proxy):
            tracer = input.tracer
            cls = next(c for c in type(self).__mro__ if c.__module__.startswith("torch.nn"))
            twin, path = cls.__new__(cls), tracer.path_of_module(self)
            object.__setattr__(twin, "__dict__", self.__dict__)
            if tracer.is_leaf_module(twin, path):
                return tracer.create_proxy("call_module", path, (input, *args), kwargs)
            if type(self) in TORCHS:
                return cls.forward(twin, input, *args, **kwargs)
        return forward(self, input, *args, **kwargs)

    return leaf
