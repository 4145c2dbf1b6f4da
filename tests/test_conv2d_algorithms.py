"""Every algorithm of conv2d gives the same, within the error that it may have."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import dlkernels
import dlkernels.functional as ours
from dlkernels import _C

# Of a result's RMS, against float64, and times direct's own: at most 4 and 10 where measured.
NORM_ERROR = 1e-5
RMS_FACTOR = {"y": 6, "grad_x": 6, "grad_weight": 10, "grad_bias": 10}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def algorithm(request):
    before = _C.set_conv_algorithm(request.param)
    yield request.param
    _C.set_conv_algorithm(before)


every_algorithm = pytest.mark.parametrize(
    "algorithm", ["direct", "winograd2", "winograd4"], indirect=True
)


def results(f, x, weight, bias, padding, grad_y):
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = f(*inputs, padding=padding)
    return dict(zip(RMS_FACTOR, (y, *torch.autograd.grad(y, inputs, grad_y)), strict=True))


def case(N, C, H, W, K, padding=1, layout=torch.contiguous_format, mean=0):
    x, weight = torch.randn(N, C, H, W) + mean, torch.randn(K, C, 3, 3) / (3 * C**0.5)
    grad_y = torch.randn(N, K, H + 2 * padding - 2, W + 2 * padding - 2)
    x, weight, grad_y = (t.contiguous(memory_format=layout) for t in (x, weight, grad_y))
    return x, weight, torch.randn(K), padding, grad_y


def exact(f, *args):
    return results(f, *(t.double() if isinstance(t, torch.Tensor) else t for t in args))


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@every_algorithm
def test_shapes_and_layouts(machine, algorithm):
    sizes = [(1, 1), (2, 3), (5, 7), (33, 1), (14, 14)]
    for (H, W), padding, layout in product(sizes, (0, 1, 2), LAYOUTS):
        if min(H, W) + 2 * padding < 3:
            continue
        for C, K in [(16, 16), (17, 31), (3, 40), (33, 5)]:
            args = case(2, C, H, W, K, padding, layout)
            got, expected = results(ours.conv2d, *args), exact(F.conv2d, *args)
            for name in got:
                assert error(got[name], expected[name]) < NORM_ERROR, (name, args[0].shape)
            assert got["y"].is_contiguous(memory_format=layout)


@every_algorithm
def test_several_batches(machine, algorithm):
    """A thread that has many blocks adds up what several batches of them give."""
    args = case(3, 16, 100, 90, 17)
    got, expected = results(ours.conv2d, *args), exact(F.conv2d, *args)
    for name in got:
        assert error(got[name], expected[name]) < NORM_ERROR, name


@every_algorithm
def test_fused_with_relu_and_pool(algorithm):
    for (H, W), layout in product([(2, 2), (5, 7), (9, 14), (12, 40)], LAYOUTS):
        x, weight, bias, padding, _ = case(3, 17, H, W, 35, 1, layout)
        grad_y = torch.randn(3, 35, H // 2, W // 2)
        got = results(ours.conv2d_relu_max_pool2d, x, weight, bias, padding, grad_y)
        expected = results(
            lambda *args, padding: ours.max_pool2d(ours.conv2d_relu(*args, padding=padding), 2),
            *(x, weight, bias, padding, grad_y),
        )
        assert torch.equal(got["y"], expected["y"])
        for name in got:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("C", "mean"), [(64, 0), (64, 10), (512, 0), (512, 10)])
def test_error_of_winograd(C, mean):
    args = case(4, C, 14, 14, 64, mean=mean)
    expected = exact(F.conv2d, *args)
    errors = {}
    for algorithm in ("direct", "winograd2", "winograd4"):
        before = _C.set_conv_algorithm(algorithm)
        got = results(ours.conv2d, *args)
        _C.set_conv_algorithm(before)
        errors[algorithm] = {name: error(got[name], expected[name]) for name in got}
    assert len({each["y"] for each in errors.values()}) == 3, "each of them ran"
    for algorithm in ("winograd2", "winograd4"):
        for name, factor in RMS_FACTOR.items():
            assert errors[algorithm][name] < NORM_ERROR, errors
            assert errors[algorithm][name] < factor * errors["direct"][name] + 1e-7, errors


def test_ieee_is_as_exact_as_direct():
    args = case(16, 64, 14, 14, 64)  # enough tiles for 4x4
    expected = exact(F.conv2d, *args)
    fast = ours.conv2d(*args[:3], padding=1)  # by default
    with dlkernels.set_precision("ieee"):
        ieee = ours.conv2d(*args[:3], padding=1)
    assert error(ieee, expected["y"]) < 4e-7 < error(fast, expected["y"])


def test_threads_give_the_same_bits():
    args = case(5, 40, 15, 18, 36)
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append(results(ours.conv2d_relu, *args))
    torch.set_num_threads(2)
    for other in outputs[1:]:
        assert all(torch.equal(outputs[0][name], other[name]) for name in other)


def test_training_follows_torch():
    def losses(convert):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            *(torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Flatten(), torch.nn.Linear(256, 10)),
        )
        if convert:
            dlkernels.convert(model)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        x, target = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
        steps = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        return torch.tensor(steps)

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-3, atol=1e-4)
