"""Fit a noisy sine with seven optimizers: their loss curves in one plot, on both kernels.

    python examples/optimizers.py
    python examples/optimizers.py --kernels dlkernels --epochs 200

All start from the same weights (Kaiming's initial values); an epoch is one step on all 512 points.
Each has a learning rate that suits it, so the plot shows how they go about it and not which is
best. tanh and the mean squared error are PyTorch's on both kernels.
"""

import argparse
import math
from functools import partial

import torch
from torch import nn

import harness
import results

METRICS = {"loss": ("mean squared error", "{:.4f}", "log")}  # name, format, scale in the plot
NOISE = 0.1  # standard deviation; its square is the loss of the sine itself
OPTIMIZERS = {
    "SGD": lambda optim, p: optim.SGD(p, lr=0.005),
    "momentum": lambda optim, p: optim.SGD(p, lr=0.002, momentum=0.9),
    "Nesterov": lambda optim, p: optim.SGD(p, lr=0.002, momentum=0.9, nesterov=True),
    "Adagrad": lambda optim, p: optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda optim, p: optim.Adadelta(p, lr=0.1),
    "RMSprop": lambda optim, p: optim.RMSprop(p, lr=0.0003),
    "Adam": lambda optim, p: optim.Adam(p, lr=0.002),
}


def load_sine():
    """512 points of a noisy sine: x from -pi to pi and y, both [512, 1]."""
    generator = torch.Generator().manual_seed(0)
    x = math.pi * (2 * torch.rand(512, 1, generator=generator) - 1)
    return x, x.sin() + NOISE * torch.randn(512, 1, generator=generator)


def make_run(kernels, make_optimizer):
    model = nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="tanh")
        nn.init.zeros_(layer.bias)
    return harness.Run(kernels, model, nn.MSELoss(), make_optimizer)


def draw_fits(axes, fits, x, y):
    """The data and what the last of every name's runs makes of them."""
    axes.scatter(x, y, s=4, color="silver")
    line = torch.linspace(x.min(), x.max(), 200)[:, None]
    for name, runs in fits.items():
        *_, run = runs.values()
        axes.plot(line, run.predict(line), label=name)
    axes.set(xlabel="x", ylabel="y")
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    args = harness.parse_arguments(parser, "optimizers.png", epochs=1000, batch_size=512)

    x, y = load_sine()
    make_batches = partial(harness.make_batches, x, y, args.batch_size, args.seed)

    fits, histories = {}, {}
    with harness.progress(len(OPTIMIZERS) * args.epochs) as advance:
        for name, make_optimizer in OPTIMIZERS.items():
            make = partial(make_run, make_optimizer=make_optimizer)
            fits[name], histories[name] = harness.make_runs(args, make), []
            for epoch in harness.train(fits[name], range(args.epochs), make_batches):
                histories[name].append(epoch)
                advance()

    title = f"A noisy sine, 1-64-64-1 neurons, batch {args.batch_size}, seed {args.seed}"
    draws = {"data and fits": lambda axes: draw_fits(axes, fits, x, y)}
    results.report(args.plot, title, histories, METRICS, draws)


if __name__ == "__main__":
    harness.run(main)
