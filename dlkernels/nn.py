"""The modules of :mod:`torch.nn` on our kernels: same constructors, state dicts and values.

Each is a subclass of PyTorch's, and only its forward differs; :func:`dlkernels.convert` turns the
modules of a model into these.
"""

import torch

from . import functional

__all__ = [
    "Conv2d",
    "Conv2dReLU",
    "Conv2dReLUMaxPool2d",
    "CrossEntropyLoss",
    "Linear",
    "LinearReLU",
    "MaxPool2d",
    "ReLU",
]


class Linear(torch.nn.Linear):
    __doc__ = torch.nn.Linear.__doc__

    def forward(self, input):
        return functional.linear(input, self.weight, self.bias)


class LinearReLU(Linear):
    """``relu(linear(x))`` in one pass. Constructed as :class:`torch.nn.Linear` is."""

    def forward(self, input):
        return functional.linear_relu(input, self.weight, self.bias)


class ReLU(torch.nn.ReLU):
    __doc__ = torch.nn.ReLU.__doc__

    def forward(self, input):
        return functional.relu(input, self.inplace)


class Conv2d(torch.nn.Conv2d):
    __doc__ = torch.nn.Conv2d.__doc__

    _conv2d = staticmethod(functional.conv2d)

    def _conv_forward(self, input, weight, bias):  # torch.nn.Conv2d.forward calls it
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(
                input, self._reversed_padding_repeated_twice, mode=self.padding_mode
            )
            padding = 0
        return self._conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


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
