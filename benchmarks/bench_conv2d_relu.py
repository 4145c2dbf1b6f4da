"""conv2d_relu: square windows, "same" padding. A first layer is asked for no gradient of x."""

from dataclasses import dataclass

import numpy as np

from dlkernels import functional

from .case import BOTH_LAYOUTS, Case, away_from_kink


@dataclass(frozen=True)
class Conv2dReLU(Case):
    N: int
    C: int
    H: int  # and the width
    K: int  # output channels
    kernel: int
    stride: int = 1
    groups: int = 1

    op = "conv2d_relu"
    providers = BOTH_LAYOUTS

    @property
    def wanted(self):
        return ("weight", "bias") if self.C <= 3 else ("x", "weight", "bias")

    @property
    def c(self):  # input channels a group
        return self.C // self.groups

    @property
    def padding(self):
        return self.kernel // 2

    @property
    def OH(self):
        return (self.H + 2 * self.padding - self.kernel) // self.stride + 1

    def __str__(self):
        k, H, stride = self.kernel, self.H, f"/{self.stride}" if self.stride > 1 else ""
        groups = f" groups={self.groups}" if self.groups > 1 else ""
        return f"{self.N}x{self.C}x{H}x{H} K={self.K} {k}x{k}{stride}{groups}"

    def inputs(self, rng):
        N, C, H, K, k = self.N, self.C, self.H, self.K, self.kernel
        return {
            "x": rng.standard_normal((N, C, H, H)),
            "weight": rng.standard_normal((K, self.c, k, k)) / (self.c * k * k) ** 0.5,
            "bias": rng.standard_normal(K),
            "grad_y": rng.standard_normal((N, K, self.OH, self.OH)),
        }

    def arrays(self, mode):
        return away_from_kink(self, super().arrays(mode))

    def flops(self, mode):
        """Of the direct way; Winograd's needs fewer."""
        forward = 2 * self.N * self.OH**2 * self.K * self.c * self.kernel**2
        products = {"forward": 1, "forward+backward": len(self.wanted)}[mode]
        return forward * products

    def bytes(self, mode):
        x, y = self.N * self.C * self.H**2, self.N * self.K * self.OH**2
        weight = self.K * self.c * self.kernel**2 + self.K
        # Backward reads x, weight, y and grad_y, and writes the gradients.
        backward = x + weight + 2 * y + weight + ("x" in self.wanted) * x
        return 4 * (x + weight + y + {"forward": 0, "forward+backward": backward}[mode])

    def torch(self, F, x, weight, bias):
        if F is functional:
            return F.conv2d_relu(x, weight, bias, self.stride, self.padding, 1, self.groups)
        return F.relu(F.conv2d(x, weight, bias, self.stride, self.padding, 1, self.groups))

    def python(self, x, weight, bias, grad_y=None):
        """y[k][oh][ow] = max(0, sum_{c,kh,kw} x[first+c][oh*s+kh-p][ow*s+kw-p] *
        weight[k][c][kh][kw] + bias[k]), where first is the first input channel of k's group and
        what lies outside of x counts as 0."""
        K, OH = range(self.K), range(self.OH)
        y = [[[[0.0 for _ in OH] for _ in OH] for _ in K] for _ in x]
        for n, image in enumerate(x):
            for oh in OH:
                for ow in OH:
                    window = self.window(oh, ow)
                    for k in K:
                        group = image[self.first(k) :]
                        products = (group[c][h][w] * weight[k][c][i][j] for c, i, j, h, w in window)
                        y[n][k][oh][ow] = max(0.0, sum(products) + bias[k])
        return [y] if grad_y is None else [y, *self.python_backward(x, weight, y, grad_y)]

    def python_backward(self, x, weight, y, grad_y):
        K, OH, taps = range(self.K), range(self.OH), range(self.kernel)
        grad_x = [[[[0.0] * self.H for _ in range(self.H)] for _ in image] for image in x]
        grad_weight = [[[[0.0 for _ in taps] for _ in taps] for _ in range(self.c)] for _ in K]
        grad_bias = [0.0 for _ in K]
        for n, image in enumerate(x):
            for oh in OH:
                for ow in OH:
                    window = self.window(oh, ow)
                    for k in K:
                        if y[n][k][oh][ow] == 0:
                            continue
                        g, first = grad_y[n][k][oh][ow], self.first(k)
                        grad_bias[k] += g
                        for c, kh, kw, h, w in window:
                            grad_weight[k][c][kh][kw] += g * image[first + c][h][w]
                            grad_x[n][first + c][h][w] += g * weight[k][c][kh][kw]
        return grad_x, grad_weight, grad_bias

    def first(self, k):
        return k // (self.K // self.groups) * self.c

    def window(self, oh, ow):
        """(c, kh, kw, h, w) of what lies inside x, c counted in a group."""
        s, p, H, taps = self.stride, self.padding, self.H, range(self.kernel)
        return [
            (c, kh, kw, h, w)
            for c in range(self.c)
            for kh in taps
            for kw in taps
            if 0 <= (h := oh * s + kh - p) < H and 0 <= (w := ow * s + kw - p) < H
        ]

    def numpy(self, x, weight, bias, grad_y=None):
        windows, y = self.numpy_forward(x, weight, bias)
        return [y] if grad_y is None else [y, *self.numpy_backward(windows, weight, y, grad_y)]

    def numpy_forward(self, x, weight, bias):
        k, s, p = self.kernel, self.stride, self.padding
        padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(2, 3))
        windows = windows[:, :, ::s, ::s]  # (N, C, OH, OW, KH, KW)
        y = self.tensordot((weight, 0), (windows, 1), ([1, 2, 3], [1, 4, 5]))  # (K, N, OH, OW)
        return windows, np.maximum(y.swapaxes(0, 1) + bias[:, None, None], 0)

    def numpy_backward(self, windows, weight, y, grad_y):
        k, s, p, H, OH = self.kernel, self.stride, self.padding, self.H, self.OH
        g = grad_y * (y > 0)
        grad_weight = self.tensordot((g, 1), (windows, 1), ([0, 2, 3], [0, 2, 3]))
        grad_padded = np.zeros((self.N, self.C, H + 2 * p, H + 2 * p), y.dtype)
        for h, w in np.ndindex(k, k):
            tap = self.tensordot((weight[:, :, h, w], 0), (g, 1), ([0], [1]))  # (C, N, OH, OW)
            grad_padded[:, :, h : h + OH * s : s, w : w + OH * s : s] += tap.swapaxes(0, 1)
        return grad_padded[:, :, p : p + H, p : p + H], grad_weight, g.sum(axis=(0, 2, 3))

    def tensordot(self, a, b, axes):
        """np.tensordot of each group, where (array, axis) is cut into groups along that axis."""
        groups = zip(*(np.split(array, self.groups, axis) for array, axis in (a, b)))
        return np.concatenate([np.tensordot(*pair, axes) for pair in groups])

    def jax(self, x, weight, bias):
        import jax

        strides, pads = (self.stride,) * 2, [(self.padding,) * 2] * 2
        y = jax.lax.conv_general_dilated(
            *(x, weight, strides, pads),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        return jax.nn.relu(y + bias)

    def tensorflow(self, x, weight, bias):
        import tensorflow as tf

        pads = [(0, 0), (self.padding,) * 2, (self.padding,) * 2, (0, 0)]
        if self.groups == self.C > 1:
            weight = tf.reshape(weight, (self.kernel, self.kernel, self.C, -1))
            y = tf.nn.depthwise_conv2d(x, weight, (1, self.stride, self.stride, 1), pads)
        else:
            y = tf.nn.conv2d(x, weight, self.stride, pads)
        return tf.nn.relu(tf.nn.bias_add(y, bias))


SMALL = Conv2dReLU(4, 8, 14, 16, 3)
SIZES = [
    (64, 32, 14, 64, 3),
    (64, 1, 28, 32, 3),
    (64, 64, 32, 64, 3),
    (32, 128, 28, 128, 3),
    (32, 256, 14, 256, 3),
    (64, 3, 32, 64, 3),
    (16, 3, 224, 64, 7, 2),
    (64, 6, 14, 16, 5),
    (32, 256, 28, 64, 1),
    (32, 64, 56, 128, 3, 2),
    (32, 144, 56, 144, 3, 2, 144),  # depthwise
    (32, 384, 14, 384, 3, 1, 384),
]
CASES = [Conv2dReLU(*sizes) for sizes in SIZES]
