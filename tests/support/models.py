"""Models to convert, and what they compute."""

import pytest
import torch
from torch import nn


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 17), nn.ReLU(), nn.Linear(17, 9), nn.ReLU(True), nn.Linear(9, 5)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True)),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(8, 5),
    )


class Block(nn.Module):
    """As in a ResNet: one ReLU module in two places, and a forward of its own."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        return self.relu(x + self.conv2(self.relu(self.bn(self.conv1(x)))))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


MODELS = {"mlp": mlp, "cnn": cnn, "resnet": ResNet}
models = pytest.mark.parametrize("model", [f() for f in MODELS.values()], ids=MODELS)


def images():
    return torch.randn(3, 1, 6, 6)


def results(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad.clone() for p in model.parameters())]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
