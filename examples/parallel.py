"""What train_digits.py needs for several processes, as torchrun starts them, that share a batch."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from harness import RANK

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


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
