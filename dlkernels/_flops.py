"""What torch.utils.flop_counter.FlopCounterMode counts for our ops: as for PyTorch's, products of
matrices and convolutions, 2 operations a multiply-add, and nothing else."""

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _C  # noqa: F401 (its import registers the ops)

_ops = torch.ops.dlkernels


@register_flop_formula([_ops.linear, _ops.linear_relu])
def _linear(input, weight, bias=None, *, out_shape=None):
    return 2 * prod(input) * weight[0]


@register_flop_formula(_ops.linear_backward)
def _linear_backward(grad_y, input, weight, y, output_mask, *, out_shape=None):
    products = output_mask[0] + output_mask[1]
    return products and products * 2 * prod(grad_y) * (input or weight)[-1]


@register_flop_formula([_ops.mlp, _ops.mlp_forward])
def _mlp(input, weights, biases, *, out_shape=None):
    rows = prod(input[:-1])
    return sum(2 * rows * prod(weight) for weight in weights)


@register_flop_formula(_ops.mlp_backward)
def _mlp_backward(grad_y, input, weights, hidden, grad_input, grad_biases, *, out_shape=None):
    first = 2 * prod(input) * weights[0][0]
    return 2 * _mlp(input, weights, None) - (0 if grad_input else first)


@register_flop_formula(
    [
        _ops.conv2d,
        _ops.conv2d_relu,
        _ops.conv2d_relu_max_pool2d,
        _ops.conv2d_relu_max_pool2d_forward,
    ]
)
def _conv2d(
    input,
    weight,
    bias=None,
    stride=(1, 1),
    padding=(0, 0, 0, 0),
    dilation=(1, 1),
    groups=1,
    *,
    out_shape=None,
):
    images = input[0] if len(input) == 4 else 1
    borders = padding[0] + padding[1], padding[2] + padding[3]
    sizes = zip(input[-2:], borders, dilation, weight[2:], stride)
    pixels = [(i + b - d * (k - 1) - 1) // s + 1 for i, b, d, k, s in sizes]
    return 2 * images * prod(pixels) * prod(weight)


@register_flop_formula(_ops.conv2d_backward)
def _conv2d_backward(grad_y, input, weight, y, *sizes, out_shape=None):
    return _conv2d_gradients(input, weight, *sizes)


@register_flop_formula(_ops.conv2d_relu_max_pool2d_backward)
def _conv2d_relu_max_pool2d_backward(grad_y, argmax, input, weight, *sizes, out_shape=None):
    return _conv2d_gradients(input, weight, *sizes)


def _conv2d_gradients(input, weight, stride, padding, dilation, groups, output_mask):
    # PyTorch counts a weight's gradient as if there were one group.
    times = output_mask[0] + output_mask[1] * groups
    return times * _conv2d(input, weight, None, stride, padding, dilation)
