"""Timing, written once: one provider's time is a row in its case's group of pytest-benchmark."""

import torch

import dlkernels


def forward_backward(benchmark, case, provider, f, inputs, flops=None):
    """Times f(*inputs) and the gradients of all inputs that require one.

    Rows of one case form a group; `extra_info` says what they ran on, and GFLOP/s where the number
    of floating-point operations is given.
    """
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    y = f(*inputs)
    grad_y = torch.ones_like(y)

    def step():
        return torch.autograd.grad(f(*inputs), wanted, grad_y)

    report(benchmark, case, provider, step, flops)


def report(benchmark, case, provider, step, flops=None):
    """Times step() as `provider`'s row in the group `case`."""
    benchmark.group = case
    benchmark.name = provider
    benchmark.extra_info.update(
        torch=torch.__version__, isa=dlkernels.info()["isa"], threads=torch.get_num_threads()
    )
    for _ in range(3):
        step()
    benchmark(step)
    if flops and benchmark.stats:
        benchmark.extra_info["GFLOP/s"] = flops / benchmark.stats.stats.median / 1e9
