"""conv2d and conv2d_relu: torch.nn.functional.conv2d, and relu of it."""

from itertools import product

import numpy
import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
from dlkernels._dispatch import conv2d_sizes
from support import reference
from support.common import RTOL, assert_exact, assert_refused_alike, calls, check, thinned

pytestmark = pytest.mark.usefixtures("ieee")  # test_conv2d_algorithms.py has the others
PAIRS = {
    "conv2d": (ours.conv2d, F.conv2d),
    "conv2d_relu": (ours.conv2d_relu, lambda *a, **k: F.relu(F.conv2d(*a, **k))),
}
op = pytest.mark.parametrize("op", PAIRS)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
layout = pytest.mark.parametrize("layout", LAYOUTS)


def samples(memory_format=torch.contiguous_format, device="cpu"):
    """(input, weight, bias), keyword arguments: tails around the tiles, options, odd strides."""

    def t(*shape):
        x = torch.randn(*shape, device=device)
        if x.dim() == 4:
            x = x.contiguous(memory_format=memory_format)
        return x.requires_grad_()

    yield (t(1, 1, 1, 1), t(1, 1, 1, 1), t(1)), {}
    yield (t(2, 3, 5, 7), t(4, 3, 3, 3), t(4)), {"padding": 1}
    yield (t(2, 3, 5, 7), t(4, 3, 3, 3), None), {"padding": 1}
    yield (t(3, 17, 6, 19), t(33, 17, 3, 3), t(33)), {"padding": 1}
    yield (t(5, 1, 28, 28), t(32, 1, 3, 3), t(32)), {"padding": 1}
    yield (t(17, 16, 8, 8), t(15, 16, 3, 3), t(15)), {}
    yield (t(2, 6, 14, 14), t(16, 6, 5, 5), t(16)), {}
    yield (t(2, 32, 9, 9), t(31, 32, 1, 1), t(31)), {}
    yield (t(1, 3, 23, 20), t(8, 3, 7, 7), t(8)), {"stride": 2, "padding": 3}
    yield (t(2, 4, 11, 13), t(6, 4, 3, 2), t(6)), {"stride": (3, 2), "padding": (2, 1)}
    yield (t(2, 4, 11, 13), t(6, 4, 2, 3), t(6)), {"dilation": (2, 3), "padding": (0, 4)}
    yield (t(2, 4, 9, 8), t(6, 4, 1, 1), t(6)), {"stride": 3}
    yield (t(2, 6, 7, 7), t(9, 2, 3, 3), t(9)), {"groups": 3, "padding": 1}
    yield (t(2, 5, 7, 7), t(10, 1, 3, 3), t(10)), {"groups": 5, "padding": 1, "stride": 2}
    yield (t(3, 33, 9, 14), t(33, 1, 5, 5), t(33)), {"groups": 33, "padding": 2}
    yield (t(2, 12, 9, 8), t(18, 2, 3, 2), None), {"groups": 6, "dilation": 2, "stride": (2, 1)}
    yield (t(2, 3, 6, 5), t(4, 3, 2, 4), t(4)), {"padding": "same"}
    yield (t(2, 3, 9, 8), t(4, 3, 2, 3), t(4)), {"padding": "same", "dilation": (3, 2)}
    yield (t(2, 3, 6, 5), t(4, 3, 2, 4), t(4)), {"padding": "valid"}
    yield (t(1, 2, 3, 3), t(2, 2, 3, 3), t(2)), {"padding": 5}  # windows of padding alone
    yield (t(3, 6, 5), t(4, 3, 3, 3), t(4)), {"padding": (1,), "stride": [1]}  # not batched
    yield (t(40, 8, 12, 12), t(40, 8, 3, 3), t(40)), {"padding": 1}  # several parts
    yield (t(2, 3, 5, 7).detach(), t(4, 3, 3, 3), t(4)), {}  # no gradient for some
    yield (t(2, 3, 5, 7), t(4, 3, 3, 3).detach(), t(4)), {}
    yield (t(2, 3, 5, 7), t(4, 3, 3, 3), t(4).detach()), {}
    yield (t(2, 3, 5, 7).detach(), t(4, 3, 3, 3).detach(), t(4)), {}
    yield (t(1, 1, 150, 150).detach(), t(64, 1, 1, 1).detach(), t(64)), {}  # for two threads
    yield (t(2, 3, 10, 7)[:, :, ::2], t(4, 6, 3, 3)[:, ::2], t(8)[::2]), {}
    yield (t(1, 3, 5, 7).expand(4, 3, 5, 7), t(1, 3, 3, 3).expand(4, 3, 3, 3), t(4)), {}
    yield (t(2, 5, 7, 3).permute(0, 3, 1, 2), t(4, 3, 3, 3), t(4)), {}
    # a last block smaller than the dilation
    yield (t(1, 16, 32, 100), t(4, 16, 3, 3), None), {"dilation": 5, "padding": 5}
    # blocks of the gradient whose inputs lie apart, the first of them in the padding
    yield (t(1, 40, 70, 70), t(8, 40, 3, 3), None), {"stride": 2, "dilation": 13, "padding": 1}
    # groups of too many channels to be lanes themselves
    yield (t(2, 18, 7, 6), t(22, 9, 3, 3), t(22)), {"groups": 2, "padding": 1}
    # a gradient of too few planes for a vector
    yield (t(2, 9, 7, 6), t(3, 9, 3, 3), t(3)), {"padding": 1}


@op
@layout
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_values_and_gradients(machine, op, layout, dtype):
    f, g = PAIRS[op]
    for args, kwargs in samples(LAYOUTS[layout]):
        check(f, g, args, kwargs, forward=[op], backward=["conv2d_backward"], dtype=dtype)


@op
def test_mixed_layouts(op):
    f, g = PAIRS[op]
    for i, j in [(0, 1), (1, 0)]:
        x, w = torch.randn(2, 4, 6, 7), torch.randn(5, 4, 3, 3)
        x = x.contiguous(memory_format=[*LAYOUTS.values()][i]).requires_grad_()
        w = w.contiguous(memory_format=[*LAYOUTS.values()][j]).requires_grad_()
        check(f, g, (x, w), forward=[op], backward=["conv2d_backward"])


@op
@layout
def test_meta_has_the_strides_of_the_cpu(op, layout):
    """PyTorch's own op on meta always says contiguous, which its op on the CPU is not."""
    f, g = PAIRS[op]
    for other in LAYOUTS.values():
        x = torch.randn(2, 4, 6, 6).to(memory_format=LAYOUTS[layout])
        w = torch.randn(3, 4, 3, 3).to(memory_format=other)
        assert f(x, w).stride() == f(x.to("meta"), w.to("meta")).stride() == g(x, w).stride()


WINDOWS = [
    ((3, 3), {"padding": 1}),
    ((3, 3), {"padding": 1, "stride": 2}),
    ((5, 5), {"padding": (2, 0), "stride": (1, 2)}),
    ((2, 7), {"padding": (0, 3), "stride": (3, 1)}),
    ((3, 2), {"padding": (4, 1), "dilation": (2, 3)}),
]


@layout
@pytest.mark.parametrize(("c", "k"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_few_channels_a_group(machine, layout, c, k):
    for groups, (H, W), (kernel, options) in product([2, 16, 23], [(3, 7), (15, 14)], WINDOWS):
        x = torch.randn(2, groups * c, H, W).contiguous(memory_format=LAYOUTS[layout])
        weight, bias = torch.randn(groups * k, c, *kernel), torch.randn(groups * k)
        args = [a.requires_grad_() for a in (x, weight, bias)]
        kwargs = {"groups": groups, **options}
        check(*PAIRS["conv2d_relu"], args, kwargs, ["conv2d_relu"], ["conv2d_backward"])


@op
@layout
def test_integers_are_exact(machine, op, layout):
    for args, kwargs in samples(LAYOUTS[layout]):
        with calls([op, "conv2d_backward"]):
            assert_exact(*PAIRS[op], args, kwargs)


# (C, H, W), (K, c, KH, KW), options
NOT_FINITE = [
    ((5, 7, 6), (5, 5, 3, 5), {"padding": (1, 2)}),  # few outputs
    ((2, 7, 6), (40, 2, 3, 3), {"padding": 1}),
    ((16, 6, 9), (17, 16, 3, 3), {"padding": 1, "stride": 2}),
    ((4, 7, 8), (10, 2, 3, 3), {"groups": 2, "dilation": 2, "padding": 2}),
    ((4, 7, 8), (8, 1, 3, 3), {"groups": 4, "dilation": 2, "padding": 2}),
    ((36, 7, 8), (36, 9, 3, 2), {"groups": 4, "padding": 1}),
    ((33, 9, 8), (33, 1, 5, 5), {"groups": 33, "padding": 2}),
    ((17, 5, 4), (1, 17, 3, 3), {"padding": 5}),  # windows outside
    ((3, 9, 70), (16, 3, 3, 3), {"padding": 1}),
]


@layout
@pytest.mark.parametrize("index", range(len(NOT_FINITE)))
def test_what_is_not_finite_reaches_what_meets_it(machine, layout, index):
    """And nothing else, not by a 0 beside the image; what stays finite stays as it was."""
    shape, window, options = NOT_FINITE[index]
    x, weight = torch.randn(1, *shape), torch.randn(window)
    x, weight = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, weight))
    bias, grad_y = torch.randn(window[0]), torch.randn_like(ours.conv2d(x, weight, **options))

    def results(f, dtype, x, weight, bias, grad_y):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
        y = f(*inputs, **options)
        return y, *torch.autograd.grad(y, inputs, grad_y.to(dtype))

    before = results(ours.conv2d, torch.float32, x, weight, bias, grad_y)
    values = iter([torch.nan, torch.inf, -torch.inf] * 9)
    for where in (0, 1, 3):
        for at in (0, -1, x[0].numel() // 3):
            args = [t.clone() for t in (x, weight, bias, grad_y)]
            flat = args[where].permute(0, 2, 3, 1) if layout == "channels_last" else args[where]
            flat.view(-1)[at % flat.numel()] = next(values)
            got = results(ours.conv2d, torch.float32, *args)
            expected = results(reference.conv2d, torch.float64, *args)
            for result, exact, other in zip(got, expected, before, strict=True):
                torch.testing.assert_close(
                    result.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True
                )
                if where:  # x itself counts for all that sees it
                    finite = exact.isfinite()
                    assert torch.equal(result[finite], other[finite])


def test_threads_give_the_same_bits():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        x, w = torch.randn(19, 5, 9, 9, requires_grad=True), torch.randn(7, 5, 3, 3)
        y = ours.conv2d(x, w.requires_grad_(), padding=1)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@op
def test_opcheck(op):
    for args, kwargs in thinned(samples()):
        defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        sizes = conv2d_sizes(args[1], **{**defaults, **kwargs})
        torch.library.opcheck(getattr(torch.ops.dlkernels, op), (*args, *sizes))


@op
def test_compile(op):
    f, g = PAIRS[op]
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for args, kwargs in [*samples()][1:18:4]:
        check(compiled, g, args, kwargs, forward=[op], backward=["conv2d_backward"])


@op
def test_left_to_torch(op):
    f, g = PAIRS[op]
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    bias = torch.randn(4).double()  # PyTorch takes it where padding is text and few are convolved
    for args in [(x.double(), w.double()), (x[:0], w), (x[:1], w, bias)]:
        with calls(torchs=[op]):
            torch.testing.assert_close(f(*args, padding="same"), g(*args, padding="same"))
    with calls(torchs=[op]):
        batched = torch.func.vmap(lambda x: f(x, w, padding=(1, 2)))(x[None])
    torch.testing.assert_close(batched[0], g(x, w, padding=(1, 2)))


@op
def test_double_backward(op):
    f, g = PAIRS[op]
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=True)
        w, b = torch.randn(6, 2, 3, 2, dtype=dtype, requires_grad=True), torch.randn(6, dtype=dtype)
        seconds = []
        for conv in (f, g):
            y = conv(x, w, b, stride=2, padding="valid", groups=2)
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), (x, w)))
        for ours_, torchs in zip(*seconds):
            torch.testing.assert_close(ours_, torchs, rtol=1e-4, atol=1e-3)


BAD = {
    "rank of input": lambda x, w: ((x[0, 0], w), {}),
    "rank of weight": lambda x, w: ((x, w[0]), {}),
    "channels": lambda x, w: ((x[:, :2], w), {}),
    "bias size": lambda x, w: ((x, w, torch.randn(3)), {}),
    "bias rank": lambda x, w: ((x, w, torch.randn(4, 1)), {}),
    "stride 0": lambda x, w: ((x, w), {"stride": 0}),
    "stride -1": lambda x, w: ((x, w), {"stride": (1, -1)}),
    "stride of three": lambda x, w: ((x, w), {"stride": (1, 1, 1)}),
    "padding -1": lambda x, w: ((x, w), {"padding": -1}),
    "padding word": lambda x, w: ((x, w), {"padding": "full"}),
    "padding same, strided": lambda x, w: ((x, w), {"padding": "same", "stride": 2}),
    "dilation 0": lambda x, w: ((x, w), {"dilation": 0}),
    "groups 0": lambda x, w: ((x, w), {"groups": 0}),
    "groups 2": lambda x, w: ((x, w), {"groups": 2}),
    "kernel too large": lambda x, w: ((x[..., :2], w), {}),
    "dtypes": lambda x, w: ((x, w.double()), {}),
    "bool stride": lambda x, w: ((x, w), {"stride": True}),
    "bool groups": lambda x, w: ((x, w), {"groups": True}),
    "float stride": lambda x, w: ((x, w), {"stride": 1.5}),
    "list as input": lambda x, w: (([1.0], w), {}),
    "no weight": lambda x, w: ((x, None), {}),
    "stride as text": lambda x, w: ((x, w), {"stride": "1"}),
    "padding as an array": lambda x, w: ((x, w), {"padding": numpy.array([1, 1])}),
}
UNSAFE_IN_TORCH = {
    "dilation 2**62": lambda x, w: ((x, w), {"dilation": 2**62}),
    "padding 2**62": lambda x, w: ((x, w), {"padding": 2**62}),
    "stride 2**62": lambda x, w: ((x, w), {"stride": 2**62}),
    "weight on meta": lambda x, w: ((x, w.to("meta")), {}),
    "huge output": lambda x, w: ((x, w), {"padding": 2**30}),
    "huge weight": lambda x, w: (
        (x[:, :1], w[:1, :1, :1, :1].expand(1, 1, 2**30, 2**30)),
        {"padding": 2**29, "stride": 2**30},
    ),
}


@op
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_as_torch_does(op, case):
    args, kwargs = BAD[case](torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3))
    assert_refused_alike(*PAIRS[op], args, kwargs)


@op
@pytest.mark.parametrize("case", UNSAFE_IN_TORCH)
def test_bad_input_is_refused(op, case):
    args, kwargs = UNSAFE_IN_TORCH[case](torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3))
    with pytest.raises(RuntimeError):
        PAIRS[op][0](*args, **kwargs)
    with torch.inference_mode(), pytest.raises(RuntimeError):  # goes past autograd's own checks
        PAIRS[op][0](*args, **kwargs)


@op
def test_trace_of_same_padding(op):
    f, _ = PAIRS[op]
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    traced = torch.jit.trace(lambda x: f(x, w, padding="same"), x)
    torch.testing.assert_close(traced(x[:, :, :4]), f(x[:, :, :4], w, padding="same"))


def test_backward_checks_its_arguments():
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    backward = torch.ops.dlkernels.conv2d_backward
    rest = ([1, 1], [0, 0, 0, 0], [1, 1], 1, [True] * 3)
    assert backward(torch.randn(2, 4, 3, 3), x, w, None, *rest)[0].shape == x.shape
    for grad_y, y in [(torch.randn(2, 4, 3, 2), None), (torch.randn(2, 4, 3, 3), torch.randn(1))]:
        with pytest.raises(RuntimeError, match="grad_y and y must be"):
            backward(grad_y, x, w, y, *rest)
    with pytest.raises(NotImplementedError):
        backward(torch.randn(2, 4, 3, 3).double(), x, w, None, *rest)
