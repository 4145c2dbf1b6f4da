"""Tell two noisy circles apart with a net of four hidden neurons, and draw its decision boundary.

    python examples/circles.py                        # PyTorch's kernels and ours, side by side
    python examples/circles.py --kernels dlkernels --epochs 5000

500 points of scikit-learn's make_circles to train on, 500 others to test on. Every epoch is one
step of Adam on all points. Sigmoid and binary cross-entropy are PyTorch's on both kernels.
"""

import argparse

import torch
from sklearn.datasets import make_circles
from torch import nn

import harness
import results

METRICS = {  # name, format in the table, scale in the plot
    "loss": ("training loss", "{:.4f}", "linear"),
    "accuracy": ("test accuracy", "{:.1%}", "linear"),
}


def load_circles(seed):
    """500 points [500, 2] and whether each belongs to the inner circle, 0.0 or 1.0 [500, 1]."""
    x, y = make_circles(500, noise=0.2, factor=0.3, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]


def make_run(kernels, lr):
    model = nn.Sequential(nn.Linear(2, 4), nn.Sigmoid(), nn.Linear(4, 1), nn.Sigmoid())
    return harness.Run(kernels, model, nn.BCELoss(), lambda optim, p: optim.Adam(p, lr=lr))


def draw_boundary(axes, runs, x, y):
    """The first run's probabilities, every run's boundary and the points."""
    line = torch.linspace(-1.75, 1.75, 200)
    grid = torch.cartesian_prod(line, line)
    looks = ({"linewidths": 5, "alpha": 0.4}, {"linestyles": "--"})
    for i, (run, look) in enumerate(zip(runs.values(), looks)):
        p = run.predict(grid).reshape(200, 200).T
        if i == 0:
            image = axes.contourf(line, line, p, levels=20, cmap="RdBu", alpha=0.5)
            axes.figure.colorbar(image, ax=axes, label="probability of the inner circle")
        axes.contour(line, line, p, levels=[0.5], colors="black", **look)
    axes.scatter(*x.T, c=y[:, 0], cmap="RdBu", edgecolors="black", linewidths=0.5, s=16)
    axes.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    args = harness.parse_arguments(parser, "circles.png", epochs=1000, lr=0.01)

    x, y = load_circles(seed=0)
    test_x, test_y = load_circles(seed=1)
    runs = harness.make_runs(args, lambda kernels: make_run(kernels, args.lr))

    def evaluate(run):
        return {"accuracy": harness.accuracy(run.predict(test_x) > 0.5, test_y > 0.5)}

    history = []
    with harness.progress(args.epochs) as advance:
        for epoch in harness.train(runs, range(args.epochs), lambda epoch: [(x, y)], evaluate):
            history.append(epoch)
            advance()

    title = f"Two circles, 2-4-1 neurons, seed {args.seed}"
    draws = {
        "decision boundary, test points": lambda axes: draw_boundary(axes, runs, test_x, test_y)
    }
    results.report(args.plot, title, {"circles": history}, METRICS, draws)


if __name__ == "__main__":
    harness.run(main)
