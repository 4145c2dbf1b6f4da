"""Which modules in a row run as one op: a table, and the matcher that reads it at each call.

A row is a list of steps, each applied to the result of the one before. A step is a module or, where
a forward calls a function, (the class of torch.nn that computes the same, its other arguments).
Nothing is remembered from one call to the next.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as _module

from .. import _C, functional
from .._dispatch import is_eligible
from .classes import KNOWN, are_unchanged

# ---- the ops: of the input, the steps, and the weights and biases of those that have some -----


def linear_relu(input, steps, weights, biases):
    return functional.linear_relu(input, *weights, *biases)


def mlp(input, steps, weights, biases):
    if len(biases) in (0, len(weights)):  # what one op takes
        return functional.mlp(input, weights, biases)
    *hidden, last = steps[::2]
    for layer in hidden:
        input = functional.linear_relu(input, layer.weight, layer.bias)
    return functional.linear(input, last.weight, last.bias)


def conv2d_relu(input, steps, weights, biases):
    (bias,) = biases or (None,)
    return steps[0]._convolve(functional.conv2d_relu, input, *weights, bias)


def conv2d_relu_max_pool2d(input, steps, weights, biases):
    (bias,) = biases or (None,)
    op = functional.conv2d_relu_max_pool2d
    return steps[0]._convolve(op, input, *weights, bias, *_window(steps[2]))


# ``...`` repeats the two kinds that stand before it.
PATTERNS = {
    (nn.Linear, nn.ReLU): linear_relu,
    (nn.Linear, nn.ReLU, ..., nn.Linear): mlp,
    (nn.Conv2d, nn.ReLU): conv2d_relu,
    (nn.Conv2d, nn.ReLU, nn.MaxPool2d): conv2d_relu_max_pool2d,
}


def _tree(patterns):
    """{kind: the tree after it}; where a pattern ends, "run" is its op and the number of steps, or
    None for all that led there."""
    root = {}
    for kinds, op in patterns.items():
        path = [root]
        for kind in kinds:
            if kind is not ...:
                path.append(path[-1].setdefault(kind, {}))
        path[-1]["run"] = op, None if ... in kinds else len(kinds)
        if ... in kinds:  # a, b, ..., a: a row that goes on with b and no a runs as a, b
            a, b = kinds[:2]
            path[-1][b] = {a: path[-1], "run": path[2]["run"]}
    return root


_TREE = _tree(PATTERNS)
_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)
_GLOBAL_METHODS = tuple((nn.Module, n, getattr(nn.Module, n)) for n in ("__call__", "_call_impl"))


# ---- the matcher ----------------------------------------------------------------------------


def match(steps, begin):
    """The op of the longest pattern that steps[begin:] starts with, and where that ends; else None
    and the next step."""
    node, op, end = _TREE, None, begin + 1
    for i in range(begin, len(steps)):
        node = node.get(_kind_of(steps[i]))
        if node is None:
            break
        if "run" in node:
            op, length = node["run"]
            end = begin + length if length else i + 1
    return op, end


def _kind_of(step):
    """PyTorch's class whose forward a step computes; None for a module that is not exactly ours, or
    that somebody watches or has changed."""
    if isinstance(step, tuple):
        return step[0]
    if type(step) not in KNOWN:
        return None
    kind, methods, is_layer = KNOWN[type(step)]
    state = step.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or state.get("return_indices")
        or "forward" in state
        or "_conv_forward" in state
        or "_call_impl" in state
        or "_compiled_call_impl" in state
        or (is_layer and not _has_parameters(state["_parameters"]))
    ):
        return None
    return kind if are_unchanged(methods) else None


def _has_parameters(parameters):
    """Whether weight and bias, which may be None, are kept as usual."""
    return type(parameters) is dict and "weight" in parameters and "bias" in parameters


def find_in_python(steps, begin, input):
    """(op, end, weights, biases) to run steps[begin:end] on `input` by, with the biases that are
    not None; or None where steps[begin] is to be called, also because `input` is no plain tensor or
    all modules are watched."""
    if not is_eligible(input) or any(_GLOBAL_HOOKS):
        return None
    op, end = match(steps, begin)
    if op is None:
        return None
    layers = [m for m in steps[begin:end] if not isinstance(m, tuple) and KNOWN[type(m)][2]]
    biases = [m.bias for m in layers if m.bias is not None]
    return op, end, [m.weight for m in layers], biases


# The same in C++, which torch.compile can't look into: in Python it takes longer than a small op.
# Besides, nobody has replaced Module.__call__, which torch.export does while it traces.
find_in_cpp = _C.matcher(KNOWN, _TREE, _GLOBAL_HOOKS, _GLOBAL_METHODS)


def find():
    """The one of both to use now."""
    return find_in_python if torch.compiler.is_compiling() else find_in_cpp


# ---- what a forward calls in place of modules -----------------------------------------------

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
POOLS = (F.max_pool2d, torch.max_pool2d)
METHOD_RELUS = {"relu": torch.Tensor.relu, "relu_": torch.Tensor.relu_}  # x.relu()

# The arguments of a max-pool, and what they are by default.
_WINDOW = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}


def as_step(f, args, kwargs):
    """A module, a function, or the name of a method of tensors, as a step; None for any other."""
    if isinstance(f, nn.Module):
        return None if args or kwargs else f
    if isinstance(f, str):
        return (nn.ReLU,) if getattr(torch.Tensor, f) is METHOD_RELUS[f] else None
    if is_one_of(f, RELUS):
        return (nn.ReLU,)
    window = is_one_of(f, POOLS) and _window_of_arguments(args, kwargs)
    return (nn.MaxPool2d, window) if window else None


def is_one_of(f, functions):
    """Whether f, which may be any object, is one of these."""
    return f is functions[0] or any(f is function for function in functions)


def _window(pool):
    """The arguments of a max-pool from kernel_size to ceil_mode."""
    if isinstance(pool, tuple):
        return pool[1]
    return pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode


def _window_of_arguments(args, kwargs):
    """The same of a function's arguments; None where they say more, or do not fit."""
    given = {**dict(zip(_WINDOW, args)), **kwargs}
    fits = len(given) == len(args) + len(kwargs) and given.keys() <= _WINDOW.keys()
    return tuple({**_WINDOW, **given}.values()) if fits and "kernel_size" in given else None
