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
import reference
from common import assert_close, compare
from regressions import REGRESSIONS

COUNT = int(os.environ.get("DLKERNELS_FUZZ", 0))
SEED = int(os.environ.get("DLKERNELS_FUZZ_SEED", 0)) or random.randrange(1, 2**32)
if COUNT:
    print(f"DLKERNELS_FUZZ={COUNT} DLKERNELS_FUZZ_SEED={SEED}")

EXTREMES = (0, -1, 2**31, 2**62, 2**63 - 1, -(2**63), 2**63)
MISTAKES = (*EXTREMES, (1,), (1, 1, 1), (), "same", 1.0, True, None)
DTYPES = ["float32"] * 6 + ["float64", "bfloat16", "float16", "int64"]
LAYOUTS = ("dense", "last", "transposed", "strided", "inner", "offset", "expanded")

size = st.integers(0, 9) | st.sampled_from([15, 16, 17, 31, 33, 40, 67])
small = st.integers(1, 4)
flag = st.booleans()


def maybe(strategy, *instead):
    """Mostly what is in range."""
    return st.one_of(*[strategy] * 5, st.sampled_from(instead))


def fuzz(strategy):
    """A test of cases: few and always the same, or `make fuzz`'s."""

    def decorate(test):
        many = hypothesis.settings(
            max_examples=COUNT or 120,
            derandomize=not COUNT,
            database=None,
            deadline=None,
            print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        test = many(hypothesis.given(case=strategy)(test))
        return hypothesis.seed(SEED)(test) if COUNT else test

    return decorate


# ---- tensors ----------------------------------------------------------------------------------

kinds = st.fixed_dictionaries(
    {"layout": st.sampled_from(LAYOUTS), "dtype": st.sampled_from(DTYPES), "grad": flag}
)


def make(shape, kind, special=False):
    """A tensor of this shape; `special`: with NaN, infinities, -0.0 and ties."""
    shape, layout = tuple(shape), kind["layout"]
    if special:
        values = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf")])
        new = lambda *s: values[torch.randint(len(values), s)]
    else:
        new = torch.randn
    if not shape:
        x = new(3)[1]
    elif layout == "last" and len(shape) == 4:
        x = new(*shape).contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = new(*shape[::-1]).permute(*range(len(shape))[::-1])
    elif layout == "strided":
        x = new(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif layout == "inner":
        x = new(*(s + 2 for s in shape))[(slice(1, -1),) * len(shape)]
    elif layout == "offset":
        x = new(3 + torch.Size(shape).numel())[3:].view(shape)
    elif layout == "expanded":
        x = new(1, *shape[1:]).expand(shape)
    else:
        x = new(*shape)
    dtype = getattr(torch, kind["dtype"])
    x = x.to(dtype) if dtype.is_floating_point else (x.nan_to_num() * 3).clamp(-9, 9).to(dtype)
    return x.requires_grad_(kind["grad"] and dtype.is_floating_point)


def alike(kind, other):
    """`kind` with the dtype of the other: in most cases all tensors share one."""
    return {**kind, "dtype": other["dtype"]}


def same_or_close(got, torchs, exact):
    """What is not float32 PyTorch has computed itself, on both sides."""
    if got.dtype is torch.float32:
        return assert_close(got, torchs, exact)
    torch.testing.assert_close(got, torchs, rtol=0, atol=0, equal_nan=True)


def close_to_norm(got, torchs, exact):
    """Winograd's bound."""
    if got.dtype is not torch.float32 or got.numel() == 0:
        return same_or_close(got, torchs, exact)
    error, norm = (got.double() - exact).norm(), exact.norm()
    assert error <= 1e-5 * (norm + 1), f"error {error}, norm {norm}"


def outcome(f, *args, **kwargs):
    """The exception that a call raises, or None."""
    try:
        f(*args, **kwargs)
    except Exception as error:
        return error
    return None


def agree(f, torchs, args, kwargs=None, grad_strides=True, safe=None, close=same_or_close):
    """The same class of exception, or the same values. `safe` computes the values instead of
    torchs where that is not None."""
    kwargs = kwargs or {}
    if safe is None:
        expected = outcome(torchs, *args, **kwargs)
        if expected is not None:
            got = outcome(f, *args, **kwargs)
            assert type(got) is type(expected), f"{got!r}, expected {expected!r}"
            return
    if len({x.dtype for x in args if x is not None and x.dtype is not torch.int64}) > 1:
        return f(*args, **kwargs)  # PyTorch looks at no dtype where it has nothing to compute
    compare(f, safe or torchs, args, kwargs, grad_strides, close)


def numbers(values):
    """All ints of some arguments."""
    for value in values:
        yield from value if isinstance(value, tuple | list) else (value,)


def is_wild(options):
    """Beyond what sizes can be: PyTorch's own arithmetic overflows there."""
    return any(type(v) is int and abs(v) >= 2**31 for v in numbers(options.values()))


def refused(f, args, kwargs):
    error = outcome(f, *args, **kwargs)
    assert isinstance(error, RuntimeError | TypeError | ValueError | OverflowError), repr(error)


# ---- linear, linear_relu, mlp, relu -------------------------------------------------------------


@st.composite
def linears(draw):
    K, N = draw(size), draw(size)
    x, w, b = draw(kinds), draw(kinds), draw(kinds)
    if draw(maybe(st.just(True), False)):
        w, b = alike(w, x), alike(b, x)
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
        "kind": draw(maybe(st.just(alike(kind, x)), kind)),
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

    def torchs(x, weights, biases):
        if len(biases) not in (0, len(weights)):
            raise RuntimeError
        for i, w in enumerate(weights):
            x = F.linear(F.relu(x) if i else x, w, biases[i] if biases else None)
        return x

    args = [make(*case["x"]), *weights, *biases]
    agree(called(ours.mlp), called(torchs), args, grad_strides=False)


relus = st.fixed_dictionaries({"shape": st.lists(size, max_size=4), "kind": kinds})


def check_relu(case):
    agree(ours.relu, F.relu, [make(case["shape"], case["kind"], special=True)])


# ---- conv2d, conv2d_relu, conv2d_relu_max_pool2d ------------------------------------------------


def twice(strategy):
    return strategy | st.tuples(strategy, strategy)


@st.composite
def convs(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    window = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    c, k, plane = draw(small), draw(small), [draw(st.integers(1, 12)), draw(st.integers(1, 20))]
    if draw(st.sampled_from([False, False, True])):  # Winograd's
        groups, window, c, k = 1, [3, 3], draw(st.sampled_from([8, 16, 17])), 16
    x, w, b = draw(kinds), draw(kinds), draw(kinds)
    if draw(maybe(st.just(True), False)):
        w, b = alike(w, x), alike(b, x)
    options = {
        "stride": draw(twice(small)),
        "padding": draw(twice(st.integers(0, 3)) | st.sampled_from(["same", "valid"])),
        "dilation": draw(twice(st.sampled_from([1, 1, 1, 2, 3]))),
        "groups": groups,
    }
    name = draw(maybe(st.none(), *options))
    if name:
        options[name] = draw(st.sampled_from(MISTAKES))
    N = draw(st.integers(0, 3))
    shape = [groups * c, *plane]
    return {
        "op": draw(st.sampled_from(list(COMBINED))),
        "x": (draw(maybe(st.just([N, *shape]), shape, [1, 1, *shape], [2, 0, *plane])), x),
        "w": (draw(maybe(st.just([groups * k, c, *window]), [groups * k, c + 1, *window])), w),
        "b": draw(maybe(st.sampled_from([None, ([groups * k], b)]), ([1], b), ([3, 1], b))),
        "options": options,
        "precision": draw(st.sampled_from(["ieee", "fast"])),
    }


COMBINED = {
    "conv2d": lambda conv, pool, *a, **k: conv(*a, **k),
    "conv2d_relu": lambda conv, pool, *a, **k: F.relu(conv(*a, **k)),
    "conv2d_relu_max_pool2d": lambda conv, pool, *a, **k: pool(F.relu(conv(*a, **k)), 2),
}


def check_conv(case):
    """PyTorch's own is asked where all numbers are small, else the definition."""
    f, combined = getattr(ours, case["op"]), COMBINED[case["op"]]
    args, options = [make(*case[name]) if case[name] else None for name in "xwb"], case["options"]
    if is_wild(options):
        return refused(f, args, options)
    safe = None
    if case.get("far"):
        safe = partial(combined, reference.conv2d, reference.max_pool2d)
    with dlkernels.set_precision(case["precision"]):
        agree(
            f,
            partial(combined, F.conv2d, F.max_pool2d),
            args,
            options,
            safe=safe,
            grad_strides=False,
            close=close_to_norm if case["precision"] == "fast" else same_or_close,
        )


@st.composite
def far_convs(draw):
    """In range, with most taps or most outputs outside of the image."""
    kind = {"layout": draw(st.sampled_from(LAYOUTS)), "dtype": "float32", "grad": True}
    groups, c, k = draw(st.sampled_from([1, 1, 2])), draw(small), draw(small)
    taps = draw(st.integers(2, 3))
    far = draw(st.sampled_from([5, 20, 1000, 2**20, 2**30 - 1]))
    plane = [draw(st.integers(1, 9)), draw(st.integers(1, 40))]
    options = {"dilation": far, "padding": (taps - 1) * far // 2 + far % 2, "stride": 1}
    if draw(flag):
        d = draw(small)
        options = {"padding": draw(st.integers(d, 30)), "stride": far, "dilation": d}
    return {
        "op": draw(st.sampled_from(["conv2d", "conv2d_relu"])),
        "x": ([draw(st.integers(1, 2)), groups * c, *plane], kind),
        "w": ([groups * k, c, taps, taps], kind),
        "b": draw(st.sampled_from([None, ([groups * k], kind)])),
        "options": {**options, "groups": groups},
        "precision": "ieee",
        "far": True,
    }


# ---- max_pool2d -----------------------------------------------------------------------------------


@st.composite
def pools(draw):
    kernel = draw(twice(st.sampled_from([1, 2, 2, 3, 3, 4, 5, 16])))
    shape = [draw(st.integers(1, 3)), *[draw(st.integers(1, 20)) for _ in range(3)]]
    args = {
        "kernel_size": kernel,
        "stride": draw(st.none() | twice(small) | st.just([])),
        "padding": draw(maybe(st.sampled_from([0, 0, 1, min(numbers([kernel])) // 2]), 2)),
        "dilation": draw(twice(st.sampled_from([1, 1, 2, 3, 7]))),
        "ceil_mode": draw(flag),
    }
    name = draw(maybe(st.none(), *args))
    if name:
        args[name] = draw(st.sampled_from(MISTAKES))
    return {
        "x": (draw(maybe(st.just(shape), shape[1:], [0, *shape[1:]], shape[:2])), draw(kinds)),
        "special": draw(flag),
        "args": args,
    }


def check_pool(case):
    x, args = make(*case["x"], case["special"]), case["args"]
    if is_wild(args):
        return refused(ours.max_pool2d, [x], args)
    safe = None
    if are_unsafe(x, args):
        if x.dtype is not torch.float32:  # then what is computed is PyTorch's
            return refused(ours.max_pool2d, [x], args)
        safe = reference.max_pool2d
    agree(ours.max_pool2d, F.max_pool2d, [x], args, safe=safe)


def are_unsafe(x, args):
    """Whether a window holds no element: there PyTorch's kernels write outside of their tensors."""
    kernel, padding, dilation = (args[k] for k in ("kernel_size", "padding", "dilation"))
    stride = kernel if args["stride"] in (None, []) else args["stride"]
    window = kernel, stride, padding, dilation
    if x.dim() not in (3, 4) or 0 in x.shape or not all(map(are_sizes, window)):
        return False
    for i in (0, 1):
        k, s, p, d = (reference.pair(v)[i] for v in window)
        if min(k, s, d) < 1 or not 0 <= p <= k // 2 or type(args["ceil_mode"]) is not bool:
            return False
        size = x.shape[i - 2]
        out = reference.pool_size(size, k, s, p, d, args["ceil_mode"])
        _, inside = reference.taps(size, max(out, 0), k, s, p, d)
        if not inside.any(1).all():
            return True
    return False


def are_sizes(value):
    values = value if isinstance(value, tuple | list) else (value,)
    return len(values) in (1, 2) and all(type(v) is int for v in values)


# ---- cross_entropy --------------------------------------------------------------------------------


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
        "target": (draw(maybe(st.just(x if target == "probabilities" else rows), x, [*rows, 1], rows[1:])), target),
        "range": (low, max(high, low + 1)),
        "weight": draw(maybe(st.sampled_from([None, ([C], alike(w, kind))]), ([C + 1], w), ([1, C], w))),
        "options": {
            "ignore_index": draw(maybe(st.sampled_from([-100, 0, 1]), *EXTREMES)),
            "reduction": draw(maybe(st.sampled_from(["mean", "sum", "none"]), "total", None)),
            "label_smoothing": draw(maybe(st.sampled_from([0.0, 0.0, 0.1, 1.0, 1]), 1.5, None, "a")),
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
    agree(ours.cross_entropy, F.cross_entropy, args, case["options"])


# ---- Adam, AdamW ----------------------------------------------------------------------------------


@st.composite
def adams(draw):
    options = {
        "lr": draw(maybe(st.sampled_from([1e-3, 0.1, 0]), -1.0, float("nan"), float("inf"), "a")),
        "betas": draw(maybe(st.sampled_from([(0.9, 0.999), (0.0, 0.0)]), (1.0, 0.9), (0.5,), (-1, 0))),
        "eps": draw(maybe(st.sampled_from([1e-8, 0.1]), -1.0, 0.0, None)),
        "weight_decay": draw(maybe(st.sampled_from([0, 0.1]), -0.1, float("nan"))),
        "maximize": draw(flag),
        "amsgrad": draw(maybe(st.just(False), True)),
        "foreach": draw(maybe(st.none(), True, False)),
        "fused": draw(maybe(st.none(), True, False)),
        "differentiable": draw(maybe(st.just(False), True)),
    }
    params = st.tuples(st.lists(size, max_size=3), kinds, kinds)
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
                p.grad = None if i in case["skipped"][:step + 1] else grad.to(p.dtype)
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
        same_or_close(a.detach(), b.detach(), c.detach())


# ---- the tests ------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("op", CHECKS)
def test_fuzz(op):
    strategy, check = CHECKS[op]

    @fuzz(strategy)
    def cases(case):
        torch.manual_seed(0)
        check(case)

    cases()


@pytest.mark.parametrize("op, case", REGRESSIONS)
def test_regressions(op, case):
    CHECKS[op][1](case)
