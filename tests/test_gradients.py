"""What a backward pass keeps, and which gradients it takes: as PyTorch's, for every op."""

import re
from contextlib import nullcontext

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters

import dlkernels
import dlkernels.functional as ours
from support.common import calls

TARGET = torch.tensor([0, 2, 4, 1])


def pooled(f, *args):
    """conv2d_relu_max_pool2d, which PyTorch does not have."""
    return f.conv2d_relu_max_pool2d(*args) if f is ours else F.max_pool2d(F.conv2d(*args).relu(), 2)


def with_relu(op):
    """So are these."""

    def relued(f, *args):
        return getattr(f, f"{op}_relu")(*args) if f is ours else getattr(F, op)(*args).relu()

    return relued


OPS = {
    "linear": (lambda f, x, w, b: f.linear(x, w, b), (4, 5), (3, 5)),
    "linear_relu": (with_relu("linear"), (4, 5), (3, 5)),
    "conv2d": (lambda f, x, w, b: f.conv2d(x, w, b, padding=1), (2, 2, 5, 5), (3, 2, 3, 3)),
    "conv2d_relu": (with_relu("conv2d"), (2, 2, 5, 5), (3, 2, 3, 3)),
    "conv2d_relu_max_pool2d": (pooled, (2, 2, 6, 7), (3, 2, 3, 3)),
    "relu": (lambda f, x, w, b: f.relu(x), (4, 5), (1,)),
    "max_pool2d": (lambda f, x, w, b: f.max_pool2d(x, 2), (2, 2, 6, 6), (1,)),
    "cross_entropy": (lambda f, x, w, b: f.cross_entropy(x, TARGET), (4, 5), (1,)),
}
every = pytest.mark.parametrize("op", OPS)


def both(op, gradient_of):
    """gradient_of(y, x, seed) of our op and of PyTorch's."""
    f, *shapes = OPS[op]
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in (*shapes, (3,)))
    grad_y = torch.randn_like(f(F, x, w, b))
    return [gradient_of(f(module, x, w, b), x, grad_y) for module in (ours, F)]


@every
def test_negative_views_as_gradients(op):
    def gradient(y, x, grad_y):
        return torch.autograd.grad(y, x, torch._neg_view(torch.ones_like(grad_y)))[0]

    torch.testing.assert_close(*both(op, gradient))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad_y):
        return None


@every
def test_no_gradient(op):
    """From the function that comes next."""

    def gradient(y, x, grad_y):
        NoGradient.apply(y).backward(grad_y)
        return x.grad

    assert both(op, gradient) == [None, None]


@pytest.mark.parametrize("op", ["max_pool2d", "cross_entropy"])
def test_call_of_a_node(op):
    """Without the engine, which alone knows where a tensor came from that was not saved."""
    f, *shapes = OPS[op]
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in (*shapes, (3,)))
    y = f(ours, x, w, b)
    grad_y = torch.randn_like(y)
    with torch.no_grad():
        got = y.grad_fn(grad_y)
    with pytest.raises(RuntimeError, match="engine alone"):
        y.grad_fn(grad_y)
    got = got[0] if isinstance(got, tuple) else got
    assert torch.equal(got, torch.autograd.grad(y, x, grad_y)[0])


@every
def test_compiled_autograd(op):
    def gradient(y, x, grad_y):
        with compiled_autograd._enable(torch.compile(backend="eager")):
            y.backward(grad_y)
        return x.grad

    before = counters["compiled_autograd"]["captures"]
    torch.testing.assert_close(*both(op, gradient))
    assert counters["compiled_autograd"]["captures"] > before


@every
def test_nodes(op):
    created = []
    hook = getattr(torch.autograd.graph, "node_creation_hook", None)  # since torch 2.14

    def names(y, x, grad_y):
        return y.grad_fn.name(), y.grad_fn.next_functions[0][0].name()

    with hook(lambda node: created.append(node.name())) if hook else nullcontext():
        (name, follows), _ = both(op, names)
    assert re.fullmatch(r"\w+Backward", name)
    assert follows == "torch::autograd::AccumulateGrad"
    assert not hook or created.count(name) == 1


@every
def test_gradients_without_memory(op):
    def gradient(y, x, grad_y):
        return torch.autograd.grad(y, x, torch._efficientzerotensor(y.shape))[0]

    torch.testing.assert_close(*both(op, gradient))


@every
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_with_a_tangent(op, create_graph):
    def gradient(y, x, grad_y):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(grad_y, grad_y * 2)
            (grad_x,) = torch.autograd.grad(y, x, dual, create_graph=create_graph)
            assert create_graph or not grad_x.requires_grad
            return tuple(forward_ad.unpack_dual(grad_x))

    torch.testing.assert_close(*both(op, gradient))


@every
def test_batched_gradients(op):
    def gradient(y, x, grad_y):
        batch = torch.stack([grad_y, grad_y * 2])
        return torch.autograd.grad(y, x, batch, is_grads_batched=True)[0]

    torch.testing.assert_close(*both(op, gradient), rtol=1e-4, atol=1e-5)


FUSED = {
    "linear": lambda f, x, w, b: f.linear(x, w, b),
    "linear_relu": lambda f, x, w, b: F.relu(F.linear(x, w, b)),
    "conv2d": lambda f, x, w, b: f.conv2d(x, w, b),
    "conv2d_relu": lambda f, x, w, b: F.relu(F.conv2d(x, w, b)),
}


@pytest.mark.parametrize("wanted", ["x", "w", "b", "xw", "xb", "wb", "xwb"])
@pytest.mark.parametrize("op", FUSED)
def test_only_what_is_needed_is_kept(op, wanted):
    """The rest may change before backward, as in a step between two backward passes."""
    shapes = ((4, 5), (3, 5)) if "linear" in op else ((2, 2, 5, 5), (3, 2, 3, 3))
    tensors = [torch.randn(shape) for shape in (*shapes, (3,))]
    results = []
    for f in (getattr(ours, op), lambda *args: FUSED[op](F, *args)):
        leaves = [t.clone().requires_grad_(name in wanted) for name, t in zip("xwb", tensors)]
        y = f(*leaves)
        kept = {"b": False, "x": "w" in wanted, "w": "x" in wanted}
        with torch.no_grad():
            for name, t in zip("xwb", leaves):
                if not kept[name] and (name == "b" or "linear" in op):
                    t.zero_()
        with calls([op.split("_")[0] + "_backward"] if f is getattr(ours, op) else []):
            results.append(torch.autograd.grad(y.sum(), [t for t in leaves if t.requires_grad]))
    torch.testing.assert_close(*results)


@every
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("changed", "xwby")
def test_changes_before_backward(op, changed, create_graph):
    """Are noticed or make no difference; what PyTorch puts up with, we do."""
    f, *shapes = OPS[op]
    tensors = [torch.randn(shape) for shape in (*shapes, (3,))]

    def gradients(module, change):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = f(module, *leaves)
        if change:
            with torch.no_grad():
                dict(zip("xwby", [*leaves, y]))[changed].mul_(3)
        grad_y = torch.linspace(1, 2, y.numel()).view_as(y).requires_grad_()
        try:
            (first,) = torch.autograd.grad(y, leaves[0], grad_y, create_graph=create_graph)
            return first, *(torch.autograd.grad(first.sum(), grad_y) if create_graph else ())
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return None

    got, torchs = gradients(ours, True), gradients(F, True)
    assert got or not torchs
    torch.testing.assert_close(got or (), gradients(F, False) if got else (), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", FUSED)
@pytest.mark.parametrize("wanted", ["x", "w", "b", "xwb"])
def test_second_gradients(op, wanted):
    """Of every subset of the inputs; an input of one dimension too."""
    cases = [((4, 5), (3, 5)), ((5,), (3, 5)), ((2, 3, 5), (3, 5)), ((0, 5), (3, 5))]
    if "conv2d" in op:
        cases = [((2, 2, 5, 5), (3, 2, 3, 3)), ((2, 5, 5), (3, 2, 3, 3))]
    for shapes in cases:
        tensors = [torch.randn(shape) for shape in (*shapes, (3,))]
        results = []
        for f in (getattr(ours, op), lambda *args: FUSED[op](F, *args)):
            leaves = [t.clone().requires_grad_(name in wanted) for name, t in zip("xwb", tensors)]
            y = f(*leaves)
            inputs = [t for t in leaves if t.requires_grad]
            grad_y = torch.full_like(y, 0.5, requires_grad=True)
            firsts = torch.autograd.grad(y, inputs, grad_y, create_graph=True)
            total = sum(first.square().sum() for first in firsts)
            seconds = torch.autograd.grad(total, [*inputs, grad_y], materialize_grads=True)
            results.append([*firsts, *seconds])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", FUSED)
def test_second_gradients_of_one_tensor(op):
    """As input and as weight at once: the sum of what both have."""
    f, shape, _ = OPS[op]
    x = torch.randn([3 for _ in shape], requires_grad=True)
    results = []
    for module in (ours, F):
        y = f(module, x, x, torch.ones(3))
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum(), x)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [*FUSED, "conv2d_relu_max_pool2d"])
def test_second_gradients_of_a_bias(op):
    """Its gradient depends on the inputs piecewise at most: zeros or none, as PyTorch's."""
    f, *shapes = OPS[op]
    tensors = [torch.randn(shape) for shape in (*shapes, (3,))]
    results = []
    for module in (ours, F):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = f(module, *leaves)
        grad_y = torch.linspace(1, 2, y.numel()).view_as(y)
        (first,) = torch.autograd.grad(y, leaves[2], grad_y, create_graph=True)
        results.append(
            torch.autograd.grad(first.sum(), leaves, allow_unused=True)
            if first.requires_grad
            else (None, None, None)
        )
    torch.testing.assert_close(*results)


@every
@pytest.mark.parametrize("wanted", ["x", "xw", "xwb"])
def test_second_gradients_of_a_constant(op, wanted):
    """What does not depend on the inputs but piecewise has zeros for second gradients, or none,
    where PyTorch's has: not an error."""
    f, *shapes = OPS[op]
    tensors = [torch.randn(shape) for shape in (*shapes, (3,))]
    results = []
    for module in (ours, F):
        leaves = [t.clone().requires_grad_(name in wanted) for name, t in zip("xwb", tensors)]
        y = f(module, *leaves)
        grad_y = torch.linspace(1, 2, y.numel()).view_as(y)
        (first,) = torch.autograd.grad(y, leaves[0], grad_y, create_graph=True)
        inputs = [t for t in leaves if t.requires_grad]
        results.append(
            torch.autograd.grad(first.square().sum(), inputs, allow_unused=True)
            if first.requires_grad
            else None
        )
    mine, torchs = results
    assert (mine is None) == (torchs is None)
    for a, b in zip(mine or (), torchs or (), strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b)


@every
def test_second_gradients_are_counted(op):
    """They are PyTorch's: counted as such, or an error where that was asked for."""
    f, *shapes = OPS[op]
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in (*shapes, (3,)))
    y = f(ours, x, w, b)
    fused = op == "conv2d_relu_max_pool2d"  # runs the convolution again
    backward = op.removesuffix("_relu") + "_backward"
    torchs = [backward, *(["conv2d_backward"] if fused else [])]
    with calls(["conv2d"] if fused else [], torchs):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with dlkernels.set_fallback("error"), pytest.raises(NotImplementedError, match="no kernel"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_nested_tensors_are_pytorchs():
    w, b = torch.randn(3, 5), torch.randn(3)
    for name, args in (("linear", (w, b)), ("relu", ())):
        results = []
        for f in (getattr(ours, name), getattr(F, name)):
            torch.manual_seed(0)
            rows = [torch.randn(n, 5) for n in (2, 3)]
            x = torch.nested.nested_tensor(rows, requires_grad=True)
            with calls(torchs=[name] if f is getattr(ours, name) else []):
                y = f(x, *args)
                y.backward(torch.ones_like(y))
            results.append([*y.detach().unbind(), *x.grad.unbind()])
        torch.testing.assert_close(*results)
