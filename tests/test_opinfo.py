"""dlkernels.functional on PyTorch's own samples of its functions, OpInfo."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.utils._pytree import tree_leaves

import dlkernels.functional as ours
from support.common import FULL, RTOL, calls, check
from support.samples import assert_same, outcome

OPS = "linear", "relu", "conv2d", "max_pool2d", "cross_entropy"
INFO = {op: next(i for i in op_db if i.name == f"nn.functional.{op}") for op in OPS}
ops = pytest.mark.parametrize("op", OPS)
EVERY_DTYPE = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
]


def functions(op):
    return getattr(ours, op), getattr(F, op)


def inputs(op, dtype=torch.float32, requires_grad=False, every=1):
    """(args, kwargs) of each sample that is valid, or of one in `every`."""
    found = INFO[op].reference_inputs("cpu", dtype, requires_grad=requires_grad)
    return [((s.input, *s.args), s.kwargs) for s in list(found)[::every]]


@functools.cache
def some(op, *args):
    """Few enough for what is tried in many ways: max_pool2d has 1,440."""
    return inputs(op, *args, every=29 if op == "max_pool2d" and not FULL else 1)


def tensors(args, kwargs):
    return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]


def mapped(f, args, kwargs):
    """The same call with f of each of its tensors."""

    def of(x):
        return f(x) if isinstance(x, torch.Tensor) else x

    return tuple(map(of, args)), {k: of(v) for k, v in kwargs.items()}


def floats(f):
    return lambda t: f(t) if t.is_floating_point() else t


def assert_same_calls(op, args, kwargs):
    """Values and gradients, or the exception."""
    assert_same(*(outcome(value_and_gradients, f, args, kwargs) for f in functions(op)))


def value_and_gradients(f, args, kwargs):
    ys = f(*args, **kwargs)
    y = ys[0] if isinstance(ys, tuple) else ys
    leaves = [t for t in tensors(args, kwargs) if t.requires_grad]
    if not leaves:
        return ys, ()
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return ys, torch.autograd.grad(y, leaves, weights)


@ops
@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "backward"])
def test_samples(machine, ieee, op, requires_grad):
    """All on kernels of ours, against PyTorch and float64."""
    for args, kwargs in some(op, torch.float32, requires_grad):
        if op == "cross_entropy" and args[1].requires_grad:
            with calls(torchs=[op]):  # a gradient of the probabilities is wanted too
                ours.cross_entropy(*args, **kwargs)
            assert_same_calls(op, args, kwargs)
        else:
            check(*functions(op), args, kwargs, [op], [f"{op}_backward"])


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, dtype) for op in OPS for dtype in sorted(INFO[op].supported_dtypes("cpu"), key=str)],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_samples_of_every_listed_dtype(op, dtype):
    has_gradient = dtype.is_floating_point or dtype.is_complex
    for requires_grad in (False, True)[: 1 + has_gradient]:
        every = inputs if dtype is torch.float32 else some
        for args, kwargs in every(op, dtype, requires_grad):
            if op in ("linear", "conv2d") and dtype in RTOL:  # PyTorch rounds more than once
                check(*functions(op), args, kwargs, [op], [f"{op}_backward"], dtype=dtype)
            else:
                assert_same_calls(op, args, kwargs)


@pytest.mark.parametrize("op", [op for op in OPS if INFO[op].error_inputs_func])
def test_error_samples(op):
    """Refused by both, as PyTorch refuses them."""
    for error in INFO[op].error_inputs("cpu"):
        sample = error.sample_input
        results = [outcome(f, sample.input, *sample.args, **sample.kwargs) for f in functions(op)]
        assert isinstance(results[0], error.error_type)
        assert re.search(error.error_regex, str(results[0]))
        assert_same(*results)


@ops
@pytest.mark.parametrize("which", ["all", "floats", "first"])
def test_every_dtype(op, which):
    """Listed or not, of all tensors or of some: PyTorch's result or its exception."""
    for args, kwargs in some(op):
        for dtype in EVERY_DTYPE:
            # Text as padding PyTorch handles before it compares dtypes, numbers after.
            if which == "first" and isinstance(kwargs.get("padding"), str):
                continue

            def cast(t, first=args[0], dtype=dtype):
                chosen = {"all": True, "floats": t.is_floating_point(), "first": t is first}
                return t.to(dtype) if chosen[which] else t

            assert_same_calls(op, *mapped(cast, args, kwargs))


class Subclass(torch.Tensor):
    pass


def strided(t):
    return noncontiguous_like(t) if t.numel() > 1 else t


INPUTS_OF_A_KIND = {
    "noncontiguous": strided,
    "negative bit": floats(lambda t: torch._neg_view(t.neg())),
    "conjugate bit": floats(lambda t: t.to(torch.complex64).conj()),
    "zero tensor": floats(lambda t: torch._efficientzerotensor(t.shape)),
    "expanded": floats(lambda t: t.mean().expand(t.shape)),
    "at an odd offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "meta": lambda t: t.to("meta"),
    "requires grad": floats(lambda t: t.clone().requires_grad_()),
    "subclass": lambda t: t.as_subclass(Subclass),
}


LEFT_TO_TORCH = ("conjugate bit", "subclass")


@ops
@pytest.mark.parametrize("kind", INPUTS_OF_A_KIND)
def test_inputs_of_a_kind(op, kind):
    for args, kwargs in some(op):
        args, kwargs = mapped(INPUTS_OF_A_KIND[kind], args, kwargs)
        wanted = [t.requires_grad for t in tensors(args, kwargs)]
        ran = {"kernels": [op, f"{op}_backward"] if any(wanted) else [op]}
        if kind in LEFT_TO_TORCH or (op == "cross_entropy" and any(wanted[1:])):
            ran = {"torchs": [op]}
        with calls(**ran if kind != "meta" else {}):
            assert_same_calls(op, args, kwargs)


@ops
def test_copies_on_write_stay_lazy(op):
    for args, kwargs in some(op):
        lazy = mapped(torch._lazy_clone, args, kwargs)
        assert_same(*(f(*lazy[0], **lazy[1]) for f in functions(op)))
        assert all(torch._C._is_cow_tensor(t) for t in tensors(*lazy))


@ops
@pytest.mark.parametrize("context", ["inference mode", "autocast bfloat16", "autocast float16"])
def test_in_a_context(op, context):
    def make():
        if context == "inference mode":
            return torch.inference_mode()
        return torch.autocast("cpu", getattr(torch, context.split()[1]))

    for args, kwargs in some(op):
        with make():
            assert_same_calls(op, args, kwargs)


@ops
def test_fake_tensors(op):
    """What torch.compile is told of the results: shape, strides, dtype and device."""
    for args, kwargs in some(op):
        with FakeTensorMode() as mode:
            fake = mapped(mode.from_tensor, args, kwargs)
            results = [outcome(f, *fake[0], **fake[1]) for f in functions(op)]
        if not isinstance(results[1], Exception):
            results = [
                [(y.shape, y.stride(), y.dtype, y.device) for y in tree_leaves(result)]
                for result in results
            ]
        assert_same(*results)


TRANSFORMS = {
    "vmap": lambda f, t: torch.vmap(f)(torch.stack([t, t])),
    "jvp": lambda f, t: torch.func.jvp(f, (t,), (torch.ones_like(t),)),
    "grad": lambda f, t: torch.func.grad(lambda t: f(t).sum())(t),
    "vmap of grad": lambda f, t: torch.vmap(torch.func.grad(lambda t: f(t).sum()))(
        torch.stack([t, t])
    ),
}


@ops
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(op, transform):
    """torch.func on each tensor of the call in turn."""
    for args, kwargs in some(op):
        if kwargs.get("return_indices"):
            continue
        for chosen in tensors(args, kwargs):
            if transform != "vmap" and not chosen.is_floating_point():
                continue

            def call(f, chosen=chosen, args=args, kwargs=kwargs):
                def of(t):
                    new = mapped(lambda old: t if old is chosen else old, args, kwargs)
                    return f(*new[0], **new[1])

                return TRANSFORMS[transform](of, chosen)

            assert_same(*(outcome(call, f) for f in functions(op)))


CALLS = {
    "keywords": ("linear", lambda f, x: f(input=x, weight=x, bias=x[0])),
    "out": ("linear", lambda f, x: f(x, x, out=torch.empty(4, 4))),
    "out that is an input": ("linear", lambda f, x: f(x, x, out=x.clone().requires_grad_())),
    "in place": ("relu", lambda f, x: f(x.clone(), inplace=True)),
    "list and tuple": ("conv2d", lambda f, x: f(x[None], x[None, None], None, [2, 1], (1,))),
    "torch.Size": ("max_pool2d", lambda f, x: f(x[None], torch.Size([2, 1]), [])),
    "bool": ("max_pool2d", lambda f, x: f(x[None], True)),
    "tensor as size": ("max_pool2d", lambda f, x: f(x[None], torch.tensor(2))),
    "legacy reduction": ("cross_entropy", lambda f, x: f(x, x.argmax(1), None, False, -100, None)),
    "smoothing by a bool": ("cross_entropy", lambda f, x: f(x, x.argmax(1), label_smoothing=True)),
    "reduction None": ("cross_entropy", lambda f, x: f(x, x.argmax(1), reduction=None)),
    "byte 156 is no -100": ("cross_entropy", lambda f, x: f(x, torch.full((4,), 156).byte())),
}


@pytest.mark.parametrize("call", CALLS)
def test_ways_to_call(call):
    op, f = CALLS[call]
    x = torch.randn(4, 4)
    assert_same(*(outcome(f, function, x) for function in functions(op)))
