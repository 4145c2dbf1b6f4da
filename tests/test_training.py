"""Training on our kernels follows training on PyTorch's, step for step from the same seed."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import dlkernels
from support.common import calls

STEPS = 30


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


KERNELS = {
    mlp: {"mlp", "mlp_backward"},
    cnn: {"mlp", "mlp_backward", "conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward"},
}


def train(make, dtype, ours):
    """Losses of STEPS steps on digits, the parameters after them, and before."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=dtype)[:, None] / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model, loss_fn, optim = make(), nn.CrossEntropyLoss(), torch.optim.Adam
    if ours:
        dlkernels.convert(model)
        loss_fn, optim = dlkernels.nn.CrossEntropyLoss(), dlkernels.optim.Adam
    model.to(dtype)
    optimizer = optim(model.parameters(), lr=1e-3)
    start = [p.detach().clone() for p in model.parameters()]
    losses = []
    for i in torch.randperm(len(y)).repeat(5).split(256)[:STEPS]:
        optimizer.zero_grad()
        loss = loss_fn(model(x[i]), y[i])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    end = [p.detach().double() for p in model.parameters()]
    return torch.stack(losses).double(), end, [p.double() for p in start]


@pytest.mark.parametrize("make", KERNELS)
def test_thirty_steps(machine, ieee, make):
    torchs, exact = train(make, torch.float32, False), train(make, torch.float64, False)
    with calls({"adam_", "cross_entropy"} | KERNELS[make]):
        got = train(make, torch.float32, True)
    # The losses differ by rounding errors, which grow at the pace that PyTorch's own run shows.
    error, torchs_error = (got[0] - exact[0]).norm(), (torchs[0] - exact[0]).norm()
    assert error <= 4 * torchs_error + 1.3e-6 * exact[0].norm()
    assert got[0][-1] < got[0][0] - 0.1
    # The parameters went the same way. Not to the last bit: among millions of ReLUs and maxima a
    # few lie within rounding of a tie, and one that falls to the other side shows in its weights.
    for mine, true, start in zip(got[1], exact[1], exact[2]):
        assert (mine - true).norm() <= 0.01 * (true - start).norm()
