"""A converted Sequential: which modules run as one op, and that each stays the module it was,
whatever is done to the model afterwards."""

import contextlib
import copy
import random
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

import dlkernels
from dlkernels import nn as ours
from dlkernels._convert import patterns
from support.common import calls
from support.models import assert_same, results


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((4, 3)),  # so that other pools before it fit
        nn.Flatten(),
        nn.Linear(48, 6),
        nn.ReLU(inplace=True),
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


FUSED = {"conv2d_relu_max_pool2d", "conv2d_relu", "mlp"}
X = torch.randn(3, 2, 8, 6)


def pair(make=cnn):
    """A model and the same, converted."""
    torch.manual_seed(3)
    plain = make()
    return plain, dlkernels.convert(copy.deepcopy(plain))


def fused(model, x):
    """The ops that a call of the model runs."""
    before = dlkernels.stats()
    model(x)
    return {op for op, n in dlkernels.stats().items() if n["kernel"] > before[op]["kernel"]}


def test_runs_as_one_op():
    plain, model = pair()
    assert fused(model, X) == FUSED == {row.op for row in dlkernels.report(model).fused}
    assert_same(results(model, X), results(plain, X))


L, R, F_ = (lambda: nn.Linear(4, 4)), nn.ReLU, nn.Flatten


@pytest.mark.parametrize(
    ("row", "ops"),
    [
        ([L, R, L], {"mlp": 1}),
        ([L, L, R, L, R, L], {"linear": 1, "mlp": 1}),
        ([L, R, L, R], {"linear_relu": 2}),
        ([L, R, L, R, F_, L, R, R], {"linear_relu": 3, "relu": 1}),
        ([R, L, F_, R], {"relu": 2, "linear": 1}),
        ([L, R, lambda: nn.Linear(4, 4, bias=False)], {"linear_relu": 1, "linear": 1}),
        ([lambda: nn.Linear(4, 4, bias=False), R] * 2 + [L], {"linear_relu": 2, "linear": 1}),
        ([lambda: nn.Linear(4, 4, bias=False), R, F_, L, R, L], {"linear_relu": 1, "mlp": 1}),
    ],
)
def test_rows_of_linear_layers(row, ops):
    plain, model = pair(lambda: nn.Sequential(*[make() for make in row]))
    x = torch.randn(3, 4)
    before = dlkernels.stats()
    torch.testing.assert_close(model(x), plain(x))
    ran = {op: n["kernel"] - before[op]["kernel"] for op, n in dlkernels.stats().items()}
    assert {op: n for op, n in ran.items() if n} == ops


def test_taps_slices_and_single_modules():
    plain, model = pair()
    x = y = X
    for i, (a, b) in enumerate(zip(plain, model)):
        x, y = a(x), b(y)
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(model[: i + 1](X), plain[: i + 1](X))
        assert type(model[: i + 1]) is ours.Sequential
    layers = nn.ModuleList(model)
    for layer in layers[:4]:
        x = layer(X) if layer is layers[0] else layer(x)
    torch.testing.assert_close(x, plain[:4](X))


def test_relu_in_place():
    _, model = pair()
    for index, shape in ((1, (3, 5)), (4, (3, 5))):
        x = torch.randn(shape)
        expected = x.relu()
        assert (model[index](x) is x) == model[index].inplace
        assert not model[index].inplace or torch.equal(x, expected)


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.base(x) - self.scale


def set_attribute(index, name, value):
    return lambda model: setattr(model[index], name, value)


def replace(index, make):
    return lambda model: model.__setitem__(index, make(model[index]))


def freeze_as_buffer(model):
    weight = model[7].weight.detach()
    del model[7].weight
    model[7].register_buffer("weight", weight)


EDITS = {
    "insert": lambda model: model.insert(8, nn.BatchNorm1d(6)),
    "delete a ReLU": lambda model: model.__delitem__(1),
    "append": lambda model: model.extend([nn.ReLU(), nn.Linear(3, 2)]),
    "another class": replace(7, lambda m: nn.LazyLinear(6)),
    "a new layer": replace(7, lambda m: nn.Linear(48, 6)),
    "an adapter": replace(7, Adapter),
    "an adapter of a convolution": replace(0, Adapter),
    "checkpointed": replace(3, checkpoint_wrapper),
    "weight_norm": lambda model: nn.utils.parametrizations.weight_norm(model[7]),
    "old weight_norm": lambda model: nn.utils.weight_norm(model[0]),
    "pruned": lambda model: prune.l1_unstructured(model[0], "weight", amount=9),
    "ceil_mode": set_attribute(2, "ceil_mode", True),
    "stride": set_attribute(2, "stride", 1),
    "kernel_size": set_attribute(2, "kernel_size", 1),
    "padding": set_attribute(3, "padding", (1, 1)),
    "not in place": set_attribute(1, "inplace", False),
    "no bias": set_attribute(9, "bias", None),
    "a buffer as weight": freeze_as_buffer,
    "forward on the instance": set_attribute(1, "forward", torch.tanh),
    "_conv_forward on the instance": set_attribute(
        0, "_conv_forward", lambda x, w, b: F.conv2d(x, 2 * w, b, padding=1)
    ),
    "_call_impl on the instance": set_attribute(1, "_call_impl", torch.sigmoid),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("edit", EDITS)
def test_edits(edit):
    for again in (None, dlkernels.convert, dlkernels.revert):
        plain, model = pair()
        for m in (plain, model):
            torch.manual_seed(4)
            EDITS[edit](m)
        if again:
            again(model)
        torch.manual_seed(5)  # a lazy layer draws its weights now
        expected = results(plain, X)
        torch.manual_seed(5)
        assert_same(results(model, X), expected)
    assert not any(type(m).__module__.startswith("dlkernels") for m in model.modules())


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("index", [0, 1, 2, 7, 8])
def test_hooks_see_the_values_in_between(index, register):
    seen = {}

    def watch(m, key):
        def hook(_, *values):
            flat = [t for v in values for t in (v if isinstance(v, tuple) else (v,))]
            seen[key] = [t.detach().clone() for t in flat if t is not None]

        return getattr(m[index], register)(hook)

    plain, model = pair()
    for m in (plain, model):  # a gradient's hook does not let the value be overwritten
        m[1].inplace = m[8].inplace = False
    handles = [watch(plain, "torch"), watch(model, "ours")]
    assert_same(results(model, X), results(plain, X))
    assert seen["ours"]
    assert_same(seen["ours"], seen["torch"])
    for handle in handles:
        handle.remove()
    assert fused(model, X) == FUSED


def test_hooks_on_all_modules():
    _, model = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    model(X)
    handle.remove()
    assert seen == [*model, model]
    assert fused(model, X) == FUSED


def test_hooks_that_a_module_before_sets():
    class Sets(nn.Module):
        def forward(self, x):
            model[2].register_forward_hook(lambda m, args, y: y + 1)
            return x

    plain = nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.ReLU())
    model = dlkernels.convert(copy.deepcopy(plain))
    model[0] = Sets()
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), plain(x) + 1)


@contextlib.contextmanager
def patched(cls, name):
    old = vars(cls)[name]
    setattr(cls, name, lambda self, *args, **kwargs: old(self, *args, **kwargs) + 1)
    try:
        yield
    finally:
        setattr(cls, name, old)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Linear", "forward"),
        ("ReLU", "forward"),
        ("Conv2d", "forward"),
        ("Conv2d", "_conv_forward"),
        ("MaxPool2d", "forward"),
        ("Sequential", "forward"),
        ("Module", "__call__"),
        ("Module", "_call_impl"),
    ],
)
def test_patched_classes(kind, name):
    plain, model = pair()
    with patched(getattr(nn, kind), name):
        expected = plain(X)
        torch.testing.assert_close(model(X), expected)
        torch.testing.assert_close(dlkernels.convert(model)(X), expected)
    if kind != "Module":
        with patched(getattr(ours, kind), name):  # ours alone
            torch.testing.assert_close(model(X), expected)
    assert fused(model, X) == FUSED
    torch.testing.assert_close(model(X), plain(X))


def test_modules_that_are_compiled():
    plain, model = pair()
    model[1].compile(backend="eager")
    assert fused(model, X) == FUSED - {"conv2d_relu_max_pool2d"} | {"conv2d", "max_pool2d"}
    torch.testing.assert_close(model(X), plain(X))


def test_modules_in_two_places():
    shared = nn.Linear(4, 4)
    models = [
        nn.Sequential(shared, nn.ReLU(), shared),
        nn.Sequential(shared, nn.Tanh(), nn.Linear(4, 1)),
        nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), relu := nn.ReLU()), relu] * 2),
    ]
    x = torch.randn(3, 4)
    expected = [m(x) for m in models]
    for model in models:
        dlkernels.convert(model)
        for m, y in zip(models, expected):
            torch.testing.assert_close(m(x), y)
    for model in models:
        dlkernels.revert(model)
        for m, y in zip(models, expected):
            torch.testing.assert_close(m(x), y)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3),
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d((1, 2), (2, 1)),
        nn.AvgPool2d(2),
        type("Mine", (nn.MaxPool2d,), {})(2),
    ],
)
def test_other_pools(pool):
    plain, model = pair(lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), pool))
    assert "conv2d_relu" in fused(model, X)
    assert_same(results(model, X), results(plain, X))


def test_pools_with_indices():
    pool = nn.MaxPool2d(2, return_indices=True)
    plain, model = pair(lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), pool))
    for got, expected in zip(model(X), plain(X), strict=True):
        torch.testing.assert_close(got, expected)


def test_only_a_plain_sequential_fuses():
    class Reversed(nn.Sequential):
        def forward(self, x):
            for m in reversed(self):
                x = m(x)
            return x

    class Watched(nn.Sequential):
        def __call__(self, x):
            return super().__call__(x) + 1

    x = torch.randn(3, 4)
    for model in (
        Reversed(nn.ReLU(), nn.Linear(4, 4)),
        Watched(nn.Linear(4, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.ReLU()),
    ):
        expected = model(x)
        torch.testing.assert_close(dlkernels.convert(model)(x), expected)
        assert not dlkernels.report(model).fused


def test_fuse_false():
    plain, model = pair()
    for m in (dlkernels.convert(model, fuse=False), dlkernels.convert(plain, fuse=False)):
        assert type(m) is nn.Sequential and type(m[0]) is ours.Conv2d
        assert fused(m, X) == {"conv2d", "max_pool2d", "relu", "linear"}
        assert not dlkernels.report(m).fused
    torch.testing.assert_close(model(X), plain(X))
    assert fused(dlkernels.convert(model), X) == FUSED


def test_other_inputs():
    plain, model = pair()
    for x in (X.double(), X.to(memory_format=torch.channels_last), X[0]):
        for m in (plain, model):
            m.to(x.dtype)[6].start_dim = -3
        torch.testing.assert_close(model(x), plain(x))

    class Marked(torch.Tensor):
        pass

    for m in (plain, model):
        m.float()
    y = model(X.as_subclass(Marked))
    assert type(y) is Marked
    torch.testing.assert_close(y.as_subclass(torch.Tensor), plain(X))
    with dlkernels.disabled(), calls():
        assert torch.equal(model(X), plain(X))
    with pytest.raises(RuntimeError, match="conv2d: input must be"):
        model(torch.randn(3, 4))


def random_row():
    """Modules of which some were changed, so that no row of them may run as one op."""
    makes = [
        lambda: nn.Linear(3, 3, bias=random.random() < 0.5),
        lambda: nn.ReLU(inplace=random.random() < 0.5),
        lambda: nn.Conv2d(1, 1, 1),
        lambda: nn.MaxPool2d(2, return_indices=random.random() < 0.2),
        nn.Tanh,
    ]
    row = [random.choice(makes)() for _ in range(random.randrange(7))]
    dlkernels.convert(nn.ModuleList(row))
    for m in row:
        if random.random() < 0.1:
            getattr(m, random.choice(HOOKS))(lambda *args: None)
        if random.random() < 0.05:
            setattr(m, random.choice(["forward", "_conv_forward", "_call_impl"]), len)
        if random.random() < 0.05:
            m._parameters = OrderedDict(m._parameters)  # as of a class that gathers them
        if isinstance(m, nn.Linear) and random.random() < 0.1:
            del m.weight
            m.weight = torch.zeros(3, 3)
    return [(nn.ReLU,) if type(m) is ours.ReLU and random.random() < 0.3 else m for m in row]


def test_the_matcher_in_cpp_is_the_one_in_python():
    random.seed(7)
    x, found = torch.zeros(3), 0
    for _ in range(1000):
        row = random_row()
        for begin in range(len(row) + 1):
            both = [f(row, begin, x) for f in (patterns.find_in_cpp, patterns.find_in_python)]
            assert both[0] is both[1] is None or both[0][:2] == both[1][:2]
            if both[0]:
                found += 1
                for a, b in zip(both[0][2:], both[1][2:]):
                    assert len(a) == len(b) and all(p is q for p, q in zip(a, b))
    assert found > 100
    for bad in ((), (row,), (tuple(row), 0, x), (row, -1, x), (row, "0", x), (row, 2**70, x)):
        with pytest.raises((TypeError, OverflowError)):
            patterns.find_in_cpp(*bad)
    assert (
        patterns.find_in_cpp(row, 99, x) is None and patterns.find_in_cpp([None, 3], 0, x) is None
    )
