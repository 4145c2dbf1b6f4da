"""The one place that measures time: steps in turns, the machine's roofs, the load of others."""

import gc
import math
import os
import random
import statistics
import time
from functools import partial
from typing import ClassVar

import torch

from dlkernels import _C

clock = time.perf_counter

BATCH = 5e-3  # seconds: shorter ones would measure the clock and the caches of the step before
SETTLE = 0.01  # OpenMP's threads spin this long after a region, on cores that the next step needs
LONG = 0.02  # seconds a call: from here on caches and threads warm up within a small part of it


def batch(step, seconds):
    """Seconds a call of step(), hot, over as many calls as one batch takes at `seconds` each."""
    time.sleep(SETTLE)
    begin = clock()
    while seconds < LONG and clock() - begin < BATCH:
        step()
    calls = max(1, math.ceil(BATCH / seconds))
    begin = clock()
    for _ in range(calls):
        step()
    return (clock() - begin) / calls


class Failed(Exception):
    """Why a provider failed, in words that need no name of an exception beside them."""


def why(error):
    """An exception in a line."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if isinstance(error, Failed) else f"{type(error).__name__}: {line}".rstrip(": ")


def note(failed, name, error):
    """Keep in `failed`, {name: why}, that a peer failed. If one of ours did, that is an error."""
    if name.startswith("dlkernels"):
        raise RuntimeError(f"{name}: {why(error)}") from error
    failed[name] = why(error)


def attempts(f, names, failed):
    """{name: f(name)} of those that it works for: see note()."""
    found = {}
    for name in names:
        try:
            found[name] = f(name)
        except Exception as error:
            note(failed, name, error)
    return found


def interleave(steps, failed, separate=(), **limits):
    """Time steps, {name: callable}, in turns. `separate` are steps that time themselves: see
    take_turns()."""
    gc.collect()
    gc.disable()  # a collection would be some step's bad luck
    try:
        turns = attempts(lambda name: turn(steps[name]), steps, failed)
        return take_turns(turns | dict(separate), failed, **limits)
    finally:
        gc.enable()


def turn(step):
    """The function that times one batch of a step."""
    step()  # may compile, the next ones are warm
    begin = clock()
    step()
    return partial(batch, step, clock() - begin)


def take_turns(turns, failed, rounds=30, seconds=1.0, share=2.0):
    """Call every function of `turns`, {name: function that times one batch}, in each round once.

    Each round is in another order. It takes `rounds` rounds and `seconds` seconds at least. Who has
    had `share` seconds sits out after five rounds. Who fails is noted in `failed` and takes no
    further part.

    Returns:
        {name: [seconds a call in each round, None where it sat out]}
    """
    times = {name: [] for name in turns}
    spent = dict.fromkeys(turns, 0.0)
    begin, done = clock(), 0
    while done < rounds or clock() - begin < seconds:
        active = [name for name in times if done < 5 or spent[name] < share]
        if not active:
            break
        for name in random.sample(active, len(active)):
            start = clock()
            try:
                times[name].append(turns[name]())
            except Exception as error:
                note(failed, name, error)
                del times[name]
            spent[name] += clock() - start
        done += 1
        for taken in times.values():
            taken += [None] * (done - len(taken))
    return times


def median(times):
    return statistics.median(t for t in times if t)


def ratio(over, under):
    """First quartile, median and third quartile of over / under, round by round."""
    return statistics.quantiles([a / b for a, b in zip(over, under) if a and b], n=4)


# ---- roofs: what the machine could do at best -----------------------------------------------


def fastest(step, rounds=20):
    """Seconds a call of step() in the best of some batches."""
    step()
    begin = clock()
    step()
    estimate = clock() - begin
    return min(batch(step, estimate) for _ in range(rounds))


def fma_roof():
    """FLOP/s of fused multiply-adds that wait for nothing, on all of torch's threads."""
    times = 100_000
    return _C.multiply_add(times) / fastest(lambda: _C.multiply_add(times))


def copy_roof(size):
    """Bytes/s read and written by a copy that touches `size` bytes, in whichever cache they fit."""
    n = max(size, 2**20) // 8  # a smaller copy would time its call
    source, target = torch.ones(n), torch.ones(n)
    return 8 * n / fastest(lambda: target.copy_(source), rounds=10)


# ---- load -----------------------------------------------------------------------------------

TICKS = os.sysconf("SC_CLK_TCK")  # a second, as /proc counts CPU time


def cpu_time(pid):
    """Seconds of CPU time of a child that lives, and of those that it has waited for."""
    with open(f"/proc/{pid}/stat") as file:  # the name, in parentheses, may hold anything
        return sum(map(int, file.read().rpartition(")")[2].split()[11:15])) / TICKS


class Others:
    """CPU time of other processes since this was made."""

    BUSY = 0.2  # cores: an OpenMP region waits for its slowest thread
    children: ClassVar = set()  # the pids of living children that are no others

    def __init__(self):
        self.begin = self._now()

    def _now(self):
        with open("/proc/stat") as file:
            user, nice, system, _idle, _wait, irq, softirq, stolen = map(
                int, file.readline().split()[1:9]
            )
        machine = (user + nice + system + irq + softirq + stolen) / TICKS
        return clock(), machine - sum(os.times()[:4]) - sum(map(cpu_time, self.children))

    def cores(self):
        """How many cores they kept busy."""
        (t0, cpu0), (t1, cpu1) = self.begin, self._now()
        return max(0.0, (cpu1 - cpu0) / (t1 - t0))
