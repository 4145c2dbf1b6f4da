"""The modules of :mod:`torch.nn` on our kernels: same constructors, state dicts and values.

Each is a subclass of PyTorch's, and only its forward differs; :func:`dlkernels.convert` turns the
modules of a model into these.
"""

from itertools import pairwise

import torch

from . import functional

__all__ = [
    "MLP",
    "Conv2d",
    "Conv2dReLU",
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


class MLP(torch.nn.Sequential):
    """Linear layers with a ReLU between every two, none after the last, in one pass.

    Its children are those of ``Sequential(Linear(784, 256), ReLU(), Linear(256, 10))``, and so are
    its initial values and the keys of its state_dict. While it has all of them, without hooks, it
    runs :func:`dlkernels.functional.mlp` and does not call them.

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

    def forward(self, input):
        children = list(self._modules.values())
        linears = children[::2]
        if not (
            len(children) % 2
            and all(_is_bare(m, Linear) for m in linears)
            and all(_is_bare(m, ReLU) for m in children[1::2])
        ):
            return super().forward(input)
        biases = [m.bias for m in linears if m.bias is not None]
        if biases and len(biases) < len(linears):
            return super().forward(input)
        return functional.mlp(input, [m.weight for m in linears], biases)


def _is_bare(m, cls):
    """Whether a module computes what its class says, and nobody watches it."""
    return type(m) is cls and not (
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
    )


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
