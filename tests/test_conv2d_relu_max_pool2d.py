"""conv2d_relu_max_pool2d: what max_pool2d(relu(conv2d)) gives, in one op for windows of 2x2; and
Conv2d, ReLU and MaxPool2d in a row."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlkernels
import dlkernels.functional as ours
from dlkernels._dispatch import conv2d_sizes
from support import reference
from support.common import RTOL, assert_refused_alike, calls, check, steps, thinned

pytestmark = pytest.mark.usefixtures("ieee")  # test_conv2d_algorithms.py has the others
NAN, INF = float("nan"), float("inf")
OP = "conv2d_relu_max_pool2d"
# What runs for windows of 2x2, and for others.
FORWARD, BACKWARD = [OP], [OP + "_backward"]
TWO_FORWARD = ["conv2d_relu", "max_pool2d"]
TWO_BACKWARD = ["conv2d_backward", "max_pool2d_backward"]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
layout = pytest.mark.parametrize("layout", LAYOUTS)
f = ours.conv2d_relu_max_pool2d


def composed(conv2d, relu, max_pool2d):
    def g(
        input,
        weight,
        bias=None,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        pool_kernel_size=2,
        pool_stride=None,
        pool_padding=0,
        pool_dilation=1,
        ceil_mode=False,
    ):
        y = relu(conv2d(input, weight, bias, stride, padding, dilation, groups))
        return max_pool2d(y, pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)

    return g


torchs = composed(F.conv2d, F.relu, F.max_pool2d)
two_ops = composed(ours.conv2d_relu, lambda x: x, ours.max_pool2d)


def samples(memory_format=torch.contiguous_format, device="cpu"):
    """(input, weight, bias), keyword arguments: one op each."""

    def t(*shape):
        x = torch.randn(*shape, device=device)
        if x.dim() == 4:
            x = x.contiguous(memory_format=memory_format)
        return x.requires_grad_()

    yield (t(1, 1, 2, 2), t(1, 1, 1, 1), t(1)), {}
    yield (t(2, 3, 8, 10), t(4, 3, 3, 3), t(4)), {"padding": 1}
    yield (t(2, 3, 9, 11), t(4, 3, 3, 3), None), {"padding": 1}  # a row and a column in no window
    yield (t(3, 17, 6, 19), t(33, 17, 3, 3), t(33)), {"padding": 1, "stride": (1, 2)}
    yield (t(5, 1, 28, 28), t(32, 1, 3, 3), t(32)), {"padding": 1}
    yield (t(5, 1, 28, 28).detach(), t(32, 1, 3, 3), t(32)), {"padding": 1}
    yield (t(2, 6, 14, 14), t(16, 6, 5, 5), t(16)), {"padding": 2}
    yield (t(9, 16, 14, 14), t(31, 16, 3, 3), t(31)), {"padding": 1}
    yield (t(2, 3, 7, 8), t(4, 3, 2, 3), t(4)), {"padding": "same", "pool_kernel_size": (2, 2)}
    yield (t(2, 3, 7, 8), t(4, 3, 1, 1), t(4)), {"pool_kernel_size": [2], "stride": (1, 2)}
    yield (t(2, 4, 11, 13), t(6, 4, 3, 2), t(6)), {"stride": (2, 1), "padding": (2, 1)}
    yield (t(2, 4, 11, 13), t(6, 4, 2, 3), t(6)), {"dilation": (2, 3), "padding": (0, 4)}
    yield (t(2, 6, 7, 7), t(9, 2, 3, 3), t(9)), {"groups": 3, "padding": 1, "pool_stride": 2}
    yield (t(2, 18, 7, 9), t(18, 1, 3, 3), t(18)), {"groups": 18, "padding": 1}
    yield (t(3, 16, 18), t(4, 3, 2, 2), t(4)), {"pool_stride": (2, 2)}  # not batched
    yield (t(2, 3, 6, 7), t(4, 3, 1, 1), t(4)), {}
    yield (t(40, 8, 12, 12), t(40, 8, 3, 3), t(40)), {"padding": 1}  # several parts
    yield (t(2, 3, 10, 7)[:, :, ::2], t(4, 6, 3, 3)[:, ::2], t(8)[::2]), {}
    yield (t(1, 3, 6, 7).expand(4, 3, 6, 7), t(1, 3, 3, 3).expand(4, 3, 3, 3), t(4)), {}
    yield (t(2, 6, 7, 3).permute(0, 3, 1, 2), t(4, 3, 3, 3), t(4)), {}


def several_ops():
    """Keyword arguments that other pools need."""
    yield {"pool_kernel_size": 3}
    yield {"pool_kernel_size": (2, 1)}
    yield {"pool_kernel_size": 3, "pool_stride": 2}
    yield {"pool_kernel_size": 3, "pool_padding": 1, "ceil_mode": True}
    yield {"pool_kernel_size": 2, "pool_dilation": (2, 1)}
    yield {"pool_kernel_size": 2, "ceil_mode": True}


def same_bits(a, b):
    return steps(a) == steps(b) and torch.equal(a.view(torch.int32), b.view(torch.int32))


def grads(y, inputs, seed=0):
    torch.manual_seed(seed)
    return torch.autograd.grad(
        y, [x for x in inputs if x is not None and x.requires_grad], torch.randn(y.shape)
    )


@layout
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_values_and_gradients(machine, layout, dtype):
    for args, kwargs in samples(LAYOUTS[layout]):
        check(f, torchs, args, kwargs, forward=FORWARD, backward=BACKWARD, dtype=dtype)


@layout
def test_same_bits_as_two_ops(machine, layout):
    for args, kwargs in samples(LAYOUTS[layout]):
        y, expected = f(*args, **kwargs), two_ops(*args, **kwargs)
        assert same_bits(y, expected)
        with torch.no_grad():
            assert same_bits(y, f(*args, **kwargs))
        for a, b in zip(grads(y, args), grads(expected, args), strict=True):
            torch.testing.assert_close(a, b)  # 1x1 takes sums in another order


def test_mixed_layouts():
    for i, j in [(0, 1), (1, 0)]:
        x, w = torch.randn(2, 4, 6, 7), torch.randn(5, 4, 3, 3)
        x = x.contiguous(memory_format=[*LAYOUTS.values()][i]).requires_grad_()
        w = w.contiguous(memory_format=[*LAYOUTS.values()][j]).requires_grad_()
        check(f, torchs, (x, w), forward=FORWARD, backward=BACKWARD)
        check(f, torchs, (x[0], w), forward=FORWARD, backward=BACKWARD)


def test_several_ops(machine):
    x, w = torch.randn(2, 3, 9, 11, requires_grad=True), torch.randn(4, 3, 3, 3)
    for kwargs in several_ops():
        check(f, torchs, (x, w), kwargs, forward=TWO_FORWARD, backward=TWO_BACKWARD)
    w = torch.randn(4, 3, 1, 1)
    x = torch.randn(1, 3, 16, 16)
    with calls(["conv2d_relu"], ["max_pool2d"]):  # 256 elements are PyTorch's
        got = f(x, w, pool_kernel_size=16)
    torch.testing.assert_close(got, torchs(x, w, pool_kernel_size=16))


SPECIAL = torch.tensor([1.0, NAN, 1.0, -INF, -INF, -1.0, 0.0, -0.0, INF, 2.0])


@layout
@pytest.mark.parametrize("pool", [2, 3, (2, 1)])
def test_ties_and_special_values(machine, layout, pool):
    """Through a 1x1 window of weight 1, so that the values are what is pooled."""
    for values in (SPECIAL, torch.tensor([-1.0, -0.0, 0.0]), torch.tensor([-INF]), SPECIAL[2:4]):
        x = values[torch.randint(len(values), (3, 1, 12, 40))]
        x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        w = torch.ones(1, 1, 1, 1)
        y, expected = f(x, w, pool_kernel_size=pool), torchs(x, w, pool_kernel_size=pool)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        grad_y = torch.rand_like(y) + 1
        (grad,) = torch.autograd.grad(y, x, grad_y, retain_graph=True)
        (want,) = torch.autograd.grad(expected, x, grad_y)
        assert torch.equal(grad, want)
        (again,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
        assert torch.equal(again, want)


def test_argmax():
    op = torch.ops.dlkernels.conv2d_relu_max_pool2d_forward
    for memory_format in LAYOUTS.values():
        x = torch.tensor([[-1.0, 0, 1, 1, NAN, NAN, 0, 2], [-2, -0.0, 1, 0, 5, 1, 3, 1]])
        x = x.expand(1, 2, 2, 8).contiguous(memory_format=memory_format)
        weight = torch.ones(2, 1, 1, 1)
        weight[1] = -1
        y, argmax = op(x, weight, None, [1, 1], [0] * 4, [1, 1], 2)
        torch.testing.assert_close(
            y[0], torch.tensor([[[0, 1, NAN, 3]], [[2, 0, NAN, 0]]]), equal_nan=True
        )
        assert argmax.tolist() == [[[[255, 0, 1, 2]], [[2, 255, 1, 255]]]]


def test_threads_give_the_same_bits():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        x, w = torch.randn(19, 5, 10, 10, requires_grad=True), torch.randn(7, 5, 3, 3)
        y = f(x, w.requires_grad_(), padding=1)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("wanted", ["x", "w", "b", "xw", "xb", "wb", "xwb"])
def test_only_what_is_needed(wanted):
    """The bias may change before backward, and the result too: neither is kept."""
    tensors = [torch.randn(shape) for shape in ((2, 2, 6, 6), (3, 2, 3, 3), (3,))]
    results = []
    for op in (f, torchs):
        leaves = [t.clone().requires_grad_(name in wanted) for name, t in zip("xwb", tensors)]
        y = op(*leaves)
        with torch.no_grad():
            leaves[2].zero_()
            if op is f:
                y.zero_()
        with calls(BACKWARD if op is f else []):
            results.append(torch.autograd.grad(y.sum(), [t for t in leaves if t.requires_grad]))
    torch.testing.assert_close(*results)


def test_keeps_a_byte_for_every_maximum():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        f(x, w, padding=1)
    sizes = sorted((t.dtype, tuple(t.shape)) for t in kept if t.dtype is torch.uint8)
    assert len(kept) == 3 and sizes == [(torch.uint8, (2, 4, 4, 4))]


def op_arguments(args, kwargs):
    conv = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    sizes = conv2d_sizes(args[1], **{name: kwargs.get(name, conv[name]) for name in conv})
    return *args, *sizes


def test_opcheck():
    for args, kwargs in thinned(samples()):
        torch.library.opcheck(
            torch.ops.dlkernels.conv2d_relu_max_pool2d, op_arguments(args, kwargs)
        )


def test_opcheck_of_what_autograd_calls():
    ops = torch.ops.dlkernels
    for memory_format in LAYOUTS.values():
        for args, kwargs in [*samples(memory_format)][:12:3]:
            x, w, b, *sizes = op_arguments([t if t is None else t.detach() for t in args], kwargs)
            y, argmax = ops.conv2d_relu_max_pool2d_forward(x, w, b, *sizes)
            torch.library.opcheck(ops.conv2d_relu_max_pool2d_forward, (x, w, b, *sizes))
            for mask in ([True] * 3, [False, True, True]):
                backward = (y, argmax, x, w, *sizes, mask)
                torch.library.opcheck(ops.conv2d_relu_max_pool2d_backward, backward)


def test_meta():
    def meta(t):
        return None if t is None else torch.empty_strided(t.shape, t.stride(), device="meta")

    for memory_format in LAYOUTS.values():
        for args, kwargs in samples(memory_format):
            y, expected = f(*map(meta, args), **kwargs), f(*args, **kwargs)
            assert y.is_meta and y.shape == expected.shape and steps(y) == steps(expected)


@layout
def test_compile(layout):
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for args, kwargs in [*samples(LAYOUTS[layout])][1:14:4]:
        check(compiled, torchs, args, kwargs, forward=FORWARD, backward=BACKWARD)
    x, w = torch.randn(2, 3, 9, 11, requires_grad=True), torch.randn(4, 3, 3, 3)
    other = next(several_ops())
    check(compiled, torchs, (x, w), other, forward=TWO_FORWARD, backward=TWO_BACKWARD)


def test_left_to_torch():
    x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    args = x.double(), w.double()
    with calls(torchs=FORWARD + TWO_FORWARD):
        got = f(*args, padding="same")
    torch.testing.assert_close(got, torchs(*args, padding="same"))
    assert f(x[:0], w).shape == (0, 4, 2, 2)
    with calls(torchs=FORWARD + TWO_FORWARD):
        batched = torch.func.vmap(lambda x: f(x, w, padding=(1, 2)))(x[None])
    torch.testing.assert_close(batched[0], torchs(x, w, padding=(1, 2)))
    with dlkernels.set_fallback("error"), pytest.raises(NotImplementedError, match=OP):
        f(x.double(), w.double())
    with dlkernels.disabled(), calls():
        f(x, w)
    with calls(torchs=[OP]), pytest.raises(TypeError):  # Python types that PyTorch is to judge
        f(x, w, stride=1.5)


def test_tangents():
    x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)

    def jvp(op):
        return torch.func.jvp(lambda x: op(x, w), (x,), (x * 2,))

    torch.testing.assert_close(jvp(f), jvp(torchs))


@layout
@pytest.mark.parametrize("wanted", ["x", "w", "b", "xwb"])
def test_second_gradients(layout, wanted):
    for shape in [(2, 2, 7, 6), (2, 7, 6)]:
        tensors = [torch.randn(shape), torch.randn(3, 2, 3, 3), torch.randn(3)]
        if len(shape) == 4:
            tensors[0] = tensors[0].contiguous(memory_format=LAYOUTS[layout])
        results = []
        for op in (f, torchs):
            leaves = [t.clone().requires_grad_(name in wanted) for name, t in zip("xwb", tensors)]
            y = op(*leaves, padding=1, pool_kernel_size=(2, 3))
            inputs = [t for t in leaves if t.requires_grad]
            grad_y = torch.full_like(y, 0.5, requires_grad=True)
            firsts = torch.autograd.grad(y, inputs, grad_y, create_graph=True)
            total = sum(first.square().sum() for first in firsts)
            seconds = torch.autograd.grad(total, [*inputs, grad_y], materialize_grads=True)
            results.append([*firsts, *seconds])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_gradgradcheck():
    tensors = [torch.randn(shape).double() for shape in ((1, 2, 5, 5), (2, 2, 2, 2), (2,))]
    inputs = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


BAD = {
    "rank of input": lambda x, w: ((x[0, 0], w), {}),
    "rank of weight": lambda x, w: ((x, w[0]), {}),
    "channels": lambda x, w: ((x[:, :2], w), {}),
    "bias size": lambda x, w: ((x, w, torch.randn(3)), {}),
    "bias rank": lambda x, w: ((x, w, torch.randn(4, 1)), {}),
    "stride 0": lambda x, w: ((x, w), {"stride": 0}),
    "padding -1": lambda x, w: ((x, w), {"padding": -1}),
    "padding word": lambda x, w: ((x, w), {"padding": "full"}),
    "groups 2": lambda x, w: ((x, w), {"groups": 2}),
    "kernel too large": lambda x, w: ((x[..., :2], w), {}),
    "window too large": lambda x, w: ((x, w), {"pool_kernel_size": 4}),
    "window 0": lambda x, w: ((x, w), {"pool_kernel_size": 0}),
    "window -1": lambda x, w: ((x, w), {"pool_kernel_size": (-1, 2)}),
    "windows of -1 * -1": lambda x, w: ((x, w), {"pool_kernel_size": -1}),
    "window of three": lambda x, w: ((x, w), {"pool_kernel_size": (1, 1, 1)}),
    "window of none": lambda x, w: ((x, w), {"pool_kernel_size": ()}),
    "window 2**62": lambda x, w: ((x, w), {"pool_kernel_size": 2**62}),
    "window 2**70": lambda x, w: ((x, w), {"pool_kernel_size": 2**70}),
    "window as float": lambda x, w: ((x, w), {"pool_kernel_size": 2.0}),
    "window as bool": lambda x, w: ((x, w), {"pool_kernel_size": True}),
    "window as text": lambda x, w: ((x, w), {"pool_kernel_size": "2"}),
    "window None": lambda x, w: ((x, w), {"pool_kernel_size": None}),
    "pool_stride 0": lambda x, w: ((x, w), {"pool_stride": 0}),
    "pool_padding 2": lambda x, w: ((x, w), {"pool_padding": 2}),
    "pool_padding -1": lambda x, w: ((x, w), {"pool_padding": -1}),
    "pool_dilation 0": lambda x, w: ((x, w), {"pool_dilation": 0}),
    "ceil_mode 1": lambda x, w: ((x, w), {"ceil_mode": 1}),
    "dtypes": lambda x, w: ((x, w.double()), {}),
    "list as input": lambda x, w: (([1.0], w), {}),
    "no weight": lambda x, w: ((x, None), {}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_as_torch_does(case):
    args, kwargs = BAD[case](torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3))
    assert_refused_alike(f, torchs, args, kwargs)


def test_weight_on_another_device_is_refused():  # PyTorch reads garbage
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode(), pytest.raises(RuntimeError, match=f"{OP}: expected all tensors to be on the"):
            f(torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, device="meta"))


def test_ops_refuse_what_does_not_belong_together():
    ops = torch.ops.dlkernels
    x, w, sizes = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), ([1, 1], [0] * 4, [1, 1], 1)
    forward, backward = ops.conv2d_relu_max_pool2d_forward, ops.conv2d_relu_max_pool2d_backward
    y, argmax = forward(x, w, None, *sizes)
    for bad in [(x.double(), w, None), (x, w.double(), None), (x[:0], w, None)]:
        with pytest.raises(NotImplementedError):
            forward(*bad, *sizes)
    for bad in [(y[:1], argmax, x, w), (y, argmax[:1], x, w), (y, argmax, x[:1], w)]:
        with pytest.raises(RuntimeError):
            backward(*bad, *sizes, [True] * 3)
    for bad in [(y.double(), argmax, x, w), (y, argmax.long(), x, w), (y, argmax, x, w[:, :2])]:
        with pytest.raises(RuntimeError):
            backward(*bad, *sizes, [True] * 3)
    everything = torch.randint(256, argmax.shape, dtype=torch.uint8)  # is not trusted
    assert backward(y, everything, x, w, *sizes, [True] * 3)[0].isfinite().all()


# ---- the module, and the op in an exported model ------------------------------------------------


X = torch.randn(3, 2, 9, 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "pool"),
    [
        ((2, 5, 3), {}, {}),
        ((2, 6, (3, 2), 2, 1, 1, 2), {}, {"kernel_size": 2}),
        ((2, 5, 3), {"padding": "same", "bias": False}, {"kernel_size": 3, "stride": 2}),
        ((2, 5, 3), {"padding": 1, "padding_mode": "reflect"}, {"kernel_size": 3, "padding": 1}),
    ],
)
def test_module(args, kwargs, pool):
    torch.manual_seed(1)
    module = dlkernels.nn.Conv2dReLUMaxPool2d(
        *args, **kwargs, **{f"pool_{name}": value for name, value in pool.items()}
    )
    torch.manual_seed(1)
    pool = nn.MaxPool2d(**{"kernel_size": 2, **pool})
    expected = nn.Sequential(nn.Conv2d(*args, **kwargs), nn.ReLU(), pool)
    assert isinstance(module, nn.Conv2d)
    assert [*module.state_dict()] == [*expected[0].state_dict()]
    assert repr(module) == (
        repr(expected[0])[:-1].replace("Conv2d", "Conv2dReLUMaxPool2d", 1)
        + f", pool_kernel_size={pool.kernel_size}, pool_stride={pool.stride}, "
        f"pool_padding={pool.padding}, pool_dilation=1, ceil_mode=False)"
    )
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(module(X), expected(X))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(X), module(X))


def test_export_keeps_the_op():
    row = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d((2, 2)))
    model = dlkernels.convert(row)
    exported = torch.export.export(model, (X,))
    assert f"dlkernels.{OP}.default" in {str(node.target) for node in exported.graph.nodes}
    assert torch.equal(exported.module()(X), model(X))


@layout
def test_what_is_not_finite_reaches_what_meets_it(machine, layout):
    """As through the ops that it is made of, whose zeros beside the image count for nothing."""
    for C, K, groups, kernel in [(3, 9, 1, 3), (3, 5, 1, 5), (17, 17, 17, 3)]:
        x, bias = torch.randn(2, C, 9, 7).contiguous(memory_format=LAYOUTS[layout]), torch.randn(K)
        weight, grad_y = torch.randn(K, C // groups, kernel, kernel), torch.randn(2, K, 4, 3)
        for where, value in [(0, torch.nan), (1, torch.nan), (1, -torch.inf), (2, torch.inf)]:
            args = [t.clone() for t in (x, weight, grad_y)]
            args[where][0, -1, 0, 0] = value

            def results(f, dtype, args=args, bias=bias, groups=groups, kernel=kernel):
                inputs = [t.to(dtype, copy=True).requires_grad_() for t in (*args[:2], bias)]
                y = f(*inputs, padding=kernel // 2, groups=groups)
                return y, *torch.autograd.grad(y, inputs, args[2].to(dtype))

            got = results(ours.conv2d_relu_max_pool2d, torch.float32)
            expected = results(
                lambda *a, **k: reference.max_pool2d(F.relu(reference.conv2d(*a, **k)), 2),
                torch.float64,
            )
            for result, exact in zip(got, expected, strict=True):
                torch.testing.assert_close(
                    result.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True
                )
