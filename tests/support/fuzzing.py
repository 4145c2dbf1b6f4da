"""What the fuzz tests share: how a tensor is drawn and made, and when two calls agree."""

import hypothesis.strategies as st
import torch

from support.common import RTOL, assert_close, compare, run, safe_for_torch

EXTREMES = (0, -1, 2**31, 2**62, 2**63 - 1, -(2**63), 2**63)
MISTAKES = (*EXTREMES, (1,), (1, 1, 1), (), "same", 1.0, True, None)
DTYPES = ["float32"] * 6 + ["float64", "bfloat16", "float16", "int64"]
SPECIAL = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf")])
LAYOUTS = ("dense", "last", "transposed", "strided", "inner", "offset", "expanded")

size = st.integers(0, 9) | st.sampled_from([15, 16, 17, 31, 33, 40, 67])
small = st.integers(1, 4)
flag = st.booleans()


def maybe(strategy, *instead):
    """Mostly what is in range. Not by one_of, which drops what it is given twice."""
    return st.integers(0, 7).flatmap(lambda i: strategy if i < 7 else st.sampled_from(instead))


def twice(strategy):
    return strategy | st.tuples(strategy, strategy)


# ---- tensors ------------------------------------------------------------------------------------

kinds = st.fixed_dictionaries(
    {"layout": st.sampled_from(LAYOUTS), "dtype": st.sampled_from(DTYPES), "grad": flag}
)


def make(shape, kind, special=False):
    """A tensor of this shape; `special`: with NaN, infinities, -0.0 and ties."""
    shape, layout = tuple(shape), kind["layout"]

    def new(*shape):
        return SPECIAL[torch.randint(len(SPECIAL), shape)] if special else torch.randn(shape)

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


def with_dtype(kind, other):
    """`kind` with the dtype of the other: in most cases all tensors share one."""
    return {**kind, "dtype": other["dtype"]}


def same_or_close(got, torchs, exact):
    """What is of no dtype of ours PyTorch has computed itself, on both sides."""
    if got.dtype in RTOL:
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


def agree(
    f, torchs, args, kwargs=None, grad_strides=True, safe=None, close=same_or_close, alike=True
):
    """The same class of exception, or the same values. `safe` computes the values instead of
    torchs where that is not None."""
    kwargs = kwargs or {}
    if safe is None:
        with safe_for_torch(args, kwargs):
            expected = outcome(run, torchs, args, kwargs)
        if expected is not None:
            got = outcome(run, f, args, kwargs)
            assert type(got) is type(expected), f"{got!r}, expected {expected!r}"
            return
    if alike and len({x.dtype for x in args if x is not None}) > 1:
        with safe_for_torch(args, kwargs):
            got = outcome(f, *args, **kwargs)
        # PyTorch looks at no dtype where it has nothing to compute.
        assert got is None or (args[0].numel() == 0 and type(got) is RuntimeError), repr(got)
        return
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
