"""What every example needs around its training: arguments, checkpoints, progress, results."""

import argparse
import io
import os
import statistics
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

# torchrun tells each of its processes; the first alone prints and writes.
RANK, WORLD_SIZE = (int(os.environ.get(*key)) for key in (("RANK", 0), ("WORLD_SIZE", 1)))
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


def parse_arguments(parser, epochs, batch_size, lr):
    """Parse the script's own arguments and those that every example has."""
    add = parser.add_argument
    add("--kernels", choices=("torch", "dlkernels", "both"), default="both")
    add("--epochs", type=number(int, 1, 10**6), default=epochs)
    add("--batch-size", type=number(int, 1, 10**6), default=batch_size)
    add("--lr", type=number(float, 1e-12, 1), default=lr, help="learning rate")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add("--threads", type=number(int, 1, 1024), default=torch.get_num_threads())
    add("--plot", type=output, help="where the learning curves go, a PNG")
    add("--checkpoint", type=output, help="written after every epoch")
    add("--resume", action="store_true", help="go on from --checkpoint where that exists")
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("argument --resume: needs --checkpoint")
    if args.checkpoint and args.checkpoint.exists() and not args.resume:
        parser.error(f"argument --checkpoint: '{args.checkpoint}' exists; add --resume to go on")
    return args


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
def process_group(device):
    """Join the other processes where torchrun started this one: gloo on CPUs, nccl on GPUs."""
    if "RANK" not in os.environ:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(timeout=timedelta(seconds=25))  # a lost peer is an error then
    try:
        yield
    finally:
        distributed.destroy_process_group()


def replicated(model):
    """`model` for the training steps, whose gradients are the mean of those of all processes."""
    return DistributedDataParallel(model) if distributed.is_initialized() else model


def shard(x, y):
    """This process's rows of a batch, and what to multiply their mean loss by: the mean over the
    processes is then that of the whole batch, though their numbers of rows may differ."""
    n = len(y)
    rows = slice(RANK * n // WORLD_SIZE, (RANK + 1) * n // WORLD_SIZE)
    weight = (rows.stop - rows.start) * WORLD_SIZE / n
    if not weight:  # fewer rows than processes; all of them must take part in the step
        rows = slice(0, 1)
    return x[rows], y[rows], weight


def mean_of_all(value):
    """The mean of a number over all processes."""
    if not distributed.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(total)
    return total.item() / WORLD_SIZE


@contextmanager
def progress(total, done):
    """A bar where a terminal watches; yields the function that moves it on by one."""
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=total, completed=done)
        yield lambda: bar.advance(task)


def report(path, title, history, metrics):
    """Print a table of the runs and draw their learning curves to `path`.

    `history` has an item an epoch, {run: {metric: value, "seconds": value}}; `metrics` is
    {metric: (name, format in the table, scale in the plot)}.
    """
    if not history:  # stopped in the first epoch
        return
    curves = {
        run: {key: [epoch[run][key] for epoch in history] for key in (*metrics, "seconds")}
        for run in history[0]
    }
    seconds = {run: statistics.median(curve["seconds"]) for run, curve in curves.items()}
    title += f", {len(history)} epochs, {torch.get_num_threads()} threads"
    first, *others = curves

    table = Table("kernels", title=title)
    for name in (*(name for name, _, _ in metrics.values()), "seconds an epoch", "speed-up"):
        table.add_column(name, justify="right")
    for run, curve in curves.items():
        last = [form.format(curve[key][-1]) for key, (_, form, _) in metrics.items()]
        speed_up = f"{seconds[first] / seconds[run]:.2f}x" if run in others else ""
        table.add_row(run, *last, f"{seconds[run]:.4f}", speed_up)
    console.print(table)
    for run in others:
        apart = max(abs(a - b) for a, b in zip(curves[first]["loss"], curves[run]["loss"]))
        console.print(f"largest difference between the two loss curves: {apart:.1e}")

    figure = Figure(figsize=(5.5 * len(metrics), 4.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, (key, (name, _, scale)) in zip(panels, metrics.items()):
        # The curves should coincide: a thin dashed line over a wide pale one shows both.
        for run, look in zip(curves, ({"lw": 5, "alpha": 0.5}, {"ls": "--"})):
            label, values = f"{run}, {seconds[run]:.3g} s an epoch", curves[run][key]
            axes.plot(range(1, len(values) + 1), values, label=label, marker=".", **look)
        axes.set(xlabel="epoch", ylabel=name, yscale=scale)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getbuffer())
    console.print(f"learning curves: {path}", soft_wrap=True)


def run(main):
    """Run a script: Ctrl-C and the system's errors end it without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
