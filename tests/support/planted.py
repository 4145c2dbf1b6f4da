"""A peer that does something in the middle of its work. Its process imports this module."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dlkernels.benchmarks.bench_relu import ReLU

FIRST, LATER = 1, 30  # calls of its step: the second is in a batch


def aborts():
    print("a line\nthe last line\n*** stack trace: ***\n    @ 0x7f  f", flush=True)
    os.abort()


def raises():
    raise MemoryError


def hangs():
    time.sleep(600)


def interrupts():
    os.kill(os.getppid(), signal.SIGINT)
    hangs()


def computes():
    pass


def planted(case, inputs):
    (case.folder / str(case)).write_text(str(os.getpid()))
    calls = 0

    def step():
        nonlocal calls
        calls += 1
        if calls == case.call:
            case.does()
        time.sleep(1e-3)  # or a batch has thousands of calls
        return [inputs["x"].clip(0)]

    return step, lambda results: results


@dataclass(frozen=True)
class Planted(ReLU):
    does: Callable
    call: int
    folder: Path

    providers: ClassVar = {
        "torch": ReLU.providers["torch"],
        "jax planted": planted,
        "dlkernels": ReLU.providers["dlkernels"],
    }

    def __str__(self):
        return self.does.__name__


class PlantedCompile(Planted):
    providers: ClassVar = {
        "torch": ReLU.providers["torch"],
        "compile planted": planted,
        "dlkernels": ReLU.providers["dlkernels"],
    }
