"""Whole training steps, each provider in a process of its own.

In one process, they would live on one another's warm heap and threads. The processes take turns, so
that a change of the machine's speed meets all alike; only one of them runs at a time.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack

import torch

from .models import MODELS, torch_step
from .timing import Others, take_turns

COMPILERS = ("compile tuned", "tensorflow")  # take seconds to start
TORCH = ("torch", "torch fused", "torch fused tuned")
CHANNELS_LAST = ("torch channels_last fused", "torch channels_last fused tuned")
OURS = ("dlkernels", "dlkernels tuned")
OURS_CHANNELS_LAST = ("dlkernels channels_last", "dlkernels channels_last tuned")


class Worker:
    """A process that times the steps of one provider."""

    def __init__(self, *arguments):
        self.errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "dlkernels.benchmarks.worker", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def read(self):
        """Its next answer, or a RuntimeError with the last line of what it said before it died."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().split("\n")
        raise RuntimeError(next((x for x in reversed(lines) if x.strip()), f"exit code {code}"))

    def turn(self):
        print(file=self.process.stdin, flush=True)
        return self.read()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()
        self.errors.close()


class Load:
    """A process that keeps one core busy."""

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()


def providers(model, quick):
    images = len(model.image) == 3
    names = [*TORCH, *(CHANNELS_LAST if images else ())]
    names += [*COMPILERS, "jax"]
    names += [*OURS, *(OURS_CHANNELS_LAST if images else ())]
    return [name for name in names if not (quick and name in COMPILERS)]


def exact_losses(model, batch, steps):
    step = torch_step(model, batch, dtype=torch.float64)
    return [float(step()) for _ in range(steps)]


def run(name, batch, names, busy=False, **limits):
    """Time the training steps of one model; `busy` with another process on one of the cores."""
    model, found, failed = MODELS[name], {}, {}
    others = Others()
    with ExitStack() as stack:
        workers = {}
        for provider in names:
            worker = stack.enter_context(Worker(name, batch, provider))
            try:
                found[provider] = worker.read()
                workers[provider] = worker
            except RuntimeError as error:
                failed[provider] = str(error)
        if busy:
            stack.enter_context(Load())
        times = take_turns({p: worker.turn for p, worker in workers.items()}, **limits)
    return times, found, failed, others.cores()
