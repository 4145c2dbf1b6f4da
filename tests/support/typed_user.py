"""A training script with types, as a user writes one: `make lint` checks it, test_types.py runs it.

The annotations are the test. convert() and revert() keep the class of what they are given.
"""

import math

import torch
from torch import Tensor, nn

import dlkernels
from dlkernels import functional


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding="same")
        self.pool = dlkernels.nn.MaxPool2d(2)
        self.head: nn.Linear = dlkernels.nn.Linear(8 * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.conv(x)))
        return functional.linear(x.flatten(1), self.head.weight, bias=self.head.bias)


def train(model: nn.Module, images: Tensor, classes: Tensor, steps: int = 8) -> list[float]:
    optimizer: torch.optim.Optimizer = dlkernels.optim.Adam(model.parameters(), lr=1e-2)
    loss = dlkernels.nn.CrossEntropyLoss(label_smoothing=0.1)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        value: Tensor = loss(model(images), classes)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@dlkernels.disabled()
def evaluate(model: nn.Module, images: Tensor, *, classes: Tensor) -> float:
    with torch.no_grad():
        right: Tensor = model(images).argmax(1) == classes
    return right.float().mean().item()


def call_functions(x: Tensor) -> list[Tensor]:
    image = x.reshape(1, 1, 4, -1)
    window = torch.ones(2, 1, 3, 3)
    pooled: Tensor = functional.max_pool2d(image, (2, 2), stride=2)
    values, indices = functional.max_pool2d(image, 2, return_indices=True)
    convolved: Tensor = functional.conv2d(image, window, None, 1, "same", dilation=(1, 1))
    fused: Tensor = functional.conv2d_relu_max_pool2d(image, window, padding=[1, 1])
    mlp: Tensor = functional.mlp(x, [torch.ones(3, x.shape[1]), torch.ones(2, 3)])
    loss: Tensor = functional.cross_entropy(x, torch.zeros(len(x), dtype=torch.long))
    return [pooled, values, indices, convolved, fused, mlp, loss]


def main() -> None:
    torch.manual_seed(0)
    kept: bool = dlkernels.tune_allocator()
    images, classes = torch.randn(32, 1, 8, 8), torch.arange(32) % 4

    stack: nn.Sequential = dlkernels.convert(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    )
    net: Net = dlkernels.convert(Net(classes=4), fuse=True, verbose=False)
    perceptron: dlkernels.nn.MLP = dlkernels.convert(dlkernels.nn.MLP([64, 32, 4], bias=True))
    for model, inputs in ((stack, images), (net, images), (perceptron, images.flatten(1))):
        losses = train(model, inputs, classes)
        assert losses[-1] < losses[0], losses
        assert 0 <= evaluate(model, inputs, classes=classes) <= 1

    optimizer = dlkernels.optim.SGD(stack.parameters(), lr=0.1, momentum=0.9)

    def closure() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(stack(images), classes)
        loss.backward()
        return loss.item()

    value: float = optimizer.step(closure)
    assert math.isfinite(value)

    step = dlkernels.graphed(stack, functional.cross_entropy, optimizer, (images, classes))
    detached: Tensor = step(images, classes)
    assert not detached.requires_grad

    fused: list[str] = [row.op for row in dlkernels.report(stack).fused]
    assert fused == ["mlp"]
    assert not dlkernels.report(net).left
    back: Net = dlkernels.revert(net)
    assert type(back.conv) is nn.Conv2d

    with dlkernels.set_fallback("error"), dlkernels.set_precision("ieee"):
        dlkernels.reset_stats()
        call_functions(torch.randn(8, 6))
    ran: dict[str, int] = {op: count["kernel"] for op, count in dlkernels.stats().items()}
    info: dict[str, object] = dlkernels.info()
    print(
        info["isa"], dlkernels.__version__, kept, sorted(op for op, times in ran.items() if times)
    )


if __name__ == "__main__":
    main()
