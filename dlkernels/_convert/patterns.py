"""Which modules in a row run as one op: a table, and the matcher that reads it at each call.

A row is a list of steps, each applied to the result of the one before: a module, or in a rewritten
forward also a function with its other arguments. Nothing is remembered from one call to the next.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .. import functional
from .classes import METHODS, TORCHS

_MODULE_CALL = nn.Module.__call__


# ---- the ops: f(steps, input) ---------------------------------------------------------------


def linear_relu(steps, input):
    return functional.linear_relu(input, *_weight_and_bias(steps[0]))


def mlp(steps, input):
    layers = [_weight_and_bias(m) for m in steps[::2]]
    weights, biases = [w for w, _ in layers], [b for _, b in layers if b is not None]
    if len(biases) in (0, len(weights)):
        return functional.mlp(input, weights, biases)
    for layer in layers[:-1]:
        input = functional.linear_relu(input, *layer)
    return functional.linear(input, *layers[-1])


def conv2d_relu(steps, input):
    return steps[0]._convolve(functional.conv2d_relu, input, *_weight_and_bias(steps[0]))


def conv2d_relu_max_pool2d(steps, input):
    conv, _, pool = steps
    op = functional.conv2d_relu_max_pool2d
    return conv._convolve(op, input, *_weight_and_bias(conv), *pool_window(pool))


# ``...`` repeats what stands before it.
PATTERNS = {
    (nn.Linear, nn.ReLU): linear_relu,
    (nn.Linear, nn.ReLU, ..., nn.Linear): mlp,
    (nn.Conv2d, nn.ReLU): conv2d_relu,
    (nn.Conv2d, nn.ReLU, nn.MaxPool2d): conv2d_relu_max_pool2d,
}

# What stands in a forward in place of a module, or as a method of a tensor.
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
POOLS = (F.max_pool2d, torch.max_pool2d)
METHOD_RELUS = {"relu": torch.Tensor.relu, "relu_": torch.Tensor.relu_}

# The arguments of a max-pool, and what they are by default.
_WINDOW = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}


class _Node:
    """The patterns as a tree: `after` is {kind: node}. Where a pattern ends, `op` runs its first
    `length` steps, or where that is None all of them."""

    def __init__(self, after=(), op=None, length=None):
        self.after, self.op, self.length = dict(after), op, length


def _tree(patterns):
    root = _Node()
    for kinds, op in patterns.items():
        path = [root]
        for kind in kinds:
            if kind is not ...:
                path.append(path[-1].after.setdefault(kind, _Node()))
        node = path[-1]
        node.op, node.length = op, len(path) - 1
        if ... in kinds:  # a, b, ..., a: after one more b, which is left, an a comes back here
            a, b = kinds[:2]
            node.length = None
            node.after[b] = _Node({a: node}, path[2].op, path[2].length)
    return root


_TREE = _tree(PATTERNS)


def find(steps, begin):
    """The op of the longest pattern that steps[begin:] starts with, and where that ends; or None
    and the next step."""
    node, op, end = _TREE, None, begin + 1
    for i in range(begin, len(steps)):
        node = node.after.get(kind_of(steps[i]))
        if node is None:
            break
        if node.op:
            op, end = node.op, begin + node.length if node.length else i + 1
    return op, end


def may_fuse(input):
    """Whether modules may be passed over for this input: it is a plain tensor, and nobody watches
    the calls of all modules."""
    return (
        functional._ours(input)
        and not _has_any_global_hook()
        and nn.Module.__call__ is _MODULE_CALL
    )


def kind_of(step):
    """PyTorch's class whose forward a step computes, if it is a module of ours that nobody watches
    or has changed, or a function; else None."""
    methods = METHODS.get(type(step))
    if methods is None:
        return _kind_of_function(*step) if type(step) is tuple else None
    state = step.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_conv_forward" in state
        or "_call_impl" in state
        or "_compiled_call_impl" in state
        or state.get("return_indices")
    ):
        return None
    for cls, name, function in methods:
        if getattr(cls, name) is not function:
            return None
    return TORCHS[type(step)]


def _kind_of_function(f, args, kwargs):
    if isinstance(f, nn.Module):
        return None if args or kwargs else kind_of(f)
    if isinstance(f, str):
        return nn.ReLU if getattr(torch.Tensor, f) is METHOD_RELUS[f] else None
    if any(f is relu for relu in RELUS):
        return nn.ReLU
    if any(f is pool for pool in POOLS) and _window_of_arguments(args, kwargs):
        return nn.MaxPool2d
    return None


def pool_window(pool):
    """The arguments of a max-pool from kernel_size to ceil_mode."""
    if isinstance(pool, tuple):
        f, args, kwargs = pool
        if not isinstance(f, nn.Module):
            return _window_of_arguments(args, kwargs)
        pool = f
    return pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode


def _window_of_arguments(args, kwargs):
    """pool_window() of a function's arguments; None where they say more, or do not fit."""
    given = {**dict(zip(_WINDOW, args)), **kwargs}
    fits = len(given) == len(args) + len(kwargs) and given.keys() <= _WINDOW.keys()
    if not fits or "kernel_size" not in given:
        return None
    return tuple({**_WINDOW, **given}.values())


def _weight_and_bias(m):
    parameters = m._parameters
    if "weight" in parameters and "bias" in parameters:  # or m.weight, which takes longer
        return parameters["weight"], parameters["bias"]
    return m.weight, m.bias
