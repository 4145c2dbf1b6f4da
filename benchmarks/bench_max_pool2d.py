"""max_pool2d with square windows, no padding."""

from dataclasses import dataclass

import numpy as np

from .case import BOTH_LAYOUTS, Case


@dataclass(frozen=True)
class MaxPool2d(Case):
    N: int
    C: int
    H: int  # and the width
    kernel: int
    stride: int

    op = "max_pool2d"
    wanted = ("x",)
    providers = BOTH_LAYOUTS

    @property
    def OH(self):
        return (self.H - self.kernel) // self.stride + 1

    def __str__(self):
        k, H = self.kernel, self.H
        return f"{self.N}x{self.C}x{H}x{H} {k}x{k}/{self.stride}"

    def inputs(self, rng):
        N, C, H, OH = self.N, self.C, self.H, self.OH
        return {
            "x": rng.standard_normal((N, C, H, H)),
            "grad_y": rng.standard_normal((N, C, OH, OH)),
        }

    def bytes(self, mode):
        x, y = self.N * self.C * self.H**2, self.N * self.C * self.OH**2
        # Training also stores and reads which element won: a byte an output at least.
        return {"forward": 4 * (x + y), "forward+backward": 8 * (x + y) + 2 * y}[mode]

    def torch(self, F, x):
        return F.max_pool2d(x, self.kernel, self.stride)

    def python(self, x, grad_y=None):
        """y[oh][ow] = the greatest x of the window, whose gradient all goes to that element."""
        k, s, OH = range(self.kernel), self.stride, self.OH
        y = [[[[0.0] * OH for _ in range(OH)] for _ in image] for image in x]
        grad_x = [[[[0.0] * self.H for _ in plane] for plane in image] for image in x]
        for n, image in enumerate(x):
            for c, plane in enumerate(image):
                for oh in range(OH):
                    for ow in range(OH):
                        window = [(oh * s + kh, ow * s + kw) for kh in k for kw in k]
                        h, w = max(window, key=lambda at: plane[at[0]][at[1]])
                        y[n][c][oh][ow] = plane[h][w]
                        if grad_y is not None:
                            grad_x[n][c][h][w] += grad_y[n][c][oh][ow]
        return [y] if grad_y is None else [y, grad_x]

    def numpy(self, x, grad_y=None):
        k, s, OH = self.kernel, self.stride, self.OH
        windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(2, 3))
        windows = windows[:, :, ::s, ::s].reshape(*x.shape[:2], OH, OH, k * k)
        if grad_y is None:
            return [windows.max(axis=-1)]
        winner = windows.argmax(axis=-1)
        y = np.take_along_axis(windows, winner[..., None], axis=-1)[..., 0]
        grad_x = np.zeros_like(x)
        for tap in range(k * k):  # windows overlap, but never in the same tap
            h, w = divmod(tap, k)
            hits = grad_x[:, :, h : h + OH * s : s, w : w + OH * s : s]
            hits += np.where(winner == tap, grad_y, 0)
        return [y, grad_x]

    def jax(self, x):
        import jax

        window, strides = (1, self.kernel, self.kernel, 1), (1, self.stride, self.stride, 1)
        return jax.lax.reduce_window(x, -np.inf, jax.lax.max, window, strides, "VALID")

    def tensorflow(self, x):
        import tensorflow as tf

        return tf.nn.max_pool2d(x, self.kernel, self.stride, "VALID")


SMALL = MaxPool2d(8, 16, 28, 2, 2)
CASES = [MaxPool2d(64, 32, 28, 2, 2), MaxPool2d(64, 32, 28, 3, 2)]
