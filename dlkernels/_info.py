"""What this build is and what it runs on."""

import os
import platform
from importlib import metadata

import torch

from . import _C, _build, _cuda


class Info(dict):
    """A dict that prints as a table."""

    def __str__(self):
        width = max(map(len, self))

        def text(value):
            if isinstance(value, bool):
                return "yes" if value else "no"
            return "; ".join(value) or "none" if isinstance(value, list) else str(value)

        return "\n".join(f"{key:{width}}  {text(value)}" for key, value in self.items())


def _warnings():
    wanted = os.environ.get("DLKERNELS_ISA", "").replace("default", "baseline")
    if wanted and wanted != _C.isa():
        yield f"DLKERNELS_ISA asks for {wanted}, and {_C.isa()} is used"
    try:
        installed = metadata.version("dlkernels")
    except metadata.PackageNotFoundError:  # built in place
        return
    if installed != _build.VERSION:
        yield f"built as {_build.VERSION}, and {installed} is installed: build again"


def info():
    """What this build is and what it runs on, as a dict that prints as a table.

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
        warnings=list(_warnings()),
    )
