"""One step of an optimizer on a model's parameters. The states start away from 0, so that the step
shows every coefficient: after one step of Adam from 0 it would be lr * sign(gradient) whatever the
betas are."""

import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch

import dlkernels

from .case import Case

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8  # Adam's
MOMENTUM, ALPHA, RHO = 0.9, 0.99, 0.9


@dataclass(frozen=True)
class Step(Case):
    """An optimizer's subclass has its formula, and as `states` which of them are squares."""

    name: str
    shapes: tuple

    modes = ("step",)
    optimizer: ClassVar[str]
    options: ClassVar[dict]
    states: ClassVar[dict]

    def __str__(self):
        return self.name

    @staticmethod
    def update(xp, t, p, g, *states):
        """The formula: the new p and states. `xp` is math, numpy or jax.numpy."""
        raise NotImplementedError

    def arrays(self, mode):
        """Lists of arrays, in the order of `shapes`."""
        rng = np.random.default_rng(0)

        def normal():
            return [rng.standard_normal(shape, np.float32) for shape in self.shapes]

        states = {
            key: [a * a for a in normal()] if square else normal()
            for key, square in self.states.items()
        }
        return {"params": normal(), "grads": normal(), **states}

    def bytes(self, mode):  # all arrays are read, all but the gradients written
        lists = 2 + len(self.states)
        return (2 * lists - 1) * self.footprint(mode) // lists

    def footprint(self, mode):
        return 4 * (2 + len(self.states)) * sum(int(np.prod(shape)) for shape in self.shapes)

    def exact(self, inputs):
        return torch_provider(torch.optim, dtype=torch.float64)(self, inputs)


class Adam(Step):
    op = "adam"
    optimizer = "Adam"
    options: ClassVar = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS}
    states: ClassVar = {"exp_avg": False, "exp_avg_sq": True}

    @staticmethod
    def update(xp, t, p, g, m, v):
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        step = LR / (1 - BETA1**t) * m / (xp.sqrt(v / (1 - BETA2**t)) + EPS)
        return p - step, m, v


class Sgd(Step):
    op = "sgd"
    optimizer = "SGD"
    options: ClassVar = {"lr": LR, "momentum": MOMENTUM}
    states: ClassVar = {"momentum_buffer": False}

    @staticmethod
    def update(xp, t, p, g, b):
        b = MOMENTUM * b + g
        return p - LR * b, b


class Adagrad(Step):
    op = "adagrad"
    optimizer = "Adagrad"
    options: ClassVar = {"lr": LR, "eps": EPS}
    states: ClassVar = {"sum": True}

    @staticmethod
    def update(xp, t, p, g, s):
        s = s + g * g
        return p - LR * g / (xp.sqrt(s) + EPS), s


class Adadelta(Step):
    op = "adadelta"
    optimizer = "Adadelta"
    options: ClassVar = {"lr": LR, "rho": RHO, "eps": EPS}
    states: ClassVar = {"square_avg": True, "acc_delta": True}

    @staticmethod
    def update(xp, t, p, g, v, u):
        v = RHO * v + (1 - RHO) * g * g
        delta = xp.sqrt((u + EPS) / (v + EPS)) * g
        return p - LR * delta, v, RHO * u + (1 - RHO) * delta * delta


class RMSprop(Step):
    op = "rmsprop"
    optimizer = "RMSprop"
    options: ClassVar = {"lr": LR, "alpha": ALPHA, "eps": EPS}
    states: ClassVar = {"square_avg": True}

    @staticmethod
    def update(xp, t, p, g, v):
        v = ALPHA * v + (1 - ALPHA) * g * g
        return p - LR * g / (xp.sqrt(v) + EPS), v


def python(case, inputs):
    """The formula, element by element."""
    lists = [[x for a in arrays for x in a.ravel().tolist()] for arrays in inputs.values()]
    params, grads, *states = lists
    t = 0

    def run():
        nonlocal t
        t += 1
        for i, g in enumerate(grads):
            new = case.update(math, t, params[i], g, *(state[i] for state in states))
            for values, x in zip((params, *states), new):
                values[i] = x
        return params

    def arrays(params):
        ends = np.cumsum([np.prod(shape) for shape in case.shapes])[:-1]
        return [p.reshape(s) for p, s in zip(np.split(np.array(params), ends), case.shapes)]

    return run, arrays


def numpy(case, inputs):
    params, grads, *states = (list(arrays) for arrays in inputs.values())
    t = 0

    def run():
        nonlocal t
        t += 1
        for i, g in enumerate(grads):
            new = case.update(np, t, params[i], g, *(state[i] for state in states))
            for arrays, a in zip((params, *states), new):
                arrays[i] = a
        return params

    return run, lambda params: params


def jax(case, inputs):
    import jax

    params, grads, *states = ([jax.numpy.array(a) for a in arrays] for arrays in inputs.values())
    state = 0, list(zip(params, *states))

    @partial(jax.jit, donate_argnums=0)  # so that it may update in place
    def step(state, grads):
        t, tensors = state
        t += 1
        return t, [
            case.update(jax.numpy, t, p, g, *states) for (p, *states), g in zip(tensors, grads)
        ]

    def run():
        nonlocal state
        state = jax.block_until_ready(step(state, grads))
        return state

    return run, lambda state: [np.array(tensors[0]) for tensors in state[1]]


def tensorflow(case, inputs):
    import tensorflow as tf

    params, exp_avgs, exp_avg_sqs = (
        [tf.Variable(a) for a in inputs[name]] for name in ("params", "exp_avg", "exp_avg_sq")
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


def torch_provider(module, compile=False, dtype=torch.float32, device="cpu", **options):
    """The optimizer of torch.optim or dlkernels.optim."""

    def build(case, inputs):
        params, grads, *states = (
            [torch.from_numpy(a).to(device, dtype, copy=True) for a in arrays]
            for arrays in inputs.values()
        )
        optimizer = getattr(module, case.optimizer)(params, **case.options, **options)
        for i, (p, g) in enumerate(zip(params, grads)):
            p.grad = g
            optimizer.state[p] = dict(zip(case.states, (state[i] for state in states)))
            if case.optimizer != "SGD":
                capturable = optimizer.defaults.get("capturable")
                optimizer.state[p]["step"] = torch.zeros((), device=device if capturable else "cpu")
        step = optimizer.step
        if compile:
            torch.compiler.reset()
            step = torch.compile(lambda: optimizer.step())
        return step, lambda _: [p.cpu().numpy() for p in params]

    return build


Step.providers = {
    "python": python,
    "numpy": numpy,
    "torch": torch_provider(torch.optim),
    "torch foreach": torch_provider(torch.optim, foreach=True),
    "compile": torch_provider(torch.optim, compile=True),
    "jax": jax,
    "dlkernels": torch_provider(dlkernels.optim),
}
FUSED = {"torch fused": torch_provider(torch.optim, fused=True)}
Sgd.providers = Adagrad.providers = Step.providers | FUSED
Adam.providers = Sgd.providers | {"tensorflow": tensorflow}


def cases(optimizer):
    """As a module of one op has them."""
    return SimpleNamespace(
        SMALL=optimizer("784-32-10 (25 K)", ((32, 784), (32,), (10, 32), (10,))),
        CASES=[
            optimizer("784-128-10 (102 K)", ((128, 784), (128,), (10, 128), (10,))),
            optimizer("1024x1024 (1 M)", ((1024, 1024),)),
        ],
    )


OPTIMIZERS = [cases(optimizer) for optimizer in (Adam, Sgd, Adagrad, Adadelta, RMSprop)]
OPTIMIZERS[0].CASES += [
    Adam("150 of 48x48 (346 K)", ((48, 48),) * 150),
    Adam("16 of 1024x1024 (17 M)", ((1024, 1024),) * 16),
]
