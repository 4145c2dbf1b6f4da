"""What every op's tests share: an op of ours against PyTorch's, both against float64."""

import os
import re
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._pytree import tree_map_only

from dlkernels import _C

FULL = "DLKERNELS_TEST_FULL" in os.environ  # make test-full: every sample in every way


def thinned(samples):
    """Every third of them, for tests that take long with each; all in make test-full."""
    return [*samples][:: 1 if FULL else 3]


@contextmanager
def calls(kernels=(), torchs=()):
    """Exactly these ops ran on kernels of ours, and exactly those were left to PyTorch."""
    before = _C.stats()
    yield
    now = _C.stats()
    for which, path, expected in ((0, "kernels of ours", kernels), (1, "PyTorch", torchs)):
        got = {op for op in now if now[op][which] > before[op][which]}
        assert got == set(expected), f"ops that ran on {path}: {got}, expected {set(expected)}"


def steps(x):
    """Strides, of the dimensions in which anything moves."""
    return [(dim, x.stride(dim)) for dim in range(x.dim()) if x.size(dim) > 1]


def convert(values, f, only_floats=True):
    """f of every tensor in `values`, as a leaf that requires a gradient where the tensor did."""

    def leaf(x):
        if only_floats and not x.is_floating_point():
            return x
        return f(x.detach()).requires_grad_(x.requires_grad)

    return tree_map_only(torch.Tensor, leaf, values)


# Our dtypes, and their rtol; atol is 1e-5: torch.testing.assert_close's.
RTOL = {torch.float32: 1.3e-6, torch.bfloat16: 1.6e-2, torch.float16: 1e-3}


def assert_close(got, torchs, exact):
    """|got - float64| <= max(PyTorch's default tolerance, 4 x the error of PyTorch's own op)."""
    assert (got.dtype, got.shape) == (torchs.dtype, torchs.shape)
    if not got.is_floating_point() or got.numel() == 0:
        return torch.testing.assert_close(got, torchs, rtol=0, atol=0)

    def error(x):
        same = (x == exact) | (x.isnan() & exact.isnan())
        return torch.where(same, 0.0, (x.double() - exact).abs())

    default = 1e-5 + RTOL[got.dtype] * exact.abs()
    bound = torch.maximum(default, 4 * error(torchs).max()).nan_to_num()
    wrong = ~((error(got) <= bound) | (got == torchs))  # which may be inf where the other is not
    assert not wrong.any(), f"got {got[wrong]}, PyTorch {torchs[wrong]}, float64 {exact[wrong]}"


def run(f, args, kwargs, dtype=None, grad_ys=None):
    """f's outputs, its gradients (for tensors that require one), and the grad_ys that were used.
    Floating tensors are converted to dtype, unless that is None."""
    args, kwargs = convert((args, kwargs), lambda x: x.to(dtype or x.dtype))
    ys = f(*args, **kwargs)
    ys = ys if isinstance(ys, tuple) else (ys,)
    inputs = [
        x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor) and x.requires_grad
    ]
    if not inputs:
        return ys, (), None
    grad_ys = grad_ys or [torch.randn_like(y) for y in ys if y.requires_grad]
    wanted = [y for y in ys if y.requires_grad]
    grads = torch.autograd.grad(wanted, inputs, [g.to(y.dtype) for g, y in zip(grad_ys, wanted)])
    return ys, grads, grad_ys


def safe_for_torch(args, kwargs):
    """A context without oneDNN where its convolutions may touch what is outside of their memory, as
    those of PyTorch 2.13 do on AVX2: in 16 bits, grad_weight of windows of 1x1 with a stride, and
    forward with a stride and dilated windows that lie in the padding (channels_last, bias)."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    one = any(x.dim() == 4 and x.shape[2:] == (1, 1) for x in tensors)
    dilated = kwargs.get("dilation", 1) not in (1, (1, 1), [1, 1])
    if ("stride" in kwargs and (one or dilated)) or any(
        x.dtype in (torch.bfloat16, torch.float16) for x in tensors
    ):
        return torch.backends.mkldnn.flags(enabled=False)
    return nullcontext()


def compare(ours, torchs, args, kwargs=None, grad_strides=True, close=assert_close):
    """Values, gradients, dtypes, shapes and strides of `ours` are those of `torchs`, and the inputs
    stay as they are. grad_strides=False where PyTorch's happen to lie transposed."""
    kwargs = kwargs or {}
    tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]
    before = [(x.clone(), x._version) for x in tensors]
    ys, grads, grad_ys = run(ours, args, kwargs)
    with safe_for_torch(args, kwargs):
        ys_torch, grads_torch, _ = run(torchs, args, kwargs, grad_ys=grad_ys)
        ys_exact, grads_exact, _ = run(torchs, args, kwargs, torch.float64, grad_ys)
    for results in zip(
        [*ys, *grads], [*ys_torch, *grads_torch], [*ys_exact, *grads_exact], strict=True
    ):
        close(*results)
    for got, torch_ in zip([*ys, *grads], [*ys_torch, *grads_torch], strict=True):
        if got.numel() > 0 and (grad_strides or got.grad_fn):
            assert steps(got) == steps(torch_)
    for x, (value, version) in zip(tensors, before, strict=True):
        assert x._version == version
        torch.testing.assert_close(x, value, rtol=0, atol=0, equal_nan=True)


def assert_exact(ours, torchs, args, kwargs=None):
    """Of integers, whose sums are exact: values and gradients bit for bit, on kernels of ours."""
    args = [None if x is None else x.detach().mul(3).round().requires_grad_() for x in args]
    results = []
    for f in (ours, torchs):
        with safe_for_torch(args, kwargs or {}):
            y = f(*args, **kwargs or {})
            grad_y = (torch.arange(y.numel()) % 7 - 3.0).view(y.shape)
            inputs = [x for x in args if x is not None]
            results.append([y, *torch.autograd.grad(y, inputs, grad_y)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def assert_refused_alike(ours, torchs, args, kwargs=None):
    """One class of exception; in words PyTorch's first line or `op: what must hold, got what`."""
    with pytest.raises(Exception) as expected:
        torchs(*args, **kwargs or {})
    with pytest.raises(Exception) as got:
        ours(*args, **kwargs or {})
    assert got.type is expected.type
    first, text = str(expected.value).partition("\n")[0].rstrip("."), str(got.value)
    # The function that a TypeError names is PyTorch's: it was called with all arguments.
    assert first in text or re.match(r"\w+(: .*\bgot\b|\(\) received an invalid)", text), text


def check(
    ours,
    torchs,
    args,
    kwargs=None,
    forward=(),
    backward=(),
    grad_strides=True,
    device="cpu",
    dtype=torch.float32,
):
    """compare() on that device and in that dtype, and the named kernels of ours ran (`backward`
    where a gradient is wanted), nothing through PyTorch; but bfloat16 is PyTorch's on a processor
    that multiplies it."""
    args, kwargs = convert((args, kwargs or {}), lambda x: x.to(device), only_floats=False)
    args, kwargs = convert((args, kwargs), lambda x: x.to(dtype))
    tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]
    wanted = any(x.requires_grad for x in tensors)
    left = device == "cpu" and dtype is torch.bfloat16 and _C.multiplies_bfloat16()
    with nullcontext() if left else calls({*forward, *(backward if wanted else ())}):
        compare(ours, torchs, args, kwargs, grad_strides)
