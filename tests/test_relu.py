"""relu: torch.nn.functional.relu, bit for bit."""

import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
from support.common import calls, check


def samples(device="cpu"):
    def t(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    for n in (0, 1, 7, 15, 16, 17, 31, 33, 100_003):
        yield (t(n),)
    yield (t(()),)
    yield (t(3, 0, 2),)
    yield (t(6, 10).t(),)
    yield (t(6, 10)[:, ::3],)
    yield (t(4, 1).expand(4, 5),)
    yield (t(2, 3, 4, 5).to(memory_format=torch.channels_last),)
    special = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), -float("inf"), 1e-40, -1e-40])
    yield (special.repeat(5).to(device).requires_grad_(),)


def test_values_and_gradients(machine):
    for args in samples():
        check(ours.relu, F.relu, args, forward=["relu"], backward=["relu_backward"])
        assert torch.equal(ours.relu(*args).view(torch.int32), F.relu(*args).view(torch.int32))


def test_opcheck():
    for args in list(samples())[:-1]:  # opcheck takes a NaN for a difference
        torch.library.opcheck(torch.ops.dlkernels.relu, args)


def test_compile():
    compiled = torch.compile(ours.relu, fullgraph=True, dynamic=True)
    for args in list(samples())[4:7]:
        check(compiled, F.relu, args, forward=["relu"], backward=["relu_backward"])


def test_inplace_is_pytorchs():
    x = torch.randn(5)
    with calls(torchs=["relu"]):
        assert ours.relu(x, inplace=True) is x
    assert (x >= 0).all()


def test_backward_checks_its_arguments():
    backward, x = torch.ops.dlkernels.relu_backward, torch.randn(4, 5)
    assert torch.equal(backward(x, torch.ones(4, 5)), x)
    for args in [(x[:3], x), (x, x[:, :4]), (x[0], x), (x.to("meta"), x), (x.double(), x)]:
        with pytest.raises(RuntimeError, match=r"relu_backward: .*(must be|on the same device)"):
            backward(*args)
