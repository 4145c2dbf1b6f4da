"""linear and linear_relu: torch.nn.functional.linear, and relu of it."""

import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
from support.common import RTOL, assert_exact, assert_refused_alike, calls, check

PAIRS = {
    "linear": (ours.linear, F.linear),
    "linear_relu": (ours.linear_relu, lambda *a: F.relu(F.linear(*a))),
}
op = pytest.mark.parametrize("op", PAIRS)


def samples(device="cpu"):
    """(input, weight, bias): tails around the register tiles, odd strides, nothing at all."""

    def t(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    for M, K, N in [
        (1, 1, 1),
        (2, 3, 5),
        (13, 17, 31),
        (14, 16, 32),
        (15, 15, 33),
        (29, 257, 65),
        (64, 784, 10),
    ]:
        yield t(M, K), t(N, K), t(N)
        yield t(M, K), t(N, K), None
    # Empty, (0, 784, 512) with enough zeros in grad_weight for two threads.
    for M, K, N in [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 784, 512)]:
        yield t(M, K), t(N, K), t(N)
    yield t(7), t(5, 7), t(5)  # any rank
    yield t(2, 3, 4, 7), t(5, 7), t(5)
    yield t(7, 9).t(), t(7, 5).t(), t(5, 2)[:, 0]  # transposed, strided
    yield t(4, 6, 7).transpose(0, 1), t(5, 14)[:, ::2], t(5)
    yield t(1, 7).expand(6, 7), t(5, 7), t(1).expand(5)
    yield t(50)[1:43].view(6, 7), t(5, 7), t(5)  # misaligned
    yield t(300, 300), t(200, 300), t(200)  # several blocks and parts
    yield t(6, 7).detach(), t(5, 7), t(5)  # no gradient for some
    yield t(6, 7), t(5, 7).detach(), t(5)
    yield t(6, 7), t(5, 7), t(5).detach()
    yield t(6, 7).detach(), t(5, 7).detach(), t(5)
    yield t(5000, 7).detach(), t(300, 7).detach(), t(300)  # large enough for two threads


@op
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_values_and_gradients(machine, op, dtype):
    f, g = PAIRS[op]
    passes = {"forward": [op], "backward": ["linear_backward"]}
    for args in samples():
        check(f, g, args, **passes, grad_strides=False, dtype=dtype)


@op
def test_integers_are_exact(machine, op):
    for args in samples():
        with calls([op, "linear_backward"]):
            assert_exact(*PAIRS[op], args)


def test_gradient_of_one_element(machine):
    """Its strides lead nowhere and may be any, so that it runs along memory on neither side."""
    args = [t.requires_grad_() for t in (torch.ones(1, 4), -torch.ones(1, 4), torch.zeros(1))]
    grad_y = torch.ones(7, 7)[::7, ::7]
    with calls(["linear_relu", "linear_backward"]):
        y = ours.linear_relu(*args)
        grads = torch.autograd.grad(y, args, grad_y)
    assert y == 0 and not any(grad.any() for grad in grads)


@op
@pytest.mark.parametrize("M, K, N", [(5000, 70, 40), (300, 900, 257), (3, 5000, 5)])
def test_threads_give_the_same_bits(op, M, K, N):
    before, results = torch.get_num_threads(), []
    args = [torch.randn(shape, requires_grad=True) for shape in ((M, K), (N, K), (N,))]
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        y = PAIRS[op][0](*args)
        results.append((y, *torch.autograd.grad(y.square().sum(), args)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@op
def test_opcheck(op):
    for args in samples():
        torch.library.opcheck(getattr(torch.ops.dlkernels, op), args)


@op
def test_compile(op):
    f, g = PAIRS[op]
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for args in list(samples())[:6]:
        check(compiled, g, args, forward=[op], backward=["linear_backward"], grad_strides=False)


@op
def test_weight_on_another_device_is_refused(op):  # PyTorch reads garbage
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode(), pytest.raises(RuntimeError, match="expected all tensors to be on the same"):
            PAIRS[op][0](torch.randn(2, 5), torch.randn(3, 5, device="meta"))


@op
def test_bias_that_broadcasts_is_pytorchs(op):
    f, g = PAIRS[op]
    args = torch.randn(2, 5), torch.randn(3, 5), torch.randn(1)
    with calls(torchs=[op]):
        torch.testing.assert_close(f(*args), g(*args))
    with pytest.raises(RuntimeError):
        f(args[0], args[1], torch.randn(2))


BAD = {
    "features": lambda x, w, b: (x[:, :4], w),
    "bias size": lambda x, w, b: (x, w, b[:2]),
    "rank of weight": lambda x, w, b: (x, w[None]),
    "no rank": lambda x, w, b: (x[0, 0], w),
    "dtypes": lambda x, w, b: (x, w.double()),
    "dtype of bias": lambda x, w, b: (x, w, b.double()),
    "list as input": lambda x, w, b: ([1.0], w),
    "no weight": lambda x, w, b: (x, None),
    "number as bias": lambda x, w, b: (x, w, 1.0),
}


@op
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_as_torch_does(op, case):
    args = BAD[case](torch.randn(4, 5), torch.randn(3, 5), torch.randn(3))
    assert_refused_alike(*PAIRS[op], args)


def test_backward_checks_its_arguments():
    backward = torch.ops.dlkernels.linear_backward
    g, x, w, mask = torch.randn(4, 3), torch.randn(4, 5), torch.randn(3, 5), [True] * 3
    assert torch.equal(backward(g, x, w, torch.zeros(4, 3), mask)[2], torch.zeros(3))
    for args in [
        (g[:3], x, w, None),
        (g[:, :2], x, w, None),
        (g, x[:, :4], w, None),
        (g, x, w[0], None),
        (g, x, w, g[:3]),
        (g, x.to("meta"), w, None),
        (g, x.double(), w, None),
    ]:
        with pytest.raises(RuntimeError, match=r"linear_backward: .*(must be|on the same device)"):
            backward(*args, mask)
