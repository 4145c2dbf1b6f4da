"""convert(), revert(), report(): what changes, what stays, and that the model computes the same."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import dlkernels
from dlkernels import nn as ours
from support.common import calls
from support.models import assert_same, cnn, images, mlp, models, results


def classes(model):
    return {name: type(m) for name, m in model.named_modules()}


@models
def test_same_results_and_back(model):
    model, x = copy.deepcopy(model), images()
    before, kinds, keys = results(model, x), classes(model), list(model.state_dict())
    parameters, states = list(model.parameters()), [set(vars(m)) for m in model.modules()]
    text = repr(model)
    assert dlkernels.convert(model) is model
    names = [name for name, kind in classes(model).items() if kind is not kinds[name]]
    assert names == [c.name for c in dlkernels.report(model).converted] != []
    with dlkernels.set_fallback("error"):  # so nothing ran on PyTorch
        dlkernels.reset_stats()
        after = results(model, x)
        assert any(dlkernels.stats()[op]["kernel"] for op in ("linear", "mlp"))
    assert_same(after, before)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    converted = classes(model)
    assert classes(dlkernels.convert(model)) == converted  # again: nothing left to do

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert dlkernels.revert(other) is other
        assert classes(other) == kinds and repr(other) == text
        with calls():
            back = results(other, x)
        assert all(torch.equal(a, b) for a, b in zip(back, before, strict=True))
        assert dlkernels.report(other).converted == dlkernels.report(other).fused == []
    assert [set(vars(m)) for m in model.modules()] == states


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
                dlkernels.convert(m)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(m(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*map(torch.tensor, losses))
    assert losses[1][-1] < losses[1][0]


def test_report(capsys):
    model = cnn()
    before = dlkernels.report(model)
    assert before.converted == before.fused == [] and "nothing is converted" in str(before)
    assert {m.name for m in before.left} == {"0", "1", "2", "3.0", "3.1", "4", "5", "6"}
    report = dlkernels.report(dlkernels.convert(model, verbose=True))
    assert capsys.readouterr().out == f"{report}\n"
    kinds = [("", "Sequential"), ("0", "Conv2d"), ("1", "ReLU"), ("2", "MaxPool2d")]
    kinds += [("3", "Sequential"), ("3.0", "Conv2d"), ("3.1", "ReLU"), ("6", "Linear")]
    assert report.converted == [(n, f"torch.nn.{k}", f"dlkernels.nn.{k}") for n, k in kinds]
    assert report.fused == [
        ("", "conv2d_relu_max_pool2d", "0, 1, 2"),
        ("3", "conv2d_relu", "0, 1"),
    ]
    assert [tuple(m)[:2] for m in report.left] == [
        ("4", "torch.nn.Flatten"),
        ("5", "torch.nn.Dropout"),
    ]
    assert all("no kernel" in m.reason for m in report.left)
    lines = str(report).splitlines()
    assert str(report) == repr(report) and lines[0] == "converted 8, fused 2, left 2"
    assert "  3.0      torch.nn.Conv2d         -> dlkernels.nn.Conv2d" in lines
    assert len({line.index("->") for line in lines if "->" in line}) == 1
    for entry in (report.converted[0], report.fused[0], report.left[0]):
        assert entry._fields[0] == "name"

    model[1] = nn.Tanh()  # the report is of the model as it is
    now = dlkernels.report(model)
    assert now.fused == [("3", "conv2d_relu", "0, 1")]
    assert ("1", "torch.nn.Tanh", "no kernel of ours for this class") in now.left
    empty = dlkernels.report(nn.Sequential())
    assert empty.converted == empty.left == [] and str(empty).startswith("converted 0")


def test_report_of_what_could_be_fused():
    model = dlkernels.convert(mlp(), fuse=False)
    assert [m.name for m in dlkernels.report(model).left] == ["", "0"]
    assert "not fused: dlkernels.convert(model)" in dlkernels.report(model).left[0].reason


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
    report = dlkernels.report(dlkernels.convert(module))
    assert type(module) is cls and report.converted[0].name == "" and "(model)" in str(report)
    assert type(dlkernels.revert(module)) is kind


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
        "other": (nn.GELU(), "no kernel"),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in left.items()})
    kinds = classes(model)
    report = dlkernels.report(dlkernels.convert(model))
    assert not report.converted and classes(model) == kinds
    reasons = {m.name: m.reason for m in report.left}
    for name, (_, words) in left.items():
        assert words in reasons[name], name


def test_lazy_modules_once_they_have_shapes():
    model = dlkernels.convert(nn.Sequential(nn.LazyLinear(4), nn.ReLU()))
    assert [type(m) for m in model] == [nn.LazyLinear, ours.ReLU]
    model(torch.randn(2, 3))
    dlkernels.convert(model)
    assert type(model[0]) is ours.Linear


def test_layers_added_later():
    model = dlkernels.convert(mlp())
    model.append(nn.ReLU())
    model.append(nn.Linear(5, 3))
    x = images()
    expected = model[-1](model[-2](model[:-2](x)))
    torch.testing.assert_close(model(x), expected)
    before = len(dlkernels.report(model).converted)
    assert len(dlkernels.report(dlkernels.convert(model)).converted) == before + 2
    torch.testing.assert_close(model(x), expected)


def test_other_dtypes_are_converted_and_decide_when_called():
    model = mlp().double()
    x = images().double()
    expected = model(x)
    dlkernels.convert(model)
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

    stay = [ours.LinearReLU(4, 4), ours.Conv2dReLU(1, 2, 3), ours.Conv2dReLUMaxPool2d(1, 2, 3)]
    stay.append(Mine(4, 4))
    model = ours.Sequential(ours.Linear(4, 4), ours.MLP([4, 3, 4]), *stay)
    kinds = [type(m) for m in stay]
    dlkernels.revert(model)
    assert type(model) is type(model[1]) is nn.Sequential
    assert [type(m) for m in model] == [nn.Linear, nn.Sequential, *kinds]
    assert {type(m) for m in model[1]} == {nn.Linear, nn.ReLU}


@pytest.mark.parametrize("again", [dlkernels.convert, dlkernels.revert])
def test_modules_that_torch_changed_since(again):
    x = torch.randn(3, 4)
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = dlkernels.convert(copy.deepcopy(plain))
    for m in (plain, model):
        torch.manual_seed(0)
        nn.utils.parametrizations.weight_norm(m[0])
        prune.random_unstructured(m[2], "weight", 0.5)
    assert_same(results(again(model), x), results(plain, x))
    reverted = dlkernels.revert(model)
    assert not any(type(m).__module__.startswith("dlkernels") for m in reverted.modules())
    assert not any(isinstance(m, ours.Linear) for m in reverted.modules())
    assert type(reverted[0]).__name__ == "ParametrizedLinear"
    for m in (plain, model):
        nn.utils.parametrize.remove_parametrizations(m[0], "weight")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), plain(x))


LOADER = DataLoader(TensorDataset(torch.zeros(2)))


@pytest.mark.parametrize(
    "bad", [None, 3, "model", nn.Linear, [nn.Linear(2, 2)], torch.zeros(2), LOADER], ids=type
)
def test_no_module(bad):
    for f in (dlkernels.convert, dlkernels.revert, dlkernels.report):
        with pytest.raises(TypeError, match=f"{f.__name__}: model must be a torch.nn.Module, got"):
            f(bad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_are_left():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert not dlkernels.report(dlkernels.convert(scripted)).converted
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
    dlkernels.convert(compiled)
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
