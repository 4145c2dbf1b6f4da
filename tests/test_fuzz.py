"""Random shapes, layouts, dtypes and arguments, in range and out of it, against PyTorch.

A case is a dict of plain values; one that fails is printed so that it can be pasted into
regressions.py. `make fuzz` runs 20,000 of each op: DLKERNELS_FUZZ cases with DLKERNELS_FUZZ_SEED.
"""

import os
import random
from functools import partial

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

import dlkernels
import dlkernels.functional as ours
from support.common import assert_close
from support.fuzz_conv import check_conv, check_pool, convs, far_convs, pools
from support.fuzzing import EXTREMES, agree, flag, kinds, make, maybe, size, with_dtype
from support.regressions import REGRESSIONS

COUNT = int(os.environ.get("DLKERNELS_FUZZ", 0))
SEED = int(os.environ.get("DLKERNELS_FUZZ_SEED", 0)) or random.randrange(1, 2**32)
if COUNT:
    print(f"DLKERNELS_FUZZ={COUNT} DLKERNELS_FUZZ_SEED={SEED}")


def fuzz(strategy):
    """A test of cases: few and always the same, or `make fuzz`'s."""

    def decorate(test):
        many = hypothesis.settings(
            max_examples=COUNT or 400,
            derandomize=not COUNT,
            database=None,
            deadline=None,
            print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        test = many(hypothesis.given(case=strategy)(test))
        return hypothesis.seed(SEED)(test) if COUNT else test

    return decorate


# ---- linear, linear_relu, mlp, relu -------------------------------------------------------------


@st.composite
def linears(draw):
    K, N = draw(size), draw(size)
    x, w, b = draw(kinds), draw(kinds), draw(kinds)
    if draw(maybe(st.just(True), False)):
        w, b = with_dtype(w, x), with_dtype(b, x)
    return {
        "op": draw(st.sampled_from(["linear", "linear_relu"])),
        "x": ([*draw(st.lists(size, max_size=2)), draw(maybe(st.just(K), 0, 1, K + 1))], x),
        "w": (draw(maybe(st.just([N, K]), [N, K, 1], [N + 1, K])), w),
        "b": draw(maybe(st.sampled_from([None, ([N], b)]), ([1], b), ([N + 1], b), ([], b))),
    }


def check_linear(case):
    relu = case["op"] == "linear_relu"
    args = [make(*case[name]) if case[name] else None for name in "xwb"]
    agree(
        getattr(ours, case["op"]),
        (lambda *a: F.relu(F.linear(*a))) if relu else F.linear,
        args,
        grad_strides=False,
    )


@st.composite
def mlps(draw):
    x, kind = draw(kinds), draw(kinds)
    sizes = [draw(size) for _ in range(draw(st.integers(2, 4)))]
    return {
        "x": ([*draw(st.lists(size, max_size=2)), draw(maybe(st.just(sizes[0]), 3))], x),
        "sizes": sizes,
        "kind": draw(maybe(st.just(with_dtype(kind, x)), kind)),
        "biases": draw(maybe(st.sampled_from([0, len(sizes) - 1]), 1)),
        "frozen": draw(st.sampled_from([None, None, 0, 1])),
    }


def check_mlp(case):
    sizes, kind = case["sizes"], case["kind"]
    weights = [make(s, kind) for s in zip(sizes[1:], sizes)]
    biases = [make([n], kind) for n in sizes[1:]][: case["biases"]]
    if case["frozen"] is not None:
        weights[case["frozen"] % len(weights)].requires_grad_(False)
    count = len(weights)

    def called(f):
        return lambda x, *rest: f(x, list(rest[:count]), list(rest[count:]))

    def steps(linear, x, weights, biases):
        if len(biases) not in (0, len(weights)):
            raise RuntimeError
        for i, w in enumerate(weights):
            x = linear(F.relu(x) if i else x, w, biases[i] if biases else None)
        return x

    args = [make(*case["x"]), *weights, *biases]
    # Gradients against steps of ours, which check_linear holds against PyTorch's: a sum near 0 that
    # another order of adding makes negative changes all gradients of the layers before it.
    agree(called(ours.mlp), called(partial(steps, ours.linear)), args, grad_strides=False)
    agree(called(ours.mlp), called(partial(steps, F.linear)), [x.detach() for x in args])


relus = st.fixed_dictionaries({"shape": st.lists(size, max_size=4), "kind": kinds})


def check_relu(case):
    agree(ours.relu, F.relu, [make(case["shape"], case["kind"], special=True)])


# ---- cross_entropy ------------------------------------------------------------------------------


@st.composite
def entropies(draw):
    C, rest = draw(size), draw(st.lists(st.integers(0, 5), max_size=2))
    x = draw(st.sampled_from([[C], [draw(size), C, *rest]]))
    rows = x[:0] if len(x) == 1 else [x[0], *x[2:]]
    kind, w = draw(kinds), draw(kinds)
    target = draw(maybe(st.sampled_from(["classes", "classes", "probabilities"]), "byte", "int32"))
    low, high = draw(maybe(st.just((0, C)), (0, C + 1), (-1, C), (0, 2**40), (-(2**62), 0)))
    return {
        "x": (x, kind),
        "target": (
            draw(maybe(st.just(x if target == "probabilities" else rows), x, [*rows, 1], rows[1:])),
            target,
        ),
        "range": (low, max(high, low + 1)),
        "weight": draw(
            maybe(st.sampled_from([None, ([C], with_dtype(w, kind))]), ([C + 1], w), ([1, C], w))
        ),
        "options": {
            "ignore_index": draw(maybe(st.sampled_from([-100, 0, 1]), *EXTREMES)),
            "reduction": draw(maybe(st.sampled_from(["mean", "sum", "none"]), "total", None)),
            "label_smoothing": draw(
                maybe(st.sampled_from([0.0, 0.0, 0.1, 1.0, 1]), 1.5, None, "a")
            ),
        },
    }


def check_entropy(case):
    shape, kind = case["target"]
    x = make(*case["x"])
    if kind == "probabilities":
        target = torch.rand(shape, dtype=x.dtype if x.dtype.is_floating_point else None)
    else:
        dtype = {"classes": torch.int64, "byte": torch.uint8, "int32": torch.int32}[kind]
        target = torch.randint(*case["range"], tuple(shape)).to(dtype)
    weight = case["weight"] and make(*case["weight"]).detach().abs()
    args = [x, target] if weight is None else [x, target, weight]
    agree(ours.cross_entropy, F.cross_entropy, args, case["options"], alike=False)


# ---- Adam, AdamW --------------------------------------------------------------------------------


@st.composite
def adams(draw):
    options = {
        "lr": draw(maybe(st.sampled_from([1e-3, 0.1, 0]), -1.0, float("nan"), float("inf"), "a")),
        "betas": draw(
            maybe(st.sampled_from([(0.9, 0.999), (0.0, 0.0)]), (1.0, 0.9), (0.5,), (-1, 0))
        ),
        "eps": draw(maybe(st.sampled_from([1e-8, 0.1]), -1.0, 0.0, None)),
        "weight_decay": draw(maybe(st.sampled_from([0, 0.1]), -0.1, float("nan"))),
        "maximize": draw(flag),
        "amsgrad": draw(maybe(st.just(False), True)),
        "foreach": draw(maybe(st.none(), True, False)),
        "fused": draw(maybe(st.none(), True, False)),
        "differentiable": draw(maybe(st.just(False), True)),
    }
    params = st.tuples(st.lists(size, max_size=2), kinds, kinds)
    return {
        "op": draw(st.sampled_from(["Adam", "AdamW"])),
        "params": draw(st.lists(params, max_size=5)),
        "skipped": draw(st.lists(st.integers(0, 4), max_size=2)),
        "options": options,
        "steps": draw(st.integers(1, 4)),
        "groups": draw(st.sampled_from([1, 1, 2])),
    }


def adam_results(cls, case, dtype):
    """Parameters, then their state, after some steps; or the exception."""
    torch.manual_seed(1)
    tensors, params = case["params"], []
    if case["options"]["fused"]:  # PyTorch's reads outside of tensors that do not lie alike
        tensors = [(s, {**k, "layout": "dense"}, {**k, "layout": "dense"}) for s, k, _ in tensors]
    for shape, kind, _ in tensors:
        x = make(shape, {**kind, "grad": False}).detach()
        x = x.clone() if kind["layout"] == "expanded" or not x.is_floating_point() else x
        params.append(x.to(dtype or x.dtype).requires_grad_(x.is_floating_point()))
    half = len(params) // 2 if case["groups"] == 2 else 0
    groups = [{"params": params[:half]}, {"params": params[half:]}] if half else params
    try:
        optimizer = cls(groups, **case["options"])
        for step in range(case["steps"]):
            for i, (p, (shape, kind, like)) in enumerate(zip(params, tensors)):
                grad = make(shape, {**like, "dtype": kind["dtype"], "grad": False})
                p.grad = None if i in case["skipped"][: step + 1] else grad.to(p.dtype)
            optimizer.step()
    except Exception as error:
        return error, []
    states = [optimizer.state[p] for p in params]
    keys = [sorted(state) for state in states]
    return keys, [*params, *(state[k] for state in states for k in sorted(state))]


def check_adam(case):
    ours_, torchs = (getattr(m, case["op"]) for m in (dlkernels.optim, torch.optim))
    expected, values = adam_results(torchs, case, None)
    got, results = adam_results(ours_, case, None)
    if isinstance(expected, Exception):
        assert type(got) is type(expected), f"{got!r}, expected {expected!r}"
        return
    assert got == expected, f"{got!r}, expected {expected!r}"
    _, exact = adam_results(torchs, case, torch.float64)
    for a, b, c in zip(results, values, exact, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        a, b, c = a.detach(), b.detach(), c.detach()
        if a.dtype is torch.float32:
            assert_close(a, b, c)
        else:  # of 16 bits too PyTorch has computed itself
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- the tests ----------------------------------------------------------------------------------

CHECKS = {
    "linear": (linears(), check_linear),
    "mlp": (mlps(), check_mlp),
    "relu": (relus, check_relu),
    "conv2d": (convs(), check_conv),
    "far conv2d": (far_convs(), check_conv),
    "max_pool2d": (pools(), check_pool),
    "cross_entropy": (entropies(), check_entropy),
    "adam": (adams(), check_adam),
}
CONVS = ("conv2d", "conv2d_relu", "conv2d_backward")
KERNELS = {  # that must have been among what was compared, where they are not the op's name
    "linear": ("linear", "linear_relu", "linear_backward"),
    "conv2d": (*CONVS, "conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward"),
    "far conv2d": CONVS,
    "adam": ("adam_",),
}


@pytest.mark.parametrize("op", CHECKS)
def test_fuzz(op):
    strategy, check = CHECKS[op]

    @fuzz(strategy)
    def cases(case):
        torch.manual_seed(0)
        check(case)

    dlkernels.reset_stats()
    cases()
    ran, least = dlkernels.stats(), max(1, min(10, (COUNT or 400) // 40))
    for name in KERNELS.get(op, (op, f"{op}_backward")):
        assert ran[name]["kernel"] >= least, f"{name} was PyTorch's on both sides"


@pytest.mark.parametrize("op, case", REGRESSIONS)
def test_regressions(op, case):
    CHECKS[op][1](case)
