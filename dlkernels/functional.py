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
