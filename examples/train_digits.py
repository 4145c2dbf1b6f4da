"""Train an MLP or a small CNN on handwritten digits: PyTorch's kernels, dlkernels' or both.

    python examples/train_digits.py --model mlp                            # both, side by side
    python examples/train_digits.py --model cnn --kernels dlkernels
    python examples/train_digits.py --model cnn --data mnist --epochs 5    # needs torchvision
    python examples/train_digits.py --checkpoint run.pt --resume           # start, or go on
    torchrun --nproc-per-node 2 examples/train_digits.py                   # on two processes

The data are scikit-learn's 1,797 bundled digits at 28x28, a quarter held out. With `both`, two
models start from the same weights and see the same batches: their curves should coincide and only
the clock differ ("seconds an epoch": the training steps alone). Batches depend on the seed and the
epoch only, so a resumed run repeats the uninterrupted one bit for bit, on as many threads. Several
processes share every batch, and their losses are those of one process but for rounding.
"""

import argparse
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

import dlkernels
import harness
import parallel
import results

MODELS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    ),
}  # fmt: skip
METRICS = {  # name, format in the table, scale in the plot
    "loss": ("training loss", "{:.6f}", "log"),
    "accuracy": ("test accuracy", "{:.2%}", "linear"),
}
SETTINGS = ("model", "data", "kernels", "batch_size", "lr", "seed")  # what a checkpoint is for
SHIFT = 2  # pixels an image may move each way; takes the CNN from about 98 to 99 %


class Run(harness.Run):
    """One that shares every batch with the other processes, where torchrun started several."""

    def __init__(self, kernels, args):
        model, loss_fn = MODELS[args.model]().to(args.device), nn.CrossEntropyLoss()
        super().__init__(kernels, model, loss_fn, lambda optim, p: optim.Adam(p, lr=args.lr))
        self.replica = parallel.replicated(model)

    def loss(self, x, y):
        x, y, weight = parallel.shard(x, y)
        loss = self.loss_fn(self.replica(x), y)
        return loss if weight == 1 else loss * weight

    def train_epoch(self, batches, advance):
        result = super().train_epoch(batches, advance)
        return result | {"loss": parallel.mean_of_all(result["loss"])}


def load_mnist(folder):
    try:
        from torchvision.datasets import MNIST

        parts = [MNIST(folder, train=train, download=True) for train in (True, False)]
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch, no data
        why = str(error).partition("\n")[0]
        sys.exit(f"--data mnist needs torchvision and the network or the data: {why}")
    return [(part.data[:, None].float(), part.targets) for part in parts]


def shift(x, rng):
    """Every image moved by up to SHIFT pixels."""
    moves = rng.integers(0, 2 * SHIFT + 1, size=(2, len(x)))
    padded = F.pad(x, (SHIFT,) * 4, value=x.min().item())
    return torch.stack([im[:, i : i + 28, j : j + 28] for im, i, j in zip(padded, *moves)])


def train(runs, data, args, checkpoint, history):
    train_data, (test_x, test_y) = data

    def make_batches(epoch):
        return harness.make_batches(*train_data, args.batch_size, args.seed, epoch, shift)

    def evaluate(run):
        return {"accuracy": harness.accuracy(run.predict(test_x).argmax(1), test_y)}

    steps = len(runs) * math.ceil(len(train_data[1]) / args.batch_size)
    with harness.progress(steps * args.epochs, done=steps * len(history)) as advance:
        epochs = range(len(history), args.epochs)
        for epoch in harness.train(runs, epochs, make_batches, evaluate, advance):
            history.append(epoch)
            checkpoint.save(history)
            line = f"epoch {len(history)}/{args.epochs}"
            for k, r in epoch.items():
                line += (
                    f" | {k}: loss {r['loss']:.4f}, test {r['accuracy']:.2%}, {r['seconds']:.3f} s"
                )
            harness.console.print(line, soft_wrap=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", choices=tuple(MODELS), default="mlp")
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--data-dir", default="data", help="where MNIST lies or is put")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = harness.parse_arguments(
        parser, "train_digits_{model}.png", epochs=40, batch_size=256, lr=1e-3, checkpoint=True
    )
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this torch finds no GPU")
    dlkernels.tune_allocator()  # for both sides: PyTorch's steps gain as much from it
    with parallel.process_group(args.device):
        compare(args)


def compare(args):
    runs = harness.make_runs(args, lambda kernels: Run(kernels, args))
    settings = {key: getattr(args, key) for key in SETTINGS}
    checkpoint = harness.Checkpoint(args.checkpoint, settings, runs)
    history = checkpoint.load() if args.resume else []

    data = load_mnist(args.data_dir) if args.data == "mnist" else harness.load_digits()
    title = f"{args.model.upper()} on {args.data}, batch {args.batch_size}, seed {args.seed}"
    mean, std = data[0][0].mean(), data[0][0].std()
    data = [(((x - mean) / std).to(args.device), y.to(args.device)) for x, y in data]
    try:
        train(runs, data, args, checkpoint, history)
    finally:  # after Ctrl-C too
        results.report(args.plot, title, {args.model: history}, METRICS)


if __name__ == "__main__":
    harness.run(main)
