"""conv2d_relu_max_pool2d: conv2d_relu's cases with square windows side by side."""

from dataclasses import dataclass

import torch

from dlkernels import functional

from .bench_conv2d_relu import Conv2dReLU
from .bench_max_pool2d import MaxPool2d
from .case import Case


@dataclass(frozen=True)
class Conv2dReLUMaxPool2d(Conv2dReLU):
    pool: int = 2

    op = "conv2d_relu_max_pool2d"

    @property
    def pooling(self):
        return MaxPool2d(self.N, self.K, self.OH, self.pool, self.pool)

    def __str__(self):
        return f"{super().__str__()}, {self.pool}x{self.pool}/{self.pool}"

    def inputs(self, rng):
        return super().inputs(rng) | {"grad_y": self.pooling.inputs(rng)["grad_y"]}

    def arrays(self, mode):
        """No gradient comes in where rounding may decide which element of a window is the greatest,
        or whether it is above 0."""
        inputs = Case.arrays(self, mode)
        if "grad_y" in inputs:
            x, weight, bias = (
                torch.from_numpy(inputs[a]).double() for a in ("x", "weight", "bias")
            )
            y = torch.conv2d(x, weight, bias, self.stride, self.padding)
            windows = y.unfold(2, self.pool, self.pool).unfold(3, self.pool, self.pool).flatten(-2)
            first, second = windows.topk(2).values.unbind(-1)
            inputs["grad_y"][(first.abs() < 1e-4) | (first - second < 1e-4)] = 0
        return inputs

    def bytes(self, mode):
        x, y = self.N * self.C * self.H**2, self.N * self.K * self.pooling.OH**2
        weight = self.K * self.C * self.kernel**2 + self.K
        # Training also stores and reads which element won, a byte an output, and reads x, weight
        # and grad_y again, and writes the gradients.
        training = 2 * y + 4 * (x + weight + y + weight + ("x" in self.wanted) * x)
        return 4 * (x + weight + y) + (training if mode == "forward+backward" else 0)

    def torch(self, F, x, weight, bias):
        if F is functional:
            return F.conv2d_relu_max_pool2d(
                x, weight, bias, self.stride, self.padding, pool_kernel_size=self.pool
            )
        return self.pooling.torch(F, super().torch(F, x, weight, bias))

    def python(self, x, weight, bias, grad_y=None):
        (y,) = super().python(x, weight, bias)
        if grad_y is None:
            return self.pooling.python(y)
        pooled, grad_relu = self.pooling.python(y, grad_y)
        return [pooled, *self.python_backward(x, weight, y, grad_relu)]

    def numpy(self, x, weight, bias, grad_y=None):
        windows, y = self.numpy_forward(x, weight, bias)
        if grad_y is None:
            return self.pooling.numpy(y)
        pooled, grad_relu = self.pooling.numpy(y, grad_y)
        return [pooled, *self.numpy_backward(windows, weight, y, grad_relu)]

    def jax(self, x, weight, bias):
        return self.pooling.jax(super().jax(x, weight, bias))

    def tensorflow(self, x, weight, bias):
        return self.pooling.tensorflow(super().tensorflow(x, weight, bias))


SMALL = Conv2dReLUMaxPool2d(4, 8, 14, 16, 3)
CASES = [
    Conv2dReLUMaxPool2d(*sizes)
    for sizes in [(64, 1, 28, 32, 3), (64, 32, 14, 64, 3), (64, 6, 14, 16, 5)]
]
