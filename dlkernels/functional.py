"""The ops of :mod:`torch.nn.functional` on our kernels: same names, argument order and defaults.

Every function here gives what PyTorch's gives: values, gradients, dtype, shape, strides and
exceptions. Dense float32 tensors on the CPU run on our kernels; so do bfloat16 and float16, in
linear layers and convolutions there and in all of these ops on CUDA (:func:`dlkernels.info` has the
table). What has no kernel (other dtypes and devices, tensor subclasses, ``torch.func``, double
backward) runs on PyTorch's own ops. :func:`dlkernels.stats` counts both.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter, _reduction
from torch.optim.adam import adam

from . import _C, _state

_direct = SimpleNamespace(
    **{
        op: _C.direct(getattr(torch.ops.dlkernels, op).default)
        for op in (
            "linear",
            "linear_relu",
            "mlp",
            "relu",
            "leaky_relu",
            "conv2d",
            "conv2d_relu",
            "conv2d_relu_max_pool2d",
            "max_pool2d",
            "max_pool2d_with_indices",
            "cross_entropy",
        )
    }
)


def _ops():
    """Our ops, without the detour of torch.ops except where torch.compile must see them."""
    return torch.ops.dlkernels if torch.compiler.is_compiling() else _direct


# Exact types: a subclass may mean anything by an op, so PyTorch's own dispatch decides about it.
_PLAIN = {Tensor, Parameter}

_INT = {int, torch.SymInt}  # no bool


def _ours(*tensors):
    """Whether our op is asked at all; it decides itself whether it has a kernel."""
    for t in tensors:
        # Fake and functional tensors stand for plain ones while torch traces. Told by name: to
        # import their classes is slow, and warns where there is no NumPy. ONNX knows PyTorch's ops.
        if type(t) not in _PLAIN and (
            not type(t).__module__.startswith("torch._subclasses.")
            or torch.onnx.is_in_onnx_export()
        ):
            return False
    return _state.enabled or _state.enabled_here()


def _torch(op, f, *args, **kwargs):
    """PyTorch's own function, counted as such."""
    if not torch.compiler.is_compiling() and (_state.enabled or _state.enabled_here()):
        _C.torch_ran(op)
    return f(*args, **kwargs)


def _is_int(x):
    """An int of 64 bits."""
    return type(x) in _INT and -(2**63) <= x < 2**63


def _pair(x):
    """(h, w) of what PyTorch takes in two dimensions: an int, or one or two of them. Else None."""
    if not isinstance(x, (tuple, list)):
        return (x, x) if _is_int(x) else None
    is_pair = len(x) in (1, 2) and _is_int(x[0]) and _is_int(x[-1])
    return (x[0], x[-1]) if is_pair else None


def _pool_stride(stride, kernel_size):
    """None and, as PyTorch has it, no numbers at all mean kernel_size."""
    is_default = stride is None or (isinstance(stride, tuple | list) and len(stride) == 0)
    return kernel_size if is_default else stride


def linear(input, weight, bias=None, *, out=None):
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
        return _torch("linear", F.linear, input, weight, bias, out=out)
    if _ours(input, weight, weight if bias is None else bias):
        return _ops().linear(input, weight, bias)
    return _torch("linear", F.linear, input, weight, bias)


def linear_relu(input, weight, bias=None):
    """``relu(linear(input, weight, bias))`` in one pass, both ways: see :func:`linear`."""
    if _ours(input, weight, weight if bias is None else bias):
        return _ops().linear_relu(input, weight, bias)
    return _torch("linear_relu", _linear_relu_torch, input, weight, bias)


def mlp(input, weights, biases=None):
    """Linear layers with a ReLU between every two, none after the last, as one op and one node of
    the graph: the same values as :func:`linear_relu` on each but the last and :func:`linear` on it.

    Args:
        input: (..., K)
        weights: matrices (N1, K), (N2, N1), ...: at least one
        biases: vectors (N1), (N2), ...: one a weight; or None

    Returns:
        (..., N) of the last weight

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not go together, no weights, or not as
            many biases.
        TypeError: where an argument is no tensor or no series of tensors.
    """
    weights, biases = list(weights), [] if biases is None else list(biases)
    if _ours(input, *weights, *biases):
        return _ops().mlp(input, weights, biases)
    return _torch("mlp", _mlp_torch, input, weights, biases)


def _mlp_torch(input, weights, biases):
    if not weights or len(biases) not in (0, len(weights)):
        raise RuntimeError(
            f"mlp: there must be weights, and no biases or one a weight, got {len(weights)} weights"
            f" and {len(biases)} biases"
        )
    for i, weight in enumerate(weights):
        input = F.linear(F.relu(input) if i else input, weight, biases[i] if biases else None)
    return input


def _linear_relu_torch(input, weight, bias=None):
    return F.relu(F.linear(input, weight, bias))


def relu(input, inplace=False):
    """``max(0, input)``, NaN kept: :func:`torch.nn.functional.relu`.

    Args:
        input: any shape
        inplace: overwrite ``input``; PyTorch's own op does that, already in a single pass
    """
    if not inplace and _ours(input):
        return _ops().relu(input)
    return _torch("relu", F.relu, input, inplace)


def leaky_relu(input, negative_slope=0.01, inplace=False):
    """``input`` where it is above 0, else ``input * negative_slope``:
    :func:`torch.nn.functional.leaky_relu`.

    Args:
        input: any shape
        negative_slope: a number
        inplace: overwrite ``input``; PyTorch's own op does that, already in a single pass
    """
    if not inplace and isinstance(negative_slope, int | float) and _ours(input):
        return _ops().leaky_relu(input, negative_slope)
    return _torch("leaky_relu", F.leaky_relu, input, negative_slope, inplace)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """2-D convolution: :func:`torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), contiguous or channels_last; the output lies likewise
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
    sizes = _conv2d_sizes(weight, stride, padding, dilation, groups, bias)
    if sizes and _ours(input, weight, weight if bias is None else bias):
        return _ops().conv2d(input, weight, bias, *sizes)
    return _torch("conv2d", F.conv2d, input, weight, bias, stride, padding, dilation, groups)


def conv2d_relu(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """``relu(conv2d(...))`` in one pass, both ways: see :func:`conv2d`."""
    args = (input, weight, bias, stride, padding, dilation, groups)
    sizes = _conv2d_sizes(weight, stride, padding, dilation, groups, bias)
    if sizes and _ours(input, weight, weight if bias is None else bias):
        return _ops().conv2d_relu(input, weight, bias, *sizes)
    return _torch("conv2d_relu", lambda *a: F.relu(F.conv2d(*a)), *args)


def _differ(weight, bias):
    """Whether bias has another dtype: PyTorch takes some of them, but only with text as padding."""
    return isinstance(bias, Tensor) and bias.dtype != getattr(weight, "dtype", None)


def _conv2d_sizes(weight, stride, padding, dilation, groups, bias=None):
    """(stride, (top, bottom, left, right), dilation, groups), or None: PyTorch is to judge them."""
    if isinstance(padding, str) and _differ(weight, bias):
        return None
    stride, dilation = _pair(stride), _pair(dilation)
    if stride is None or dilation is None or not _is_int(groups):
        return None
    if isinstance(padding, str) and padding == "valid":
        edges = (0, 0, 0, 0)
    elif isinstance(padding, str) and padding == "same":
        if not isinstance(weight, Tensor) or weight.dim() != 4 or stride != (1, 1):
            return None
        if _pair(weight.shape[2:]) is None:  # tensors, where torch.jit.trace looks on
            return None
        edges = []
        for size, step in zip(weight.shape[2:], dilation):
            total = step * (size - 1)
            edges += [total // 2, total - total // 2]
    elif pair := _pair(padding):
        h, w = pair
        edges = (h, h, w, w)
    else:
        return None
    return stride, edges, dilation, groups


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
    stride = _pool_stride(stride, kernel_size)
    window = [_pair(x) for x in (kernel_size, stride, padding, dilation)]
    if None not in window and type(ceil_mode) is bool and _ours(input):
        op = _ops().max_pool2d_with_indices if return_indices else _ops().max_pool2d
        return op(input, *window, ceil_mode)
    args = input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
    return _torch("max_pool2d", F.max_pool2d, *args)


def conv2d_relu_max_pool2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    pool_kernel_size=2,
    pool_stride=None,
    pool_padding=0,
    pool_dilation=1,
    ceil_mode=False,
):
    """``max_pool2d(relu(conv2d(...)), ...)``: see :func:`conv2d` and :func:`max_pool2d`.

    One op for windows of 2x2 side by side, the default: what is pooled is then never stored, and
    backward needs neither it nor the result, but a byte for every maximum. Other windows take two
    ops.

    Args:
        input, weight, bias, stride, padding, dilation, groups: of :func:`conv2d`
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode: of
            :func:`max_pool2d`, where they have no ``pool_``

    Returns:
        (N, K, OH, OW) or (K, OH, OW)
    """
    conv = input, weight, bias, stride, padding, dilation, groups
    pool = pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode
    if not _are_2x2(*pool):
        return max_pool2d(conv2d_relu(*conv), *pool)
    sizes = _conv2d_sizes(weight, stride, padding, dilation, groups, bias)
    if sizes and _ours(input, weight, weight if bias is None else bias):
        return _ops().conv2d_relu_max_pool2d(input, weight, bias, *sizes)
    return _torch("conv2d_relu_max_pool2d", lambda: F.max_pool2d(F.relu(F.conv2d(*conv)), *pool))


def _are_2x2(kernel_size, stride, padding, dilation, ceil_mode):
    """Whether these windows are 2x2 and lie side by side."""
    stride = _pool_stride(stride, kernel_size)
    window = [_pair(x) for x in (kernel_size, stride, padding, dilation)]
    return ceil_mode is False and window == [(2, 2), (2, 2), (0, 0), (1, 1)]


def adam_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    state_steps,
    *,
    lr,
    beta1,
    beta2,
    weight_decay,
    eps,
    maximize=False,
    decoupled_weight_decay=False,
    grad_scale=None,
    found_inf=None,
):
    """One step of Adam on all tensors of a group, in place: :func:`torch._fused_adam_`, which
    counts the steps itself here. :class:`dlkernels.optim.Adam` calls it.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of tensors, alike from list to list
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
    if _ours(*params, *grads, *exp_avgs, *exp_avg_sqs, *state_steps, *scalars):
        lists = params, grads, exp_avgs, exp_avg_sqs, state_steps
        return torch.ops.dlkernels.adam_(*lists, **kwargs)
    lists = params, grads, exp_avgs, exp_avg_sqs, [], state_steps
    return _torch("adam_", adam, *lists, amsgrad=False, fused=bool(scalars), **kwargs)


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """``nll_loss(log_softmax(input), target)``: :func:`torch.nn.functional.cross_entropy`.

    The gradient is computed together with the loss, where one is wanted.

    Args:
        input: (C), (N, C) or (N, C, d1, ...): logits
        target: classes, shaped like input without C, or probabilities, shaped like input
        weight: (C) or None
        size_average, reduce: PyTorch's old way to say `reduction`
        ignore_index: a class that does not count, as if its row were not there
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
        _is_int(ignore_index)
        and isinstance(label_smoothing, int | float)
        and _ours(input, target, target if weight is None else weight)
    ):
        args = input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing
        return _ops().cross_entropy(*args)
    args = input, target, weight, None, ignore_index, None, reduction, label_smoothing
    return _torch("cross_entropy", F.cross_entropy, *args)
