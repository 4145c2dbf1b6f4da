"""linear_relu: forward and backward with all three gradients."""

import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
from timing import forward_backward

PROVIDERS = {"torch": lambda *a: F.relu(F.linear(*a)), "dlkernels": ours.linear_relu}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "M,K,N", [(64, 784, 128), (128, 512, 10), (256, 784, 256), (1000, 64, 64), (512, 1024, 1024)]
)
def test_linear_relu(benchmark, M, K, N, provider):
    inputs = [torch.randn(*s, requires_grad=True) for s in [(M, K), (N, K), (N,)]]
    case = f"linear_relu {M}x{K}x{N}"
    forward_backward(benchmark, case, provider, PROVIDERS[provider], inputs, 6 * M * K * N)
