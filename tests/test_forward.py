"""convert() of modules with a forward of their own: which ReLUs are fused, and that nothing else
about the function changes."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlkernels
from dlkernels._convert import rewrite
from support.common import calls
from support.models import assert_same, results


class Functions(nn.Module):
    """Each way to write it."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(channels, 6, 3)
        self.pool, self.act = nn.MaxPool2d(2), nn.ReLU(inplace=True)
        self.fc1, self.fc2 = nn.Linear(54, 8), nn.Linear(8, 8)
        self.more = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.function = F.relu

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(x)
        x = F.max_pool2d(x, kernel_size=2, stride=2)
        x = self.pool(F.relu(self.conv2(x), inplace=True)).flatten(1)
        x = self.act(self.fc1(x))
        for layer in self.more:
            x = torch.relu(layer(x))
        return self.function(self.head(x) + (self.fc2(x).relu()))

    def head(self, x):
        return self.more[0](x).relu_()


KERNELS = {"conv2d_relu_max_pool2d", "linear_relu"}
KERNELS |= {"conv2d_relu_max_pool2d_backward", "linear_backward"}


def images():
    return torch.randn(2, 1, 16, 16)


def test_every_way_to_write_it():
    model, x = Functions(), images()
    expected, text = results(model, x), repr(model)
    report = dlkernels.report(dlkernels.convert(model))
    change = next(c for c in report.converted if c.name == "")
    assert change.after == f"{change.before} (fused)"
    assert sorted(report.fused) == [
        ("", "conv2d_relu_max_pool2d", "conv1, F.relu, F.max_pool2d"),
        ("", "conv2d_relu_max_pool2d", "conv2, F.relu, pool"),
        ("", "linear_relu", "fc1, act"),
        ("", "linear_relu", "fc2, relu"),
        ("", "linear_relu or conv2d_relu", "layer, torch.relu"),
        ("", "linear_relu or conv2d_relu", "more[0], relu_"),
    ]
    assert isinstance(model, Functions) and repr(model) == text
    with calls(KERNELS):
        assert_same(results(model, x), expected)
    kind = type(model)
    assert type(dlkernels.convert(model)) is kind
    assert type(dlkernels.convert(model, fuse=False)) is Functions
    assert type(dlkernels.convert(model)) is kind
    dlkernels.revert(model)
    assert type(model) is Functions and type(model.fc1) is nn.Linear
    with calls():
        assert_same(results(model, x), expected)


def test_copies():
    model, x = Functions(), images()
    expected = model(x)
    dlkernels.convert(model)
    copied = copy.deepcopy(model)
    assert type(copied) is type(model)
    dlkernels.convert(other := Functions())
    assert type(other) is type(model)  # one subclass for all of them
    with calls({"conv2d_relu_max_pool2d", "linear_relu"}):
        torch.testing.assert_close(copied(x), expected)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert type(loaded) is Functions
        torch.testing.assert_close(loaded(x), expected)
        dlkernels.convert(loaded)
        assert type(loaded) is type(model)


def test_compile_and_export():
    model, x = Functions(), images()
    expected = results(model, x)
    dlkernels.convert(model)
    with calls(KERNELS):
        assert_same(results(torch.compile(model, fullgraph=True), x), expected)
    with calls({"conv2d_relu_max_pool2d", "linear_relu"}):
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected[0])


class Eventful(nn.Module):
    """What a trace would freeze or lose."""

    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.flag, self.seen, self.__private = False, [], 2.0

    def forward(self, x, *args, scale=1.0, **kwargs):
        "Its text."
        if isinstance(x, torch.Tensor) and x.sum() > 1e6:
            raise OverflowError
        self.seen.append((len(args), sorted(kwargs)))
        h = self.fc(x)
        y = F.relu(h)
        y = y + h
        y = F.relu(self.fc(y)) * scale * self.__private
        y = F.dropout(y, 1.0, training=self.training)
        return -y if self.flag else y

    def extra_repr(self):
        return super().extra_repr() + "x"


def test_the_rest_of_the_program_stays():
    model, x = Eventful(), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    assert dlkernels.report(dlkernels.convert(model)).fused == [("", "linear_relu", "fc, F.relu")]
    assert model.forward.__doc__ == "Its text." and repr(model) == repr(plain).replace("!", "")
    for change in ("flag", "training"):
        for value in (True, False):
            for m in (model, plain):
                setattr(m, change, value)
            args, kwargs = (1, 2), {"scale": 3.0, "other": None}
            torch.testing.assert_close(model(x, *args, **kwargs), plain(x, *args, **kwargs))
    assert model.seen == plain.seen == [(2, ["other"])] * 4
    with pytest.raises(OverflowError) as raised:
        model(x + 1e6)
    assert raised.traceback[-1].path.name == "test_forward.py"
    with calls({"linear", "linear_relu"}):
        model(x)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.act(self.layer(x))


@pytest.mark.parametrize("which", ["layer", "act"])
def test_hooks_added_later_see_the_values_in_between(which):
    model, x, seen = Pair(), torch.randn(3, 4), []
    dlkernels.convert(model)
    getattr(model, which).register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    with calls({"linear", "relu"}):
        y = model(x)
    h = model.layer(x)
    assert_same(seen[0], (x, h) if which == "layer" else (h, y))
    torch.testing.assert_close(y, h.relu())


def test_modules_replaced_later():
    model, x = Pair(), torch.randn(3, 4)
    dlkernels.convert(model)
    model.act = nn.Tanh()
    torch.testing.assert_close(model(x), model.layer(x).tanh())
    model.act, model.layer = nn.ReLU(), nn.Identity()
    assert torch.equal(model(x), x.relu())
    assert not dlkernels.report(model).fused
    assert type(dlkernels.convert(model)) is Pair  # nothing to fuse now
    model.layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    dlkernels.convert(model)
    torch.testing.assert_close(model(x), model.layer(x).relu())


def test_other_arguments_and_dtypes():
    model, x = Functions().double(), images().double()
    expected = model(x)
    dlkernels.convert(model)
    with calls(torchs={"conv2d_relu_max_pool2d", "conv2d_relu", "max_pool2d", "linear_relu"}):
        torch.testing.assert_close(model(x), expected)
    with calls(), dlkernels.disabled():
        torch.testing.assert_close(model(x), expected)


def reasons(model):
    return [m.reason for m in dlkernels.report(dlkernels.convert(model)).left if m.name == ""]


PLAIN = "its forward is no plain method: asynchronous, a lambda, or it binds self anew"


def test_left_where_nothing_is_fused():
    class AfterNorm(Pair):
        def forward(self, x):
            return F.relu(F.layer_norm(self.layer(x), (4,)))

    class Rebinds(Pair):
        def forward(self, x):
            self = Pair()
            return F.relu(self.layer(x))

    class Lambda(Pair):
        forward = lambda self, x: F.relu(self.layer(x))  # noqa: E731

    class Wrapped(Pair):
        forward = torch.no_grad()(Pair.forward)

    class Registered(Pair):
        def __init_subclass__(cls):
            raise AssertionError("called")

        def forward(self, x):
            return F.relu(self.layer(x))

    assert reasons(AfterNorm()) == ["no ReLU in its forward comes right after a Linear or Conv2d"]
    assert reasons(Rebinds()) == [PLAIN]
    assert reasons(Lambda()) == [PLAIN]
    assert reasons(Wrapped()) == []
    assert "__init_subclass__" in reasons(Registered())[0]
    replaced = Pair()
    replaced.forward = lambda x: x
    assert reasons(replaced) == [] and type(replaced) is Pair


TEXT = """
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return F.relu(self.fc(x))
"""


def test_left_without_its_source(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(TEXT)

    def net(filename):
        names = {"__name__": "net"}
        exec(compile(path.read_text(), filename, "exec"), names)
        return names["Net"]()

    assert reasons(net("<string>")) == ["the source of its forward is not to be had"]
    model = net(str(path))
    for other in (TEXT.replace("F.relu", "-F.relu"), "\n" + TEXT, "", "no Python"):
        path.write_text(other)
        rewrite._find.cache_clear()
        assert len(reasons(model)) == 1
        x = torch.randn(3, 4)
        torch.testing.assert_close(model(x), model.fc(x).relu())
    path.write_text(TEXT)
    rewrite._find.cache_clear()
    assert dlkernels.report(dlkernels.convert(model)).fused == [("", "linear_relu", "fc, F.relu")]


class Pooled(nn.Module):
    """Pools that do more than the fused op."""

    def __init__(self):
        super().__init__()
        self.c, self.pool = nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)

    def forward(self, x):
        a, indices = F.max_pool2d(F.relu(self.c(x)), 2, return_indices=True)
        b = F.max_pool2d(F.relu(self.c(x)), 2, 2, 0, 1, True)
        c = F.max_pool2d(F.relu(self.c(x)), kernel_size=3, stride=1, padding=1, ceil_mode=False)
        return a + F.max_pool2d(b, 1) + c.mean() + indices + self.pool(F.relu(self.c(x)))


def test_pools_in_a_forward():
    model, x = Pooled(), images()
    expected = results(model, x)
    fused = dlkernels.report(dlkernels.convert(model)).fused
    assert [row.op for row in fused] == ["conv2d_relu"] + 3 * ["conv2d_relu_max_pool2d"]
    assert_same(results(model, x), expected)
    model.pool.return_indices = True
    with pytest.raises(TypeError):  # as PyTorch's: a tensor and a tuple
        model(x)
    assert len(dlkernels.report(model).fused) == 4
    assert dlkernels.report(model).fused[-1].modules == "c, F.relu"


def test_wrong_arguments_of_a_pool():
    class Wrong(Pooled):
        def forward(self, x, way):
            if way == 0:
                return F.max_pool2d(F.relu(self.c(x)), 2, kernel_size=2)
            if way == 1:
                return F.max_pool2d(F.relu(self.c(x)), size=2)
            return F.max_pool2d(F.relu(self.c(x)))

    model = dlkernels.convert(Wrong())
    assert len(dlkernels.report(model).fused) == 3
    for way in range(3):
        with pytest.raises(TypeError, match="max_pool2d"):
            model(images(), way)


def edited(self, x):
    return F.relu(self.layer(x)) + 100


def test_classes_patched_later(monkeypatch):
    plain, x = Pair(), torch.randn(3, 4)
    model = dlkernels.convert(copy.deepcopy(plain))
    assert type(model) is not Pair
    with monkeypatch.context() as patch:
        patch.setattr(Pair, "forward", edited)
        torch.testing.assert_close(model(x), plain(x))
        assert (model(x) >= 100).all() and not dlkernels.report(model).fused
        again = dlkernels.convert(copy.deepcopy(model))  # the new one is rewritten
        with calls({"linear_relu"}):
            torch.testing.assert_close(again(x), plain(x))
    torch.testing.assert_close(again(x), plain(x))
    with monkeypatch.context() as patch:  # as IPython's autoreload does
        patch.setattr(Pair.forward, "__code__", edited.__code__)
        torch.testing.assert_close(model(x), plain(x))
        assert (model(x) >= 100).all()
    with monkeypatch.context() as patch:  # by way of the subclass, with a call of what it was
        old = type(model).forward
        patch.setattr(type(model), "forward", lambda self, x: old(self, x) + 100)
        torch.testing.assert_close(model(x), plain(x) + 100)
    with calls({"linear_relu"}):
        torch.testing.assert_close(model(x), plain(x))


class Counting(Pair):
    calls = 0

    def forward(self, x):
        self.__class__.calls += 1
        type(self).last = self.__class__.__name__
        return F.relu(self.layer(x))

    def another(self):
        return type(self)()


def test_attributes_of_the_class_are_one():
    model = dlkernels.convert(Counting())
    model(torch.randn(3, 4))
    assert dlkernels.report(model).fused
    assert (Counting.calls, Counting.last) == (1, "Counting")
    assert isinstance(model.another(), Counting)
    del type(model).last
    assert not hasattr(Counting, "last")


def test_classes_that_ask_for_their_own_class():
    class OldSuper(Pair):
        def train(self, mode=True):
            super(self.__class__, self).train(mode)
            return self

        def forward(self, x):
            return F.relu(self.layer(x))

    class OldInit(Pair):
        def __init__(self):
            super(type(self), self).__init__()

        def forward(self, x):
            return F.relu(self.layer(x))

    class Exact(Pair):
        def forward(self, x):
            if self.__class__ is not Exact:
                raise TypeError
            return F.relu(self.layer(x))

    for cls, words in (
        (OldSuper, "train says super(self.__class__, self)"),
        (OldInit, "__init__ says super(type(self), self)"),
        (Exact, "forward says self.__class__ is not Exact"),
    ):
        model = dlkernels.convert(cls())
        assert type(model) is cls and type(model.layer) is dlkernels.nn.Linear
        model.train().eval()(torch.randn(3, 4))
        (reason,) = reasons(model)
        assert words in reason


class Weighted(Pair):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return F.relu(self.layer(x)) * self.scale


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("again", [None, dlkernels.convert, dlkernels.revert])
def test_parametrized_later(again):
    x, plain = torch.randn(3, 4), Weighted()
    model = dlkernels.convert(copy.deepcopy(plain))
    assert dlkernels.report(model).fused
    for m in (plain, model):
        nn.utils.parametrize.register_parametrization(m, "scale", Doubled())
    if again:
        again(model)
    assert_same(results(copy.deepcopy(model), x), results(plain, x))
    assert "scale" not in vars(Weighted)
    nn.utils.parametrize.remove_parametrizations(model, "scale", leave_parametrized=False)
    torch.testing.assert_close(model(x), Weighted.forward(model, x))
    assert type(dlkernels.revert(model)) is Weighted


def test_classes_derived_of_a_rewritten_one():
    model = dlkernels.convert(Pair())
    cls = type(type(model))("Derived", (type(model),), {"__module__": __name__})
    cls.number = 3
    assert cls.number == 3 and not hasattr(Pair, "number")
    del cls.number
    assert not hasattr(cls, "number")
