"""relu: forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from common import forward_backward

import dlkernels.functional as ours

PROVIDERS = {"torch": F.relu, "dlkernels": ours.relu}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("n", [1 << 14, 1 << 20])
def test_relu(benchmark, n, provider):
    inputs = [torch.randn(n, requires_grad=True)]
    forward_backward(benchmark, f"relu {n}", provider, PROVIDERS[provider], inputs)
