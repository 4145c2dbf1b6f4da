"""Whole training steps, each provider in a process of its own.

In one process they would live on one another's warm heap and threads. The processes take turns, so
that a change of the machine's speed meets all alike, and sleep while another one's is timed.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from functools import partial

import torch

from .case import missing
from .models import MODELS, torch_step
from .timing import Others, take_turns

QUICK = ("mlp", "cnn")  # what --quick times
# Who takes part, and whether under --quick: not what takes seconds to compile, nor what is only
# there to show what a setting brings.
PROVIDERS = {
    "torch": True,
    "torch fused": False,
    "torch fused tuned": True,
    "torch channels_last fused": False,
    "torch channels_last fused tuned": True,
    "compile tuned": False,
    "jax": True,
    "tensorflow": False,
    "dlkernels": True,
    "dlkernels tuned": True,
    "dlkernels channels_last": False,
    "dlkernels channels_last tuned": True,
}


class Worker:
    """A process that times the steps of one provider: see worker.py."""

    def __init__(self, *arguments):
        # The modules of this process, whatever the working directory holds: the source tree, say.
        run = f"import sys; sys.path = {sys.path}; from dlkernels.benchmarks import worker"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (__exit__ closes it)
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{run}; worker.main(*{arguments})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def wait(self):
        """Until it has imported all that it needs, or has died."""
        self.process.stdout.readline()

    def ask(self):
        """Its next answer, or a RuntimeError with the last line that it said before it died."""
        with suppress(BrokenPipeError):
            print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().split("\n")
        raise RuntimeError(next(filter(None, reversed(said)), f"exit status {code}"))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()  # closes the pipes and waits
        self.errors.close()


class Load:
    """A process that keeps a core busy, whichever the system gives it."""

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()


def providers(model, quick):
    images = len(model.image) == 3
    return [
        name
        for name, in_quick in PROVIDERS.items()
        if (images or "channels_last" not in name)
        and (in_quick or not quick)
        and name not in missing()
    ]


def run(model_name, batch, names, busy, quick, machine):
    """Time the training steps of one model beside one another; `busy`: with a core taken away."""
    model, others = MODELS[model_name], Others()
    exact = torch_step(model, batch, dtype=torch.float64)
    exact_losses = [float(exact()) for _ in range(2)]
    found, failed = {}, {}
    with ExitStack() as stack:
        workers = {p: stack.enter_context(Worker(model_name, batch, p)) for p in names}
        for worker in workers.values():
            worker.wait()
        for provider, worker in workers.items():
            try:
                found[provider] = worker.ask()
            except RuntimeError as error:
                failed[provider] = str(error)
        if busy:
            stack.enter_context(Load())
        limits = {"rounds": 10, "seconds": 0, "share": 1.0} if quick else {"share": 4.0}
        times = take_turns({p: workers[p].ask for p in found}, **limits)
    for provider, result in found.items():
        losses = result.pop("losses")
        result["error"] = max(abs(a - b) / b for a, b in zip(losses, exact_losses))
        result["seconds"] = times[provider]
    return {
        "op": "step",
        "case": f"{model.text}, batch {batch}{', a core busy' if busy else ''}",
        "mode": "train",
        "small": False,
        "busy_cores": others.cores(),
        "providers": found,
        "failed": failed,
    }


def jobs(name, quick, busy=False):
    """What there is to run of a model: see suite.op_jobs()."""
    model = MODELS[name]
    return {
        f"step {name} {batch}{' busy' if busy else ''}": partial(
            run, name, batch, providers(model, quick), busy, quick
        )
        for batch in model.batches[: 1 if quick else None]
    }
