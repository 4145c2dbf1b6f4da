"""convert() and revert(): which neighbours are fused, and that nobody sees a wrong value."""

import pytest
import torch
from torch import nn

import dlkernels
from dlkernels import nn as ours
from models import assert_same, images, mlp


def hook_places():
    return [
        (index, register)
        for index in (0, 1)
        for register in (
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        )
    ]


@pytest.mark.parametrize(("index", "register"), hook_places())
def test_hooks_see_the_values_in_between(index, register):
    torch.manual_seed(2)
    seen = []

    def values(*args):
        flat = [t for a in args[1:] for t in (a if isinstance(a, tuple) else (a,))]
        seen.extend(t.detach().clone() for t in flat)

    x = torch.randn(3, 4, requires_grad=True)
    for when in ("never", "hook first", "convert first"):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        seen.clear()
        if when == "convert first":
            dlkernels.convert(model)
            assert type(model[1]) is ours.FusedReLU
        getattr(model[index], register)(values)
        if when != "never":
            dlkernels.convert(model)  # takes apart what a hook was added to
            assert [type(m) for m in model] == [ours.Linear, ours.ReLU]
        model(x).square().sum().backward()
        if when == "never":
            expected = list(seen)
        assert_same(seen, expected)


def test_shared_modules_are_not_fused():
    relu, linear = nn.ReLU(), nn.Linear(4, 4)
    shared_relu = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)
    shared_linear = nn.Sequential(linear, nn.ReLU(), linear)
    elsewhere = nn.Module()
    elsewhere.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    elsewhere.first = elsewhere.net[0]
    x = torch.randn(3, 4)
    for model in (shared_relu, shared_linear):
        expected = model(x)
        dlkernels.convert(model)
        assert {type(m) for m in model} == {ours.Linear, ours.ReLU}
        torch.testing.assert_close(model(x), expected)
    dlkernels.convert(elsewhere)
    assert type(elsewhere.first) is ours.Linear

    twice = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU())] * 2)  # a pair, used twice
    expected = twice(x)
    dlkernels.convert(twice)
    assert type(twice[0][1]) is ours.FusedReLU
    torch.testing.assert_close(twice(x), expected)


def test_only_a_plain_sequential_fuses():
    class Reversed(nn.Sequential):
        def forward(self, x):
            for m in reversed(self):
                x = m(x)
            return x

    for model in (
        Reversed(nn.Linear(4, 4), nn.ReLU()),
        nn.ModuleList([nn.Linear(4, 4), nn.ReLU()]),
        nn.Sequential(nn.ReLU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.ReLU()),
    ):
        dlkernels.convert(model)
        assert not any(isinstance(m, ours.LinearReLU | ours.FusedReLU) for m in model.modules())


def test_fuse_false_takes_apart():
    model, x = mlp(), images()
    expected = model(x)
    dlkernels.convert(model)
    assert [c.name for c in dlkernels.convert(model, fuse=False).changed] == [
        "",
        "1",
        "2",
        "3",
        "4",
    ]
    assert [type(m) for m in model][1:5] == [ours.Linear, ours.ReLU, ours.Linear, nn.ReLU]
    torch.testing.assert_close(model(x), expected)
    assert not dlkernels.convert(model, fuse=False)


def test_values_after_the_relu_in_a_slice():
    model = mlp()
    x = images()
    first = nn.functional.relu(model[1](model[0](x)))
    dlkernels.convert(model)
    torch.testing.assert_close(model[:2](x), first)
    torch.testing.assert_close(model[1](model[0](x)), first)


def test_a_first_module_that_was_replaced():
    for again in (dlkernels.convert, dlkernels.revert):
        model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
        dlkernels.convert(model)
        model[0] = nn.Linear(4, 4)
        assert again(model)
        torch.testing.assert_close(model(x), nn.functional.relu(model[0](x)))
        assert (model(x) >= 0).all()
    model[0], model[1] = nn.Tanh(), ours.FusedReLU()
    dlkernels.convert(model)
    assert type(model[1]) is ours.ReLU


def test_revert_of_a_part():
    model, x = nn.Sequential(mlp(), nn.ReLU(), nn.Linear(5, 5), nn.ReLU()), images()
    expected = model(x)
    dlkernels.convert(model)
    assert dlkernels.revert(model[0])
    assert type(model[0][1]) is nn.Linear and type(model[2]) is ours.LinearReLU
    for half in (model[2], model[3], model[3:]):  # half a pair stays, so the model stays right
        report = dlkernels.revert(half)
        assert not report and len(report.left) == 1
        torch.testing.assert_close(model(x), expected)
    assert len(dlkernels.revert(model[2:])) == 2 and len(dlkernels.revert(model)) == 1
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch"}
    assert torch.equal(model(x), expected)


def test_a_stack_of_linear_layers_is_one_op():
    x = torch.randn(3, 4, requires_grad=True)
    for layers in ([0, 1, 0], [2, 0, 1, 0, 1, 0, 2], [0, 1, 0, 0, 1, 0]):
        make = [lambda: nn.Linear(4, 4), nn.ReLU, nn.Tanh]
        model = nn.Sequential(*[make[i]() for i in layers])
        expected = model(x)
        dlkernels.convert(model)
        assert type(model) is ours.Sequential and type(model[1:]) is ours.Sequential
        dlkernels.reset_stats()
        torch.testing.assert_close(model(x), expected)
        assert dlkernels.stats()["mlp"]["kernel"] >= 1
        seen = []
        for m in model:
            m.register_forward_hook(lambda m, args, y, seen=seen: seen.append(m))
        torch.testing.assert_close(model(x), expected)
        assert seen == list(model)
        dlkernels.convert(model)  # with the hooks there is nothing to put together
        assert type(model) is nn.Sequential
        torch.testing.assert_close(model(x), expected)
    for layers in (1, 2):
        ends_with_relu = nn.Sequential(*[m for _ in range(layers) for m in (make[0](), make[1]())])
        dlkernels.convert(ends_with_relu)
        assert type(ends_with_relu) is nn.Sequential
    mixed = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
    expected = mixed(x)
    dlkernels.convert(mixed)
    assert type(mixed) is nn.Sequential
    torch.testing.assert_close(mixed(x), expected)
