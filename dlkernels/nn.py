"""The modules of :mod:`torch.nn` on our kernels: same constructors, state dicts and values.

Each is a subclass of PyTorch's, and only its forward differs; :func:`dlkernels.convert` turns the
modules of a model into these.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
from torch.nn.modules.module import _has_any_global_hook

from . import functional

__all__ = [
    "MLP",
    "Conv2d",
    "Conv2dReLU",
    "Conv2dReLUMaxPool2d",
    "CrossEntropyLoss",
    "Linear",
    "LinearReLU",
    "MaxPool2d",
    "ReLU",
    "Sequential",
]


class Linear(torch.nn.Linear):
    __doc__ = torch.nn.Linear.__doc__

    def forward(self, input):
        return functional.linear(input, self.weight, self.bias)


class LinearReLU(Linear):
    """``relu(linear(x))`` in one pass. Constructed as :class:`torch.nn.Linear` is."""

    def forward(self, input):
        return functional.linear_relu(input, self.weight, self.bias)


class Sequential(torch.nn.Sequential):
    """Runs linear layers and the ReLUs between them as one op; convert() puts it in the place of a
    :class:`torch.nn.Sequential` that holds such. Modules with hooks are called as ever.
    """

    def forward(self, input):
        modules, i = list(self._modules.values()), 0
        while i < len(modules):
            linears, end = find_mlp(modules, i)
            if len(linears) > 1:
                biases = [m.bias for m in linears if m.bias is not None]
                input, i = functional.mlp(input, [m.weight for m in linears], biases), end
            else:
                input, i = modules[i](input), i + 1
        return input


class MLP(Sequential):
    """Linear layers with a ReLU between every two, none after the last, in one pass.

    Its children are those of ``Sequential(Linear(784, 256), ReLU(), Linear(256, 10))``, and so are
    its initial values and the keys of its state_dict.

    Args:
        sizes: features of the input, of each hidden layer and of the output: ``[784, 256, 10]``
        bias, device, dtype: of every :class:`Linear`

    Raises:
        ValueError: for fewer than two sizes.
    """

    def __init__(self, sizes, bias=True, device=None, dtype=None):
        sizes = list(sizes)
        if len(sizes) < 2:
            raise ValueError(f"MLP: sizes must be two or more numbers, got {sizes}")
        layers = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            layers += [ReLU()] if i else []
            layers.append(Linear(before, after, bias=bias, device=device, dtype=dtype))
        super().__init__(*layers)

    def __getitem__(self, index):
        if isinstance(index, slice):  # torch's would construct another MLP from them
            return Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def find_mlp(modules, begin, kind=type):
    """The linear layers of the longest stack, with ReLUs in between, from modules[begin] on, and
    where it ends. kind(module) is its class.
    """
    linears, biases, i, count, end = [], None, begin, 0, begin
    while i < len(modules) and kind(modules[i]) in (Linear, LinearReLU):
        m = modules[i]
        if not is_bare(m) or biases not in (None, m.bias is not None):
            break
        biases = m.bias is not None  # all of them or none
        linears.append(m)
        if kind(m) is Linear:  # a stack ends without a ReLU
            count, end = len(linears), i + 1
        relu = modules[i + 1] if i + 1 < len(modules) else None
        if kind(relu) is not (ReLU if kind(m) is Linear else FusedReLU) or not is_bare(relu):
            break
        i += 2
    return linears[:count], end


def is_bare(m):
    """Whether nobody watches a module or has replaced what it does."""
    return not (
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        or _has_any_global_hook()
    )


class ReLU(torch.nn.ReLU):
    __doc__ = torch.nn.ReLU.__doc__

    def forward(self, input):
        return functional.relu(input, self.inplace)


class Conv2d(torch.nn.Conv2d):
    __doc__ = torch.nn.Conv2d.__doc__

    _conv2d = staticmethod(functional.conv2d)

    def _conv_forward(self, input, weight, bias):  # torch.nn.Conv2d.forward calls it
        return self._convolve(self._conv2d, input, weight, bias)

    def _convolve(self, conv2d, input, weight, bias, *pool):
        """`conv2d`, one of :mod:`dlkernels.functional` that convolve, with this module's sizes."""
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(
                input, self._reversed_padding_repeated_twice, mode=self.padding_mode
            )
            padding = 0
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, *pool)


class Conv2dReLU(Conv2d):
    """``relu(conv2d(x))`` in one pass. Constructed as :class:`torch.nn.Conv2d` is."""

    _conv2d = staticmethod(functional.conv2d_relu)


class MaxPool2d(torch.nn.MaxPool2d):
    __doc__ = torch.nn.MaxPool2d.__doc__

    def forward(self, input):
        return functional.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class Conv2dReLUMaxPool2d(Conv2d):
    """``max_pool2d(relu(conv2d(x)))`` in one op. Constructed as :class:`torch.nn.Conv2d` is, and
    with the arguments of :class:`torch.nn.MaxPool2d`, by keyword."""

    def __init__(
        self,
        *args,
        pool_kernel_size=2,
        pool_stride=None,
        pool_padding=0,
        pool_dilation=1,
        ceil_mode=False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        stride = pool_kernel_size if pool_stride is None else pool_stride
        self._pool = pool_kernel_size, stride, pool_padding, pool_dilation, ceil_mode

    def _conv2d(self, *args):
        return functional.conv2d_relu_max_pool2d(*args, *self._pool)

    def extra_repr(self):
        names = "pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode"
        pool = [f"{name}={value}" for name, value in zip(names, self._pool)]
        return ", ".join([super().extra_repr(), *pool])


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    __doc__ = torch.nn.CrossEntropyLoss.__doc__

    def forward(self, input, target):
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class FusedReLU(torch.nn.ReLU):
    """Keeps the place of a ReLU that the module before it applies; made by convert() alone."""

    def forward(self, input):
        return input


class FusedMaxPool2d(torch.nn.MaxPool2d):
    """Keeps the place of a MaxPool2d that the module two before it applies; made by convert()."""

    def forward(self, input):
        return input
