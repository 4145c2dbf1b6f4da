"""cross_entropy: torch.nn.functional.cross_entropy."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels.functional as ours
from support.common import assert_close, calls, check, convert

NAN, INF = float("nan"), float("inf")
reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
BACKWARD = {"forward": ["cross_entropy"], "backward": ["cross_entropy_backward"]}


def logits(*shape):
    return (3 * torch.randn(*shape)).requires_grad_()


def targets(x):
    """Classes for x, about one in four of them 1."""
    C = x.shape[min(x.dim() - 1, 1)]
    shape = x.shape[:1] + x.shape[2:] if x.dim() > 1 else ()
    t = torch.randint(C, shape)
    return torch.where(torch.rand(shape) < 0.25, 1 % C, t)


def samples():
    """(input, target), keyword arguments: tails around the vector width, every option, any rank."""
    sizes = [1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 33, 63, 129, 1000]
    for N, C in [*zip(itertools.cycle([1, 3, 17]), sizes), (64, 10), (1021, 10), (67, 1000)]:
        x = logits(N, C)
        yield (x, targets(x)), {}
        yield (x, logits(N, C).softmax(1).detach()), {}
    for x in [logits(13, 5), logits(5, 37), logits(10), logits(2, 3, 7), logits(2, 11, 3, 4)]:
        C = x.shape[min(x.dim() - 1, 1)]
        weight = torch.rand(C)
        weight[0] = 0
        for w, smoothing in itertools.product([None, weight], [0.0, 0.1, 1]):
            kwargs = {"weight": w, "label_smoothing": smoothing}
            yield (x, targets(x)), {**kwargs, "ignore_index": 1}
            yield (x, targets(x)), {**kwargs, "ignore_index": -100}
            yield (x, torch.rand_like(x)), kwargs
    x = logits(6, 10)
    yield (x, torch.tensor([0, 77, 9, -5, 3, 77])[[0, 1, 2, 4, 5, 0]]), {"ignore_index": 77}
    yield (x, targets(x).byte()), {"ignore_index": 1}
    yield (x, torch.randn(6, 10)), {}  # "probabilities" need not be any
    yield (x, targets(x)), {"weight": torch.rand(20)[::2]}
    yield (logits(10, 6).t(), targets(x)), {}  # transposed, strided, expanded, misaligned
    yield (logits(6, 20)[:, ::2], targets(x)), {}
    yield (logits(1, 10).expand(6, 10), torch.tensor(3).expand(6)), {}
    yield (logits(61)[1:].view(6, 10), torch.randint(10, (12,))[::2]), {}
    yield (x, torch.rand(10, 6).t()), {}
    x = logits(2, 5, 3, 4)
    yield (x.to(memory_format=torch.channels_last), targets(x).mT.contiguous().mT), {}
    yield (logits(2, 3, 2, 2, 3), torch.randint(3, (2, 2, 2, 3))), {}
    for shape in [(0, 5), (0, 5, 2), (2, 5, 0), (0, 5, 2, 2)]:  # nothing at all
        yield (logits(*shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.long)), {}
        yield (logits(*shape), torch.rand(*shape)), {}


@reduction
def test_values_and_gradients(machine, reduction):
    for args, kwargs in samples():
        check(
            ours.cross_entropy,
            F.cross_entropy,
            args,
            {**kwargs, "reduction": reduction},
            **BACKWARD,
        )


@pytest.mark.parametrize("N,C", [(5, 32000), (20000, 3), (2, 70001)])
def test_large(machine, N, C):
    x = logits(N, C)
    check(ours.cross_entropy, F.cross_entropy, (x, targets(x)), **BACKWARD)
    check(
        ours.cross_entropy, F.cross_entropy, (x, targets(x)), {"label_smoothing": 0.2}, **BACKWARD
    )
    check(
        ours.cross_entropy, F.cross_entropy, (x, torch.rand(N, C)), {"reduction": "sum"}, **BACKWARD
    )


def special_rows(C):
    big = 3e38
    for other, value in itertools.product(
        [0.0, 1e4, -1e4, 1e30, big, -big, INF, -INF, NAN], repeat=2
    ):
        row = torch.full((C,), other)
        row[1] = value
        yield row
        yield torch.randn(C).index_fill(0, torch.tensor(1), value)


@pytest.mark.parametrize("C", [2, 5, 21])
def test_special_rows(machine, C):
    """Infinities, NaN and logits at the edge of float32 give what they give in PyTorch, or, where
    its sums overflow, in float64."""
    rows = torch.stack([*special_rows(C)])
    for i in (0, 1):
        target = torch.full((len(rows),), i)
        one_hot = F.one_hot(target, C).float()
        cases = [(target, 0.0), (target, 0.1), (one_hot, 0.0), (one_hot * 0.5 + 0.1, 0.0)]
        for t, smoothing in cases:
            results = []
            for f, dtype in [
                (ours.cross_entropy, torch.float32),
                (F.cross_entropy, torch.float32),
                (F.cross_entropy, torch.float64),
            ]:
                x = rows.to(dtype).requires_grad_()
                y = t.to(dtype) if t.is_floating_point() else t
                loss = f(x, y, reduction="none", label_smoothing=smoothing)
                (grad,) = torch.autograd.grad(loss.sum(), x)
                results.append((loss.detach().float(), grad.float()))
            for got, *expected in zip(*results, strict=True):
                torchs, exact = [torch.isclose(got, e, 1.3e-6, 1e-5, True) for e in expected]
                assert (torchs | exact).all()


def test_classes_that_cannot_be():
    """-inf on another class than the target's: gradient 0 there, exactly."""
    x = torch.randn(4, 23)
    x[:, 5] = -INF
    x.requires_grad_()
    for weight in (None, torch.rand(23)):
        (grad,) = torch.autograd.grad(ours.cross_entropy(x, torch.tensor([0, 1, 2, 3]), weight), x)
        assert (grad[:, 5] == 0).all() and grad.isfinite().all()


@reduction
@pytest.mark.parametrize("factor", [1.0, 2.0, INF, NAN])
@pytest.mark.parametrize("C", [5, 19])  # classes along the lanes of a vector, or rows
def test_ignored_rows(machine, reduction, factor, C):
    """Gradient 0 even where the row or what comes from above is not finite."""
    x = torch.randn(5, C)
    x[1], x[2, 3] = NAN, INF
    x.requires_grad_()
    target = torch.tensor([0, -100, -100, C // 3, C - 1])
    for kwargs in ({}, {"weight": torch.rand(C), "label_smoothing": 0.3}):
        loss = ours.cross_entropy(x, target, reduction=reduction, **kwargs)
        kept = ours.cross_entropy(x[[0, 3, 4]], target[[0, 3, 4]], reduction=reduction, **kwargs)
        torch.testing.assert_close(loss[[0, 3, 4]] if loss.dim() else loss, kept)
        (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, factor))
        assert (grad[1:3] == 0).all() and (grad[[0, 3, 4]] != 0).all()


@pytest.mark.parametrize("shape", [(8, 33, 2), (40, 5, 3), (3, 4, 5, 2)])
def test_nan_in_the_gradient_of_pixels_is_where_pytorch_has_it(machine, shape):
    """Also in ignored ones: 0 times a probability that is NaN."""
    for seed, reduction in enumerate(["mean", "mean", "sum", "none"]):
        x, target = torch.randn(shape), torch.randint(3, (shape[0], *shape[2:]))
        target[target == 1] = -100
        rows, targets = x.movedim(1, -1), target.clone()
        for ignored, value in itertools.product([False, True], [NAN, INF, -INF]):
            those = ((targets == -100) == ignored).nonzero()
            rows[(*those[torch.randint(len(those), ())], torch.randint(shape[1], ()))] = value
        weight = torch.rand(shape[1]) if seed % 2 else None
        results = []
        for f in (ours.cross_entropy, F.cross_entropy):
            inputs = x.clone().requires_grad_()
            loss = f(inputs, target, weight, reduction=reduction)
            results.append((loss, *torch.autograd.grad(loss.sum(), inputs)))
        for got, torchs in zip(*results):
            torch.testing.assert_close(got, torchs, equal_nan=True)


def test_nothing_to_average():
    x = torch.randn(3, 4, requires_grad=True)
    for target, rows in [(torch.full((3,), -100), x), (torch.zeros(0, dtype=torch.long), x[:0])]:
        assert ours.cross_entropy(rows, target).isnan()
        assert ours.cross_entropy(rows, target, reduction="sum") == 0
        (grad,) = torch.autograd.grad(ours.cross_entropy(rows, target), x)
        assert (grad == 0).all()
    assert ours.cross_entropy(x[:0], torch.rand(0, 4)).isnan()
    target = torch.tensor([0, 0, 2])
    for weight in (torch.tensor([0.0, 1, 0, 1]), torch.tensor([1.0, 1, -2, 1])):  # they sum to 0
        losses = [f(x, target, weight) for f in (ours.cross_entropy, F.cross_entropy)]
        grads = [torch.autograd.grad(loss, x)[0] for loss in losses]
        torch.testing.assert_close(*losses, equal_nan=True)
        torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parametrize("shape", [(6, 10), (2, 10, 3)])
def test_gradient_is_not_shared(shape):
    """The gradient made in forward is handed out as it is only where nobody can see it again."""
    x = logits(*shape)
    target = targets(x)
    (expected,) = torch.autograd.grad(F.cross_entropy(x, target), x)

    def same(got):
        torch.testing.assert_close(got, expected)

    loss = ours.cross_entropy(x, target)
    with calls(["cross_entropy_backward"]):
        (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    same(grad)
    grad.zero_()
    with calls():
        (grad,) = torch.autograd.grad(loss, x)
    same(grad)
    loss = ours.cross_entropy(x, target)
    for _ in range(3):
        loss.backward(retain_graph=True)
    same(x.grad / 3)
    x.grad = None
    handle = x.register_hook(lambda grad: grad.mul_(2))
    loss.backward(retain_graph=True)
    loss.backward()
    handle.remove()
    same(x.grad / 4)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_no_gradient_unless_wanted():
    x = logits(6, 10)
    target = targets(x)
    for wanted, rows in [(True, x), (False, x), (False, x.detach())]:
        with torch.set_grad_enabled(wanted), Recorder() as recorder:
            loss = ours.cross_entropy(rows, target)
        assert loss.requires_grad == wanted
        assert ("cross_entropy_forward" in recorder.ops) == wanted
        torch.testing.assert_close(loss, F.cross_entropy(rows, target))
    with torch.inference_mode():
        torch.testing.assert_close(ours.cross_entropy(x, target), F.cross_entropy(x, target))


def gradients_after_a_change(f, dtype, x, target, kwargs):
    """First and second gradients, where the logits are overwritten after the loss."""
    (x, target), kwargs = convert(((x, target), kwargs), lambda t: t.to(dtype))
    y = x * 2
    loss = f(y, target, **kwargs)
    y.zero_()
    (first,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(loss.sum(), x)
    return first, second, again


@reduction
def test_logits_may_change_before_backward(reduction):
    """As in PyTorch, which keeps their log_softmax; here their gradient is enough."""
    ways = (ours, torch.float32), (F, torch.float32), (F, torch.float64)
    for (x, target), kwargs in samples():
        if x.numel():
            results = [
                gradients_after_a_change(
                    module.cross_entropy, dtype, x, target, {**kwargs, "reduction": reduction}
                )
                for module, dtype in ways
            ]
            for got, *expected in zip(*results, strict=True):
                assert_close(got, *expected)


def test_what_is_kept():
    """No more than PyTorch keeps: not the logits."""
    x, kept = logits(6, 10), []
    target, weight = targets(x), torch.rand(10)

    def pack(t):
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = ours.cross_entropy(x, target, weight)
    assert sorted(kept) == [(6,), (6, 10), (10,)]
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(x, target, weight), x)[0])
    for changed in (target, weight):  # which PyTorch keeps, too
        for f in (ours.cross_entropy, F.cross_entropy):
            loss = f(x, target, weight)
            changed.zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("value", [INF, -INF, NAN, 3e38, 0.0])
def test_class_weights_that_are_not_finite(value, smoothing, reduction):
    """Infinite and NaN where PyTorch's are, or, where its sums overflow, float64's."""
    for C, maps, classes in itertools.product([2, 5, 21], [(), (3,)], [[0], [1], range(21)]):
        x, weight = torch.randn(6, C, *maps), torch.rand(C)
        weight[[c for c in classes if c < C]] = value
        target = torch.randint(1, C, (6, *maps))
        for t in (target, torch.rand_like(x)):
            results = []
            for f, dtype in [
                (ours.cross_entropy, torch.float32),
                (F.cross_entropy, torch.float32),
                (F.cross_entropy, torch.float64),
            ]:
                y = x.to(dtype).requires_grad_()
                u = t.to(dtype) if t.is_floating_point() else t
                kwargs = {"reduction": reduction, "label_smoothing": smoothing}
                loss = f(y, u, weight.to(dtype), **kwargs)
                (grad,) = torch.autograd.grad(loss.sum(), y)
                results.append((loss.detach().float(), grad.float()))
            for got, *expected in zip(*results, strict=True):
                torchs, exact = [torch.isclose(got, e, 1.3e-6, 1e-5, True) for e in expected]
                assert (torchs | exact).all()
            with torch.no_grad():
                loss = ours.cross_entropy(x, t, weight, **kwargs)
            torch.testing.assert_close(loss, results[0][0], equal_nan=True)


def test_threads_give_the_same_bits():
    before = torch.get_num_threads()
    for N, C in [(5000, 11), (300, 1000), (7, 40000)]:
        x = logits(N, C)
        weight, target = torch.rand(C), targets(x)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = ours.cross_entropy(x, target, weight, label_smoothing=0.1)
            results.append((loss, *torch.autograd.grad(loss * 3, x)))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def op_samples():
    """Arguments of the ops, with all of them given."""
    defaults = {"weight": None, "reduction": 1, "ignore_index": -100, "label_smoothing": 0.0}
    for i, ((x, target), kwargs) in enumerate([*samples()][::7]):
        # An empty mean is NaN, which opcheck takes for a difference.
        options = {**defaults, **kwargs, "reduction": 2 * (i % 2) if x.numel() == 0 else i % 3}
        yield (x, target, *options.values())


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(grad):
    for x, *args in op_samples():
        x = x.detach().requires_grad_(grad)
        torch.library.opcheck(torch.ops.dlkernels.cross_entropy, (x, *args))


def test_opcheck_internal():
    for x, target, weight, number, ignore_index, smoothing in op_samples():
        args = x.detach(), target, weight, number, ignore_index, float(smoothing)
        torch.library.opcheck(torch.ops.dlkernels.cross_entropy_forward, args)
        loss, grad = torch.ops.dlkernels.cross_entropy_forward(*args)
        args = torch.full_like(loss, 2), grad, target, ignore_index
        torch.library.opcheck(torch.ops.dlkernels.cross_entropy_backward, args)


@reduction
@pytest.mark.parametrize("maps", [(), (3,)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_compile(reduction, maps, probabilities):
    weight = torch.rand(5)
    for kwargs in [{}, {"weight": weight, "ignore_index": -1, "label_smoothing": 0.1}]:
        torch.compiler.reset()
        compiled = torch.compile(ours.cross_entropy, fullgraph=True, dynamic=True)
        for N in (6, 7, 40):
            x = logits(N, 5, *maps)
            target = torch.rand_like(x) if probabilities else targets(x)
            options = {**kwargs, "reduction": reduction}
            check(compiled, F.cross_entropy, (x, target), options, **BACKWARD)
            with torch.no_grad(), calls(["cross_entropy"]):
                compiled(x, target, **options)


def test_left_to_torch():
    x, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    cases = [
        (x.double(), target),
        (x.bfloat16(), target),
        (x, torch.rand(4, 5).double()),
        (x, torch.rand(4, 5, requires_grad=True)),
        (x, torch.rand(4, 5), torch.rand(5, requires_grad=True)),
        (x[:, :0], target - 100 - target),
        (x[0], target[:1]),
        (x.view(2, 5, 2), target.view(2, 2), torch.rand(5, 1)),
    ]
    for args in cases:
        with calls(torchs=["cross_entropy"]):
            got = ours.cross_entropy(*args)
        torch.testing.assert_close(got, F.cross_entropy(*args), equal_nan=True)
    with calls(torchs=["cross_entropy"]):
        ours.cross_entropy(x, target.byte(), label_smoothing=0.1)
    with torch.autocast("cpu"), calls(torchs=["cross_entropy"]):
        assert ours.cross_entropy(x.bfloat16(), target).dtype is torch.float32
    with calls(torchs=["cross_entropy"]):
        batched = torch.func.vmap(ours.cross_entropy)(x[None], target[None])
        grad = torch.func.grad(ours.cross_entropy)(x, target)
    torch.testing.assert_close(batched[0], F.cross_entropy(x, target))
    torch.testing.assert_close(grad, torch.func.grad(F.cross_entropy)(x, target))


def test_meta():
    x, target = (
        torch.empty(4, 5, 3, device="meta"),
        torch.empty(4, 3, device="meta", dtype=torch.long),
    )
    assert ours.cross_entropy(x, target, reduction="none").shape == (4, 3)
    assert ours.cross_entropy(x, target).device.type == "meta"


@pytest.mark.parametrize("probabilities", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_of_gradients(probabilities, smoothing):
    target = torch.rand(5, 3) if probabilities else torch.tensor([2, 0, 1, -100, 2])
    weight = torch.rand(3)
    target64 = target.double() if probabilities else target
    x = torch.randn(5, 3, dtype=torch.double, requires_grad=True)

    def loss(x):
        return ours.cross_entropy(x, target64, weight.double(), label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)
    x = x.detach().float().requires_grad_()
    seconds = []
    for f in (ours.cross_entropy, F.cross_entropy):
        y = f(x, target, weight, label_smoothing=smoothing)
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        seconds.append((first, *torch.autograd.grad(first.square().sum() + y, x)))
    for mine, torchs in zip(*seconds, strict=True):
        torch.testing.assert_close(mine, torchs)


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_old_reductions(size_average, reduce):
    x, target = logits(4, 5), torch.tensor([0, 1, 2, 3])
    results = []
    for f in (ours.cross_entropy, F.cross_entropy):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = f(x, target, size_average=size_average, reduce=reduce)
        results.append((loss, [str(w.message) for w in caught]))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
