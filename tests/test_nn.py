"""dlkernels.nn: each module against PyTorch's own, constructed with the same arguments."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils import prune

import dlkernels
from dlkernels import nn as ours
from support.common import calls

# name: arguments, keyword arguments, input's shape
CASES = {
    "Linear": [
        ((7, 5), {}, (3, 7)),
        ((7, 5, False), {}, (2, 3, 7)),
        ((7, 5), dict(bias=True), (7,)),
    ],
    "ReLU": [((), {}, (3, 5))],
    "Conv2d": [
        ((3, 6, 3), {}, (2, 3, 9, 8)),
        ((4, 6, (3, 2), 2, 1, 1, 2), {}, (2, 4, 9, 8)),
        ((3, 6, 3), dict(padding="same", dilation=2, bias=False), (2, 3, 9, 8)),
        ((3, 6, 3), dict(padding=(1, 2), padding_mode="reflect"), (2, 3, 9, 8)),
        ((3, 6, 3), dict(padding="same", padding_mode="circular"), (2, 3, 9, 8)),
        ((3, 6, 1), {}, (3, 9, 8)),
    ],
    "MaxPool2d": [
        ((2,), {}, (2, 3, 9, 8)),
        (((3, 2), (1, 2), 1, 1), dict(ceil_mode=True), (2, 3, 9, 8)),
    ],
}
ALL = [(name, *case) for name, cases in CASES.items() for case in cases]
every = pytest.mark.parametrize(("name", "args", "kwargs", "shape"), ALL)
RELU = {"Linear": "LinearReLU", "Conv2d": "Conv2dReLU"}
OPS = {
    "Linear": "linear",
    "LinearReLU": "linear_relu",
    "ReLU": "relu",
    "Conv2d": "conv2d",
    "Conv2dReLU": "conv2d_relu",
    "MaxPool2d": "max_pool2d",
}


def pair(name, args, kwargs, relu=False):
    """Ours and PyTorch's, each constructed under the same seed."""
    torch.manual_seed(1)
    torchs = getattr(torch.nn, name)(*args, **kwargs)
    torch.manual_seed(1)
    mine = getattr(ours, RELU[name] if relu else name)(*args, **kwargs)
    assert isinstance(mine, type(torchs))
    return mine, torch.nn.Sequential(torchs, torch.nn.ReLU()) if relu else torchs


def assert_same_training(mine, torchs, shape, op):
    """Outputs and the gradients of input and parameters; ours come from the kernel of `op`."""
    x = torch.randn(shape, requires_grad=True)
    with calls(kernels={op, op.removesuffix("_relu") + "_backward"}):
        y = mine(x)
        weights = torch.randn_like(y)
        got = [y, *torch.autograd.grad(y, [x, *mine.parameters()], weights)]
    y = torchs(x)
    expected = [y, *torch.autograd.grad(y, [x, *torchs.parameters()], weights)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@every
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
def test_is_pytorchs(name, args, kwargs, shape, relu):
    if relu and name not in RELU:
        return
    mine, torchs = pair(name, args, kwargs, relu)
    plain = torchs[0] if relu else torchs
    assert list(mine.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, mine.state_dict()[key])
    assert repr(mine) == repr(plain).replace(name, RELU[name] if relu else name)
    assert_same_training(mine, torchs, shape, OPS[RELU[name] if relu else name])
    plain.load_state_dict(mine.state_dict())
    mine.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_loss(reduction):
    options = dict(weight=torch.rand(5), ignore_index=1, reduction=reduction, label_smoothing=0.1)
    mine, torchs = ours.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    assert repr(mine) == repr(torchs) and list(mine.state_dict()) == list(torchs.state_dict())
    x, target = torch.randn(7, 5, requires_grad=True), torch.arange(7) % 5
    before = dlkernels.stats()["cross_entropy"]["kernel"]
    losses = [mine(x, target), torchs(x, target)]
    assert dlkernels.stats()["cross_entropy"]["kernel"] == before + 1
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in losses]
    torch.testing.assert_close(*grads)


def test_relu_in_place():
    x = torch.randn(5)
    assert ours.ReLU(inplace=True)(x) is x and (x >= 0).all()


def test_max_pool_indices():
    x = torch.randn(2, 3, 8, 8)
    for got, expected in zip(
        ours.MaxPool2d(2, return_indices=True)(x), torch.nn.MaxPool2d(2, return_indices=True)(x)
    ):
        assert torch.equal(got, expected)


@every
def test_copies_keep_the_class(name, args, kwargs, shape):
    mine = getattr(ours, RELU.get(name, name))(*args, **kwargs)
    x = torch.randn(shape)
    saved = io.BytesIO()
    torch.save(mine, saved)
    saved.seek(0)
    copies = (
        copy.deepcopy(mine),
        pickle.loads(pickle.dumps(mine)),
        torch.load(saved, weights_only=False),
    )
    for other in copies:
        assert type(other) is type(mine)
        assert torch.equal(other(x), mine(x))


@every
def test_meta_and_dtype(name, args, kwargs, shape):
    if name in RELU:
        factory = dict(kwargs, device="meta", dtype=torch.float32)
        for cls in (name, RELU[name]):
            mine = getattr(ours, cls)(*args, **factory)
            assert mine.weight.is_meta
            expected = getattr(torch.nn, name)(*args, **factory)(torch.empty(shape, device="meta"))
            assert mine(torch.empty(shape, device="meta")).shape == expected.shape
        kwargs = dict(kwargs, dtype=torch.float64)
    mine, torchs = pair(name, args, kwargs)
    x = torch.randn(shape, dtype=torch.float64)
    with calls(torchs=[OPS[name]]):
        y = mine(x)
    torch.testing.assert_close(y, torchs(x))
    mine.to(torch.bfloat16)(x.bfloat16())


def test_hooks_see_what_goes_through():
    seen = []
    linear = ours.LinearReLU(4, 3)
    linear.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    linear.register_forward_hook(lambda m, args, y: seen.append(y))
    linear.register_full_backward_hook(lambda m, grad_x, grad_y: seen.append(grad_y[0]))
    x = torch.randn(2, 4, requires_grad=True)
    y = linear(x)
    y.sum().backward()
    assert [tuple(t.shape) for t in seen] == [(2, 4), (2, 3), (2, 3)]
    assert torch.equal(seen[0], x) and torch.equal(seen[1], y) and (seen[2] == 1).all()


def test_tied_weights_share_one_gradient():
    a, b = ours.Linear(4, 6, bias=False), ours.LinearReLU(4, 6, bias=False)
    b.weight = a.weight
    x = torch.randn(3, 4)
    (a(x) + b(x)).sum().backward()
    y = torch.nn.functional.linear(x, a.weight)
    expected = torch.autograd.grad((y + y.relu()).sum(), a.weight)[0]
    torch.testing.assert_close(a.weight.grad, expected)


def test_parametrized_and_pruned_later():
    linear = ours.Linear(4, 3)
    torch.nn.utils.parametrizations.weight_norm(linear)
    x = torch.randn(2, 4)
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
    linear = ours.Linear(4, 3)
    prune.l1_unstructured(linear, "weight", amount=6)
    with calls(kernels=["linear"]):
        y = linear(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, linear.weight, linear.bias))


def test_bad_input_raises_as_pytorch():
    for name, args, x, error in [
        ("Linear", (4, 3), torch.randn(2, 5), RuntimeError),
        ("Linear", (4, 3), "text", TypeError),
        ("ReLU", (), None, TypeError),
        ("Conv2d", (3, 4, 3), torch.randn(1, 2, 8, 8), RuntimeError),
        ("MaxPool2d", (2,), torch.randn(8), RuntimeError),
    ]:
        for library in (ours, torch.nn):
            with pytest.raises(error):
                getattr(library, name)(*args)(x)
    with pytest.raises(ValueError):
        ours.Conv2d(3, 4, 3, groups=2)


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_our_ops(strict):
    model = torch.nn.Sequential(
        ours.Conv2dReLU(1, 4, 3), ours.MaxPool2d(2), ours.Linear(3, 2)
    ).eval()
    x = torch.randn(2, 1, 8, 8)
    exported = torch.export.export(model, (x,), strict=strict)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert targets >= {f"dlkernels.{op}.default" for op in ("conv2d_relu", "max_pool2d", "linear")}
    assert torch.equal(exported.module()(x), model(x))
