"""linear_relu: y = relu(x @ weight.T + bias), with the gradients of all three."""

from dataclasses import dataclass

import numpy as np

from dlkernels import functional

from .case import Case, away_from_kink


@dataclass(frozen=True)
class LinearReLU(Case):
    M: int  # rows of x
    K: int  # input features
    N: int  # output features

    op = "linear_relu"
    wanted = ("x", "weight", "bias")

    def __str__(self):
        return f"{self.M}x{self.K}x{self.N}"

    def inputs(self, rng):
        M, K, N = self.M, self.K, self.N
        return {
            "x": rng.standard_normal((M, K)),
            "weight": rng.standard_normal((N, K)) / K**0.5,
            "bias": rng.standard_normal(N),
            "grad_y": rng.standard_normal((M, N)),
        }

    def arrays(self, mode):
        return away_from_kink(self, super().arrays(mode))

    def flops(self, mode):  # a product forward, two of the same size backward
        return 2 * self.M * self.K * self.N * {"forward": 1, "forward+backward": 3}[mode]

    def bytes(self, mode):
        inputs, y = self.M * self.K + self.K * self.N + self.N, self.M * self.N
        # Backward reads x, weight, y and grad_y, and writes the three gradients.
        return 4 * {"forward": inputs + y, "forward+backward": 3 * inputs + 3 * y}[mode]

    def torch(self, F, x, weight, bias):
        if F is functional:
            return F.linear_relu(x, weight, bias)
        return F.relu(F.linear(x, weight, bias))

    def python(self, x, weight, bias, grad_y=None):
        """y[m][n] = max(0, sum_k x[m][k] * weight[n][k] + bias[n])"""
        M, K, N = range(self.M), range(self.K), range(self.N)
        y = [[max(0.0, sum(x[m][k] * weight[n][k] for k in K) + bias[n]) for n in N] for m in M]
        if grad_y is None:
            return [y]
        g = [[grad_y[m][n] if y[m][n] > 0 else 0.0 for n in N] for m in M]
        grad_x = [[sum(g[m][n] * weight[n][k] for n in N) for k in K] for m in M]
        grad_weight = [[sum(g[m][n] * x[m][k] for m in M) for k in K] for n in N]
        grad_bias = [sum(g[m][n] for m in M) for n in N]
        return [y, grad_x, grad_weight, grad_bias]

    def numpy(self, x, weight, bias, grad_y=None):
        y = np.maximum(x @ weight.T + bias, 0)
        if grad_y is None:
            return [y]
        g = grad_y * (y > 0)
        return [y, g @ weight, g.T @ x, g.sum(axis=0)]

    def jax(self, x, weight, bias):
        import jax

        return jax.nn.relu(x @ weight + bias)

    def tensorflow(self, x, weight, bias):
        import tensorflow as tf

        return tf.nn.relu(tf.nn.bias_add(tf.matmul(x, weight), bias))


SMALL = LinearReLU(32, 256, 64)
SIZES = [
    (256, 784, 256),
    (64, 784, 128),
    (64, 784, 100),
    (128, 784, 512),
    (128, 512, 10),
    (256, 256, 10),
    (1000, 64, 64),
    (512, 1024, 1024),
    (512, 4096, 1024),
]
CASES = [LinearReLU(*sizes) for sizes in SIZES]
