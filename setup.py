"""The compiled part of dlkernels. The rest is in pyproject.toml; build_backend.py finds torch."""

import os
import shutil
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

# -g0 undoes the -g that Python was built with: a third of the compile time, most of the file.
FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-Wall", "-Wextra"]


def why_no_cuda() -> str:
    return "the CUDA kernels are not written yet"


def ninja_on_path() -> bool:
    # torch runs `ninja` from PATH, where a virtual environment that is not activated is missing.
    try:
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    except ImportError:
        pass
    return shutil.which("ninja") is not None


def compiled() -> dict:
    """What setup() needs to build dlkernels._C."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    class BuildExt(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Object files are good for one torch, and ninja does not notice another torch installed
            # in the same place; a fixed directory also makes editable installs incremental.
            self.build_temp = f"build/{sys.implementation.cache_tag}-torch-{torch.__version__}"

        def run(self):
            super().run()
            record = {
                "VERSION": self.distribution.get_version(),
                "TORCH_VERSION": str(torch.__version__),
                "FLAGS": " ".join(FLAGS),
                "CUDA_REASON": why_no_cuda(),
            }
            lines = ["# Written by setup.py: what this build is.\n"]
            lines += [f"{name} = {value!r}\n" for name, value in record.items()]
            root = Path() if self.inplace else Path(self.build_lib)
            (root / "dlkernels" / "_build.py").write_text("".join(lines))

    extension = CppExtension(
        "dlkernels._C",
        sorted(glob("csrc/**/*.cpp", recursive=True)),
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        # -isystem, so that the warnings shown are ours and not those of torch's headers.
        extra_compile_args=[*FLAGS, *(f"-isystem{path}" for path in include_paths())],
    )
    extension.include_dirs = [os.path.abspath("csrc")]
    build_ext = BuildExt.with_options(use_ninja=ninja_on_path())
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build_ext}}


try:
    parts = compiled()
except ImportError:
    if not {"sdist", "egg_info"} & set(sys.argv):
        raise
    parts = {}  # an sdist needs no torch

setup(**parts)
