"""convert() and revert(): what changes, what stays, and that the model computes the same."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import dlkernels
from common import calls
from dlkernels import nn as ours
from models import assert_same, cnn, images, mlp, models, results


def classes(model):
    return {name: type(m) for name, m in model.named_modules()}


@models
def test_same_results_and_back(model):
    model, x = copy.deepcopy(model), images()
    before, kinds, keys = results(model, x), classes(model), list(model.state_dict())
    parameters = list(model.parameters())
    text = repr(model)
    report = dlkernels.convert(model)
    assert report and len(report) == len(report.changed) == sum(
        kinds[name] is not kind for name, kind in classes(model).items()
    )
    with dlkernels.set_fallback("error"):  # so nothing ran on PyTorch
        dlkernels.reset_stats()
        after = results(model, x)
        assert any(dlkernels.stats()[op]["kernel"] for op in ("linear", "mlp"))
    assert_same(after, before)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not dlkernels.convert(model)  # again: nothing left to do

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert len(dlkernels.revert(other)) == len(report)
        assert classes(other) == kinds and repr(other) == text
        with calls():
            back = results(other, x)
        assert all(torch.equal(a, b) for a, b in zip(back, before, strict=True))
        assert not dlkernels.revert(other)


def test_trains_with_the_optimizer_it_had():
    torch.manual_seed(3)
    model, x, target = cnn(), images(), torch.tensor([0, 1, 2])
    other = copy.deepcopy(model)
    losses = []
    for m in (model, other):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        losses.append([])
        for step in range(6):
            if m is other and step == 2:
                assert dlkernels.convert(m)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(m(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*map(torch.tensor, losses))
    assert losses[1][-1] < losses[1][0]


def test_report():
    model = cnn()
    report = dlkernels.convert(model)
    assert [tuple(c) for c in report.changed] == [
        ("0", "torch.nn.Conv2d", "dlkernels.nn.Conv2dReLUMaxPool2d"),
        ("1", "torch.nn.ReLU", "dlkernels.nn.FusedReLU"),
        ("2", "torch.nn.MaxPool2d", "dlkernels.nn.FusedMaxPool2d"),
        ("3.0", "torch.nn.Conv2d", "dlkernels.nn.Conv2dReLU"),
        ("3.1", "torch.nn.ReLU", "dlkernels.nn.FusedReLU"),
        ("6", "torch.nn.Linear", "dlkernels.nn.Linear"),
    ]
    assert [tuple(m)[:2] for m in report.left] == [
        ("4", "torch.nn.Flatten"),
        ("5", "torch.nn.Dropout"),
    ]
    assert all("no kernel" in m.reason for m in report.left)
    lines = str(report).splitlines()
    assert str(report) == repr(report) and lines[0] == "converted 6, left 2"
    assert "  3.0  torch.nn.Conv2d     -> dlkernels.nn.Conv2dReLU" in lines
    assert len({line.index("->") for line in lines if "->" in line}) == 1

    empty = dlkernels.convert(nn.Sequential())
    assert not empty and len(empty) == 0 and empty.changed == []
    assert str(empty).startswith("converted 0")


@pytest.mark.parametrize(
    ("module", "cls"),
    [
        (nn.Linear(3, 2), ours.Linear),
        (nn.ReLU(), ours.ReLU),
        (nn.Conv2d(1, 2, 3), ours.Conv2d),
        (nn.MaxPool2d(2), ours.MaxPool2d),
        (nn.CrossEntropyLoss(), ours.CrossEntropyLoss),
    ],
)
def test_the_model_itself(module, cls):
    kind = type(module)
    report = dlkernels.convert(module)
    assert type(module) is cls and report.changed[0].name == "" and "(model)" in str(report)
    assert dlkernels.revert(module) and type(module) is kind


def test_what_is_left_and_why():
    class MyLinear(nn.Linear):
        pass

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    pruned = nn.Linear(4, 4)
    prune.l1_unstructured(pruned, "weight", amount=2)
    wrapped = nn.Linear(4, 4)
    wrapped.forward = lambda x: x
    left = {
        "subclass": (MyLinear(4, 4), "subclass"),
        "lazy": (nn.LazyLinear(4), "subclass"),
        "normed": (normed, "subclass"),
        "pruned": (pruned, "pruned"),
        "wrapped": (wrapped, "forward was replaced"),
        "inplace": (nn.ReLU(inplace=True), "in place"),
        "other": (nn.GELU(), "no kernel"),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in left.items()})
    kinds = classes(model)
    report = dlkernels.convert(model)
    assert not report and classes(model) == kinds
    reasons = {m.name: m.reason for m in report.left}
    for name, (_, words) in left.items():
        assert words in reasons[name], name


def test_lazy_modules_once_they_have_shapes():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    assert len(dlkernels.convert(model)) == 1  # the ReLU
    model(torch.randn(2, 3))
    assert [c.name for c in dlkernels.convert(model).changed] == ["0", "1"]
    assert type(model[0]) is ours.LinearReLU


def test_layers_added_later():
    model = mlp()
    dlkernels.convert(model)
    model.append(nn.ReLU())
    model.append(nn.Linear(5, 3))
    x = images()
    expected = model[-1](model[-2](model[:-2](x)))
    assert [c.name for c in dlkernels.convert(model).changed] == ["5", "6", "7"]
    assert type(model[5]) is ours.LinearReLU
    torch.testing.assert_close(model(x), expected)


def test_other_dtypes_are_converted_and_decide_when_called():
    model = mlp().double()
    x = images().double()
    expected = model(x)
    assert dlkernels.convert(model)
    with calls(torchs=["mlp"]):
        assert torch.equal(model(x), expected)
    with dlkernels.set_fallback("error"), pytest.raises(NotImplementedError):
        model(x)
    meta = mlp().to("meta")
    dlkernels.convert(meta)
    assert meta(images().to("meta")).shape == (3, 5)


def test_hooks_survive():
    model, seen = mlp(), []
    model[5].register_forward_hook(lambda m, args, y: seen.append(y.shape))
    dlkernels.convert(model)
    model(images())
    dlkernels.revert(model)
    model(images())
    assert seen == [(3, 5), (3, 5)]


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    dlkernels.convert(model)
    assert model[2].weight is model[0].weight and len(list(model.parameters())) == 3


def test_revert_of_modules_made_by_hand():
    class Mine(ours.Linear):
        pass

    model = nn.Sequential(ours.Linear(4, 4), ours.LinearReLU(4, 4), nn.ReLU(), Mine(4, 4))
    report = dlkernels.revert(model)
    assert [c.name for c in report.changed] == ["0"]
    assert [(m.name, m.type) for m in report.left] == [
        ("1", "dlkernels.nn.LinearReLU"),
        ("3", f"{__name__}.{Mine.__qualname__}"),
    ]
    assert "no such class" in report.left[0].reason


@pytest.mark.parametrize("bad", [None, 3, "model", nn.Linear, [nn.Linear(2, 2)], torch.zeros(2)])
def test_no_module(bad):
    for f in (dlkernels.convert, dlkernels.revert):
        with pytest.raises(TypeError, match=f"{f.__name__}: model must be a torch.nn.Module, got"):
            f(bad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_are_left():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert not dlkernels.convert(scripted)
    scripted(torch.randn(2, 3))


@models
def test_compile(model):
    model, x = copy.deepcopy(model), images()
    expected = results(model, x)
    dlkernels.convert(model)
    compiled = torch.compile(model, fullgraph=True)
    dlkernels.reset_stats()
    assert_same(results(compiled, x), expected)
    ran = dlkernels.stats()
    assert ran["linear"]["kernel"] + ran["mlp"]["kernel"] > 0
    assert sum(op["torch"] for op in ran.values()) == 0


def test_convert_after_compile():
    model, x = mlp(), images()
    compiled = torch.compile(model, fullgraph=True)
    expected = compiled(x)
    assert dlkernels.convert(compiled)
    with calls(kernels=["mlp"]):
        torch.testing.assert_close(compiled(x), expected)


@models
def test_export(model):
    model, x = copy.deepcopy(model).eval(), images()
    expected = model(x)
    dlkernels.convert(model)
    exported = torch.export.export(model, (x,)).module()
    with dlkernels.set_fallback("error"):
        torch.testing.assert_close(exported(x), expected)


@models
def test_functorch(model):
    model, xs = copy.deepcopy(model).eval(), torch.randn(4, 3, 1, 6, 6)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    parameters = {k: v.detach() for k, v in model.named_parameters()}
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    expected, values = per_sample(parameters, xs), torch.func.vmap(model)(xs)
    dlkernels.convert(model)
    got = per_sample(parameters, xs)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(model)(xs), values)


@models
def test_autocast(model):
    model, x = copy.deepcopy(model), images()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        dlkernels.convert(model)
        y = model(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
