"""One provider's training step, in a process of its own that steps.py starts and asks.

It says "ready" when all is imported, and then answers each line on its standard input: the first,
when it has warmed up, with the losses of its first steps and its peak memory, and all others with
the seconds a step.
"""

import importlib
import json
import math
import os
import sys
from functools import partial

import dlkernels

from . import models
from .timing import batch, clock

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


def main(model, batch_size, provider):
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    if provider.endswith(" tuned") and not dlkernels.tune_allocator():
        sys.exit("the allocator is not glibc's")
    importlib.import_module(IMPORTS.get(provider.split()[0], "torch._dynamo"))
    print("ready", file=answers)
    sys.stdin.readline()

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
    print(json.dumps({"losses": losses, "peak": peak(partial(steps, 3)) - before}), file=answers)

    for _ in sys.stdin:
        n = math.ceil(TURN / seconds)
        seconds = batch(partial(steps, n), n * seconds) / n
        print(seconds, file=answers)
