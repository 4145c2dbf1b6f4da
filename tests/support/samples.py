"""PyTorch's own samples (OpInfo, ModuleInfo, OptimizerInfo) and how a result is compared."""

import pytest
import torch

if not torch.__version__.startswith("2.13."):
    pytest.skip(
        f"PyTorch's samples are private to a version: tested with 2.13, not {torch.__version__}",
        allow_module_level=True,
    )
pytest.importorskip("expecttest")


def outcome(f, *args, **kwargs):
    """What f returns, or the exception it raises."""
    try:
        return f(*args, **kwargs)
    except Exception as error:
        return error


def assert_same(got, expected, path="result"):
    """Tensors alike within PyTorch's default tolerance, in dtype, strides and flags too; all else
    equal; exceptions of one class."""
    assert type(got) is type(expected), f"{path}: got {got!r}, expected {expected!r}"
    if isinstance(got, torch.Tensor):
        for flag in ("requires_grad", "is_leaf", "is_inference", "is_neg", "is_conj"):
            a, b = (getattr(t, flag) for t in (got, expected))
            assert (a() if callable(a) else a) == (b() if callable(b) else b), f"{path}: {flag}"
        filled = got.numel() > 0  # else strides lead nowhere
        options = dict(equal_nan=True, check_stride=filled, msg=lambda m: f"{path}: {m}")
        torch.testing.assert_close(got, expected, **options)
    elif isinstance(got, dict):
        assert list(got) == list(expected), path
        for key in got:
            assert_same(got[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(got, list | tuple):
        assert len(got) == len(expected), path
        for i, (a, b) in enumerate(zip(got, expected)):
            assert_same(a, b, f"{path}[{i}]")
    elif not isinstance(got, Exception):
        assert got == expected, path
