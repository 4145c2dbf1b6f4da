"""max_pool2d: torch.nn.functional.max_pool2d, bit for bit where that is safe."""

import numpy
import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
import dlkernels.nn
from support.common import assert_refused_alike, calls, check, steps, thinned

KERNELS = {"forward": ["max_pool2d"], "backward": ["max_pool2d_backward"]}
NAN, INF = float("nan"), float("inf")
LAST = {"memory_format": torch.channels_last}
EMPTY_WINDOW = {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 3}  # for a 2 x 2 input


def samples(device="cpu"):
    """(input, kernel_size, stride, padding, dilation, ceil_mode)"""

    def t(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    windows = [
        (2, None, 0, 1, False),
        ((3, 2), (2, 1), (1, 0), 1, False),
        (3, 2, 1, 1, True),
        (2, (2, 3), 1, (1, 2), True),
        (3, 1, 1, 2, False),
    ]
    for shape in [(1, 1, 7, 7), (2, 3, 11, 13), (1, 16, 9, 32), (2, 17, 8, 33), (1, 5, 6, 67)]:
        for window in windows:
            yield t(*shape), *window
            yield t(*shape).to(**LAST), *window
    yield t(1, 1, 1, 1), 1, [], 0, 1, False
    yield t(3, 4, 5, 5), (1,), (2,), (0,), (1,), False  # a list of one
    yield t(3, 6, 7), 2, None, 1, 1, True  # no batch
    yield t(0, 3, 6, 7), 2, None, 0, 1, False  # an empty batch
    yield t(0, 3, 6, 7).to(**LAST), 2, None, 0, 1, False
    yield t(2, 3, 9, 7).transpose(2, 3), 2, None, 0, 1, False  # any strides
    yield t(2, 3, 8, 18)[..., ::2], 3, 2, 1, 1, False
    yield t(1, 1, 6, 7).expand(2, 4, 6, 7), 2, None, 0, 1, False
    yield t(500)[1:421].view(2, 5, 6, 7), 2, None, 0, 1, False  # misaligned
    yield t(2, 3, 15, 17), (15, 17), None, (7, 8), 1, False  # 255 elements, a byte's last
    yield t(2, 4, 9, 9), 2, 5, 0, 1, True  # gaps between windows
    yield t(16, 32, 28, 28), 2, None, 0, 1, False  # several threads
    yield t(16, 32, 28, 28).to(**LAST), 3, 2, 1, 1, False
    special = torch.tensor([1.0, NAN, 1.0, -INF, -INF, 0.0, -0.0, INF, NAN])
    x = special[torch.randint(9, (2, 5, 9, 40))].to(device)
    yield x.clone().requires_grad_(), 3, 2, 1, 1, False
    yield x.to(**LAST).requires_grad_(), 2, None, 0, 1, False
    # At the border the first element of a window is not its first place.
    lowest = torch.full((1, 2, 6, 6), -INF, device=device)
    for window in [*windows, (3, 1, 1, 1, False), (2, 2, 1, 1, False)]:
        yield lowest.clone().requires_grad_(), *window
    yield lowest.to(**LAST).requires_grad_(), 3, 2, 1, 1, False


def same_bits(a, b):
    return steps(a) == steps(b) and torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_values_and_gradients(machine):
    for args in samples():
        check(ours.max_pool2d, F.max_pool2d, args, **KERNELS)
        y = ours.max_pool2d(*args)
        assert same_bits(y, F.max_pool2d(*args))
        with torch.no_grad():
            assert same_bits(y, ours.max_pool2d(*args))


def test_indices(machine):
    for args in samples():
        check(
            lambda *a: ours.max_pool2d(*a, return_indices=True),
            lambda *a: F.max_pool2d(*a, return_indices=True),
            args,
            **KERNELS,
        )
        _, got = ours.max_pool2d(*args, return_indices=True)
        assert not got.requires_grad and got.dtype == torch.int64
        with torch.inference_mode(), calls(["max_pool2d"]):
            assert torch.equal(got, ours.max_pool2d(*args, return_indices=True)[1])


def test_same_bits_on_any_number_of_threads():
    x = torch.randn(5, 7, 30, 30, requires_grad=True)
    results = []
    for threads in (1, 2, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        y = ours.max_pool2d(x, 3, 1, 1)
        results.append((y, *torch.autograd.grad(y, x, torch.linspace(-3, 7, y.numel()).view_as(y))))
        torch.set_num_threads(before)
    for y, grad in results[1:]:
        assert same_bits(y, results[0][0]) and same_bits(grad, results[0][1])


def test_opcheck():
    for input, *window in thinned(samples()):
        if input.isnan().any() or input.stride(0) == 0:
            continue  # opcheck takes a NaN for a difference, and cannot write to expanded inputs
        window[1] = window[1] or []
        window[:4] = [[v] if isinstance(v, int) else v for v in window[:4]]
        torch.library.opcheck(torch.ops.dlkernels.max_pool2d, (input, *window))
        torch.library.opcheck(torch.ops.dlkernels.max_pool2d_with_indices, (input, *window))


def test_opcheck_of_what_autograd_calls():
    ops, window = torch.ops.dlkernels, [3, 2, 2, 2, 1, 0, 1, 1]
    for x in (torch.randn(2, 3, 7, 9), torch.randn(2, 3, 7, 9).to(**LAST)):
        y, argmax = ops.max_pool2d_forward(x, window, False)
        torch.library.opcheck(ops.max_pool2d_forward, (x, window, False))
        torch.library.opcheck(ops.max_pool2d_indices, (argmax, [7, 9], window, False))
        torch.library.opcheck(ops.max_pool2d_backward, (y, argmax, [7, 9], window, False))


def test_compile():
    for input, *window in list(samples())[:10:3]:
        for return_indices in (False, True):
            torch.compiler.reset()  # every window is a graph of its own
            compiled = torch.compile(ours.max_pool2d, fullgraph=True, dynamic=True)
            for x in (input, input[..., 1:, 2:]):
                x = x.detach().requires_grad_()
                check(compiled, F.max_pool2d, (x, *window, return_indices), **KERNELS)


def test_double_backward(machine):
    def second(f, window):
        def g(x, v):
            y = f(x, **window)
            (grad,) = torch.autograd.grad(y, x, v, create_graph=True)
            return (grad * grad * x.detach()).sum()

        return g

    x = torch.randn(2, 3, 7, 6, requires_grad=True)
    for window in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 1, "padding": 1}):
        v = torch.randn_like(F.max_pool2d(x, **window)).requires_grad_()
        for input in (x, x.detach().to(**LAST).requires_grad_()):
            got, want = ([], [])
            for f, out in ((ours.max_pool2d, got), (F.max_pool2d, want)):
                out.append(second(f, window)(input, v))
                out.append(torch.autograd.grad(out[0], v)[0])
            torch.testing.assert_close(got, want)


def test_window_without_elements(machine):
    """PyTorch writes outside of its tensors here."""
    for layout in ({}, LAST):
        x = torch.arange(1.0, 5).view(1, 1, 2, 2).expand(2, 3, 2, 2).contiguous().to(**layout)
        x.requires_grad_()
        window = {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 3, "ceil_mode": True}
        y, indices = ours.max_pool2d(x, **window, return_indices=True)
        holds = F.max_pool2d(F.pad(x.detach(), (1, 3, 1, 3), value=-INF), 2, 2, dilation=3)
        assert y.shape == indices.shape and torch.equal(y, holds[..., : y.size(2), : y.size(3)])
        assert torch.equal(indices == -1, y == -INF)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        (again,) = torch.autograd.grad(ours.max_pool2d(x, **window), x, torch.ones_like(y))
        assert torch.equal(grad, again) and grad.sum() == (y != -INF).sum()
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    y = ours.max_pool2d(x, **EMPTY_WINDOW)
    y.sum().backward()
    assert (y == -INF).all() and (x.grad == 0).all()
    with pytest.raises(RuntimeError, match="every window must hold an element"):
        ours.max_pool2d(x.double(), **EMPTY_WINDOW)


def test_backward_does_not_trust_argmax(machine):
    ops = torch.ops.dlkernels
    for window in ([2, 2, 2, 2, 0, 0, 1, 1], [3, 3, 1, 1, 1, 1, 2, 2]):
        for layout in ({}, LAST):
            x = torch.randn(2, 5, 9, 9).to(**layout)
            y, argmax = ops.max_pool2d_forward(x, window, False)
            argmax.random_(0, 256)
            grad = ops.max_pool2d_backward(torch.ones_like(y), argmax, [9, 9], window, False)
            indices = ops.max_pool2d_indices(argmax, [9, 9], window, False)
            assert indices.min() >= -1 and indices.max() < 81
            assert grad.sum() == (indices >= 0).sum()


def test_backward_refuses_what_does_not_belong_together():
    op, window = torch.ops.dlkernels.max_pool2d_backward, [2, 2, 2, 2, 0, 0, 1, 1]
    g, a = torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    op(g, a, [8, 9], window, False)
    for args in [
        (g, a, [10, 8], window),
        (g, a, [8], window),
        (g, a, [8, 2**63 - 1], window),
        (g, a.long(), [8, 8], window),
        (g, a[0, 0], [8, 8], window),
        (g[:1], a, [8, 8], window),
        (g, a[:, :0], [8, 8], window),
        (g, a, [8, 8], window[:7]),
        (g, a, [8, 8], [2**31, *window[1:]]),
        (g.double(), a, [8, 8], window),
        (g, a.to("meta"), [8, 8], window),
    ]:
        with pytest.raises(RuntimeError, match="max_pool2d"):
            op(*args, False)


def test_large_windows_and_other_dtypes_are_pytorchs():
    x = torch.randn(2, 3, 20, 20, requires_grad=True)
    for input, kernel_size in [(x, 16), (x.double(), 2), (x.bfloat16(), 2), (x.long(), 2)]:
        for indices in (False, True):
            with calls(torchs=["max_pool2d"]):
                got = ours.max_pool2d(input, kernel_size, 3, 1, return_indices=indices)
            want = F.max_pool2d(input, kernel_size, 3, 1, return_indices=indices)
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_transforms():
    x = torch.randn(4, 2, 3, 6, 6)
    got = torch.func.vmap(lambda x: ours.max_pool2d(x, 2))(x)
    assert torch.equal(got, torch.func.vmap(lambda x: F.max_pool2d(x, 2))(x))

    def f(op):
        return torch.func.jvp(lambda x: op(x, 2), (x[0],), (x[1],))

    torch.testing.assert_close(f(ours.max_pool2d), f(F.max_pool2d))
    with torch.autocast("cpu"), calls(torchs=["max_pool2d"]):
        assert ours.max_pool2d(x[0], 2).dtype == F.max_pool2d(x[0], 2).dtype


BAD = [
    ((2, 1, 8, 8), (0,)),
    ((2, 1, 8, 8), (-1,)),
    ((2, 1, 8, 8), ((),)),
    ((2, 1, 8, 8), ((1, 2, 3),)),
    ((2, 1, 8, 8), (2.0,)),
    ((2, 1, 8, 8), ("2",)),
    ((2, 1, 8, 8), (None,)),
    ((2, 1, 8, 8), (True,)),
    ((2, 1, 8, 8), (2**31,)),
    ((2, 1, 8, 8), (2**70,)),
    ((2, 1, 8, 8), (2, 0)),
    ((2, 1, 8, 8), (2, -1)),
    ((2, 1, 8, 8), (2, (1, 2, 3))),
    ((2, 1, 8, 8), (2, 2**31)),
    ((2, 1, 8, 8), (2, None, -1)),
    ((2, 1, 8, 8), (2, None, 2)),
    ((2, 1, 8, 8), (2, None, ())),
    ((2, 1, 8, 8), (2, None, 0, 0)),
    ((2, 1, 8, 8), (2, None, 0, 2**31 - 1)),
    ((2, 1, 8, 8), (2, None, 0, 2**62)),
    ((2, 1, 8, 8), (2, None, 0, 1, 1)),
    ((2, 1, 8, 8), (9,)),
    ((8, 8), (2,)),
    ((1, 2, 1, 8, 8), (2,)),
    ((2, 0, 8, 8), (2,)),
    ((2, 1, 0, 8), (2, None, 1)),
    ((0, 8, 8), (2,)),
]


def test_errors():
    for shape, args in BAD:
        for indices in (False, True):
            given = (*args, *(None, 0, 1, False)[len(args) - 1 :], indices)
            assert_refused_alike(ours.max_pool2d, F.max_pool2d, (torch.zeros(shape), *given))
    for bad in (None, 1.0, [[[1.0]]]):
        with pytest.raises(TypeError):
            ours.max_pool2d(bad, 2)
    nested = torch.nested.nested_tensor([torch.zeros(1, 2, 2), torch.zeros(1, 3, 3)])
    for bad in (torch.zeros(1, 1, 2, 2, dtype=torch.bool), nested):
        with pytest.raises(NotImplementedError):
            ours.max_pool2d(bad, 2)


def test_sizes_of_numpy():
    """Its ints are left to PyTorch, which takes them, and its arrays, which it refuses."""
    x, two = torch.rand(1, 1, 4, 4), numpy.int64(2)
    for args in ((two,), (2, two), (two, None), ((two, 2), two, numpy.int64(0))):
        with calls(torchs=["max_pool2d"]):
            got = ours.max_pool2d(x, *args)
        assert torch.equal(got, F.max_pool2d(x, *args))
    assert torch.equal(dlkernels.nn.MaxPool2d(two)(x), F.max_pool2d(x, 2))
    with pytest.raises(TypeError):
        ours.max_pool2d(x, 2, numpy.array([2, 2]))


def test_meta():
    for args in samples("meta"):
        if args[0].stride(0) == 0:
            continue
        y, expected = ours.max_pool2d(*args), F.max_pool2d(*args)
        assert y.device.type == "meta" and steps(y) == steps(expected)
        assert y.shape == expected.shape
