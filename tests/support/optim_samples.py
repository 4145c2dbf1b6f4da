"""Parameters and gradients for PyTorch's optimizers and ours, and what is compared of both."""

import pytest
import torch
from torch import nn
from torch.testing._internal import common_optimizers

from dlkernels import optim as ours

INFO = {info.optim_cls.__name__: info for info in common_optimizers.optim_db}
names = pytest.mark.parametrize("name", ours.__all__)


def of_shapes(*shapes):
    return lambda dtype: [torch.randn(shape, dtype=dtype) for shape in shapes]


def views(dtype, *ranges):
    base = torch.randn(10, dtype=dtype)
    return [base[begin:end] for begin, end in ranges]


PARAMETERS = {
    "plain": of_shapes((3, 5), (7,), ()),
    "noncontiguous": lambda dtype: [
        torch.randn(5, 3, dtype=dtype).t(),
        torch.randn(8, dtype=dtype)[::2],
        torch.randn(2, 4, 3, 3, dtype=dtype).to(memory_format=torch.channels_last),
    ],
    "some empty": of_shapes((0,), (3, 0), (4,)),
    "all empty": of_shapes((0,)),
    "none": of_shapes(),
    "mixed dtypes": lambda dtype: [
        torch.randn(5, 3, dtype=dtype),
        torch.randn(8, dtype=torch.float64),
        torch.randn(3, dtype=torch.bfloat16),
    ],
    "views": lambda dtype: views(dtype, (0, 4), (4, 8), (8, 10)),
    "overlapping views": lambda dtype: views(dtype, (0, 6), (4, 10)),
    "expanded": lambda dtype: [torch.randn(1, dtype=dtype).expand(4)],
}


def transposed(g):
    last = g.transpose(0, -1).contiguous().transpose(0, -1) if g.dim() > 1 else g
    return last if g.dim() > 1 else torch.stack([g, g], -1)[..., 0]


GRADIENTS = {
    "plain": lambda g, step: g,
    "skipped": lambda g, step: g if (step + g.dim()) % 3 else None,
    "noncontiguous": lambda g, step: transposed(g),
    "sparse": lambda g, step: g.to_sparse() if g.dim() else g,
    "expanded": lambda g, step: torch.ones((), dtype=g.dtype).expand(g.shape),
    "negative bit": lambda g, step: g if g.is_complex() else torch._neg_view(g),
    "none": lambda g, step: None,
    "zero": lambda g, step: torch.zeros_like(g),
    "huge": lambda g, step: g.abs() * 1e30,  # of one sign: what cancels has no relative tolerance
    "tiny": lambda g, step: g * 1e-30,
    "infinite": lambda g, step: g / 0,
    "NaN": lambda g, step: g * torch.where(torch.arange(g.numel()) == 0, torch.nan, 1).view_as(g),
}


def give_gradients(params, kind, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        dtype = torch.complex128 if p.is_complex() else torch.float64
        gradient = torch.randn(p.shape, generator=generator, dtype=dtype).to(p.dtype)
        p.grad = GRADIENTS[kind](gradient, step)


def seen(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [dict(optimizer.state.get(p, {})) for p in params]
    return [params, state, optimizer.state_dict(), optimizer.defaults, repr(optimizer)]


def new_parameters(kind, dtype=torch.float32, requires_grad=True):
    torch.manual_seed(0)
    tensors = PARAMETERS[kind](dtype)
    return [nn.Parameter(t) for t in tensors] if requires_grad else tensors


def make(library, name, options):
    params = new_parameters("plain")
    return getattr(library, name)(params, **options), params


def steps(optimizer, params, count=2, start=0):
    for step in range(start, start + count):
        give_gradients(params, "plain", step)
        optimizer.step()
