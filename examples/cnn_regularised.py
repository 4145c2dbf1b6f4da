"""Train a CNN with all that keeps it from learning by heart, and look at what it has learned.

    python examples/cnn_regularised.py
    python examples/cnn_regularised.py --kernels dlkernels --epochs 100 --patience 10

Batch normalisation, dropout, label smoothing, weight decay and early stopping: training ends when
the loss on held-out images has not improved for `--patience` epochs, and the best weights count.
Batch normalisation and dropout are PyTorch's on both kernels, with the same neurons dropped.
"""

import argparse
import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.metrics import ConfusionMatrixDisplay
from torch import nn

import dlkernels
import harness
import results

METRICS = {  # name, format in the table, scale in the plot
    "loss": ("training loss", "{:.4f}", "linear"),
    "held_out": ("held-out loss", "{:.4f}", "log"),
    "accuracy": ("held-out accuracy", "{:.2%}", "linear"),
}


def block(channels, filters):  # 28 x 28 pixels become 12 x 12, and those 4 x 4
    convolution = nn.Conv2d(channels, filters, 5)
    return convolution, nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1)


def make_run(kernels, lr):
    head = nn.Linear(1024, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)
    model = nn.Sequential(*block(1, 32), *block(32, 64), nn.Flatten(), *head)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    run = harness.Run(
        kernels, model, loss_fn, lambda optim, p: optim.AdamW(p, lr=lr, weight_decay=0.05)
    )
    run.best = math.inf, 0, copy.deepcopy(model.state_dict())  # held-out loss, epoch, weights
    return run


def load_data():
    """scikit-learn's digits, standardised, to train on, hold out and test on."""
    (x, y), test = harness.load_digits()
    cut = 4 * len(y) // 5  # rows are shuffled already
    mean, std = x[:cut].mean(), x[:cut].std()
    parts = (x[:cut], y[:cut]), (x[cut:], y[cut:]), test
    return [((x - mean) / std, y) for x, y in parts]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--patience", type=harness.number(int, 1, 10**6), default=5)
    args = harness.parse_arguments(parser, "cnn_regularised.png", epochs=30, batch_size=64, lr=1e-3)
    dlkernels.tune_allocator()  # for both sides: PyTorch's steps gain as much from it
    train, (valid_x, valid_y), (test_x, test_y) = load_data()
    runs = harness.make_runs(args, partial(make_run, lr=args.lr))
    history = []

    def evaluate(run):
        predicted = run.predict(valid_x)
        loss = F.cross_entropy(predicted, valid_y).item()
        if loss < run.best[0]:
            run.best = loss, len(history) + 1, copy.deepcopy(run.model.state_dict())
        return {"held_out": loss, "accuracy": harness.accuracy(predicted.argmax(1), valid_y)}

    make_batches = partial(harness.make_batches, *train, args.batch_size, args.seed)
    with harness.progress(args.epochs) as advance:
        for epoch in harness.train(runs, range(args.epochs), make_batches, evaluate):
            history.append(epoch)
            advance()
            if all(len(history) - run.best[1] >= args.patience for run in runs.values()):
                break

    for kernels, run in runs.items():
        _, epoch, weights = run.best
        run.model.load_state_dict(weights)
        predicted = run.predict(test_x).argmax(1)
        right = harness.accuracy(predicted, test_y)
        harness.console.print(
            f"{kernels}: test accuracy {right:.2%} with the weights of epoch {epoch}"
        )

    with torch.no_grad():
        filters, maps = run.model[0].weight.detach()[:, 0], run.model[:3](test_x[:1])[0]
    draws = {
        f"confusion matrix, {kernels}": lambda axes: ConfusionMatrixDisplay.from_predictions(
            test_y, predicted, ax=axes, colorbar=False, cmap="Blues"
        ),
        f"first layer's filters, {kernels}": lambda axes: results.draw_images(axes, filters, 8),
        "feature maps of a digit": lambda axes: results.draw_images(axes, maps, 8),
    }
    title = f"Regularised CNN, batch {args.batch_size}, seed {args.seed}"
    results.report(args.plot, title, {"cnn": history}, METRICS, draws)


if __name__ == "__main__":
    harness.run(main)
