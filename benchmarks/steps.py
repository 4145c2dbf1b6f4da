"""Whole training steps, each provider in a process of its own.

In one process they would live on one another's warm heap and threads. The processes take turns, so
that a change of the machine's speed meets all alike, and sleep while another one's is timed.
"""

import importlib
import math
import subprocess
import sys
from contextlib import ExitStack
from functools import partial

import torch

import dlkernels

from . import models
from .case import missing
from .models import MODELS, torch_step
from .timing import Others, attempts, batch, clock, take_turns
from .worker import Workers

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


# What the first step would import: no part of the step's memory.
IMPORTS = {"compile": "torch._inductor.compile_fx", "jax": "jax", "tensorflow": "tensorflow"}
WARM_UP = 0.5  # seconds
TURN = 0.05  # seconds: in between, another process has had the caches and the cores


def memory(name):
    """Bytes of this process, as /proc calls them."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def peak(step):
    """The most memory that this process has during a step, without the libraries in it."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak of compiling
    step()
    return memory("VmHWM") - memory("RssFile")


def time_step(model, batch_size, provider):
    """A worker's job: yields, when all is imported, why it can take no part, or None; when it has
    warmed up, the losses of its first steps and its peak memory; then always the seconds a step."""
    if provider.endswith(" tuned") and not dlkernels.tune_allocator():
        yield "the allocator is not glibc's"
    importlib.import_module(IMPORTS.get(provider.split()[0], "torch._dynamo"))
    yield None

    before = memory("RssAnon")
    step = models.build(provider, models.MODELS[model], batch_size)

    def steps(n):
        for _ in range(n):
            loss = step()
        return float(loss)  # JAX may not have computed it before

    losses = [steps(1) for _ in range(2)]
    begin, done = clock(), 0
    while clock() - begin < WARM_UP:
        steps(1)
        done += 1
    seconds = (clock() - begin) / done
    yield {"losses": losses, "peak": peak(partial(steps, 3)) - before}

    while True:
        n = math.ceil(TURN / seconds)
        seconds = batch(partial(steps, n), n * seconds) / n
        yield seconds


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


def begin(names, model, batch, workers, failed):
    """{provider: losses and peak memory} of those that warmed up."""
    for name in names:  # all at once: most of it is imports
        workers[name].begin(time_step, model, batch, name)
    ready = attempts(lambda name: workers[name].answer(), names, failed)
    failed |= {name: absent for name, absent in ready.items() if absent}
    ready = [name for name, absent in ready.items() if not absent]
    return attempts(lambda name: workers[name].ask(), ready, failed)


def run(model_name, batch, names, busy, quick, *_):
    """Time the training steps of one model beside one another; `busy`: with a core taken away."""
    model, others = MODELS[model_name], Others()
    exact = torch_step(model, batch, dtype=torch.float64)
    exact_losses = [float(exact()) for _ in range(2)]
    failed = {}
    with ExitStack() as stack:
        workers = stack.enter_context(Workers())
        found = begin(names, model_name, batch, workers, failed)
        if busy:
            stack.enter_context(Load())
        limits = {"rounds": 10, "seconds": 0, "share": 1.0} if quick else {"share": 4.0}
        times = take_turns({p: workers[p].ask for p in found}, failed, **limits)
    for provider, seconds in times.items():
        result = found[provider]
        losses = result.pop("losses")
        result["error"] = max(abs(a - b) / b for a, b in zip(losses, exact_losses))
        result["seconds"] = seconds
    return {
        "op": "step",
        "case": f"{model.text}, batch {batch}{', a core busy' if busy else ''}",
        "mode": "train",
        "small": False,
        "busy_cores": others.cores(),
        "providers": {provider: found[provider] for provider in times},
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
