"""What this build is and what it runs on."""

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from . import _C, _build, _cuda

Kernels = dict[str, dict[str, dict[str, str]]]  # {op: {device: {dtype: "yes" or why not}}}


class Info(dict[str, Any]):
    """A dict that prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self))

        def text(value: Any) -> str:
            if isinstance(value, bool):
                return "yes" if value else "no"
            if isinstance(value, dict):
                value = [f"{key} {text}" for key, text in value.items()]
            return "; ".join(value) or "none" if isinstance(value, list) else str(value)

        shown = self | {"kernels": _summary(self["kernels"])}
        return "\n".join(f"{key:{width}}  {text(value)}" for key, value in shown.items())


def _warnings() -> Iterator[str]:
    wanted = os.environ.get("DLKERNELS_ISA", "").replace("default", "baseline")
    if wanted and wanted != _C.isa():
        yield f"DLKERNELS_ISA asks for {wanted}, and {_C.isa()} is used"
    try:
        installed = metadata.version("dlkernels")
    except metadata.PackageNotFoundError:  # built in place
        return
    if installed != _build.VERSION:
        yield f"built as {_build.VERSION}, and {installed} is installed: build again"


def _no_gemm() -> str:
    """Why linear layers and convolutions are PyTorch's on a GPU that is here, or ""."""
    for i in range(torch.cuda.device_count()):
        if (found := torch.cuda.get_device_capability(i)) < (8, 0):
            return (
                f"left to PyTorch's own op on cuda:{i}: our kernel needs compute capability 8.0, "
                f"it has {found[0]}.{found[1]}"
            )
    return ""


def kernels() -> Kernels:
    """{op: {device: {dtype: "yes", or why PyTorch's own op runs there}}}, as the ops say."""
    others = "left to PyTorch's own op: our kernels for the {} are for {}".format
    no_gemm = _no_gemm()

    def cpu(is_gemm: bool) -> dict[str, str]:
        left = others("CPU", "float32, bfloat16 and float16" if is_gemm else "float32")
        bfloat16 = float16 = "yes" if is_gemm else left
        if is_gemm and _C.multiplies_bfloat16():
            bfloat16 = "left to PyTorch's own op: this processor multiplies bfloat16"
        return {"float32": "yes", "bfloat16": bfloat16, "float16": float16, "float64": left}

    def cuda(has_kernel: bool, is_gemm: bool) -> dict[str, str]:
        answer = _cuda.REASON or (no_gemm if is_gemm else "") or "yes"
        if not has_kernel:
            answer = "left to PyTorch's own op: it has no CUDA kernel"
        wide = _cuda.REASON or others("GPU", "float32, bfloat16 and float16")
        return {"float32": answer, "bfloat16": answer, "float16": answer, "float64": wide}

    return {
        op: {"cpu": cpu(is_gemm), "cuda": cuda(has_cuda, is_gemm)}
        for op, (has_cuda, is_gemm) in sorted(_C.ops().items())
        if op in _C.stats()  # max_pool2d_with_indices counts as max_pool2d
    }


def _summary(kernels: Kernels) -> list[str]:
    """["cpu float32: all ops", ...]: which ops have a kernel there."""
    places: dict[str, list[str]] = {}
    for op, devices in kernels.items():
        for device, dtypes in devices.items():
            for dtype, answer in dtypes.items():
                if answer == "yes":
                    places.setdefault(f"{device} {dtype}", []).append(op)
    everywhere = list(kernels)
    return [
        f"{place}: {'all ops' if ops == everywhere else ', '.join(ops)}"
        for place, ops in places.items()
    ]


def info() -> Info:
    """What this build is and what it runs on, as a dict that prints as a table.

    ``kernels`` is ``{op: {device: {dtype: "yes", or why PyTorch's own op runs there}}}``.
    ``warnings`` lists what does not go together. That the running torch is the one that the build
    is for was seen to at import.
    """
    return Info(
        dlkernels=_build.VERSION,
        torch_built_for=_build.TORCH_VERSION,
        torch_running=str(torch.__version__),
        python=platform.python_version(),
        isa=_C.isa(),
        threads=torch.get_num_threads(),
        build_flags=_build.FLAGS,
        cuda=not _cuda.REASON,
        cuda_reason=_cuda.REASON,
        kernels=kernels(),
        warnings=list(_warnings()),
    )
