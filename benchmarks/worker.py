"""One provider's training step, in a process of its own that steps.py starts and asks.

    python -m dlkernels.benchmarks.worker MODEL BATCH PROVIDER

Its first line says {"losses": of the first steps, "peak": bytes}. Then it answers every line on its
standard input with the seconds a step, and sleeps in between.
"""

import importlib
import json
import math
import os
import sys

import dlkernels

from . import models
from .timing import LONG, batch, clock

FRAMEWORKS = {"compile": "torch._inductor.compile_fx", "jax": "jax", "tensorflow": "tensorflow"}
WARM_UP = 1.0  # seconds
TURN = 0.05  # seconds: another process has had the caches and the cores


def memory(name):
    """Bytes of this process: "VmRSS", what it has now, or "VmHWM", the most that it has had."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def main(model, batch_size, provider):
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints goes elsewhere
    if provider.endswith(" tuned") and not dlkernels.tune_allocator():
        sys.exit("the allocator is not glibc's")
    framework = FRAMEWORKS.get(provider.split()[0])
    if framework:
        importlib.import_module(framework)

    before = memory("VmRSS")
    step = models.build(provider, models.MODELS[model], int(batch_size))

    def steps(n):
        for _ in range(n):
            loss = step()
        return float(loss)  # JAX may not have computed it before

    losses = [steps(1) for _ in range(3)]
    begin, done = clock(), 0
    while clock() - begin < WARM_UP:
        steps(1)
        done += 1
    seconds = (clock() - begin) / done
    forget_peak()  # that of compiling
    steps(3)
    print(json.dumps({"losses": losses, "peak": memory("VmHWM") - before}), file=answers)

    n = math.ceil(max(TURN, LONG) / seconds)
    for _ in sys.stdin:
        print(batch(lambda: steps(n), n * seconds) / n, file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
