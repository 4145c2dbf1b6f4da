"""Fit a line by gradient descent on all data, on one sample and on mini-batches at a time.

    python examples/linear_regression.py
    python examples/linear_regression.py --kernels dlkernels --epochs 50

An epoch is one pass over the data in each: one iteration of gradient descent, 1,000 of stochastic
gradient descent, 16 of mini-batches. The plots show the loss against epochs and against time.
"""

import argparse
import itertools
import math
from functools import partial

import torch
from torch import nn

import harness
import results

METRICS = {"loss": ("loss after the epoch", "{:.5f}", "log")}  # name, format, scale in the plot
SAMPLES, SLOPE, INTERCEPT, NOISE = 1000, 3.0, 2.0, 0.5  # NOISE squared is the least loss
METHODS = {"full batch": (SAMPLES, 0.1), "SGD": (1, 0.001), "mini-batches": (64, 0.02)}  # batch, lr


def load_line():
    """x and y = INTERCEPT + SLOPE x + noise, both [SAMPLES, 1]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 1, generator=generator)
    return x, INTERCEPT + SLOPE * x + NOISE * torch.randn(SAMPLES, 1, generator=generator)


def make_run(kernels, lr):
    return harness.Run(kernels, nn.Linear(1, 1), nn.MSELoss(), lambda optim, p: optim.SGD(p, lr=lr))


def draw_loss_over_time(axes, histories):
    for i, (name, history) in enumerate(histories.items()):
        for kernels, style in zip(history[0], ("-", "--")):
            seconds = itertools.accumulate(epoch[kernels]["seconds"] for epoch in history)
            losses = [epoch[kernels]["loss"] for epoch in history]
            axes.plot(list(seconds), losses, style, color=f"C{i}", label=f"{name}, {kernels}")
    axes.set(xlabel="seconds", ylabel="loss after the epoch", xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_lines(axes, fits, x, y):
    axes.scatter(x, y, s=4, color="silver")
    ends = torch.tensor([[x.min()], [x.max()]])
    for name, runs in fits.items():
        *_, run = runs.values()
        bias, weight = run.model.bias.item(), run.model.weight.item()
        axes.plot(ends, run.predict(ends), label=f"{name}: {bias:.2f} + {weight:.2f} x")
    axes.set(xlabel="x", ylabel="y")
    axes.legend(title=f"the data: {INTERCEPT} + {SLOPE} x + noise")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    args = harness.parse_arguments(parser, "linear_regression.png", epochs=20)

    x, y = load_line()
    # A process's first steps are slow and would count against the kernels that take them.
    for run in harness.make_runs(args, partial(make_run, lr=0.1)).values():
        run.train_epoch([(x, y)])

    def evaluate(run):  # after the epoch and on all data, so that the methods compare
        return {"loss": run.loss_fn(run.predict(x), y).item()}

    fits, histories = {}, {}
    with harness.progress(len(METHODS) * args.epochs) as advance:
        for name, (batch_size, lr) in METHODS.items():
            name = f"{name}, {args.epochs} x {math.ceil(SAMPLES / batch_size)}"
            fits[name], histories[name] = harness.make_runs(args, partial(make_run, lr=lr)), []
            make_batches = partial(harness.make_batches, x, y, batch_size, args.seed)
            for epoch in harness.train(fits[name], range(args.epochs), make_batches, evaluate):
                histories[name].append(epoch)
                advance()

    draws = {
        "the same, against time": lambda axes: draw_loss_over_time(axes, histories),
        "data and lines": lambda axes: draw_lines(axes, fits, x, y),
    }
    title = f"A line through {SAMPLES} points, epochs x iterations, seed {args.seed}"
    results.report(args.plot, title, histories, METRICS, draws)


if __name__ == "__main__":
    harness.run(main)
