"""The optimizers' ops: one step on lists of tensors, against PyTorch's own."""

import copy

import pytest
import torch

import dlkernels
import dlkernels.functional as ours
from support.common import assert_close, calls, steps
from support.optim_table import ADAM, flat, ops, ops_and_options


def samples(op, options=(), device="cpu"):
    def t(*shape):
        return torch.randn(*shape, device=device)

    def channels_last():
        return t(6, 4, 3, 3).to(memory_format=torch.channels_last)

    def group(*params, **kwargs):
        return op.group(*params, options=options, **kwargs)

    yield group(*(t(n) for n in range(40)))
    yield group(t(()), t(3, 0, 2), t(5, 7), step=1e6)
    yield group(t(100_003))
    yield group(*(t(n % 7, 3) for n in range(100)), t(70_001), t(1))  # small ones, then cut ones
    yield group(*(t(100)[i : i + 50] for i in range(4)))  # misaligned
    yield group(channels_last(), t(6, 4, 1, 1))
    yield group(t(9, 5).t(), t(9, 10)[:, ::2], t(40_000, 2)[:, 0])
    p, g, *states = lists = group(channels_last(), t(70_000, 2))
    for k in range(2, 2 + len(op.states)):  # each out of order in its own way
        lists[k] = [transposed(x) if k % 2 else x.contiguous() for x in lists[k]]
    yield [p, [x.contiguous() for x in g], *lists[2:]]
    yield [p, [g[0][:1, :, :1].expand(6, 4, 3, 3), g[1][:, :1].expand(70_000, 2)], *states]


def transposed(x):
    return x.mT.contiguous().mT


def cast(op, lists, dtype):
    return [
        [x.clone() if op.counts and tensors is lists[-1] else x.to(dtype) for x in tensors]
        for tensors in lists
    ]


@ops_and_options
def test_values(machine, op, options):
    for lists in samples(op, options):
        got, expected, exact = (
            copy.deepcopy(lists),
            copy.deepcopy(lists),
            cast(op, lists, torch.float64),
        )
        before = [(steps(x), x.data_ptr(), x._version) for x in flat(got)]
        for _ in range(3):
            with calls([op.name]):
                op(got, options)
            op.torch_step(expected, options)
            op.torch_step(exact, options)
        for which in (0, *range(2, 2 + len(op.states))):
            for results in zip(got[which], expected[which], exact[which], strict=True):
                assert_close(*results)
        if op.counts:
            assert got[-1] == expected[-1]
        assert all(torch.equal(*pair) for pair in zip(got[1], expected[1]))
        for x, (stride, data_ptr, version) in zip(flat(got), before):
            assert (steps(x), x.data_ptr()) == (stride, data_ptr)
            is_grad = any(x is g for g in got[1])
            assert x._version == version if is_grad else x._version > version


@ops_and_options
def test_infinite(machine, op, options):
    if machine == "baseline" and options.get("centered"):
        pytest.skip("without FMA, the mean's square overflows where PyTorch's does not")
    # 1e20 squared overflows, the hundredth of that which an average takes does not.
    special = [float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e30, 1e20, 1e-30, 1e-40]
    n = len(special)
    lists = op.group(torch.tensor(special).repeat(n), torch.zeros(n * n), options=options)
    for g in lists[1]:
        g.copy_(torch.tensor(special).repeat_interleave(n))
    for x in flat(lists[2 : 2 + len(op.states)]):
        x.zero_()
    got, expected = copy.deepcopy(lists), copy.deepcopy(lists)
    for _ in range(3):
        op(got, options)
        op.torch_step(expected, options)
    torch.testing.assert_close(got, expected, equal_nan=True)


@ops
def test_same_bits(machine, op):
    params = torch.randn(3), torch.randn(70_001), torch.randn(5, 5), torch.randn(40_000)
    options = op.options[-1]
    lists = op.group(*params, options=options)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        got = copy.deepcopy(lists)
        for _ in range(3):
            op(got, options)
        results.append(flat(got))
    for one, two, again in zip(*results):
        assert torch.equal(one, two) and torch.equal(one, again)


@ops
def test_overlap(machine, op):
    """A parameter listed twice is updated twice, one after the other; a gradient may serve two."""
    options = op.options[-2]
    lists = op.group(torch.randn(70_000), torch.randn(70_000), options=options)
    p, g, *states = lists

    def view(x):
        return x.view(700, 100).t() if x.dim() else x

    for shared in (
        [x[:1] * 2 for x in lists],
        [p, g[:1] * 2, *states],
        [[p[0], view(p[0])], *([x[0], view(x[1])] if x else [] for x in (g, *states))],
    ):
        got, expected = copy.deepcopy(shared), copy.deepcopy(shared)
        op(got, options)
        op.torch_step(expected, options)
        torch.testing.assert_close(got, expected)


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grad_scale_and_found_inf(machine, op, dtype):
    options = op.options[-1]
    lists = op.group(torch.randn(70), torch.randn(3, 4, 5, 6), options=options)
    lists[1][1] = torch.randn(3, 4, 6, 5).mT
    lists = cast(op, lists, dtype)
    expected = copy.deepcopy(lists)
    for grad in expected[1]:
        grad /= torch.tensor(3.0)
    op.torch_step(expected, options)
    path = {"kernels": [op.name]} if dtype == torch.float32 else {"torchs": [op.name]}
    for shape in ((), (1,)):
        got = copy.deepcopy(lists)
        scalars = {"grad_scale": torch.full(shape, 3.0), "found_inf": torch.zeros(shape)}
        with calls(**path):
            op(got, options, **scalars)
        torch.testing.assert_close(got, expected)
        assert torch.equal(got[1][0], expected[1][0])  # unscaled in place, as PyTorch leaves them
        for found_inf in (1.0, 2.0, float("nan")):
            again = copy.deepcopy(got)
            op(again, options, **{**scalars, "found_inf": torch.full(shape, found_inf)})
            assert all(torch.equal(*pair) for pair in zip(flat(again), flat(got)))


@ops_and_options
def test_left_to_torch(op, options):
    lists = op.group(torch.randn(5), torch.randn(3, 2), options=options)
    kinds = [cast(op, lists, torch.float64), cast(op, lists, torch.bfloat16)]
    if op.counts:
        kinds.append([*lists[:-1], [x.double() for x in lists[-1]]])
    for lists in kinds:
        got, expected = copy.deepcopy(lists), copy.deepcopy(lists)
        with calls(torchs=[op.name]):
            op(got, options)
        op.torch_step(expected, options)
        assert all(torch.equal(*pair) for pair in zip(flat(got), flat(expected)))


@ops
def test_around_a_call(op):
    with calls():
        op([[] for _ in op.group()])
    with calls([op.name]), torch.autocast("cpu"):
        op(op.group(torch.randn(5)))
    with dlkernels.set_fallback("error"), pytest.raises(NotImplementedError, match=op.name):
        op(op.group(torch.randn(5).double()))


def functional_adam_(lists):
    scalars = {name: ADAM.defaults[name] for name in ADAM.defaults if name != "maximize"}
    ours.adam_(*lists, **scalars)


def test_functional():
    class Counted(torch.Tensor):
        pass

    lists = ADAM.group(torch.randn(5), torch.randn(3, 2))
    got, expected = copy.deepcopy(lists), copy.deepcopy(lists)
    with calls(["adam_"]):
        functional_adam_(got)
    ADAM(expected)
    assert all(torch.equal(*pair) for pair in zip(flat(got), flat(expected)))
    lists[0][0] = lists[0][0].as_subclass(Counted)
    with calls(torchs=["adam_"]):
        functional_adam_(lists)


def test_device_lr():
    """It replaces lr, on our kernel and on PyTorch's ops."""
    for dtype, path in ((torch.float32, "kernels"), (torch.float64, "torchs")):
        lists = cast(ADAM, ADAM.group(torch.randn(5), torch.randn(3, 2)), dtype)
        got, expected = copy.deepcopy(lists), copy.deepcopy(lists)
        with calls(**{path: ["adam_"]}):
            ADAM(got, {"lr": 7.0}, device_lr=torch.tensor([0.5]))
        ADAM(expected, {"lr": 0.5})
        assert all(torch.equal(*pair) for pair in zip(flat(got), flat(expected)))


@ops
def test_opcheck(op):
    f = getattr(torch.ops.dlkernels, op.name).default
    options = op.options[-1]
    for lists in list(samples(op, options))[1::4]:  # half a second each
        torch.library.opcheck(f, lists, op.defaults | options)
    scalars = {"grad_scale": torch.full((), 2.0), "found_inf": torch.zeros(())}
    torch.library.opcheck(
        f, op.group(torch.randn(5), torch.randn(3, 2)), {**op.defaults, **scalars}
    )


@ops
def test_compile(op):
    options = op.options[-1]
    f = getattr(torch.ops.dlkernels, op.name).default
    torch.compiler.reset()  # one wrapper for all ops: each would count as a recompilation
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for lists in list(samples(op, options))[1:3]:
        got, expected = copy.deepcopy(lists), copy.deepcopy(lists)
        with calls([op.name]):
            compiled(*got, **op.defaults | options)
        op(expected, options)
        assert all(torch.equal(*pair) for pair in zip(flat(got), flat(expected)))
