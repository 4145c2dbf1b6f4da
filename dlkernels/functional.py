"""The ops of :mod:`torch.nn.functional` on our kernels: same names, argument order and defaults.

Every function here gives what PyTorch's gives: values, gradients, dtype, shape, strides and
exceptions. float32 tensors on the CPU run on kernels of ours; everything else (other dtypes and
devices, tensor subclasses, autocast, ``torch.func``, double backward) runs on PyTorch's own ops.
:func:`dlkernels.stats` counts both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Parameter

from . import _C, _state

_ops = torch.ops.dlkernels

# Exact types: a subclass may mean anything by an op, so PyTorch's own dispatch decides about it.
_PLAIN = {Tensor, Parameter, FakeTensor, FunctionalTensor, type(None)}


def _ours(*tensors):
    """Whether our op is asked at all; it decides itself whether it has a kernel."""
    for t in tensors:
        if type(t) not in _PLAIN:
            return False
    return _state.enabled


def _torch(op, f, *args, **kwargs):
    """PyTorch's own function, counted as such."""
    if _state.enabled and not torch.compiler.is_compiling():
        _C.torch_ran(op)
    return f(*args, **kwargs)


def linear(input, weight, bias=None):
    """``input @ weight.T + bias``: :func:`torch.nn.functional.linear`.

    Args:
        input: (..., K)
        weight: (N, K)
        bias: (N) or None

    Returns:
        (..., N)

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not go together.
        TypeError: where an argument is no tensor.
    """
    if _ours(input, weight, bias):
        return _ops.linear.default(input, weight, bias)
    return _torch("linear", F.linear, input, weight, bias)


def linear_relu(input, weight, bias=None):
    """``relu(linear(input, weight, bias))`` in one pass, both ways: see :func:`linear`."""
    if _ours(input, weight, bias):
        return _ops.linear_relu.default(input, weight, bias)
    return _torch("linear_relu", _linear_relu_torch, input, weight, bias)


def _linear_relu_torch(input, weight, bias=None):
    return F.relu(F.linear(input, weight, bias))


def relu(input, inplace=False):
    """``max(0, input)``, NaN kept: :func:`torch.nn.functional.relu`.

    Args:
        input: any shape
        inplace: overwrite ``input``; PyTorch's own op does that, already in a single pass
    """
    if not inplace and _ours(input):
        return _ops.relu.default(input)
    return _torch("relu", F.relu, input, inplace)


def max_pool2d(
    input,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode=False,
    return_indices=False,
):
    """The maximum of every window: :func:`torch.nn.functional.max_pool2d`.

    Padding counts as ``-inf``, NaN as the greatest of all. A window without any element, which
    dilation makes possible, gives ``-inf``, index -1 and no gradient (PyTorch writes outside of its
    tensors there). Windows of more than 255 elements are left to PyTorch.

    Args:
        input: (N, C, H, W) or (C, H, W), contiguous or channels_last; so is the result
        kernel_size, stride, padding, dilation: an int, or one for H and one for W

    Returns:
        (N, C, OH, OW) or (C, OH, OW); with ``return_indices`` also ``h * W + w`` of every maximum

    Raises:
        RuntimeError: for sizes and values that do not go together.
        TypeError: where an argument is of another type.
    """
    window = kernel_size, () if stride is None else stride, padding, dilation
    if (
        input is not None
        and _ours(input)
        and type(ceil_mode) is bool
        and all(map(_is_int_pair, window))
    ):
        op = _ops.max_pool2d_with_indices if return_indices else _ops.max_pool2d
        # Lists, because torch.compile's symbolic ints are not widened to them.
        window = ([v] if type(v) is int else v for v in window)
        return op.default(input, *window, ceil_mode)
    args = input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
    return _torch("max_pool2d", F.max_pool2d, *args)


def _is_int_pair(v):
    """Whether v is an int or ints that the schema's ``int[2]`` can hold, spelled the usual way."""
    if type(v) is int:
        return -(2**63) <= v < 2**63
    return type(v) in (tuple, list) and all(type(i) is int and _is_int_pair(i) for i in v)
