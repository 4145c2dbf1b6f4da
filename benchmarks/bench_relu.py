"""relu: a pass over memory."""

from dataclasses import dataclass

import numpy as np

from .case import Case


@dataclass(frozen=True)
class ReLU(Case):
    n: int

    op = "relu"
    wanted = ("x",)

    def __str__(self):
        return f"{self.n:,}"

    def inputs(self, rng):
        return {"x": rng.standard_normal(self.n), "grad_y": rng.standard_normal(self.n)}

    def bytes(self, mode):  # backward reads grad_y and x or y, and writes grad_x
        return 4 * self.n * {"forward": 2, "forward+backward": 5}[mode]

    def torch(self, F, x):
        return F.relu(x)

    def python(self, x, grad_y=None):
        """y[i] = max(0, x[i])"""
        y = [v if v > 0 else 0.0 for v in x]
        if grad_y is None:
            return [y]
        return [y, [g if v > 0 else 0.0 for v, g in zip(x, grad_y)]]

    def numpy(self, x, grad_y=None):
        y = np.maximum(x, 0)
        return [y] if grad_y is None else [y, grad_y * (x > 0)]

    def jax(self, x):
        import jax

        return jax.nn.relu(x)

    def tensorflow(self, x):
        import tensorflow as tf

        return tf.nn.relu(x)


SMALL = ReLU(1 << 16)
CASES = [ReLU(1 << 20), ReLU(1 << 14)]
