"""conv2d and max_pool2d from their definitions, with torch's indexing: for arguments on which
PyTorch's own kernels write outside of their tensors."""

from itertools import product
from math import inf

import torch
from torch._prims_common import suggest_memory_format


def pair(x):
    return (x, x) if isinstance(x, int) else (x[0], x[-1])


def taps(size, out, taps, stride, padding, dilation):
    """(out, taps): which input each tap of each output is, and whether there is one."""
    at = torch.arange(out)[:, None] * stride - padding + torch.arange(taps) * dilation
    return at.clamp(0, size - 1), (at >= 0) & (at < size)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """:func:`torch.nn.functional.conv2d` of valid arguments. A tap outside is none: PyTorch's own
    multiplies it by 0 in some of its algorithms, which NaN and infinity bring up."""
    x = input if input.dim() == 4 else input[None]
    plane, (K, c, *window) = x.shape[2:], weight.shape
    edges = pair(padding)
    stride, dilation = pair(stride), pair(dilation)
    axes = []
    for i in (0, 1):
        out = (plane[i] + 2 * edges[i] - dilation[i] * (window[i] - 1) - 1) // stride[i] + 1
        axes.append(taps(plane[i], out, window[i], stride[i], edges[i], dilation[i]))
    (h, h_inside), (w, w_inside) = axes
    x = x.unflatten(1, (groups, c))
    filters = weight.unflatten(0, (groups, K // groups))
    y = x.new_zeros(len(x), groups, K // groups, len(h), len(w))
    for kh, kw in product(*map(range, window)):
        rows, cols = h_inside[:, kh].nonzero(), w_inside[:, kw].nonzero()[:, 0]
        at = x[..., h[rows, kh], w[cols, kw]]
        y[..., rows, cols] += torch.einsum("ngchw,gkc->ngkhw", at, filters[..., kh, kw])
    y = y.flatten(1, 2)
    if bias is not None:
        y = y + bias[:, None, None]
    last = torch.channels_last in (suggest_memory_format(x_) for x_ in (input, weight))
    y = y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return y if input.dim() == 4 else y[0]


def pool_size(size, kernel, stride, padding, dilation, ceil_mode):
    """Windows along one axis."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """:func:`torch.nn.functional.max_pool2d` of valid arguments; -inf where a window is empty."""
    kernel, padding, dilation = pair(kernel_size), pair(padding), pair(dilation)
    stride = kernel if stride in (None, []) else pair(stride)
    (h, h_inside), (w, w_inside) = (
        taps(
            input.shape[i - 2],
            pool_size(input.shape[i - 2], kernel[i], stride[i], padding[i], dilation[i], ceil_mode),
            kernel[i],
            stride[i],
            padding[i],
            dilation[i],
        )
        for i in (0, 1)
    )
    inside = (h_inside[:, :, None, None] & w_inside).transpose(1, 2).flatten(2)
    at = (h[:, :, None, None] * input.shape[-1] + w).transpose(1, 2).flatten(2)  # (OH, OW, taps)
    x = torch.where(inside, input.flatten(-2)[..., at], -inf)
    with torch.no_grad():  # the first maximum, or the last NaN
        order = torch.arange(x.shape[-1])
        maximal = (x == x.amax(-1, keepdim=True)) & inside
        first = torch.where(maximal, order, x.shape[-1]).amin(-1)
        last_nan = torch.where(x.isnan() & inside, order, -1).amax(-1)
        chosen = torch.where(last_nan >= 0, last_nan, first).clamp_max(x.shape[-1] - 1)
    y = x.gather(-1, chosen[..., None])[..., 0]
    return y.contiguous(memory_format=suggest_memory_format(input))
