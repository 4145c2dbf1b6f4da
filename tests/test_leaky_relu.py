"""leaky_relu: torch.nn.functional.leaky_relu."""

import pytest
import torch
import torch.nn.functional as F

import dlkernels
import dlkernels.functional as ours
from support.common import assert_refused_alike, calls, check

SLOPES = (0.01, 0.0, -2.0, 1)


def samples(device="cpu"):
    """(input,): every length around the vectors, ties, NaN, infinities, other strides, empty."""
    special = [0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf")]
    for n in (*range(35), 100_003):
        yield (torch.randn(n, device=device, requires_grad=True),)
    yield (torch.tensor(special, device=device, requires_grad=True),)
    x = torch.randn(3, 4, 5, 6, device=device)
    for view in (x, x.transpose(1, 3), x[:, ::2], x[:1].expand(5, 4, 5, 6), x[:0]):
        yield (view.detach().requires_grad_(),)


@pytest.mark.parametrize("slope", SLOPES)
def test_values_and_gradients(machine, slope):
    for args in samples():
        kwargs = {"negative_slope": slope}
        check(ours.leaky_relu, F.leaky_relu, args, kwargs, ["leaky_relu"], ["leaky_relu_backward"])


def test_opcheck():
    for (x,) in [sample for sample in samples() if not sample[0].isnan().any()][::6]:
        torch.library.opcheck(torch.ops.dlkernels.leaky_relu.default, (x, 0.1))
        y = x.detach()
        torch.library.opcheck(torch.ops.dlkernels.leaky_relu_backward.default, (y, y, 0.1))


def test_compile():
    compiled = torch.compile(ours.leaky_relu, fullgraph=True)
    for args in [*samples()][30::4]:
        check(compiled, F.leaky_relu, args, {}, ["leaky_relu"], ["leaky_relu_backward"])


def test_second_gradients():
    x = torch.randn(7, dtype=torch.float32, requires_grad=True)

    def second(f):
        (g,) = torch.autograd.grad((f(x, 0.2) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    torch.testing.assert_close(second(ours.leaky_relu), second(F.leaky_relu))


def test_left_to_torch():
    x = torch.randn(5)
    for args in ((x.double(),), (x.clone(), 0.1, True), (x, torch.tensor(0.5))):
        with calls(torchs=["leaky_relu"]):
            got = ours.leaky_relu(*args)
        assert torch.equal(got, F.leaky_relu(*args))


def test_a_slope_that_is_no_number():
    for slope in ("1", None):
        assert_refused_alike(ours.leaky_relu, F.leaky_relu, (torch.randn(5), slope))


def test_module():
    model = dlkernels.convert(torch.nn.Sequential(torch.nn.LeakyReLU(0.3)))
    assert type(model[0]) is dlkernels.nn.LeakyReLU
    x = torch.randn(5)
    with calls(["leaky_relu"]):
        got = model(x)
    assert torch.equal(got, F.leaky_relu(x, 0.3))
    assert type(dlkernels.revert(model)[0]) is torch.nn.LeakyReLU
