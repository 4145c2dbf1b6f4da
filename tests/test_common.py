"""What the other tests compare with can fail."""

import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
from support.common import assert_close, assert_exact, assert_refused_alike, calls, check, compare

EXACT = torch.tensor([1.0, -2.0, float("nan"), float("inf"), 0.0], dtype=torch.float64)
NAN, INF = float("nan"), float("inf")
fails = pytest.raises(AssertionError)


def test_assert_close():
    torchs = EXACT.float() * (1 + 2**-12)  # PyTorch's greatest error is 2**-11
    assert_close(torchs, torchs, EXACT)
    assert_close((EXACT + 3.9 * 2**-11).float(), torchs, EXACT)
    for i, value in [(0, 1.01), (0, NAN), (0, INF), (2, 0.0), (3, 1e38), (3, -INF), (4, 0.01)]:
        got = torchs.clone()
        got[i] = value
        with fails:
            assert_close(got, torchs, EXACT)
    for got in (torchs.double(), torchs[None]):
        with fails:
            assert_close(got, torchs, EXACT)
    with fails:
        assert_close(torch.tensor([1]), torch.tensor([2]), torch.tensor([1]))


def test_calls():
    x = torch.randn(3)
    for kernels, torchs in [([], []), (["linear"], []), (["relu", "linear"], []), ([], ["relu"])]:
        with fails, calls(kernels, torchs):
            ours.relu(x)
    with fails:
        check(F.relu, F.relu, (x,), forward=["relu"])  # PyTorch with itself


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_compare():
    x = torch.randn(4, 5, requires_grad=True)
    compare(F.relu, F.relu, (x,))
    for wrong in (
        lambda x: F.relu(x) + 1e-4,
        lambda x: F.relu(x).t().contiguous().t(),
        lambda x: F.relu(x).double(),
        lambda x: F.relu(x)[None],
        lambda x: (F.relu(x), x),
        WrongGradient.apply,
    ):
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            compare(wrong, F.relu, (x,))
    with fails:
        compare(torch.relu_, F.relu, (x.detach(),))


def test_other_comparisons():
    w = torch.randn(3, 5)
    with fails:
        assert_exact(lambda *args: F.linear(*args) + 2**-9, F.linear, (torch.randn(4, 5), w))

    def refuses(error):
        def f(x):
            raise error

        return f

    for error in (NotImplementedError("bad size"), RuntimeError("no")):
        with fails:
            assert_refused_alike(refuses(error), refuses(RuntimeError("bad size")), (w,))
