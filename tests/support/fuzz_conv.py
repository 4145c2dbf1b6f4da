"""Random cases of conv2d, conv2d_relu, conv2d_relu_max_pool2d and max_pool2d: see test_fuzz.py."""

from functools import partial

import hypothesis.strategies as st
import torch
import torch.nn.functional as F

import dlkernels
import dlkernels.functional as ours
from support import reference
from support.fuzzing import (
    LAYOUTS,
    MISTAKES,
    agree,
    close_to_norm,
    flag,
    is_wild,
    kinds,
    make,
    maybe,
    numbers,
    refused,
    same_or_close,
    small,
    twice,
    with_dtype,
)

# ---- conv2d, conv2d_relu, conv2d_relu_max_pool2d ------------------------------------------------


@st.composite
def convs(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    window = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    c, k, plane = draw(small), draw(small), [draw(st.integers(1, 12)), draw(st.integers(1, 20))]
    if draw(st.sampled_from([False, False, True])):  # Winograd's
        groups, window, c, k = 1, [3, 3], draw(st.sampled_from([8, 16, 17])), 16
    x, w, b = draw(kinds), draw(kinds), draw(kinds)
    if draw(maybe(st.just(True), False)):
        w, b = with_dtype(w, x), with_dtype(b, x)
    padding = draw(twice(st.integers(0, 3)) | st.sampled_from(["same", "valid"]))
    options = {
        "stride": draw(maybe(st.just(1), 2) if padding == "same" else twice(small)),
        "padding": padding,
        "dilation": draw(twice(st.sampled_from([1, 1, 1, 2, 3]))),
        "groups": groups,
    }
    name = draw(maybe(st.none(), *options))
    if name:
        options[name] = draw(st.sampled_from(MISTAKES))
    N = draw(maybe(st.integers(1, 3), 0))
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
    far = draw(st.sampled_from([5, 9, 13, 20, 31, 1000, 2**20, 2**30 - 1]))
    plane = [draw(st.integers(1, 9)), draw(st.integers(1, 40))]
    padding = (taps - 1) * far // 2 + far % 2 + draw(st.integers(0, 2))
    options = {"dilation": far, "padding": padding, "stride": draw(st.integers(1, 3))}
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


# ---- max_pool2d ---------------------------------------------------------------------------------


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
    agree(ours.max_pool2d, F.max_pool2d, [x], args, grad_strides=safe is None, safe=safe)


def are_unsafe(x, args):
    """Whether a window holds no element: there PyTorch's kernels write outside of their tensors."""
    kernel, padding, dilation = (args[k] for k in ("kernel_size", "padding", "dilation"))
    stride = kernel if args["stride"] in (None, []) else args["stride"]
    window = kernel, stride, padding, dilation
    if x.dim() not in (3, 4) or 0 in x.shape or not all(map(are_sizes, window)):
        return False
    empty = []
    for i in (0, 1):
        k, s, p, d = (reference.pair(v)[i] for v in window)
        if min(k, s, d) < 1 or not 0 <= p <= k // 2 or type(args["ceil_mode"]) is not bool:
            return False
        size = x.shape[i - 2]
        out = reference.pool_size(size, k, s, p, d, args["ceil_mode"])
        if out < 1:
            return False
        _, inside = reference.taps(size, out, k, s, p, d)
        empty.append(not inside.any(1).all())
    return any(empty)


def are_sizes(value):
    values = value if isinstance(value, tuple | list) else (value,)
    return len(values) in (1, 2) and all(type(v) is int for v in values)
