"""Train an MLP or a small CNN on handwritten digits: PyTorch's kernels, dlkernels' or both.

    python examples/train_digits.py --model mlp                     # both, side by side
    python examples/train_digits.py --model cnn --kernels dlkernels
    python examples/train_digits.py --model cnn --data mnist        # needs torchvision
    python examples/train_digits.py --checkpoint run.pt --resume    # start, or go on

The data are scikit-learn's 1,797 bundled digits, enlarged to 28x28, a quarter held out. With
`both`, two models start from the same weights and see the same batches: their curves should
coincide and only the clock differ. "Seconds an epoch" are the training steps alone; making the
batches (once for both) and testing are left out.

Batches depend on the seed and the epoch only, so a resumed run repeats the uninterrupted one bit
for bit (on the same number of threads). Without --resume an existing checkpoint is never
overwritten. Ctrl-C keeps the last whole epoch.
"""

import argparse
import io
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import dlkernels

MODELS = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)
    ),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    ),
}  # fmt: skip
EPOCHS = {"digits": 50, "mnist": 5}
SETTINGS = ("model", "data", "kernels", "batch_size", "lr", "seed")  # what a checkpoint belongs to
SHIFT = 2  # pixels an image may move each way; takes the CNN from about 98 to 99 % on digits


class Run:
    """One model, its optimizer and its learning curves."""

    def __init__(self, kernels, args):
        torch.manual_seed(args.seed)
        self.model = MODELS[args.model]()
        if kernels == "dlkernels":  # all that differs between the two
            dlkernels.convert(self.model)
            self.loss_fn = dlkernels.nn.CrossEntropyLoss()
            self.optimizer = dlkernels.optim.Adam(self.model.parameters(), lr=args.lr)
        else:
            self.loss_fn = nn.CrossEntropyLoss()
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr)
        self.history = {"loss": [], "accuracy": [], "seconds": []}

    def train_epoch(self, batches, after_batch):
        self.model.train()
        total, start = 0.0, time.perf_counter()
        for x, y in batches:
            self.optimizer.zero_grad()
            loss = self.loss_fn(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(y)
            after_batch()
        return total / sum(len(y) for _, y in batches), time.perf_counter() - start

    @torch.no_grad()
    def accuracy(self, x, y):
        self.model.eval()
        predicted = torch.cat([self.model(part).argmax(1) for part in x.split(512)])
        return (predicted == y).sum().item() / len(y)

    def state(self):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {"history": self.history}

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = {key: list(state["history"][key]) for key in self.history}


def load_digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    x, y = F.interpolate(x, size=(28, 28), mode="bilinear"), torch.tensor(digits.target)
    # The same split for every --seed, so that accuracies of different runs compare.
    split = train_test_split(range(len(y)), test_size=0.25, stratify=digits.target, random_state=0)
    return [(x[rows], y[rows]) for rows in split]


def load_mnist(folder):
    try:
        from torchvision.datasets import MNIST
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        sys.exit(f"--data mnist needs torchvision, which does not import here: {error}")
    try:
        parts = [MNIST(folder, train=train, download=True) for train in (True, False)]
    except RuntimeError as error:
        sys.exit(f"MNIST could not be loaded from {folder}: {error}")
    return [(part.data[:, None].float(), part.targets) for part in parts]


def make_batches(x, y, seed, epoch, batch_size):
    """Shuffled batches of one epoch, each image moved by up to SHIFT pixels."""
    rng = np.random.default_rng((seed, epoch))
    order = torch.from_numpy(rng.permutation(len(y)))
    dy, dx = torch.from_numpy(rng.integers(0, 2 * SHIFT + 1, size=(2, len(y))))
    padded = F.pad(x, (SHIFT,) * 4, value=x.min().item())
    windows = padded.unfold(2, 28, 1).unfold(3, 28, 1)  # (N, 1, dy, dx, 28, 28), a view
    return [(windows[i, :, dy[i], dx[i]], y[i]) for i in order.split(batch_size)]


def train(runs, data, args, first, console):
    (x, y), test = data
    with Progress(console=console, disable=not console.is_terminal) as bar:
        steps = math.ceil(len(y) / args.batch_size) * len(runs)
        task = bar.add_task("", total=args.epochs * steps, completed=first * steps)
        for epoch in range(first, args.epochs):
            batches = make_batches(x, y, args.seed, epoch, args.batch_size)
            line = f"epoch {epoch + 1}/{args.epochs}"
            bar.update(task, description=line)
            # In turns, an epoch each, so that a busy machine slows both alike.
            for kernels, run in runs.items():
                loss, seconds = run.train_epoch(batches, lambda: bar.advance(task))
                if not math.isfinite(loss):
                    sys.exit(f"the loss of {kernels} is {loss} in epoch {epoch + 1}: lower --lr")
                accuracy = run.accuracy(*test)
                for key, value in zip(run.history, (loss, accuracy, seconds), strict=True):
                    run.history[key].append(value)
                line += f" | {kernels}: loss {loss:.4f}, test {accuracy:.2%}, {seconds:.3f} s"
            if args.checkpoint:
                save_checkpoint(args.checkpoint, runs, args)
            console.print(line, soft_wrap=True)


def write_whole(path, data):
    """All of the file or the old one: os.replace is atomic within a folder."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, runs, args):
    settings = {key: getattr(args, key) for key in SETTINGS}
    states = {kernels: run.state() for kernels, run in runs.items()}
    buffer = io.BytesIO()  # on a full disk torch.save itself raises an obscure RuntimeError
    torch.save({"settings": settings, "runs": states}, buffer)
    write_whole(path, buffer.getbuffer())


def load_checkpoint(path, runs, args):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        settings = {key: saved["settings"][key] for key in SETTINGS}
    except OSError:
        raise
    except Exception:  # the reader raises nearly anything on foreign bytes
        sys.exit(f"{path} is not a whole checkpoint of this script; it was left as it is")
    for key, value in settings.items():
        if value != getattr(args, key):
            name = f"--{key.replace('_', '-')}"
            sys.exit(
                f"{path} was made with {name} {value}, not {getattr(args, key)}; left as it is"
            )
    try:
        for kernels, run in runs.items():
            run.load(saved["runs"][kernels])
        (epochs,) = {len(curve) for run in runs.values() for curve in run.history.values()}
    except Exception:
        sys.exit(f"{path} does not fit the {args.model} model; it was left as it is")
    return epochs


def report(curves, args, console):
    epochs = min(len(curve["loss"]) for curve in curves.values())
    title = f"{args.model.upper()} on {args.data}: {epochs} epochs, batch {args.batch_size}"
    title += f", seed {args.seed}, threads {torch.get_num_threads()}"
    median = {kernels: statistics.median(curve["seconds"]) for kernels, curve in curves.items()}
    both = len(curves) == 2
    table = Table(title=title)
    table.add_column("kernels")
    for name in ("training loss", "test accuracy", "seconds an epoch", "speed-up")[: 3 + both]:
        table.add_column(name, justify="right")
    for kernels, curve in curves.items():
        row = [kernels, f"{curve['loss'][-1]:.6f}", f"{curve['accuracy'][-1]:.2%}"]
        row += [f"{median[kernels]:.4f}"]
        row += [f"{median['torch'] / median[kernels]:.2f}x"] if both else []
        table.add_row(*row)
    console.print(table)
    if both:
        losses = zip(curves["torch"]["loss"], curves["dlkernels"]["loss"], strict=True)
        apart = max(abs(a - b) for a, b in losses)
        console.print(f"largest difference between the two loss curves: {apart:.1e}")
    plot(curves, median, title, args.plot)
    console.print(f"learning curves: {args.plot}", soft_wrap=True)


def plot(curves, median, title, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    # The curves should coincide: a thin dashed line over a wide pale one shows both.
    style = {
        "torch": dict(color="tab:orange", linewidth=5, alpha=0.5),
        "dlkernels": dict(color="tab:blue", linewidth=1.5, linestyle="--"),
    }
    for kernels, curve in curves.items():
        epochs = range(1, len(curve["loss"]) + 1)
        look = style[kernels] | {"marker": "o" if len(epochs) == 1 else None}
        label = f"{kernels}, {median[kernels]:.3g} s an epoch"
        left.plot(epochs, curve["loss"], label=label, **look)
        accuracy = [100 * value for value in curve["accuracy"]]
        right.plot(epochs, accuracy, label=f"{kernels}, {accuracy[-1]:.2f} % at the end", **look)
    left.set(title="Training loss", ylabel="mean cross-entropy of the epoch", yscale="log")
    right.set(title="Test accuracy", ylabel="held-out images classified correctly (%)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
        axes.legend()
    left.yaxis.set_major_formatter("{x:g}")
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getbuffer())


def number(kind, low, high):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} from {low} to {high}, got {text!r}")
        return value

    return parse


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, count = parser.add_argument, number(int, 1, 10**6)
    add("--model", choices=tuple(MODELS), default="mlp")
    add("--kernels", choices=("torch", "dlkernels", "both"), default="both")
    add("--data", choices=tuple(EPOCHS), default="digits")
    add("--data-dir", type=Path, default=Path("data"), help="where MNIST lies or is put")
    add(
        "--epochs",
        type=count,
        help="default: " + ", ".join(f"{n} on {d}" for d, n in EPOCHS.items()),
    )
    add("--batch-size", type=count, default=256)
    add("--lr", type=number(float, 1e-12, 1), default=1e-3, help="of Adam")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add("--threads", type=number(int, 1, 1024), help="default: torch's own choice")
    add("--plot", type=Path, help="default: train_digits_MODEL.png")
    add("--checkpoint", type=Path, help="written after every epoch")
    add("--resume", action="store_true", help="go on from --checkpoint where that exists")
    args = parser.parse_args()
    args.epochs = args.epochs or EPOCHS[args.data]
    args.plot = args.plot or Path(f"train_digits_{args.model}.png")
    # Said before the training, not after it.
    if args.plot.suffix.lower() != ".png":
        parser.error(f"argument --plot: must end in .png, got '{args.plot}'")
    for name, path in (("--checkpoint", args.checkpoint), ("--plot", args.plot)):
        if path and not path.parent.is_dir():
            parser.error(f"argument {name}: there is no directory '{path.parent}'")
    if args.resume and not args.checkpoint:
        parser.error("argument --resume: needs --checkpoint")
    if args.checkpoint and args.checkpoint.exists() and not args.resume:
        parser.error(f"argument --checkpoint: '{args.checkpoint}' exists; add --resume to go on")
    return args


def main():
    args, console = parse_arguments(), Console(highlight=False, markup=False)
    if args.threads:
        torch.set_num_threads(args.threads)
    runs = {k: Run(k, args) for k in ("torch", "dlkernels") if args.kernels in (k, "both")}
    first, stopped = 0, False
    if args.resume and args.checkpoint.exists():
        first = load_checkpoint(args.checkpoint, runs, args)
        console.print(f"resumed after epoch {first}")

    data = load_mnist(args.data_dir) if args.data == "mnist" else load_digits()
    mean, std = data[0][0].mean(), data[0][0].std()
    data = [((x - mean) / std, y) for x, y in data]
    try:
        train(runs, data, args, first, console)
    except KeyboardInterrupt:
        stopped = True
    # An interrupted epoch may be complete for the first of two runs: show what both have.
    done = min(len(curve) for run in runs.values() for curve in run.history.values())
    curves = {k: {key: c[:done] for key, c in run.history.items()} for k, run in runs.items()}
    if stopped:
        print(f"stopped by Ctrl-C; whole epochs: {done}", file=sys.stderr)
    if done:
        report(curves, args, console)
    return 130 if stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"train_digits: {error}")
