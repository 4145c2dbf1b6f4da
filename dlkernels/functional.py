"""The ops of :mod:`torch.nn.functional` on our kernels: same names, argument order and defaults.

Every function here gives what PyTorch's gives: values, gradients, dtype, shape, strides and
exceptions. Where an op has no kernel for its arguments, PyTorch's own op runs:

* ``dlkernels.info()["kernels"]`` tells which op has a kernel for which device and dtype.
* Tensor subclasses, sparse tensors, ``torch.func``, forward-mode AD and double backward have none.
* On the CPU, :func:`max_pool2d` and :func:`cross_entropy` have none under autocast.

:func:`dlkernels.stats` counts both.
"""

from collections.abc import Iterable
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.optim.adam import adam

from ._dispatch import (
    IntOrPair,
    aten,
    conv2d_relu_aten,
    conv2d_relu_max_pool2d_aten,
    conv2d_sizes,
    is_2x2,
    is_eligible,
    is_int,
    linear_relu_aten,
    mlp_aten,
    ops,
    or_kernel_size,
    pair,
)

__all__ = [
    "adam_",
    "conv2d",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "cross_entropy",
    "leaky_relu",
    "linear",
    "linear_relu",
    "max_pool2d",
    "mlp",
    "relu",
]


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``input @ weight.T + bias``: :func:`torch.nn.functional.linear`.

    Args:
        input: (..., K)
        weight: (N, K)
        bias: (N) or None
        out: a tensor for the result, which PyTorch's own op then writes

    Returns:
        (..., N)

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not go together.
        TypeError: where an argument is no tensor.
    """
    if out is not None:
        return aten("linear", F.linear, input, weight, bias, out=out)
    if is_eligible(input, weight, weight if bias is None else bias):
        return ops().linear(input, weight, bias)
    return aten("linear", F.linear, input, weight, bias)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(linear(input, weight, bias))`` in one pass, both ways: see :func:`linear`."""
    if is_eligible(input, weight, weight if bias is None else bias):
        return ops().linear_relu(input, weight, bias)
    return aten("linear_relu", linear_relu_aten, input, weight, bias)


def mlp(input: Tensor, weights: Iterable[Tensor], biases: Iterable[Tensor] | None = None) -> Tensor:
    """Linear layers with a ReLU between every two and none after the last, as one op.

    The values are those of :func:`linear_relu` on each layer but the last, and of :func:`linear` on
    the last. The autograd graph has one node.

    Args:
        input: (..., K)
        weights: matrices (N1, K), (N2, N1), ...: at least one
        biases: vectors (N1), (N2), ...: one a weight; or None

    Returns:
        (..., N) of the last weight

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not go together, no weights, or not as
            many biases.
        TypeError: where an argument is no tensor or no iterable of tensors.
    """
    weights, biases = list(weights), [] if biases is None else list(biases)
    if is_eligible(input, *weights, *biases):
        return ops().mlp(input, weights, biases)
    return aten("mlp", mlp_aten, input, weights, biases)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``max(0, input)``, NaN kept: :func:`torch.nn.functional.relu`.

    Args:
        input: any shape
        inplace: overwrite ``input``; PyTorch's own op does that, already in a single pass
    """
    if not inplace and is_eligible(input):
        return ops().relu(input)
    return aten("relu", F.relu, input, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``input`` where it is above 0, else ``input * negative_slope``:
    :func:`torch.nn.functional.leaky_relu`.

    Args:
        input: any shape
        negative_slope: a number
        inplace: overwrite ``input``; PyTorch's own op does that, already in a single pass
    """
    is_number = isinstance(negative_slope, float) or is_int(negative_slope)
    if not inplace and is_number and is_eligible(input):
        return ops().leaky_relu(input, negative_slope)
    return aten("leaky_relu", F.leaky_relu, input, negative_slope, inplace)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: str | IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution: :func:`torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), contiguous or channels_last; so is the result
        weight: (K, C / groups, KH, KW)
        bias: (K) or None
        stride, dilation: one number or (h, w)
        padding: one number, (h, w), ``"valid"`` or ``"same"``

    Returns:
        (N, K, OH, OW) or (K, OH, OW)

    Raises:
        RuntimeError: for shapes, values, dtypes or devices that do not go together.
        TypeError: where an argument is of no fitting Python type.
    """
    sizes = conv2d_sizes(weight, stride, padding, dilation, groups, bias)
    if sizes and is_eligible(input, weight, weight if bias is None else bias):
        return ops().conv2d(input, weight, bias, *sizes)
    return aten("conv2d", F.conv2d, input, weight, bias, stride, padding, dilation, groups)


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: str | IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(...))`` in one pass, both ways: see :func:`conv2d`."""
    args = (input, weight, bias, stride, padding, dilation, groups)
    sizes = conv2d_sizes(weight, stride, padding, dilation, groups, bias)
    if sizes and is_eligible(input, weight, weight if bias is None else bias):
        return ops().conv2d_relu(input, weight, bias, *sizes)
    return aten("conv2d_relu", conv2d_relu_aten, *args)


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: Literal[False] = False,
) -> Tensor: ...
@overload
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    *,
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The maximum of every window: :func:`torch.nn.functional.max_pool2d`.

    Padding counts as ``-inf``, NaN as the greatest of all. Dilation makes windows without any
    element possible: such a window gives ``-inf``, index -1 and no gradient. (PyTorch writes
    outside of its tensors there.) Windows of more than 255 elements run on PyTorch's own op.

    Args:
        input: (N, C, H, W) or (C, H, W), contiguous or channels_last; so is the result
        kernel_size, stride, padding, dilation: an int, or one for H and one for W

    Returns:
        (N, C, OH, OW) or (C, OH, OW); with ``return_indices`` also ``h * W + w`` of every maximum

    Raises:
        RuntimeError: for sizes and values that do not go together.
        TypeError: where an argument is of another type.
    """
    stride = or_kernel_size(stride, kernel_size)
    window = [pair(x) for x in (kernel_size, stride, padding, dilation)]
    if None not in window and type(ceil_mode) is bool and is_eligible(input):
        op = ops().max_pool2d_with_indices if return_indices else ops().max_pool2d
        return op(input, *window, ceil_mode)
    args = input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
    return aten("max_pool2d", F.max_pool2d, *args)


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: str | IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    pool_kernel_size: IntOrPair = 2,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    pool_dilation: IntOrPair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``max_pool2d(relu(conv2d(...)), ...)``: see :func:`conv2d` and :func:`max_pool2d`.

    Windows of 2x2 that do not overlap, the default, are one op. The result of the convolution is
    then never stored; backward needs one byte for every maximum instead. Other windows are two ops:
    :func:`conv2d_relu` and :func:`max_pool2d`.

    Args:
        input, weight, bias, stride, padding, dilation, groups: of :func:`conv2d`
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode: of
            :func:`max_pool2d`, where they have no ``pool_``

    Returns:
        (N, K, OH, OW) or (K, OH, OW)
    """
    conv = input, weight, bias, stride, padding, dilation, groups
    pool = pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode
    if not is_2x2(*pool):
        return max_pool2d(conv2d_relu(*conv), *pool)
    sizes = conv2d_sizes(weight, stride, padding, dilation, groups, bias)
    if sizes and is_eligible(input, weight, weight if bias is None else bias):
        return ops().conv2d_relu_max_pool2d(input, weight, bias, *sizes)
    return aten("conv2d_relu_max_pool2d", conv2d_relu_max_pool2d_aten, conv, pool)


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of Adam on all tensors of a group, in place: :func:`torch._fused_adam_`, but it also
    adds 1 to each of `state_steps`.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of one length; the tensors at one index have one
            shape and one dtype
        state_steps: as many tensors of one element
        decoupled_weight_decay: AdamW's, instead of adding it to the gradients
        grad_scale: the gradients are divided by it, in place
        found_inf: where it is not 0, nothing is changed

    Raises:
        RuntimeError: for lists, shapes, dtypes or devices that do not go together.
    """
    kwargs = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": weight_decay,
        "eps": eps,
        "maximize": maximize,
        "decoupled_weight_decay": decoupled_weight_decay,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
    }
    scalars = [t for t in (grad_scale, found_inf) if t is not None]
    if is_eligible(*params, *grads, *exp_avgs, *exp_avg_sqs, *state_steps, *scalars):
        lists = params, grads, exp_avgs, exp_avg_sqs, state_steps
        return torch.ops.dlkernels.adam_(*lists, **kwargs)
    no_maximum: list[Tensor] = []  # amsgrad's
    moments = exp_avgs, exp_avg_sqs, no_maximum
    kwargs |= {"amsgrad": False, "fused": bool(scalars)}
    return aten("adam_", adam, params, grads, *moments, state_steps, **kwargs)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``nll_loss(log_softmax(input), target)``: :func:`torch.nn.functional.cross_entropy`.

    The gradient is computed together with the loss, where one is wanted.

    Args:
        input: (C), (N, C) or (N, C, d1, ...): logits
        target: classes, shaped like input without C, or probabilities, shaped like input
        weight: (C) or None
        size_average, reduce: PyTorch's old way to say `reduction`
        ignore_index: a class whose rows do not count
        reduction: "none", "mean" or "sum"
        label_smoothing: from 0 to 1

    Returns:
        A scalar; with "none", a loss for every target.

    Raises:
        IndexError: for a target that is no class.
        ValueError: for batch sizes that differ and unknown reductions.
        RuntimeError: for other shapes, dtypes or values that do not go together.
        TypeError: where an argument is of another type.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if (
        is_int(ignore_index)
        and isinstance(label_smoothing, int | float)
        and is_eligible(input, target, target if weight is None else weight)
    ):
        args = input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing
        return ops().cross_entropy(*args)
    numbers = None, ignore_index, None, reduction, label_smoothing
    return aten("cross_entropy", F.cross_entropy, input, target, weight, *numbers)
