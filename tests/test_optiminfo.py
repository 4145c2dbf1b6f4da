"""dlkernels.optim on PyTorch's own samples of its optimizers, OptimizerInfo."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal import common_optimizers

import dlkernels
from dlkernels import optim as ours
from support.common import FULL
from support.optim_samples import (
    GRADIENTS,
    INFO,
    PARAMETERS,
    give_gradients,
    make,
    names,
    new_parameters,
    seen,
    steps,
)
from support.samples import assert_same, outcome

LIBRARIES = ours, torch.optim

# Beyond PyTorch's samples; what an optimizer does not take is a TypeError of both.
MORE_OPTIONS = [
    {"lr": torch.tensor(0.01)},
    {"lr": torch.tensor([0.01])},
    {"lr": torch.tensor(0.01, dtype=torch.float64), "fused": True},
    {"lr": torch.tensor(0.1), "weight_decay": 0.1},
    {"lr": 0.0},
    {"lr": 1},
    {"lr": True},
    {"betas": (0.0, 0.0)},
    {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
    {"eps": 0.0},
    {"eps": torch.tensor(0.1)},
    {"weight_decay": torch.tensor(0.1)},
    {"amsgrad": 1},
    {"maximize": 1},
    {"capturable": True},
]


def options_of(name, dtype):
    listed = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs
    return [each.kwargs for each in listed("cpu", dtype, INFO[name])] + MORE_OPTIONS


SOME = [
    *(("plain", gradients) for gradients in ("skipped", "sparse", "negative bit")),
    *((params, "plain") for params in ("noncontiguous", "none")),
]
ALL = [
    *(("plain", gradients) for gradients in GRADIENTS),
    *((params, gradients) for params in PARAMETERS for gradients in [*GRADIENTS][:3]),
]


def trained(library, name, options, dtype, params, gradients):
    # differentiable=True is for tensors that are no leaves.
    params = new_parameters(params, dtype, requires_grad=not options.get("differentiable"))
    optimizer = getattr(library, name)(params, **copy.deepcopy(options))
    for step in range(3):
        give_gradients(params, gradients, step)
        optimizer.step()
    return seen(optimizer)


def assert_same_training(name, options, dtype, params, gradients):
    """Parameters, state, state dict, defaults and text after three steps, or the exception."""
    case = f"{options} {params} parameters, {gradients} gradients"
    got = outcome(trained, ours, name, options, dtype, params, gradients)
    # PyTorch's fused step on the CPU is wrong where tensors do not lie alike, and may crash.
    lie_otherwise = {"noncontiguous", "expanded"} & {params, gradients}
    # And SGD's takes None for the buffer of a parameter that had no gradient before.
    no_buffer = name == "SGD" and gradients == "skipped" and dtype is torch.float32
    wrong = (lie_otherwise or no_buffer) and not dtype.is_complex
    unfused = bool(options.get("fused") and wrong)
    reference = {**options, "fused": False} if unfused else options
    expected = outcome(trained, torch.optim, name, reference, dtype, params, gradients)
    if unfused and isinstance(expected, list):
        got, expected = got[:2], expected[:2]
    assert_same(got, expected, case)


@names
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.filterwarnings("ignore")
def test_samples(name, dtype):
    dlkernels.reset_stats()
    for options in options_of(name, dtype):
        for params, gradients in ALL if FULL else SOME:
            assert_same_training(name, options, dtype, params, gradients)
    ran = dlkernels.stats()[getattr(ours, name)._op]
    assert ran["torch"] and (ran["kernel"] > 0) == (dtype is torch.float32)


@names
def test_error_samples(name):
    """PyTorch's class of exception, and its text."""
    for sample in INFO[name].optim_error_inputs_func("cpu", torch.float32):
        given = sample.optimizer_error_input
        params = [nn.Parameter(torch.ones(1))] if given.params is None else given.params
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            error = outcome(lambda p=params, g=given: getattr(ours, name)(p, **g.kwargs).step())
        assert isinstance(error, sample.error_type), (given, error)
        assert re.search(sample.error_regex, str(error)), (given, error)


SET_BY_HAND = [
    *({"lr": lr} for lr in ["0.1", None, 1j, -1.0, float("nan"), float("inf"), 1e300, 10**400]),
    *({"lr": lr} for lr in [[0.1], torch.tensor(0.1), torch.ones(2), torch.tensor(1j)]),
    *({"lr": lr} for lr in [torch.tensor(0.1, device="meta"), torch.ones((), requires_grad=True)]),
    *({"betas": b} for b in [(0.9,), (0, 1), (1.0, 1.0), (2.0, 0.5), ("a", "b"), [0.9, 0.99]]),
    {"betas": torch.tensor([0.9, 0.99])},
    *({key: v} for key in ("eps", "weight_decay", "momentum", "rho") for v in (None, "1", -1.0)),
    *({key: v} for key in ("maximize", "amsgrad", "nesterov", "centered") for v in (None, True)),
    *({key: True} for key in ("foreach", "fused", "capturable", "differentiable")),
]


@names
@pytest.mark.parametrize("change", SET_BY_HAND, ids=str)
def test_group_changed_by_hand(name, change):
    """What nobody checks before the step: PyTorch's result or its class of exception."""

    def changed(library):
        optimizer, params = make(library, name, {})
        if not change.keys() <= optimizer.param_groups[0].keys():
            return None
        optimizer.param_groups[0].update(change)
        steps(optimizer, params)
        return params

    assert_same(*(outcome(changed, library) for library in LIBRARIES))
