"""One step of Adam on a model's parameters. The moments start away from 0, so that the step shows
every coefficient: after one step from 0 it would be lr * sign(gradient) whatever the betas are."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import dlkernels

from .case import Case

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Adam(Case):
    name: str
    shapes: tuple

    op = "adam"
    modes = ("step",)

    def __str__(self):
        return self.name

    def arrays(self, mode):
        """Four lists of arrays, in the order of `shapes`."""
        rng = np.random.default_rng(0)

        def normal():
            return [rng.standard_normal(shape, np.float32) for shape in self.shapes]

        return {
            "params": normal(),
            "grads": normal(),
            "exp_avgs": normal(),
            "exp_avg_sqs": [a * a for a in normal()],
        }

    def bytes(self, mode):  # four arrays read, three of them written
        return 7 * self.footprint(mode) // 4

    def footprint(self, mode):
        return 16 * sum(int(np.prod(shape)) for shape in self.shapes)

    def exact(self, inputs):
        return torch_provider(torch.optim.Adam, dtype=torch.float64)(self, inputs)


def python(case, inputs):
    """The formula, element by element."""
    lists = [[x for a in arrays for x in a.ravel().tolist()] for arrays in inputs.values()]
    params, grads, exp_avgs, exp_avg_sqs = lists
    t = 0

    def run():
        nonlocal t
        t += 1
        for i, g in enumerate(grads):
            exp_avgs[i] = m = BETA1 * exp_avgs[i] + (1 - BETA1) * g
            exp_avg_sqs[i] = v = BETA2 * exp_avg_sqs[i] + (1 - BETA2) * g * g
            m_hat, v_hat = m / (1 - BETA1**t), v / (1 - BETA2**t)
            params[i] -= LR * m_hat / (v_hat**0.5 + EPS)
        return params

    def arrays(params):
        ends = np.cumsum([np.prod(shape) for shape in case.shapes])[:-1]
        return [p.reshape(s) for p, s in zip(np.split(np.array(params), ends), case.shapes)]

    return run, arrays


def update(xp, t, p, g, m, v):
    """The formula on whole arrays; `xp` is numpy or jax.numpy."""
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    step = LR / (1 - BETA1**t) * m / (xp.sqrt(v / (1 - BETA2**t)) + EPS)
    return p - step, m, v


def numpy(case, inputs):
    params, grads, exp_avgs, exp_avg_sqs = (list(arrays) for arrays in inputs.values())
    t = 0

    def run():
        nonlocal t
        t += 1
        for i, g in enumerate(grads):
            new = update(np, t, params[i], g, exp_avgs[i], exp_avg_sqs[i])
            params[i], exp_avgs[i], exp_avg_sqs[i] = new
        return params

    return run, lambda params: params


def jax(case, inputs):
    import jax

    params, grads, exp_avgs, exp_avg_sqs = (
        [jax.numpy.array(a) for a in arrays] for arrays in inputs.values()
    )
    state = 0, list(zip(params, exp_avgs, exp_avg_sqs))

    @partial(jax.jit, donate_argnums=0)  # so that it may update in place
    def step(state, grads):
        t, tensors = state
        t += 1
        return t, [update(jax.numpy, t, p, g, m, v) for (p, m, v), g in zip(tensors, grads)]

    def run():
        nonlocal state
        state = jax.block_until_ready(step(state, grads))
        return state

    return run, lambda state: [np.array(p) for p, _, _ in state[1]]


def tensorflow(case, inputs):
    import tensorflow as tf

    params, exp_avgs, exp_avg_sqs = (
        [tf.Variable(a) for a in inputs[name]] for name in ("params", "exp_avgs", "exp_avg_sqs")
    )
    grads = [tf.constant(g) for g in inputs["grads"]]
    power1, power2 = tf.Variable(BETA1), tf.Variable(BETA2)

    @tf.function
    def step(grads):
        for p, m, v, g in zip(params, exp_avgs, exp_avg_sqs, grads):
            # The kernel behind its optimizers; eps is added before the bias correction here.
            tf.raw_ops.ResourceApplyAdam(
                var=p.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=power1,
                beta2_power=power2,
                lr=LR,
                beta1=BETA1,
                beta2=BETA2,
                epsilon=EPS,
                grad=g,
            )
        power1.assign(power1 * BETA1)
        power2.assign(power2 * BETA2)

    return lambda: step(grads), lambda _: [p.numpy() for p in params]


def torch_provider(optimizer, compile=False, dtype=torch.float32, device="cpu"):
    def build(case, inputs):
        params, grads, exp_avgs, exp_avg_sqs = (
            [torch.from_numpy(a).to(device, dtype, copy=True) for a in arrays]
            for arrays in inputs.values()
        )
        adam = optimizer(params, lr=LR, betas=(BETA1, BETA2), eps=EPS)
        for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs):
            p.grad = g
            t = torch.zeros((), device=device if adam.defaults["capturable"] else "cpu")
            adam.state[p] = {"step": t, "exp_avg": m, "exp_avg_sq": v}
        step = adam.step
        if compile:
            torch.compiler.reset()
            step = torch.compile(lambda: adam.step())
        return step, lambda _: [p.cpu().numpy() for p in params]

    return build


Adam.providers = {
    "python": python,
    "numpy": numpy,
    "torch": torch_provider(torch.optim.Adam),
    "torch fused": torch_provider(partial(torch.optim.Adam, fused=True)),
    "compile": torch_provider(torch.optim.Adam, compile=True),
    "jax": jax,
    "tensorflow": tensorflow,
    "dlkernels": torch_provider(dlkernels.optim.Adam),
}

SMALL = Adam("784-32-10 (25 K)", ((32, 784), (32,), (10, 32), (10,)))
CASES = [
    Adam("784-128-10 (102 K)", ((128, 784), (128,), (10, 128), (10,))),
    Adam("150 of 48x48 (346 K)", ((48, 48),) * 150),
    Adam("1024x1024 (1 M)", ((1024, 1024),)),
    Adam("16 of 1024x1024 (17 M)", ((1024, 1024),) * 16),
]
