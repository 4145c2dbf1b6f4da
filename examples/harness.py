"""What every example needs around its model: arguments, data, training, checkpoints, progress."""

import argparse
import io
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress

import dlkernels

RANK = int(os.environ.get("RANK", 0))  # of torchrun's processes the first alone prints and writes
console = Console(highlight=False, markup=False, quiet=RANK > 0)


def number(kind, low, high):
    """An argument that must be an int or a float from `low` to `high`."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text!r}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


def output(text):
    """An argument that names a file to write: what is wrong is said before the training."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in an existing folder, got {text!r}")
    return path


def parse_arguments(parser, plot, epochs, batch_size=None, lr=None, checkpoint=False):
    """Parse the script's own arguments and those of every example; set the threads.

    `plot` is the default of --plot and may hold other arguments: "train_digits_{model}.png". A
    default of None leaves an argument out.
    """
    add = parser.add_argument
    add("--kernels", choices=("torch", "dlkernels", "both"), default="both")
    add("--epochs", type=number(int, 1, 10**6), default=epochs)
    if batch_size:
        add("--batch-size", type=number(int, 1, 10**6), default=batch_size)
    if lr:
        add("--lr", type=number(float, 1e-12, 1), default=lr, help="learning rate")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add("--threads", type=number(int, 1, 1024), default=torch.get_num_threads())
    add("--plot", type=output, help=f"where the plots go, a PNG: {plot}")
    if checkpoint:
        add("--checkpoint", type=output, help="written after every epoch")
        add("--resume", action="store_true", help="go on from --checkpoint where that exists")
    args = parser.parse_args()
    if checkpoint and args.resume and not args.checkpoint:
        parser.error("argument --resume: needs --checkpoint")
    if checkpoint and args.checkpoint and args.checkpoint.exists() and not args.resume:
        parser.error(f"argument --checkpoint: '{args.checkpoint}' exists; add --resume to go on")
    args.plot = args.plot or Path(plot.format_map(vars(args)))
    torch.set_num_threads(args.threads)
    return args


def load_digits():
    """scikit-learn's 1,797 digits as (images, labels) to train on and a quarter to test on; images
    are float32 [N, 1, 28, 28] with values from 0 to 16."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    x, y = F.interpolate(x, size=(28, 28), mode="bilinear"), torch.tensor(digits.target)
    # The same split for every --seed, so that accuracies of different runs compare.
    split = train_test_split(range(len(y)), test_size=0.25, stratify=y, random_state=0)
    return [(x[rows], y[rows]) for rows in split]


def make_batches(x, y, batch_size, seed, epoch, augment=None):
    """Shuffled batches of one epoch, of augment(x, random generator) if given."""
    rng = np.random.default_rng((seed, epoch))
    order = torch.from_numpy(rng.permutation(len(y)))
    if augment:
        x = augment(x, rng)
    return [(x[rows], y[rows]) for rows in order.split(batch_size)]


class Run:
    """A model in training, on PyTorch's kernels or on ours.

    make_optimizer(optim, parameters) takes one from `optim`: torch.optim or dlkernels.optim.
    """

    def __init__(self, kernels, model, loss_fn, make_optimizer):
        optim = torch.optim
        if kernels == "dlkernels":  # all that differs between the two
            model, loss_fn = dlkernels.convert(model), dlkernels.convert(loss_fn)
            optim = dlkernels.optim
        self.model, self.loss_fn = model, loss_fn
        self.optimizer = make_optimizer(optim, model.parameters())

    def train_epoch(self, batches, advance=lambda: None):
        """A step on every batch: the samples' mean loss, and the seconds it took."""
        self.model.train()
        total, start = 0.0, time.perf_counter()
        for x, y in batches:
            self.optimizer.zero_grad()
            loss = self.loss(x, y)
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(y)
            advance()
        seconds = time.perf_counter() - start
        return {"loss": total / sum(len(y) for _, y in batches), "seconds": seconds}

    def loss(self, x, y):
        return self.loss_fn(self.model(x), y)

    @torch.no_grad()
    def predict(self, x):
        self.model.eval()
        return torch.cat([self.model(part) for part in x.split(512)])


def make_runs(args, make):
    """{kernels: make(kernels)} for what --kernels asks for, each after the same seed."""
    runs = {}
    for kernels in ("torch", "dlkernels"):
        if args.kernels in (kernels, "both"):
            torch.manual_seed(args.seed)
            runs[kernels] = make(kernels)
    return runs


def train(runs, epochs, make_batches, evaluate=lambda run: {}, advance=lambda: None):
    """Yields the results of every epoch of `epochs`: {kernels: {metric: value}}.

    make_batches(epoch) gives what all runs see; evaluate(run) adds to the loss and the seconds.
    """
    for epoch in epochs:
        batches, results = make_batches(epoch), {}
        for kernels, run in runs.items():  # in turns: a busy machine slows both alike
            torch.manual_seed(epoch)  # the same dropout in both
            results[kernels] = run.train_epoch(batches, advance) | evaluate(run)
        yield results


def accuracy(predicted, y):
    return (predicted == y).float().mean().item()


def write_whole(path, data):
    """All of the file or the old one: os.replace is atomic within a folder."""
    if RANK > 0:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Checkpoint:
    """A file of `runs`, {name: anything with a model and an optimizer}, made with `settings`."""

    def __init__(self, path, settings, runs):
        self.path, self.settings, self.runs = path, settings, runs

    def save(self, history):
        if not self.path:  # none was asked for
            return
        states = {
            name: {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
            for name, run in self.runs.items()
        }
        buffer = io.BytesIO()  # on a full disk torch.save itself raises an obscure RuntimeError
        torch.save({"settings": self.settings, "history": history, "runs": states}, buffer)
        write_whole(self.path, buffer.getbuffer())

    def load(self):
        """Put the runs where the file left them; returns its history, empty if there is no file."""
        if not self.path.exists():
            return []
        try:
            saved = dict(torch.load(self.path, map_location="cpu", weights_only=True))
            for key, value in self.settings.items():
                if saved["settings"][key] != value:
                    found = f"{key} {saved['settings'][key]}, not {value}"
                    sys.exit(f"{self.path} was made with {found}; it was left as it is")
            for name, run in self.runs.items():
                run.model.load_state_dict(saved["runs"][name]["model"])
                run.optimizer.load_state_dict(saved["runs"][name]["optimizer"])
            history = list(saved["history"])
        except OSError:
            raise
        except Exception:  # foreign bytes make the reader raise nearly anything
            sys.exit(f"{self.path} is not a whole checkpoint of this script; it was left as it is")
        console.print(f"resumed after epoch {len(history)}")
        return history


@contextmanager
def progress(total, done=0):
    """A bar where a terminal watches; yields the function that moves it on by one."""
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=total, completed=done)
        yield lambda: bar.advance(task)


def run(main):
    """Run a script: Ctrl-C and the system's errors end it without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
