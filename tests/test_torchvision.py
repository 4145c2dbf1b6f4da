"""convert() on models that others wrote: torchvision's, outputs and gradients held to float64."""

import copy
import importlib

import pytest
import torch

import dlkernels


def import_models():
    """torchvision.models. The package index has torchvision for CUDA: on a torch without, its C++
    ops are missing, and it fails for want of the names of two that no classifier calls."""
    if not torch.__version__.startswith("2.13."):
        pytest.skip("torchvision 0.28 is for torch 2.13", allow_module_level=True)
    pytest.importorskip("torchvision", reason="torchvision is not installed", exc_type=ImportError)
    return importlib.import_module("torchvision.models")


try:
    models = import_models()
except RuntimeError:
    for op in ("nms", "qnms"):
        torch.library.define(f"torchvision::{op}", "(Tensor a, Tensor b, float c) -> Tensor")
    models = import_models()

OURS = {"conv2d", "linear", "max_pool2d"}
# name: how it is constructed, an image's size, the forward ops that run on our kernels
MODELS = {
    "alexnet": ({"dropout": 0.0}, 64, {"conv2d_relu", "linear_relu", "mlp", "max_pool2d"}),
    "vgg11_bn": ({"dropout": 0.0, "init_weights": False}, 32, OURS | {"linear_relu"}),
    "googlenet": (
        {"dropout": 0.0, "dropout_aux": 0.0, "init_weights": False},
        64,
        OURS | {"linear_relu"},
    ),
    "resnet18": ({}, 64, OURS),
    "densenet121": ({}, 64, OURS),
}


def results(model, x):
    """Outputs (GoogLeNet has three), and gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    ys = model(x)
    ys = ys if isinstance(ys, tuple) else (ys,)
    sum(y.square().sum() for y in ys).backward()
    return [*(y.detach() for y in ys), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name):
    kwargs, size, ops = MODELS[name]
    model = getattr(models, name)(num_classes=10, **kwargs)
    x = torch.randn(4, 3, size, size)
    exact = results(copy.deepcopy(model).double(), x.double())
    converted = copy.deepcopy(model)
    torchs = results(model, x)

    report = dlkernels.report(dlkernels.convert(converted))
    kinds = {type(m) for m in converted.modules()}
    assert not kinds & {torch.nn.Linear, torch.nn.Conv2d, torch.nn.MaxPool2d}
    assert all(m.reason for m in report.left)
    dlkernels.reset_stats()
    got = results(converted, x)
    stats = dlkernels.stats()
    assert {op for op, n in stats.items() if n["kernel"] and "backward" not in op} == ops
    assert not any(n["torch"] for n in stats.values())

    # By norm: where rounding decides which of two inputs is greater, single gradients jump.
    for ours, its, f64 in zip(got, torchs, exact, strict=True):
        error, its_error = ((t.double() - f64).norm() for t in (ours, its))
        assert error <= max(1e-5 * f64.norm(), 4 * its_error)

    assert list(converted.state_dict()) == list(model.state_dict())
    dlkernels.revert(converted)
    assert [type(m) for m in converted.modules()] == [type(m) for m in model.modules()]
    assert repr(converted) == repr(model)


def test_features_by_the_name_of_their_node():
    extract = importlib.import_module("torchvision.models.feature_extraction")
    plain = models.resnet18(num_classes=10).eval()
    converted = dlkernels.convert(copy.deepcopy(plain))
    names = [extract.get_graph_node_names(m) for m in (converted, plain)]
    assert names[0] == names[1]
    nodes = ["relu", "layer1.0.conv1", "layer2.1.relu_1", "fc"]
    x = torch.randn(2, 3, 32, 32)
    got, expected = (extract.create_feature_extractor(m, nodes)(x) for m in (converted, plain))
    assert list(got) == nodes
    for name in nodes:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-4)
