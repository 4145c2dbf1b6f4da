"""conv2d_relu: forward and backward, PyTorch in both memory formats."""

import pytest
import torch
import torch.nn.functional as F

import dlkernels.functional as ours
from timing import forward_backward

PROVIDERS = {
    "torch": (F.conv2d, torch.contiguous_format),
    "torch channels_last": (F.conv2d, torch.channels_last),
    "dlkernels": (ours.conv2d_relu, torch.contiguous_format),
    "dlkernels channels_last": (ours.conv2d_relu, torch.channels_last),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "N,C,H,K,kernel",
    [(64, 1, 28, 32, 3), (64, 32, 14, 64, 3), (64, 64, 32, 64, 3), (64, 6, 14, 16, 5)],
)
def test_conv2d_relu(benchmark, N, C, H, K, kernel, provider):
    conv, memory_format = PROVIDERS[provider]
    # The first layer of a network wants no gradient of its input.
    x = torch.randn(N, C, H, H).to(memory_format=memory_format).requires_grad_(C > 1)
    w = torch.randn(K, C, kernel, kernel).to(memory_format=memory_format).requires_grad_()
    b = torch.randn(K, requires_grad=True)

    def f(x, w, b):
        y = conv(x, w, b, padding=kernel // 2)
        return F.relu(y) if conv is F.conv2d else y

    flops = 2 * N * C * H * H * K * kernel**2 * (3 if C > 1 else 2)
    case = f"conv2d_relu {N}x{C}x{H}x{H} K={K} {kernel}x{kernel}"
    forward_backward(benchmark, case, provider, f, (x, w, b), flops)
