"""Training on our kernels follows training on PyTorch's, step for step from the same seed."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import dlkernels
from common import calls

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
    mlp: {"linear", "linear_relu", "linear_backward"},
    cnn: {"linear", "linear_relu", "linear_backward", "conv2d_relu", "conv2d_backward"}
    | {"max_pool2d", "max_pool2d_backward"},
}


def train(make, dtype, ours):
    """Losses of STEPS steps on digits, and the parameters after them."""
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
    losses = []
    for i in torch.randperm(len(y)).repeat(5).split(256)[:STEPS]:
        optimizer.zero_grad()
        loss = loss_fn(model(x[i]), y[i])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double(), [p.detach().double() for p in model.parameters()]


@pytest.mark.parametrize("make", KERNELS)
def test_thirty_steps(machine, make):
    torchs, exact = train(make, torch.float32, False), train(make, torch.float64, False)
    with calls({"adam_", "cross_entropy"} | KERNELS[make]):
        got = train(make, torch.float32, True)
    for mine, theirs, true in zip(
        [got[0], *got[1]], [torchs[0], *torchs[1]], [exact[0], *exact[1]]
    ):
        # Rounding errors grow from step to step, in both; how fast, PyTorch's own run shows.
        assert (mine - true).norm() <= 4 * (theirs - true).norm() + 1e-5 * true.norm()
    assert got[0][-1] < got[0][0] - 0.1
