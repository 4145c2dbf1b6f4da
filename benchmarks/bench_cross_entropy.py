"""cross_entropy with class indices: the mean over N rows of C logits."""

import math
from dataclasses import dataclass

import numpy as np

from .case import Case


@dataclass(frozen=True)
class CrossEntropy(Case):
    N: int
    C: int

    op = "cross_entropy"
    wanted = ("logits",)

    def __str__(self):
        return f"{self.N}x{self.C}"

    def inputs(self, rng):
        return {
            "logits": rng.standard_normal((self.N, self.C)),
            "target": rng.integers(self.C, size=self.N),
            "grad_y": np.array(1.0),
        }

    def bytes(self, mode):
        return 4 * self.N * self.C * {"forward": 1, "forward+backward": 2}[mode]

    def torch(self, F, logits, target):
        return F.cross_entropy(logits, target)

    def python(self, logits, target, grad_y=None):
        """loss = mean(log(sum_c exp(x[c])) - x[target]), gradient = (softmax(x) - one_hot) / N."""
        loss, grad = 0.0, []
        for row, t in zip(logits, target):
            top = max(row)  # exp(x - top) cannot overflow
            exps = [math.exp(x - top) for x in row]
            total = sum(exps)
            loss += (math.log(total) + top - row[t]) / self.N
            if grad_y is not None:
                grad.append([grad_y * e / (total * self.N) for e in exps])
                grad[-1][t] -= grad_y / self.N
        return [loss] if grad_y is None else [loss, grad]

    def numpy(self, logits, target, grad_y=None):
        rows = np.arange(self.N)
        shifted = logits - logits.max(axis=1, keepdims=True)
        exps = np.exp(shifted)
        total = exps.sum(axis=1, keepdims=True)
        loss = (np.log(total[:, 0]) - shifted[rows, target]).mean()
        if grad_y is None:
            return [loss]
        grad = exps / total
        grad[rows, target] -= 1
        return [loss, grad * (grad_y / self.N)]

    def jax(self, logits, target):
        import jax

        log_p = jax.nn.log_softmax(logits)
        return -jax.numpy.take_along_axis(log_p, target[:, None], axis=1).mean()

    def tensorflow(self, logits, target):
        import tensorflow as tf

        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(target, logits))


SMALL = CrossEntropy(128, 100)
SIZES = [(128, 1000), (4096, 1000), (64, 10), (2048, 32000)]
CASES = [CrossEntropy(*sizes) for sizes in SIZES]
