"""Adam on CUDA tensors, steps on the CPU and on the device; and targets that are no class there."""

import pytest
import torch

import dlkernels
import dlkernels.functional as ours
from support.common import calls

pytestmark = pytest.mark.cuda

SIZES = (0, 1, 7, 2048, 5000, 0)


def optimizers(**kwargs):
    """The same parameters in each dtype, under PyTorch's Adam and ours."""
    pairs = []
    for cls in (torch.optim.Adam, dlkernels.optim.Adam):
        torch.manual_seed(1)
        params = [
            torch.randn(n).to("cuda", dtype).requires_grad_()
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for n in SIZES
        ]
        pairs.append((params, cls(params, **kwargs)))
    return pairs


def step(params, optimizer, seed):
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape).to(p)
    optimizer.step()


def assert_equal_states(a, b):
    for p, q in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(p, q)
        for key, value in a[1].state[p].items():
            torch.testing.assert_close(b[1].state[q][key], value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capturable": True},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "capturable": True},
    ],
)
def test_adam_is_torchs(options):
    torchs, mine = optimizers(lr=0.01, **options)
    for seed in range(3):
        step(*torchs, seed)
        with calls(["adam_"]):
            step(*mine, seed)
    assert_equal_states(torchs, mine)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_and_grad_scale_stay_on_the_device(found):
    torchs, mine = optimizers(lr=0.01, fused=True)
    for pair in (torchs, mine):
        step(*pair, 0)
        pair[1].grad_scale = torch.tensor(4.0, device="cuda")
        pair[1].found_inf = torch.tensor(found, device="cuda")
        step(*pair, 1)
    assert_equal_states(torchs, mine)
    for p, q in zip(torchs[0], mine[0], strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_captured_steps_are_the_steps():
    plain, captured = optimizers(lr=0.01, capturable=True)
    step(*captured, 0)
    step(*plain, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured[1].step()
    for _ in range(3):
        graph.replay()
        plain[1].step()
    assert_equal_states(plain, captured)


def test_lr_on_the_device():
    """It is read there: a captured step follows a schedule."""
    lr = torch.tensor(0.01, device="cuda")
    torchs, mine = optimizers(lr=lr, capturable=True)
    for seed in range(2):
        step(*torchs, seed)
        with calls(["adam_"]):
            step(*mine, seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine[1].step()
    for rate in (0.1, 0.001):
        lr.fill_(rate)
        graph.replay()
        torchs[1].step()
    assert_equal_states(torchs, mine)


def test_a_target_that_is_no_class():
    x = torch.randn(4, 3, device="cuda", requires_grad=True)
    bad, good = torch.tensor([0, 1, 3, 2], device="cuda"), torch.tensor([0, 1, 1, 2], device="cuda")
    assert ours.cross_entropy(x, bad).isnan()  # waits for the device
    with pytest.raises(IndexError, match="out of bounds"):
        ours.cross_entropy(x, good)
    losses = ours.cross_entropy(x, good, reduction="none")
    assert losses.isfinite().all()
    rows = ours.cross_entropy(x, bad, reduction="none").isnan()
    assert rows.tolist() == [False, False, True, False]
    with pytest.raises(IndexError, match="out of bounds"):
        ours.cross_entropy(x, good)
