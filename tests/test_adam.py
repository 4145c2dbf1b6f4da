"""adam_: one step on lists of tensors, against torch.optim.adam's own."""

import copy

import pytest
import torch
from torch.optim.adam import adam

import dlkernels.functional as ours
from common import assert_close, calls, steps

OP = torch.ops.dlkernels.adam_.default
SCALARS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    {"beta1": 0.0, "beta2": 0.0, "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
]


def group(*params, step=0.0):
    """(params, grads, exp_avgs, exp_avg_sqs, state_steps) in the middle of a training."""
    params = list(params)
    grads = [torch.randn_like(p) for p in params]
    exp_avgs = [0.1 * torch.randn_like(p) for p in params]
    exp_avg_sqs = [torch.rand_like(p) for p in params]
    return (
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [torch.tensor(step + i) for i in range(len(params))],
    )


def samples(device="cpu"):
    def t(*shape):
        return torch.randn(*shape, device=device)

    def channels_last():
        return t(6, 4, 3, 3).to(memory_format=torch.channels_last)

    yield group(*(t(n) for n in range(40)))
    yield group(t(()), t(3, 0, 2), t(5, 7), step=1e6)
    yield group(t(100_003))
    yield group(*(t(n % 7, 3) for n in range(100)), t(70_001), t(1))  # small ones, then cut ones
    yield group(*(t(100)[i : i + 50] for i in range(4)))  # misaligned
    yield group(channels_last(), t(6, 4, 1, 1))
    yield group(t(9, 5).t(), t(9, 10)[:, ::2], t(40_000, 2)[:, 0])
    p, g, m, v, s = group(channels_last(), t(70_000, 2))
    yield p, [x.contiguous() for x in g], m, [x.mT.contiguous().mT for x in v], s  # out of order
    yield p, g, [x.contiguous() for x in m], [torch.stack([x, x], -1)[..., 0] for x in v], s
    yield p, [g[0][:1, :, :1].expand(6, 4, 3, 3), g[1][:, :1].expand(70_000, 2)], m, v, s


def torchs(*lists, **kwargs):
    params, grads, exp_avgs, exp_avg_sqs, state_steps = lists
    kwargs = {"maximize": False, **SCALARS, **kwargs}
    adam(params, grads, exp_avgs, exp_avg_sqs, [], state_steps, amsgrad=False, **kwargs)


def double(lists):
    *lists, state_steps = copy.deepcopy(lists)
    return *([x.double() for x in tensors] for tensors in lists), state_steps


def flat(lists):
    return [x for tensors in lists for x in tensors]


def test_values(machine):
    for lists in samples():
        for options in OPTIONS:
            got, expected, exact = copy.deepcopy(lists), copy.deepcopy(lists), double(lists)
            before = [(steps(x), x.data_ptr(), x._version) for x in flat(got)]
            for _ in range(3):
                with calls(["adam_"]):
                    ours.adam_(*got, **{**SCALARS, **options})
                torchs(*expected, **options)
                torchs(*exact, **options)
            for which in (0, 2, 3):
                for results in zip(got[which], expected[which], exact[which]):
                    assert_close(*results)
            assert got[4] == expected[4]
            assert all(torch.equal(*pair) for pair in zip(got[1], expected[1]))
            for x, (stride, data_ptr, version) in zip(flat(got), before):
                assert (steps(x), x.data_ptr()) == (stride, data_ptr)
                is_grad = any(x is g for g in got[1])
                assert x._version == version if is_grad else x._version > version


def test_infinite(machine):
    special = [float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e30, 1e-30, 1e-40]
    lists = group(torch.tensor(special).repeat(8), torch.zeros(64))
    for g in lists[1]:
        g.copy_(torch.tensor(special).repeat_interleave(8))
    for x in lists[2] + lists[3]:
        x.zero_()
    for options in OPTIONS:
        got, expected = copy.deepcopy(lists), copy.deepcopy(lists)
        for _ in range(3):
            ours.adam_(*got, **{**SCALARS, **options})
            torchs(*expected, **options)
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_same_bits(machine):
    lists = group(torch.randn(3), torch.randn(70_001), torch.randn(5, 5), torch.randn(40_000))
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        got = copy.deepcopy(lists)
        for _ in range(3):
            ours.adam_(*got, **SCALARS)
        results.append(flat(got))
    for one, two, again in zip(*results):
        assert torch.equal(one, two) and torch.equal(one, again)


def test_overlap(machine):
    """A parameter listed twice is updated twice, one after the other; a gradient may serve two."""
    p, g, m, v, s = group(torch.randn(70_000), torch.randn(70_000))
    for lists in (
        [x[:1] * 2 for x in (p, g, m, v, s)],
        [p, g[:1] * 2, m, v, s],
        [[p[0], p[0].view(700, 100).t()], [g[0], g[1].view(700, 100).t()]]
        + [[x[0], x[1].view(700, 100).t()] for x in (m, v)]
        + [s],
    ):
        got, expected = copy.deepcopy(lists), copy.deepcopy(lists)
        ours.adam_(*got, **SCALARS)
        torchs(*expected)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grad_scale_and_found_inf(machine, dtype):
    p, g, *rest = group(torch.randn(70), torch.randn(3, 4, 5, 6))
    lists = p, [g[0], torch.randn(3, 4, 6, 5).mT], *rest
    lists = *([x.to(dtype) for x in tensors] for tensors in lists[:4]), lists[4]
    expected = copy.deepcopy(lists)
    for scale in expected[1]:
        scale /= 3
    torchs(*expected)
    path = {"kernels": ["adam_"]} if dtype == torch.float32 else {"torchs": ["adam_"]}
    for shape in ((), (1,)):
        got = copy.deepcopy(lists)
        scalars = {"grad_scale": torch.full(shape, 3.0), "found_inf": torch.zeros(shape)}
        with calls(**path):
            ours.adam_(*got, **SCALARS, **scalars)
        torch.testing.assert_close(got, expected)
        assert torch.equal(got[1][0], expected[1][0])  # unscaled in place, as PyTorch leaves them
        for found_inf in (1.0, 2.0, float("nan")):
            again = copy.deepcopy(got)
            ours.adam_(*again, **SCALARS, **{**scalars, "found_inf": torch.full(shape, found_inf)})
            assert all(torch.equal(*pair) for pair in zip(flat(again), flat(got)))


def test_left_to_torch():
    p, g, m, v, s = group(torch.randn(5), torch.randn(3, 2))
    for lists in (double((p, g, m, v, s)), (p, g, m, v, [x.double() for x in s])):
        for options in OPTIONS:
            got, expected = copy.deepcopy(lists), copy.deepcopy(lists)
            with calls(torchs=["adam_"]):
                ours.adam_(*got, **{**SCALARS, **options})
            torchs(*expected, **options)
            assert all(torch.equal(*pair) for pair in zip(flat(got), flat(expected)))
    with calls():
        ours.adam_([], [], [], [], [], **SCALARS)
    with calls(["adam_"]), torch.autocast("cpu"):
        ours.adam_(p, g, m, v, s, **SCALARS)


def test_subclass():
    class Counted(torch.Tensor):
        pass

    p, g, m, v, s = group(torch.randn(5))
    with calls(torchs=["adam_"]):
        ours.adam_([p[0].as_subclass(Counted)], g, m, v, s, **SCALARS)


def test_requires_grad():
    p, *rest = group(torch.randn(5))
    p = [torch.nn.Parameter(p[0])]
    with pytest.raises(RuntimeError, match=r"adam_: .*torch.no_grad"):
        ours.adam_(p, *rest, **SCALARS)
    loss = (p[0] * p[0]).sum()
    with torch.no_grad():
        ours.adam_(p, *rest, **SCALARS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode():
    with torch.inference_mode():
        lists = group(torch.randn(5))
        with calls(["adam_"]):
            ours.adam_(*lists, **SCALARS)
    before = copy.deepcopy(lists)
    with pytest.raises(RuntimeError, match="inference tensor"), torch.no_grad():
        ours.adam_(*lists, **SCALARS)
    assert all(torch.equal(*pair) for pair in zip(flat(lists), flat(before)))


def bad(which, change, error=RuntimeError):
    """A fault in the last of three tensors: found before the first is written."""
    return pytest.param(which, change, error, id=f"{which}-{change.__code__.co_firstlineno}")


@pytest.mark.parametrize(
    "which, change, error",
    [
        bad(0, lambda p: [*p[:2], p[2][:0].expand(0)]),
        bad(0, lambda p: p[:2]),
        bad(0, lambda p: [*p[:2], torch.zeros(1).expand(7)]),
        bad(0, lambda p: [*p[:2], p[2].int()]),
        bad(0, lambda p: [*p[:2], p[2].to("meta")]),
        bad(0, lambda p: [*p[:2], p[2].to_sparse()]),
        bad(0, lambda p: [*p[:2], None]),
        bad(1, lambda g: [*g, g[0]]),
        bad(1, lambda g: [*g[:2], g[2][:3]]),
        bad(1, lambda g: [*g[:2], g[2].to_sparse()]),
        bad(1, lambda g: [*g[:2], g[2].double()]),
        bad(1, lambda g: [*g[:2], g[2].to("meta")]),
        bad(2, lambda m: [*m[:2], m[2][:1].expand(7)]),
        bad(2, lambda m: [*m[:2], torch.zeros(7, 7)]),
        bad(3, lambda v: []),
        bad(3, lambda v: [*v[:2], v[2].bfloat16()]),
        bad(4, lambda s: [*s[:2], torch.zeros(2)]),
        bad(4, lambda s: [*s[:2], torch.zeros(0)]),
        bad(4, lambda s: [*s[:2], s[2].to("meta")]),
        bad(4, lambda s: [*s[:2], torch.tensor(1j)], NotImplementedError),
        bad(4, lambda s: [*s[:2], 3.0]),
    ],
)
def test_bad_lists(which, change, error):
    lists = list(group(*(torch.randn(7) for _ in range(3))))
    lists[which] = change(lists[which])
    before = [x.clone() for x in flat(lists)[:2]]
    with pytest.raises(error, match=r"adam_|single memory location"):
        OP(*lists, **SCALARS, maximize=False, decoupled_weight_decay=False)
    assert all(torch.equal(*pair) for pair in zip(flat(lists), before))


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_bad_scalars(name):
    lists = group(torch.randn(7))
    for scalar in (
        torch.ones(2),
        torch.ones(0),
        torch.ones(1).to_sparse(),
        torch.ones((), device="meta"),
    ):
        with pytest.raises(RuntimeError, match=f"adam_: {name}"):
            ours.adam_(*lists, **SCALARS, **{name: scalar})
    with pytest.raises(RuntimeError, match=r"adam_: grads|single memory location"):
        p, g, *rest = lists
        ours.adam_(p, [g[0][:1].expand(7)], *rest, **SCALARS, grad_scale=torch.ones(()))
    for dtype in (torch.complex64, torch.float32):
        lists = group(torch.randn(7, dtype=dtype))
        if dtype.is_complex:
            with pytest.raises(NotImplementedError, match="adam_: params"):
                ours.adam_(*lists, **SCALARS)
        for value in (float("nan"), float("inf"), 0.0, -1.0, 1e300):  # no crash
            if not dtype.is_complex:
                ours.adam_(*lists, **{k: value for k in SCALARS})


def test_opcheck():
    for lists in samples():
        kwargs = {**SCALARS, "maximize": False, "decoupled_weight_decay": False}
        torch.library.opcheck(OP, lists, kwargs)
    scalars = {"grad_scale": torch.full((), 2.0), "found_inf": torch.zeros(())}
    torch.library.opcheck(OP, group(torch.randn(5), torch.randn(3, 2)), {**kwargs, **scalars})


def test_compile():
    compiled = torch.compile(ours.adam_, fullgraph=True, dynamic=True)
    for lists in list(samples())[1:3]:
        got, expected = copy.deepcopy(lists), copy.deepcopy(lists)
        with calls(["adam_"]):
            compiled(*got, **SCALARS)
        ours.adam_(*expected, **SCALARS)
        assert all(torch.equal(*pair) for pair in zip(flat(got), flat(expected)))
