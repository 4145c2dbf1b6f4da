"""The CUDA kernels: loaded at import where they are built and can run."""

from pathlib import Path

from . import _C, _build


def _load() -> str:
    """Load them; why not, or ""."""
    if _build.CUDA_REASON:
        return _build.CUDA_REASON
    try:
        _C.load_cuda(str(Path(__file__).resolve().parent / "_C_cuda.so"))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


REASON = _load()
_C.set_cuda_reason(REASON)
