"""The modules of :mod:`torch.nn` on our kernels: same constructors, state dicts and values.

Each is a subclass of PyTorch's, and only its forward differs; :func:`dlkernels.convert` turns the
modules of a model into these.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import functional
from ._convert import patterns
from ._convert.classes import ORIGINALS, is_leaf_in_fx, replaces
from ._dispatch import IntOrPair

__all__ = [
    "MLP",
    "Conv2d",
    "Conv2dReLU",
    "Conv2dReLUMaxPool2d",
    "CrossEntropyLoss",
    "LeakyReLU",
    "Linear",
    "LinearReLU",
    "MaxPool2d",
    "ReLU",
    "Sequential",
]


@replaces(torch.nn.Linear)
class Linear(torch.nn.Linear):
    __doc__ = torch.nn.Linear.__doc__

    @is_leaf_in_fx
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class LinearReLU(Linear):
    """``relu(linear(x))`` in one pass. Constructed as :class:`torch.nn.Linear` is."""

    @is_leaf_in_fx
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear_relu(input, self.weight, self.bias)


@replaces(torch.nn.Sequential)
class Sequential(torch.nn.Sequential):
    """:class:`torch.nn.Sequential` that runs some modules in a row as one op: linear layers with
    ReLUs between them; a Linear or Conv2d and a ReLU; a Conv2d, a ReLU and a MaxPool2d.

    It decides so at each call: each of these modules must be exactly of a class of
    :mod:`dlkernels.nn` and have no hook, so that nobody sees the values in between.
    """

    def forward(self, input: Tensor) -> Tensor:
        modules, i, find = list(self._modules.values()), 0, patterns.find()
        while i < len(modules):
            found = find(modules, i, input)
            if found:
                op, end, weights, biases = found
                input, i = op(input, modules[i:end], weights, biases), end
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

    def __init__(
        self,
        sizes: Iterable[int],
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = list(sizes)
        if len(sizes) < 2:
            raise ValueError(f"MLP: sizes must be two or more numbers, got {sizes}")
        layers: list[torch.nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            layers += [ReLU()] if i else []
            layers.append(Linear(before, after, bias=bias, device=device, dtype=dtype))
        super().__init__(*layers)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):  # torch's would construct another MLP from them
            return Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


ORIGINALS[MLP] = torch.nn.Sequential  # what revert() makes of it


@replaces(torch.nn.ReLU)
class ReLU(torch.nn.ReLU):
    """:class:`torch.nn.ReLU`. With ``inplace=True`` it is PyTorch's own op, which takes a single
    pass, except after a layer in a :class:`Sequential`."""

    @is_leaf_in_fx
    def forward(self, input: Tensor) -> Tensor:
        if self.inplace:
            return super().forward(input)
        return functional.relu(input)


@replaces(torch.nn.LeakyReLU)
class LeakyReLU(torch.nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU`. With ``inplace=True`` it is PyTorch's own op, which takes a
    single pass."""

    @is_leaf_in_fx
    def forward(self, input: Tensor) -> Tensor:
        if self.inplace:
            return super().forward(input)
        return functional.leaky_relu(input, self.negative_slope)


@replaces(torch.nn.Conv2d)
class Conv2d(torch.nn.Conv2d):
    __doc__ = torch.nn.Conv2d.__doc__  # type: ignore[assignment]

    @is_leaf_in_fx
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(functional.conv2d, input, weight, bias)

    def _convolve(
        self,
        conv2d: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *pool: Any,
    ) -> Tensor:
        """`conv2d`, one of :mod:`dlkernels.functional` that convolve, with this module's sizes."""
        padding: str | IntOrPair = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(
                input, self._reversed_padding_repeated_twice, mode=self.padding_mode
            )
            padding = 0
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, *pool)


class Conv2dReLU(Conv2d):
    """``relu(conv2d(x))`` in one pass. Constructed as :class:`torch.nn.Conv2d` is."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(functional.conv2d_relu, input, weight, bias)


@replaces(torch.nn.MaxPool2d)
class MaxPool2d(torch.nn.MaxPool2d):
    __doc__ = torch.nn.MaxPool2d.__doc__

    @is_leaf_in_fx
    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
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
        *args: Any,
        pool_kernel_size: IntOrPair = 2,
        pool_stride: IntOrPair | None = None,
        pool_padding: IntOrPair = 0,
        pool_dilation: IntOrPair = 1,
        ceil_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        stride = pool_kernel_size if pool_stride is None else pool_stride
        self._pool = pool_kernel_size, stride, pool_padding, pool_dilation, ceil_mode

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        op = functional.conv2d_relu_max_pool2d
        return self._convolve(op, input, weight, bias, *self._pool)

    def extra_repr(self) -> str:
        names = "pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode"
        pool = [f"{name}={value}" for name, value in zip(names, self._pool)]
        return ", ".join([super().extra_repr(), *pool])


@replaces(torch.nn.CrossEntropyLoss)
class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    __doc__ = torch.nn.CrossEntropyLoss.__doc__

    @is_leaf_in_fx
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
