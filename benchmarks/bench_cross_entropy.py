"""cross_entropy with class indices: forward and backward."""

import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
from timing import forward_backward

PROVIDERS = {"torch": F.cross_entropy, "dlkernels": ours.cross_entropy}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("N,C", [(64, 10), (128, 1000), (4096, 1000)])
def test_cross_entropy(benchmark, N, C, provider):
    inputs = torch.randn(N, C, requires_grad=True), torch.randint(C, (N,))
    forward_backward(benchmark, f"cross_entropy {N}x{C}", provider, PROVIDERS[provider], inputs)
