"""What stands between :mod:`dlkernels.functional` and the ops: which calls reach an op of ours.

A call reaches one if its tensors are eligible and its other arguments have the types of the op's
schema. The op itself then asks for a kernel by dtype, device and layout (csrc/ops). Every other
call is PyTorch's own function, which also raises the errors.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from . import _C, _state

IntOrPair = int | Sequence[int]  # one number, or (h, w); PyTorch takes (n,) as well
T = TypeVar("T")

# Those of the optimizers, in-place ops, are called by optim_step.
direct = SimpleNamespace(
    **{
        op: _C.direct(getattr(torch.ops.dlkernels, op).default)
        for op in _C.ops()
        if not op.endswith("_")
    }
)


def ops() -> Any:
    """Our ops, without the detour of torch.ops except where torch.compile must see them."""
    return torch.ops.dlkernels if torch.compiler.is_compiling() else direct


# Exact types: a subclass may mean anything by an op, so PyTorch's own dispatch decides about it.
_PLAIN = {Tensor, Parameter}

_INT = {int, torch.SymInt}  # no bool


def is_eligible(*tensors: object) -> bool:
    """Whether our op is asked at all: dlkernels is enabled and each of these is a plain tensor.
    The op decides itself whether it has a kernel."""
    for t in tensors:
        # Fake and functional tensors stand for plain ones while torch traces. Told by name: to
        # import their classes is slow, and warns where there is no NumPy. ONNX knows PyTorch's ops.
        if type(t) not in _PLAIN and (
            not type(t).__module__.startswith("torch._subclasses.")
            or torch.onnx.is_in_onnx_export()
        ):
            return False
    return _state.enabled or _state.enabled_here()


def aten(op: str, f: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``f(*args, **kwargs)``, PyTorch's own function, counted as a call of `op`."""
    if not torch.compiler.is_compiling() and (_state.enabled or _state.enabled_here()):
        _C.torch_ran(op)
    return f(*args, **kwargs)


def linear_relu_aten(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


def mlp_aten(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    if not weights or len(biases) not in (0, len(weights)):
        raise RuntimeError(
            f"mlp: there must be weights, and no biases or one a weight, got {len(weights)} weights"
            f" and {len(biases)} biases"
        )
    for i, weight in enumerate(weights):
        input = F.linear(F.relu(input) if i else input, weight, biases[i] if biases else None)
    return input


def conv2d_relu_aten(*conv: Any) -> Tensor:
    return F.relu(F.conv2d(*conv))


def conv2d_relu_max_pool2d_aten(conv: tuple[Any, ...], pool: tuple[Any, ...]) -> Tensor:
    return F.max_pool2d(conv2d_relu_aten(*conv), *pool)


# ---- arguments, as the ops take them ----------------------------------------------------------


def is_int(x: object) -> bool:
    """Whether this is an int of 64 bits."""
    return type(x) in _INT and -(2**63) <= x < 2**63  # type: ignore[operator]


def pair(x: Any) -> tuple[int, int] | None:
    """(h, w) of what PyTorch takes in two dimensions: an int, or one or two of them. Else None."""
    if not isinstance(x, (tuple, list)):
        return (x, x) if is_int(x) else None
    is_pair = len(x) in (1, 2) and is_int(x[0]) and is_int(x[-1])
    return (x[0], x[-1]) if is_pair else None


def or_kernel_size(stride: T, kernel_size: T) -> T:
    """The stride of a pool: `kernel_size` for None and, as in PyTorch, for an empty tuple."""
    is_default = stride is None or (isinstance(stride, tuple | list) and len(stride) == 0)
    return kernel_size if is_default else stride


def is_2x2(kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: object) -> bool:
    """Whether a pool has windows of 2x2 that do not overlap, without padding."""
    stride = or_kernel_size(stride, kernel_size)
    window = [pair(x) for x in (kernel_size, stride, padding, dilation)]
    return ceil_mode is False and window == [(2, 2), (2, 2), (0, 0), (1, 1)]


def conv2d_sizes(
    weight: Any, stride: Any, padding: Any, dilation: Any, groups: Any, bias: Any = None
) -> tuple[tuple[int, int], Sequence[int], tuple[int, int], int] | None:
    """(stride, (top, bottom, left, right), dilation, groups); None for what PyTorch must judge."""
    if isinstance(padding, str) and _dtypes_differ(weight, bias):
        return None
    stride, dilation = pair(stride), pair(dilation)
    if stride is None or dilation is None or not is_int(groups):
        return None
    edges: tuple[int, ...] | list[int]
    if isinstance(padding, str) and padding == "valid":
        edges = (0, 0, 0, 0)
    elif isinstance(padding, str) and padding == "same":
        if not isinstance(weight, Tensor) or weight.dim() != 4 or stride != (1, 1):
            return None
        if pair(weight.shape[2:]) is None:  # tensors, where torch.jit.trace looks on
            return None
        edges = []
        for size, step in zip(weight.shape[2:], dilation):
            total = step * (size - 1)
            edges += [total // 2, total - total // 2]
    elif both := pair(padding):
        h, w = both
        edges = (h, h, w, w)
    else:
        return None
    return stride, edges, dilation, groups


def _dtypes_differ(weight: object, bias: object) -> bool:
    """Whether bias has another dtype: PyTorch takes some of them, but only with text as padding."""
    return isinstance(bias, Tensor) and bias.dtype != getattr(weight, "dtype", None)
