"""Tools around a converted model: each gives what it gives for PyTorch's own model."""

import copy
import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import dlkernels
from dlkernels import functional
from dlkernels import nn as ours
from support.common import calls


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding="same")
        self.features = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU()
        )

    def forward(self, x):
        return self.head(self.features(F.max_pool2d(F.relu(self.conv(x)), 2)))


X = torch.randn(2, 1, 8, 8)


@pytest.fixture
def nets():
    """The model, and the same converted."""
    plain = Net().eval()
    return plain, dlkernels.convert(copy.deepcopy(plain))


# ---- torch.fx -------------------------------------------------------------------------------


class Through(fx.Tracer):
    """Knows no leaf but one."""

    def is_leaf_module(self, m, path):
        return type(m) is nn.MaxPool2d


def graphs(tracer, models):
    return [
        [(n.op, str(n.target), n.name, n.args, n.kwargs) for n in tracer().trace(m).nodes]
        for m in models
    ]


@pytest.mark.parametrize("tracer", [fx.Tracer, Through])
def test_fx_gives_the_same_graph(nets, tracer):
    got, expected = graphs(tracer, nets[::-1])
    assert list(map(str, got)) == list(map(str, expected))
    assert ("call_module" in {op for op, *_ in got}) and len(got) > 8


def test_fx_traces_run_on_our_kernels(nets):
    plain, model = nets
    traced = fx.symbolic_trace(model)
    assert isinstance(traced.get_submodule("features.0"), ours.Conv2d)
    with calls({"conv2d", "relu", "max_pool2d", "linear"}):
        torch.testing.assert_close(traced(X), plain(X))


def test_fx_of_modules_made_by_hand():
    model = nn.Sequential(
        ours.Conv2dReLU(1, 2, 3, padding="same"), nn.Flatten(), ours.MLP([128, 3])
    )
    model.loss = ours.CrossEntropyLoss()
    traced = fx.symbolic_trace(model[:3])
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2.0"]
    torch.testing.assert_close(traced(X), model[:3](X))


# ---- counters, export, trace, source --------------------------------------------------------


def flops(f, *args):
    with FlopCounterMode(display=False) as counter:
        y = f(*args)
        if y.requires_grad:
            y.sum().backward()
    return counter.get_total_flops()


def test_flops_of_a_model(nets):
    plain, model = nets
    assert flops(model, X) == flops(plain, X) > 0
    x = X.clone().requires_grad_()
    assert flops(model, x) == flops(plain, x)
    with torch.no_grad(), dlkernels.disabled():
        assert flops(model, X) == flops(plain, X)


def mlp(f):
    return lambda x, v, w, b, c: f(x, [v, w], [b, c])


def mlp_torch(x, v, w, b, c):
    return F.linear(F.linear(x, v, b).relu(), w, c)


def conv(f, *sizes):
    return lambda x, w, b: f(x, w, b, *sizes)


def conv_torch(*sizes):
    return lambda x, w, b: F.conv2d(x, w, b, *sizes)


FLOPS = {
    "linear": (functional.linear, F.linear, [(2, 4, 5), (6, 5), (6,)]),
    "vector": (functional.linear_relu, F.linear, [(5,), (6, 5), (6,)]),
    "mlp": (mlp(functional.mlp), mlp_torch, [(4, 5), (6, 5), (3, 6), (6,), (3,)]),
    "conv2d": (conv(functional.conv2d), F.conv2d, [(2, 4, 9, 8), (6, 4, 3, 2), (6,)]),
    "groups": (
        conv(functional.conv2d_relu, (2, 1), 1, 2, 2),
        conv_torch((2, 1), 1, 2, 2),
        [(2, 4, 9, 8), (6, 2, 3, 2), (6,)],
    ),
    "pooled": (conv(functional.conv2d_relu_max_pool2d), F.conv2d, [(4, 9, 8), (6, 4, 3, 3), (6,)]),
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_of_ops(name):
    op, torchs, shapes = FLOPS[name]
    for wanted in ([], *[[i] for i in range(len(shapes))], range(len(shapes))):
        tensors = [torch.randn(s).requires_grad_(i in wanted) for i, s in enumerate(shapes)]
        assert flops(op, *tensors) == flops(torchs, *tensors) > 0, wanted


def onnx_graph(model):
    program = torch.onnx.export(model, (X,), dynamo=True, verbose=False)
    graph = program.model_proto.graph
    nodes = [(n.op_type, list(n.input), str(list(n.attribute))) for n in graph.node]
    return nodes, [(i.name, i.raw_data) for i in graph.initializer]


@pytest.mark.filterwarnings("ignore")
def test_onnx_export(nets):
    pytest.importorskip("onnxscript")
    plain, model = nets
    got, expected = onnx_graph(model), onnx_graph(plain)
    assert got == expected and len(got[1]) >= 7
    with calls({"conv2d_relu_max_pool2d", "linear_relu"}):  # again
        model(X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(nets):
    plain, model = nets
    traced = torch.jit.trace(model, X)
    torch.testing.assert_close(traced(X), plain(X))
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(traced(x), plain(x))


def test_source_of_a_rewritten_class(nets):
    plain, model = nets
    assert type(model) is not Net
    for get in (inspect.getsource, inspect.getsourcelines, inspect.getsourcefile):
        assert get(type(model)) == get(Net)
    assert inspect.getsource(model.forward) == inspect.getsource(plain.forward)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    line = "__firstlineno__"  # by which inspect finds a class since Python 3.13
    assert vars(type(model)).get(line) == vars(Net).get(line)


@pytest.mark.filterwarnings("ignore")
def test_exact_classes_after_revert(nets):
    plain, model = nets
    dlkernels.revert(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "DynamicQuantizedLinear" in repr(quantized)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(X), plain(X))
    torch.testing.assert_close(dlkernels.convert(model)(X), plain(X))


def test_import_of_convert_hides_nothing():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dlkernels.convert")
    assert callable(dlkernels.convert)
