"""One step of Adam, PyTorch's default and fused."""

import pytest
import torch

import dlkernels
from timing import report

PROVIDERS = {
    "torch": torch.optim.Adam,
    "torch fused": lambda params: torch.optim.Adam(params, fused=True),
    "dlkernels": dlkernels.optim.Adam,
}
SIZES = {
    "784-128-10": [(128, 784), (128,), (10, 128), (10,)],
    "150 of 48x48": [(48, 48)] * 150,
    "1024x1024": [(1024, 1024)],
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_adam(benchmark, sizes, provider):
    params = [torch.randn(s, requires_grad=True) for s in SIZES[sizes]]
    for p in params:
        p.grad = torch.randn_like(p)
    report(benchmark, f"Adam {sizes}", provider, PROVIDERS[provider](params).step)
