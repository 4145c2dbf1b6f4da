"""relu: forward and backward."""

import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
from timing import forward_backward

PROVIDERS = {"torch": F.relu, "dlkernels": ours.relu}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("n", [1 << 14, 1 << 20])
def test_relu(benchmark, n, provider):
    inputs = [torch.randn(n, requires_grad=True)]
    forward_backward(benchmark, f"relu {n}", provider, PROVIDERS[provider], inputs)
