"""The cases under pytest-benchmark: `pytest benchmarks -k "max_pool2d and not compile"`."""

import pytest
import torch

import dlkernels
from dlkernels.benchmarks import suite

ROWS = [
    pytest.param(case, mode, provider, id=f"{op} {case}-{mode}-{provider}")
    for op in suite.OPS
    for case in suite.cases(op)
    for mode in case.modes
    for provider in suite.providers(case)
]


@pytest.mark.parametrize(("case", "mode", "provider"), ROWS)
def test_speed(benchmark, case, mode, provider):
    steps, errors, failed = suite.prepare(case, mode, {provider: case.providers[provider]})
    if failed:
        pytest.skip(f"{provider} failed: {failed[provider]}")
    benchmark.group = f"{case.op} {case} {mode}"
    benchmark.name = provider
    benchmark.extra_info.update(
        error=errors[provider], isa=dlkernels.info()["isa"], threads=torch.get_num_threads()
    )
    benchmark(steps[provider])
    if benchmark.stats:  # none with --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["GB/s"] = case.bytes(mode) / seconds / 1e9
        benchmark.extra_info["GFLOP/s"] = case.flops(mode) / seconds / 1e9
