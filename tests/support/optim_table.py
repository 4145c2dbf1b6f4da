"""The optimizers under test: ours, PyTorch's, and what their ops take."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim import adadelta, adagrad, adam, rmsprop, sgd

from dlkernels import optim

NAMES = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "RMSprop")
PAIRS = {name: (getattr(optim, name), getattr(torch.optim, name)) for name in NAMES}
pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)

# Options with all the state that there is, and a weight decay.
FULL = {
    "SGD": {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    # With the default eps, what it divides by is rounding where gradients change little.
    "RMSprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "eps": 1e-2},
}


def full(make):
    return FULL.get(make.__name__, {"weight_decay": 0.1})


def tensor_list(*tensors):
    def make():
        return [{"params": [nn.Parameter(t.clone()) for t in tensors]}]

    return make


FLOAT32 = tensor_list(torch.ones(3, 5), torch.ones(7))


@functools.lru_cache(4)
def gradients(shapes, steps, seed):
    """A list a step; some parameters have none at times."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            None
            if (step + i) % 9 == 0
            else torch.randn(shape, generator=generator) * 10.0 ** (i - 4)
            for i, shape in enumerate(shapes)
        ]
        for step in range(steps)
    ]


def train(opt, steps, seed=0):
    """Steps on gradients that are the same for every dtype."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for grads in gradients(tuple(p.shape for p in params), steps, seed):
        for p, g in zip(params, grads):
            p.grad = None if g is None else g.to(p.dtype)
        opt.step()
    return params


def assert_same(got, expected):
    """Parameters and state, bit for bit."""
    for group, other in zip(got.param_groups, expected.param_groups):
        for p, q in zip(group["params"], other["params"]):
            assert torch.equal(p, q)
            assert got.state[p].keys() == expected.state[q].keys()
            for key, value in expected.state[q].items():
                assert torch.equal(got.state[p][key], value)


@dataclass(frozen=True)
class Op:
    """An op: `states` says of each list whether it holds squares, `counts` whether it has
    state_steps; torchs(lists, scalars) is PyTorch's own step."""

    name: str
    states: tuple
    counts: bool
    defaults: dict
    options: tuple
    torchs: object

    def __str__(self):
        return self.name

    def __call__(self, lists, options=(), **scales):
        scalars = self.defaults | dict(options)
        getattr(torch.ops.dlkernels, self.name).default(*lists, **scalars, **scales)

    def torch_step(self, lists, options=()):
        self.torchs(*lists, **self.defaults | dict(options))

    def unused(self, options):
        """Which lists of states are empty: their options are off."""
        scalars = self.defaults | dict(options)
        if self.name == "sgd_":
            return [scalars["momentum"] == 0]
        if self.name == "rmsprop_":
            return [False, not scalars["centered"], not scalars["momentum"] > 0]
        return [False] * len(self.states)

    def group(self, *params, options=(), step=0.0):
        """The op's lists in the middle of a training."""
        lists = [list(params), [torch.randn_like(p) for p in params]]
        for square, unused in zip(self.states, self.unused(options)):
            make = torch.rand_like if square else torch.randn_like
            # A square is at least that of its mean, which a centered RMSprop relies on.
            lists.append([] if unused else [make(p) * 0.1 + square for p in params])
        if self.counts:
            lists.append([torch.tensor(step + i) for i in range(len(params))])
        return lists


def torch_sgd(params, grads, buffers, *, is_first_step, **scalars):
    found = [None] * len(params) if is_first_step or not buffers else [*buffers]
    sgd.sgd(params, grads, found, **scalars)
    if is_first_step:
        for buffer, new in zip(buffers, found):
            buffer.copy_(new)


def torch_adam(params, grads, exp_avgs, exp_avg_sqs, state_steps, **scalars):
    adam.adam(params, grads, exp_avgs, exp_avg_sqs, [], state_steps, amsgrad=False, **scalars)


def flat(lists):
    return [x for tensors in lists for x in tensors]


SGD = Op(
    "sgd_",
    (False,),
    False,
    {
        "lr": 1e-2,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
        "is_first_step": False,
    },
    (
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.5, "nesterov": True, "maximize": True},
        {"momentum": 0.9, "dampening": 0.3, "is_first_step": True},
    ),
    torch_sgd,
)
ADAM = Op(
    "adam_",
    (False, True),
    True,
    {
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.0,
        "eps": 1e-8,
        "maximize": False,
        "decoupled_weight_decay": False,
    },
    (
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        {"beta1": 0.0, "beta2": 0.0, "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
    ),
    torch_adam,
)
ADAGRAD = Op(
    "adagrad_",
    (True,),
    True,
    {"lr": 1e-2, "lr_decay": 0.0, "weight_decay": 0.0, "eps": 1e-10, "maximize": False},
    ({}, {"lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3, "maximize": True}),
    adagrad.adagrad,
)
ADADELTA = Op(
    "adadelta_",
    (True, True),
    True,
    {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0, "maximize": False},
    ({}, {"lr": 0.1, "rho": 0.3, "weight_decay": 0.1, "eps": 1e-3, "maximize": True}),
    adadelta.adadelta,
)
RMSPROP = Op(
    "rmsprop_",
    (True, False, False),
    True,
    {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": False,
        "maximize": False,
    },
    (
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"centered": True, "alpha": 0.4, "maximize": True},
        {"centered": True, "momentum": 0.5, "eps": 1e-3},
    ),
    rmsprop.rmsprop,
)
OPS = (SGD, ADAM, ADAGRAD, ADADELTA, RMSPROP)
ops = pytest.mark.parametrize("op", OPS, ids=str)
ops_and_options = pytest.mark.parametrize(
    "op, options",
    [pytest.param(op, options, id=f"{op}-{options}") for op in OPS for options in op.options],
)
