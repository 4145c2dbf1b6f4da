"""cross_entropy: torch.nn.functional.cross_entropy."""

import math

import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
from common import calls, check

NAN, INF = math.nan, math.inf
KERNELS = {"forward": ["cross_entropy"], "backward": ["cross_entropy_backward"]}


def samples(device="cpu"):
    """(input, target), keyword arguments: class counts around the vector width, every option."""

    def t(*shape):
        return torch.randn(*shape, device=device).mul(3).requires_grad_()

    def classes(C, *shape):
        return torch.randint(C, shape, device=device)

    for C in (1, 2, 3, 7, 10, 15, 16, 17, 31, 33, 100, 1000):
        yield (t(5, C), classes(C, 5)), {}
    for N in (1, 2, 31, 257):
        yield (t(N, 10), classes(10, N)), {}
    weight = torch.rand(19, device=device)
    for reduction in ("none", "mean", "sum"):
        for smoothing in (0.0, 0.1, 1.0):
            for w in (None, weight):
                kwargs = {"reduction": reduction, "label_smoothing": smoothing, "weight": w}
                yield (t(6, 19), classes(19, 6)), kwargs | {"ignore_index": 3}
                yield (t(6, 19), t(6, 19).softmax(1).detach()), kwargs
                yield (t(2, 19, 3, 4), classes(19, 2, 3, 4)), kwargs
        yield (t(19), classes(19)), {"reduction": reduction}
        yield (t(19), t(19).softmax(0).detach()), {"reduction": reduction}
        yield (t(2, 5, 3), t(2, 5, 3).softmax(1).detach()), {"reduction": reduction}
        yield (t(4, 7), torch.full((4,), -100)), {"reduction": reduction}  # nothing counts
    yield (t(4, 7), torch.tensor([6, 9, -1, 9], device=device).clamp(min=0)), {"ignore_index": 9}
    yield (t(4, 7), classes(7, 4).byte()), {}
    yield (t(7, 4).t(), classes(7, 8)[::2]), {"weight": torch.rand(14)[::2]}
    yield (t(2, 5, 3, 4).to(memory_format=torch.channels_last), classes(5, 2, 3, 4)), {}
    yield (t(4, 1).expand(4, 5), classes(5, 4)), {}


def test_values_and_gradients(machine):
    for args, kwargs in samples():
        check(ours.cross_entropy, F.cross_entropy, args, kwargs, **KERNELS, grad_strides=False)


@pytest.mark.parametrize(
    "row",
    [
        [0.0, -INF, 1.0],
        [-INF] * 3,
        [INF, 0.0, 1.0],
        [NAN, 0.0, 1.0],
        [0.0, 1.0, NAN],
        [1e4, -1e4, 0.0],
        [1e38, -1e38, 0.0],
        [-1e38, -1e38, -1e38],
        [200.0, 0.0, 100.0],
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_special_rows(machine, row, smoothing):
    for target in range(3):
        x = torch.tensor([row * 7, [0.0, 1.0, 2.0] * 7], requires_grad=True)
        y = torch.tensor([target, 1])
        kwargs = {"label_smoothing": smoothing, "reduction": "none"}
        check(ours.cross_entropy, F.cross_entropy, (x, y), kwargs, **KERNELS)


def test_zeros_that_are_exact():
    x = torch.tensor([[0.0, -INF, 1.0], [NAN, 1.0, 2.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(ours.cross_entropy(x, torch.tensor([0, -100])), x)
    assert grad[0, 1] == 0 and (grad[1] == 0).all()


def test_backward_scales(machine):
    x, y = torch.randn(9, 21, requires_grad=True), torch.randint(21, (9,))
    for factor in (1.0, 0.5, -3.0, 0.0):
        for grad in (
            torch.autograd.grad(ours.cross_entropy(x, y) * factor, x)[0],
            torch.autograd.grad(ours.cross_entropy(x, y), x, torch.tensor(factor))[0],
        ):
            torch.testing.assert_close(
                grad, torch.autograd.grad(F.cross_entropy(x, y) * factor, x)[0]
            )


@pytest.mark.parametrize("leaf", [True, False])
def test_a_retained_graph_gives_the_same_again(leaf):
    w = torch.randn(6, 11, requires_grad=True)
    loss = ours.cross_entropy(w if leaf else w * 1, torch.randint(11, (6,)))
    loss.backward(retain_graph=True)
    first = w.grad.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(w.grad, 2 * first)
    w.grad.zero_()
    loss.backward()
    torch.testing.assert_close(w.grad, first)


def test_no_gradient_is_made_where_none_is_wanted():
    x, y = torch.randn(4, 5, requires_grad=True), torch.randint(5, (4,))
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            seen.append(str(f))
            return f(*args, **(kwargs or {}))

    with Record():
        ours.cross_entropy(x, y)
        ours.cross_entropy(x.detach(), y)
        with torch.no_grad():
            ours.cross_entropy(x, y)
    mine = [name for name in seen if "dlkernels" in name]
    assert (
        mine
        == ["dlkernels.cross_entropy_forward.default"] + ["dlkernels.cross_entropy.default"] * 2
    )


def test_threads_give_the_same_bits():
    x, y = torch.randn(3000, 37, requires_grad=True), torch.randint(37, (3000,))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = ours.cross_entropy(x, y)
        results.append((loss, *torch.autograd.grad(loss, x)))
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_double_backward():
    for dtype in (torch.float32, torch.float64):
        x, y = torch.randn(5, 7, dtype=dtype, requires_grad=True), torch.randint(7, (5,))
        seconds = []
        for f in (ours.cross_entropy, F.cross_entropy):
            loss = f(x, y, label_smoothing=0.1)
            (first,) = torch.autograd.grad(loss.square(), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
        torch.testing.assert_close(*seconds)
    assert torch.autograd.gradgradcheck(lambda x: ours.cross_entropy(x, y), x)


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(reduction):
    x = torch.randn(4, 7, requires_grad=True)
    for target in (torch.randint(7, (4,)), torch.rand(4, 7)):
        for weight in (None, torch.rand(7)):
            args = (x, target, weight, reduction, -1, 0.1)
            torch.library.opcheck(torch.ops.dlkernels.cross_entropy, args)
            torch.library.opcheck(
                torch.ops.dlkernels.cross_entropy_forward, (x.detach(), *args[1:])
            )
    loss = torch.randn(()) if reduction else torch.randn(4)
    args = (loss, torch.randn(4, 7), x.detach())
    torch.library.opcheck(torch.ops.dlkernels.cross_entropy_backward, args)


def test_compile():
    compiled = torch.compile(ours.cross_entropy, fullgraph=True, dynamic=True)
    for args, kwargs in [*samples()][3:40:7]:
        check(compiled, F.cross_entropy, args, kwargs, **KERNELS, grad_strides=False)


def test_left_to_torch():
    x, y = torch.randn(4, 5), torch.randint(5, (4,))
    p = torch.rand(4, 5)
    for args in [(x.double(), y), (x[:0], y[:0]), (x, p.requires_grad_()), (x.bfloat16(), y)]:
        with calls(torchs=["cross_entropy"]):
            got = ours.cross_entropy(*args)
        torch.testing.assert_close(got, F.cross_entropy(*args), equal_nan=True)
    with torch.autocast("cpu"), calls(torchs=["cross_entropy"]):
        assert ours.cross_entropy(x.bfloat16(), y).dtype is torch.float32
    with calls(torchs=["cross_entropy"]):
        grads = torch.func.vmap(torch.func.grad(ours.cross_entropy))(x, y)
    torch.testing.assert_close(grads, torch.func.vmap(torch.func.grad(F.cross_entropy))(x, y))


def test_legacy_arguments():
    x, y = torch.randn(4, 5), torch.randint(5, (4,))
    for legacy in ({"size_average": False}, {"reduce": False}):
        with pytest.warns(UserWarning, match="deprecated"):
            got = ours.cross_entropy(x, y, **legacy)
        with pytest.warns(UserWarning, match="deprecated"):
            assert torch.equal(got, F.cross_entropy(x, y, **legacy)) or got.allclose(
                F.cross_entropy(x, y, **legacy)
            )


BAD = {
    "class too large": lambda x, y: ((x, y + 7), {}),
    "class -1": lambda x, y: ((x, y - 8), {}),
    "batch": lambda x, y: ((x, y[:3]), {}),
    "target rank": lambda x, y: ((x, y[:, None]), {}),
    "int32 target": lambda x, y: ((x, y.int()), {}),
    "int16 target": lambda x, y: ((x, y.short()), {}),
    "bool target": lambda x, y: ((x, y.bool()), {}),
    "uint8 target in two dimensions": lambda x, y: ((x[:, :, None], y[:, None].byte()), {}),
    "integer probabilities": lambda x, y: ((x, torch.ones(4, 7).long()), {}),
    "weight size": lambda x, y: ((x, y), {"weight": torch.rand(6)}),
    "weight rank": lambda x, y: ((x, y), {"weight": torch.rand(1, 7)}),
    "reduction": lambda x, y: ((x, y), {"reduction": "max"}),
    "smoothing 1.5": lambda x, y: ((x, y), {"label_smoothing": 1.5}),
    "smoothing text": lambda x, y: ((x, y), {"label_smoothing": "0.1"}),
    "ignore_index with probabilities": lambda x, y: ((x, torch.rand(4, 7)), {"ignore_index": 1}),
    "scalar input": lambda x, y: ((x[0, 0], y[0]), {}),
    "list as target": lambda x, y: ((x, [0, 1, 2, 3]), {}),
    "float ignore_index": lambda x, y: ((x, y), {"ignore_index": 1.5}),
}
UNSAFE_IN_TORCH = {
    "smoothing -0.1": lambda x, y: ((x, y), {"label_smoothing": -0.1}),
    "smoothing NaN": lambda x, y: ((x, y), {"label_smoothing": NAN}),
    "target on meta": lambda x, y: ((x, y.to("meta")), {}),
    "weight on meta": lambda x, y: ((x, y), {"weight": torch.rand(7, device="meta")}),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("wants_grad", [True, False])
def test_bad_input_is_refused_as_torch_does(case, wants_grad):
    args, kwargs = BAD[case](torch.randn(4, 7, requires_grad=wants_grad), torch.randint(7, (4,)))
    with pytest.raises(Exception) as torchs:
        F.cross_entropy(*args, **kwargs)
    with pytest.raises(torchs.type):
        ours.cross_entropy(*args, **kwargs)


@pytest.mark.parametrize("case", UNSAFE_IN_TORCH)
def test_bad_input_is_refused(case):
    args, kwargs = UNSAFE_IN_TORCH[case](torch.randn(4, 7), torch.randint(7, (4,)))
    with pytest.raises(RuntimeError):
        ours.cross_entropy(*args, **kwargs)


def test_backward_checks_its_arguments():
    backward = torch.ops.dlkernels.cross_entropy_backward
    x, grad, one = torch.randn(4, 7), torch.randn(4, 7), torch.ones(())
    assert torch.equal(backward(one, grad, x), grad)
    for bad in [
        (one, grad[:3], x),
        (torch.ones(3), grad, x),
        (one, grad[0], x),
        (one, grad, x[:0]),
    ]:
        with pytest.raises(RuntimeError):
            backward(*bad)
