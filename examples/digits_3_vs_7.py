"""Is it a 3 or a 7? Mean images, a linear model and a two-layer net, from the bottom up.

    python examples/digits_3_vs_7.py
    python examples/digits_3_vs_7.py --kernels dlkernels --epochs 100

The baseline takes a digit for a 3 if it is nearer to the mean of all threes than to that of all
sevens, in the L1 or the L2 distance. The linear model learns by gradient descent written out below,
the two-layer net by the library's. Last, the times of the baseline's distances, from a Python loop
upwards. dlkernels has no kernel for them, but L2 is a linear layer in disguise; L1 is PyTorch's.
"""

import argparse
import timeit
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import dlkernels
import harness
import results

METRICS = {  # name, format in the table, scale in the plot
    "loss": ("training loss", "{:.4f}", "log"),
    "accuracy": ("test accuracy", "{:.2%}", "linear"),
}


class SGD:
    """Stochastic gradient descent, written out."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = list(parameters), lr

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            p -= self.lr * p.grad


MODELS = {  # and how its optimizer is made
    "linear": (lambda: nn.Linear(784, 1), lambda optim, p, lr: SGD(p, lr)),
    "two layers": (
        lambda: nn.Sequential(nn.Linear(784, 30), nn.ReLU(), nn.Linear(30, 1)),
        lambda optim, p, lr: optim.SGD(p, lr),
    ),
}


def load_3_and_7():
    """Images [N, 784] from 0 to 1 and whether each is a 7 [N, 1], to train on and to test on."""
    for x, y in harness.load_digits():
        chosen = (y == 3) | (y == 7)
        yield x[chosen].flatten(1) / 16, (y[chosen, None] == 7).float()


def distances(x, means):
    """{provider: {distance: function}}: the functions give the distances of images [N, 784] to mean
    images [2, 784] as [N, 2], L2 as its square."""
    images, mean_images, array, mean_array = x.tolist(), means.tolist(), x.numpy(), means.numpy()

    def loop(term):
        return [[sum(map(term, image, mean)) for mean in mean_images] for image in images]

    def as_linear(linear):  # |x - m|^2 = |x|^2 - 2 (x m - |m|^2 / 2): a linear layer in brackets
        return x.square().sum(1, keepdim=True) - 2 * linear(x, means, -means.square().sum(1) / 2)

    return {
        "Python loop": {
            "L1": lambda: loop(lambda a, b: abs(a - b)),
            "L2": lambda: loop(lambda a, b: (a - b) ** 2),
        },
        "NumPy": {
            "L1": lambda: np.abs(array[:, None] - mean_array).sum(2),
            "L2": lambda: np.square(array[:, None] - mean_array).sum(2),
        },
        "torch": {
            "L1": lambda: torch.cdist(x, means, p=1),
            "L2": lambda: torch.cdist(x, means).square(),
            "L2 as linear": lambda: as_linear(F.linear),
        },
        "dlkernels": {"L2 as linear": lambda: as_linear(dlkernels.functional.linear)},
    }


def seconds(f):
    """The best of five, each of at least a few milliseconds."""
    timer = timeit.Timer(f)
    number = 1 + int(0.02 / timer.timeit(1))
    return min(timer.repeat(5, number)) / number


def time_distances(x, means, kernels):
    rows = []
    for provider, functions in distances(x, means).items():
        if provider != "dlkernels" or provider in kernels:
            times = {distance: f"{1e6 * seconds(f):,.1f}" for distance, f in functions.items()}
            rows.append({"": provider} | times)
    results.print_table(f"Microseconds for the distances of {len(x)} images to two", rows)


def compare(x, y, means, histories):
    """Print the accuracies of all methods; returns those of the mean images."""
    functions, rows, baseline = distances(x, means), [], {}
    for kernels in histories["linear"][-1]:
        nearest = {"L1": functions["torch"]["L1"](), "L2": functions[kernels]["L2 as linear"]()}
        for name, distance in nearest.items():
            baseline[f"mean images, {name}"] = harness.accuracy(distance.argmin(1), y[:, 0])
        learned = {name: history[-1][kernels]["accuracy"] for name, history in histories.items()}
        row = {name: f"{value:.2%}" for name, value in (baseline | learned).items()}
        rows.append({"kernels": kernels} | row)
    results.print_table("Test accuracy", rows)
    return baseline


def draw_baseline(axes, baseline):
    for (name, accuracy), style in zip(baseline.items(), ("-.", ":")):
        axes.axhline(accuracy, color="black", ls=style, label=name)
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    args = harness.parse_arguments(parser, "digits_3_vs_7.png", epochs=40, batch_size=32, lr=0.1)
    (x, y), (test_x, test_y) = load_3_and_7()
    means = torch.stack([x[y[:, 0] == 0].mean(0), x[y[:, 0] == 1].mean(0)])

    def make_run(kernels, name):
        model, make_optimizer = MODELS[name]
        return harness.Run(
            kernels, model(), nn.BCEWithLogitsLoss(), partial(make_optimizer, lr=args.lr)
        )

    def evaluate(run):
        return {"accuracy": harness.accuracy(run.predict(test_x) > 0, test_y > 0)}

    make_batches = partial(harness.make_batches, x, y, args.batch_size, args.seed)
    histories = {}
    with harness.progress(len(MODELS) * args.epochs) as advance:
        for name in MODELS:
            runs, histories[name] = harness.make_runs(args, partial(make_run, name=name)), []
            for epoch in harness.train(runs, range(args.epochs), make_batches, evaluate):
                histories[name].append(epoch)
                advance()

    time_distances(test_x, means, runs)
    baseline = compare(test_x, test_y, means, histories)
    draws = {
        "accuracy": lambda axes: draw_baseline(axes, baseline),
        "mean images": lambda axes: results.draw_images(axes, means.reshape(2, 28, 28), 2),
    }
    title = f"3 or 7, batch {args.batch_size}, seed {args.seed}"
    results.report(args.plot, title, histories, METRICS, draws)


if __name__ == "__main__":
    harness.run(main)
