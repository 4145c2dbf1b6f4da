"""max_pool2d: forward and backward, PyTorch in both memory formats."""

import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
from timing import forward_backward

PROVIDERS = {
    "torch": (F.max_pool2d, torch.contiguous_format),
    "torch channels_last": (F.max_pool2d, torch.channels_last),
    "dlkernels": (ours.max_pool2d, torch.contiguous_format),
    "dlkernels channels_last": (ours.max_pool2d, torch.channels_last),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kernel,stride", [(2, 2), (3, 2)])
def test_max_pool2d(benchmark, kernel, stride, provider):
    pool, memory_format = PROVIDERS[provider]
    x = torch.randn(64, 32, 28, 28).to(memory_format=memory_format).requires_grad_()
    case = f"max_pool2d 64x32x28x28 {kernel}x{kernel}/{stride}"
    forward_backward(benchmark, case, provider, lambda x: pool(x, kernel, stride), (x,))
