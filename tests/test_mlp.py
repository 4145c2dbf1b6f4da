"""mlp and nn.MLP: a stack of linear layers as one op, against the same layers of PyTorch."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlkernels.functional as ours
from dlkernels.nn import MLP
from support.common import RTOL, assert_close, calls, check


def stack(input, *parameters):
    """PyTorch's: weights, then as many biases or none."""
    weights, biases = split(parameters)
    for i, w in enumerate(weights):
        input = F.linear(F.relu(input) if i else input, w, biases[i] if biases else None)
    return input


def split(parameters):
    weights = [p for p in parameters if p.dim() == 2]
    return weights, list(parameters[len(weights) :])


def mlp(input, *parameters):
    return ours.mlp(input, *split(parameters))


def sample(*sizes, batch=(5,), bias=True, grad=True):
    x = torch.randn(*batch, sizes[0], requires_grad=grad)
    weights = [torch.randn(b, a).requires_grad_() for a, b in pairwise(sizes)]
    return x, *weights, *([torch.randn(n, requires_grad=True) for n in sizes[1:]] if bias else [])


def samples():
    yield sample(7, 5)
    yield sample(7, 5, 3, grad=False)
    yield sample(20, 17, 16, 1, batch=(33,))
    yield sample(20, 17, 10, bias=False)
    yield sample(6, 5, 4, batch=(2, 3))
    yield sample(6, 5, 4, batch=())
    yield sample(6, 5, 4, batch=(0,))
    yield sample(6, 0, 4)
    yield sample(0, 5, 4)
    yield sample(300, 200, 100, 10, batch=(150,))  # large enough for two threads
    x, *parameters = sample(9, 8, 7)
    yield x.detach().t().contiguous().t().requires_grad_(), *parameters


@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_values_and_gradients(machine, dtype):
    passes = {"forward": ["mlp"], "backward": ["mlp_backward"]}
    for args in samples():
        check(mlp, stack, args, **passes, grad_strides=False, dtype=dtype)


def test_threads_give_the_same_bits():
    before, results = torch.get_num_threads(), []
    args = sample(70, 90, 40, 5, batch=(3000,))
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        y = mlp(*args)
        results.append((y, *torch.autograd.grad(y.square().sum(), args)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_opcheck():
    for args in samples():
        weights, biases = split(args[1:])
        torch.library.opcheck(torch.ops.dlkernels.mlp, (args[0], weights, biases))


def test_compile():
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True)
    for args in list(samples())[:4]:
        check(compiled, stack, args, forward=["mlp"], backward=["mlp_backward"], grad_strides=False)


def test_frozen_parameters_leave_one_node_a_layer():
    x, w1, w2, b1, b2 = sample(6, 5, 4)
    args = x, w1.detach(), w2, b1, b2.detach()
    both = ["linear", "linear_relu"]
    check(mlp, stack, args, forward=both, backward=["linear_backward"], grad_strides=False)


def test_double_backward_and_functorch():
    x, *parameters = sample(4, 3, 2)

    def penalty(f, dtype=torch.float32):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, *parameters)]
        first = torch.autograd.grad(f(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for results in zip(penalty(mlp), penalty(stack), penalty(stack, torch.float64), strict=True):
        assert_close(*results)
    got = torch.func.vmap(lambda row: mlp(row, *parameters))(x)
    torch.testing.assert_close(got, stack(x, *parameters))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("grad_input", [False, True])
def test_parameters_that_change_before_backward(grad_input, create_graph):
    """May change where PyTorch's layers do not keep them: biases, and the first weight if the input
    wants no gradient. Any other change is noticed."""

    def gradients(f, changed, dtype):
        torch.manual_seed(1)
        x, *parameters = [t.detach().to(dtype) for t in sample(6, 5, 4, 3)]
        wanted = [*parameters, x] if grad_input else parameters
        for t in wanted:
            t.requires_grad_()
        y = f(x, *parameters)
        with torch.no_grad():
            parameters[changed].mul_(3)
        firsts = torch.autograd.grad(y.sum(), wanted, create_graph=create_graph)
        if not create_graph:
            return firsts
        total = sum(g.square().sum() for g in firsts)
        return *firsts, *torch.autograd.grad(total, wanted, materialize_grads=True)

    ways = (mlp, torch.float32), (stack, torch.float32), (stack, torch.float64)
    for changed in range(6):
        if changed in (1, 2) or (changed == 0 and grad_input):
            for f, dtype in ways:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    gradients(f, changed, dtype)
        else:
            results = [gradients(f, changed, dtype) for f, dtype in ways]
            for got, *expected in zip(*results, strict=True):
                assert_close(got, *expected)


def test_batched_gradients():
    x, *parameters = sample(4, 3, 2)
    y = mlp(x, *parameters)
    g = torch.randn(3, *y.shape)
    got = torch.autograd.grad(y, [x, *parameters], g, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(y, [x, *parameters], g[i], retain_graph=True)
        torch.testing.assert_close([t[i] for t in got], [*expected])


def test_others_are_pytorchs():
    x, *parameters = [t.detach().double() for t in sample(4, 3, 2)]
    with calls(torchs=["mlp"]):
        torch.testing.assert_close(mlp(x, *parameters), stack(x, *parameters))
    with torch.autocast("cpu"):
        assert mlp(*sample(4, 3, 2)).dtype == torch.bfloat16


def test_any_series_of_tensors():
    x, w1, w2, b1, b2 = sample(4, 3, 2)
    y = ours.mlp(x, [w1, w2], [b1, b2])
    for series in (tuple, iter, torch.nn.ParameterList):
        assert torch.equal(ours.mlp(x, series([w1, w2]), series([b1, b2])), y)
    assert torch.equal(ours.mlp(x, w1[None]), ours.mlp(x, [w1]))


def test_bad_input():
    x, w1, w2, b1, b2 = sample(4, 3, 2)
    for weights, biases in [
        ([], []),
        ([w1, w2], [b1]),
        ([w2, w1], None),
        ([w1, w2], [b2, b1]),
        ([w1.double(), w2], None),
        ([w1.to("meta"), w2], None),
    ]:
        with pytest.raises(RuntimeError):
            ours.mlp(x, weights, biases)
        with torch.inference_mode(), pytest.raises(RuntimeError):  # past autograd's own checks
            ours.mlp(x, weights, biases)
    for weights in ([None], 1, "ab"):
        with pytest.raises(TypeError):
            ours.mlp(x, weights)
    backward = torch.ops.dlkernels.mlp_backward
    h, g = torch.randn(5, 3), torch.randn(5, 2)
    assert len(backward(g, x, [w1, w2], [h], True, True)) == 5
    for args in [
        (g, x, [w1, w2], []),
        (g, x, [w2, w1], [h]),
        (g[:, :1], x, [w1, w2], [h]),
        (g, x, [w1, w2], [h[:4]]),
        (g, x, [], []),
        (g, x.double(), [w1, w2], [h]),
    ]:
        with pytest.raises(RuntimeError):
            backward(*args, True, True)


def test_module_is_the_sequential_it_replaces():
    sizes = [6, 5, 4, 3]
    for bias in (True, False):
        torch.manual_seed(1)
        layers = [nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes)]
        expected = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        torch.manual_seed(1)
        model = MLP(sizes, bias=bias)
        x = torch.randn(7, 6)
        with calls(kernels=["mlp"]):
            torch.testing.assert_close(model(x), expected(x))
        assert list(model.state_dict()) == list(expected.state_dict())
        model.load_state_dict(expected.state_dict())
        torch.testing.assert_close(copy.deepcopy(model)(x), expected(x))
    for bad in ([], [3]):
        with pytest.raises(ValueError, match="sizes"):
            MLP(bad)


def test_children_with_hooks_are_called():
    model, x = MLP([6, 5, 4]), torch.randn(7, 6)
    expected, seen = model(x), []
    hook = model[1].register_forward_hook(lambda m, args, y: seen.append(y))
    torch.testing.assert_close(model(x), expected)
    assert len(seen) == 1 and (seen[0] >= 0).all()
    hook.remove()
    model[1] = nn.Tanh()
    torch.testing.assert_close(model(x), model[2](torch.tanh(model[0](x))))
    model.append(nn.ReLU())
    assert (model(x) >= 0).all()
