"""The optimizers: what has no kernel of ours is left to torch.optim, or refused as by it."""

import copy

import pytest
import torch
from torch import nn

import dlkernels
from support.common import calls
from support.optim_table import FLOAT32, PAIRS, assert_same, full, pair, tensor_list, train


class Counted(torch.Tensor):
    pass


TO_TORCH = {
    "lr that requires grad": (FLOAT32, {"lr": torch.tensor(0.1, requires_grad=True)}),
    "tensor weight decay": (FLOAT32, {"weight_decay": torch.tensor(0.1)}),
    "float64": (tensor_list(torch.ones(3, dtype=torch.float64)), {}),
    "complex": (tensor_list(torch.ones(3, dtype=torch.complex64)), {}),
    "mixed": (tensor_list(torch.ones(3), torch.ones(4, dtype=torch.float64)), {}),
    "subclass": (lambda: [{"params": [nn.Parameter(torch.ones(3).as_subclass(Counted))]}], {}),
    "second group": (lambda: [*FLOAT32(), FLOAT32()[0] | {"differentiable": True}], {}),
    "differentiable": (
        lambda: [{"params": [torch.ones(3), torch.ones(2)]}],
        {"differentiable": True},
    ),
}
ADAM_TO_TORCH = {
    "amsgrad": (FLOAT32, {"amsgrad": True}),
    "amsgrad fused": (FLOAT32, {"amsgrad": True, "fused": True}),
    "tensor betas": (FLOAT32, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}),
    "bfloat16 fused": (tensor_list(torch.ones(3, dtype=torch.bfloat16)), {"fused": True}),
}


@pytest.mark.parametrize(
    "name, groups, options",
    [
        pytest.param(name, *case, id=f"{what}-{name}")
        for name in PAIRS
        for what, case in (TO_TORCH | (ADAM_TO_TORCH if "Adam" in name else {})).items()
    ],
)
def test_left_to_torch(name, groups, options):
    a, b = (make(groups(), **full(make) | options) for make in PAIRS[name])
    hooked = []
    a.register_step_pre_hook(lambda *_: hooked.append("pre"))
    a.register_step_post_hook(lambda *_: hooked.append("post"))
    with calls(torchs=[a._op]):
        train(a, 3)
    train(b, 3)
    assert_same(a, b)
    assert hooked == ["pre", "post"] * 3


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_fused_is_still_asked_for(name):
    """After a step that PyTorch could not take fused, because the parameter is no run of memory."""
    ours, torchs = PAIRS[name]
    a, b = (make([nn.Parameter(torch.ones(5, 3).t())], amsgrad=True) for make in (ours, torchs))
    a.param_groups[0]["fused"] = True
    with calls(torchs=[a._op]):
        train(a, 3)
    train(b, 3)
    assert_same(a, b)
    assert a.param_groups[0]["fused"] is True


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients(name):
    a, b = (make([nn.Parameter(torch.ones(5))]) for make in PAIRS[name])
    for opt, torchs in ((a, [a._op]), (b, [])):
        (p,) = opt.param_groups[0]["params"]
        for _ in range(3):
            p.grad = torch.tensor([0.0, 1, 2, 0, 0]).to_sparse()
            with calls(torchs=torchs):
                opt.step()
    assert_same(a, b)


@pair
def test_left_to_torch_by_state(pair):
    a, b = (make(FLOAT32(), **full(make)) for make in pair)
    train(b, 2)
    for state in b.state.values():
        state |= {key: x.double() for key, x in state.items() if key in ("step", "momentum_buffer")}
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    with torch.no_grad():
        for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"]):
            p.copy_(q)
            a.state[p] = copy.deepcopy(b.state[q])  # loading casts what is not a step
    with calls(torchs=[a._op]):
        train(a, 1)
    train(b, 1)
    assert_same(a, b)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pair
def test_parameter_listed_twice(pair):
    results = []
    for make in pair:
        p = nn.Parameter(torch.ones(5))
        results.append(make([p, p], **full(make)))
    with calls(torchs=[results[0]._op]):
        train(results[0], 3)
    train(results[1], 3)
    assert_same(*results)


@pair
def test_parameters_in_a_tuple(pair):
    a, b = (make(FLOAT32(), **full(make)) for make in pair)
    for opt in a, b:
        opt.param_groups[0]["params"] = tuple(opt.param_groups[0]["params"])
    with calls(torchs=[a._op]):
        train(a, 3)
    train(b, 3)
    assert_same(a, b)


@pair
def test_disabled(pair):
    a, b = (make(FLOAT32(), **full(make)) for make in pair)
    with calls(), dlkernels.disabled():
        train(a, 3)
    train(b, 3)
    assert_same(a, b)
    with dlkernels.set_fallback("error"):
        train(a, 3)
        with pytest.raises(NotImplementedError, match=a._op):
            train(pair[0](tensor_list(torch.ones(3).double())()), 1)


REFUSED = {
    "SGD": [{"momentum": -1.0}, {"nesterov": True}, {"nesterov": True, "dampening": 0.1}],
    "Adam": [{"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, float("nan"))}],
    "Adagrad": [{"lr_decay": -1.0}, {"eps": float("nan")}, {"initial_accumulator_value": -1.0}],
    "Adadelta": [{"rho": 1.5}, {"rho": float("nan")}, {"eps": -1.0}],
    "RMSprop": [{"alpha": -1.0}, {"momentum": float("nan")}, {"eps": -1.0}],
}
REFUSED["AdamW"] = REFUSED["Adam"]


@pytest.mark.parametrize("name", PAIRS)
def test_what_torch_refuses(name):
    for make in PAIRS[name]:
        p = nn.Parameter(torch.ones(3))
        for options in (
            {"lr": -1.0},
            {"weight_decay": -1.0},
            {"lr": torch.ones(2)},
            *REFUSED[name],
        ):
            with pytest.raises(ValueError):
                make([p], **options)
        with pytest.raises(TypeError):
            make([3])
        if "fused" in make([p]).defaults:
            with pytest.raises(RuntimeError):
                make([p], fused=True, foreach=True)
        if "capturable" in make([p]).defaults:
            p.grad = torch.ones(3).to_sparse()
            with pytest.raises(RuntimeError, match="sparse"):
                make([p]).step()
            p.grad = torch.ones(3)
            with pytest.raises(AssertionError, match="capturable"):
                make([p], capturable=True).step()
