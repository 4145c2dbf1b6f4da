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
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import dlkernels
import harness

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


class Run:
    def __init__(self, kernels, args):
        torch.manual_seed(args.seed)
        self.model = MODELS[args.model]().to(args.device)
        if kernels == "dlkernels":  # all that differs between the two
            dlkernels.convert(self.model)
            self.loss_fn = dlkernels.nn.CrossEntropyLoss()
            self.optimizer = dlkernels.optim.Adam(self.model.parameters(), lr=args.lr)
        else:
            self.loss_fn = nn.CrossEntropyLoss()
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr)
        self.replica = harness.replicated(self.model)

    def train_epoch(self, batches, advance):
        self.model.train()
        total = 0.0
        for batch in batches:
            x, y, weight = harness.shard(*batch)
            self.optimizer.zero_grad()
            loss = self.loss_fn(self.replica(x), y)
            loss = loss if weight == 1 else loss * weight
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(batch[1])
            advance()
        return harness.mean_of_all(total / sum(len(y) for _, y in batches))

    @torch.no_grad()
    def accuracy(self, x, y):
        self.model.eval()
        predicted = torch.cat([self.model(part).argmax(1) for part in x.split(512)])
        return (predicted == y).float().mean().item()


def load_digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    x, y = F.interpolate(x, size=(28, 28), mode="bilinear"), torch.tensor(digits.target)
    # The same split for every --seed, so that accuracies of different runs compare.
    split = train_test_split(range(len(y)), test_size=0.25, stratify=y, random_state=0)
    return [(x[rows], y[rows]) for rows in split]


def load_mnist(folder):
    try:
        from torchvision.datasets import MNIST

        parts = [MNIST(folder, train=train, download=True) for train in (True, False)]
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch, no data
        sys.exit(f"--data mnist needs torchvision and the network or the data: {error}")
    return [(part.data[:, None].float(), part.targets) for part in parts]


def make_batches(x, y, seed, epoch, batch_size):
    """Shuffled batches of one epoch, each image moved by up to SHIFT pixels."""
    rng = np.random.default_rng((seed, epoch))
    order = torch.from_numpy(rng.permutation(len(y)))
    moves = rng.integers(0, 2 * SHIFT + 1, size=(2, len(y)))
    padded = F.pad(x, (SHIFT,) * 4, value=x.min().item())
    x = torch.stack([im[:, i : i + 28, j : j + 28] for im, i, j in zip(padded, *moves)])
    return [(x[rows], y[rows]) for rows in order.split(batch_size)]


def train(runs, data, args, checkpoint, history):
    train_data, test_data = data
    steps = len(runs) * math.ceil(len(train_data[1]) / args.batch_size)
    with harness.progress(steps * args.epochs, done=steps * len(history)) as advance:
        for epoch in range(len(history), args.epochs):
            batches = make_batches(*train_data, args.seed, epoch, args.batch_size)
            results, line = {}, f"epoch {epoch + 1}/{args.epochs}"
            for kernels, run in runs.items():  # in turns: a busy machine slows both alike
                start = time.perf_counter()
                loss = run.train_epoch(batches, advance)
                seconds = time.perf_counter() - start
                accuracy = run.accuracy(*test_data)
                results[kernels] = {"loss": loss, "accuracy": accuracy, "seconds": seconds}
                line += f" | {kernels}: loss {loss:.4f}, test {accuracy:.2%}, {seconds:.3f} s"
            history.append(results)
            checkpoint.save(history)
            harness.console.print(line, soft_wrap=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", choices=tuple(MODELS), default="mlp")
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--data-dir", default="data", help="where MNIST lies or is put")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = harness.parse_arguments(parser, epochs=40, batch_size=256, lr=1e-3)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this torch finds no GPU")
    torch.set_num_threads(args.threads)
    dlkernels.tune_allocator()  # for both sides: PyTorch's steps gain as much from it
    with harness.process_group(args.device):
        compare(args)


def compare(args):
    runs = {k: Run(k, args) for k in ("torch", "dlkernels") if args.kernels in (k, "both")}
    settings = {key: getattr(args, key) for key in SETTINGS}
    checkpoint = harness.Checkpoint(args.checkpoint, settings, runs)
    history = checkpoint.load() if args.resume else []

    data = load_mnist(args.data_dir) if args.data == "mnist" else load_digits()
    title = f"{args.model.upper()} on {args.data}, batch {args.batch_size}, seed {args.seed}"
    mean, std = data[0][0].mean(), data[0][0].std()
    data = [(((x - mean) / std).to(args.device), y.to(args.device)) for x, y in data]
    try:
        train(runs, data, args, checkpoint, history)
    finally:  # after Ctrl-C too
        harness.report(args.plot or Path(f"train_digits_{args.model}.png"), title, history, METRICS)


if __name__ == "__main__":
    harness.run(main)
