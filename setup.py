"""The compiled part of dlkernels. The rest is in pyproject.toml; build_backend.py finds torch."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_kernels

# -g0 undoes the -g that Python was built with: a third of the compile time, most of the file.
# Loops begin a line of the instruction cache: GEMM takes 0.95 of the time where another process
# shares the core (docs/performance/linear.md).
FLAGS = ["-std=c++20", "-O3", "-falign-loops=64", "-g0", "-fopenmp", "-Wall", "-Wextra"]


def why_no_cuda() -> str:
    """Why not to build CUDA kernels, or "": DLKERNELS_CUDA=0|1 decides, else nvcc and torch do."""
    import torch

    wanted = os.environ.get("DLKERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"DLKERNELS_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "it was built with DLKERNELS_CUDA=0"
    if build_kernels.nvcc() is None:
        if wanted:
            raise RuntimeError("DLKERNELS_CUDA=1, and there is no nvcc: set CUDA_HOME")
        return "no nvcc was there when it was built: install the CUDA toolkit, set CUDA_HOME"
    if wanted:
        return ""
    if torch.version.cuda is None:
        return f"it was built for torch {torch.__version__}, which is no CUDA build"
    if build_kernels.version()[0] > int(torch.version.cuda.split(".")[0]):
        found = ".".join(map(str, build_kernels.version()))
        return f"nvcc was {found} when it was built, newer than torch's CUDA {torch.version.cuda}"
    return ""


def add_cuda(objects: Path, library: Path) -> str:
    """Build the CUDA kernels if they are wanted; returns why there are none, or ""."""
    reason = why_no_cuda()
    library.unlink(missing_ok=True)
    if not reason:
        try:
            build_kernels.build_cuda(objects, library)
        except RuntimeError as error:
            if os.environ.get("DLKERNELS_CUDA"):
                raise
            print(f"dlkernels: the CUDA kernels could not be built:\n{error}", file=sys.stderr)
            reason = "nvcc failed when it was built: see the build's output (pip install -v)"
    return reason


def ninja_on_path() -> bool:
    # torch runs `ninja` from PATH, where a virtual environment that is not activated is missing.
    try:
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    except ImportError:
        pass
    return shutil.which("ninja") is not None


def build_command(include: list) -> type:
    """The build_ext that compiles kernels, precompiles torch's headers, and records the build."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Object files are good for one torch, and ninja does not notice another torch installed
            # in the same place; a fixed directory also makes editable installs incremental.
            self.build_temp = f"build/{sys.implementation.cache_tag}-torch-{torch.__version__}"

        def build_extensions(self):
            cxx = os.environ.get("CXX", "c++").split()  # as PyTorch chooses it
            if not cxx or shutil.which(cxx[0]) is None:
                # pip shows its text without a traceback.
                raise SystemExit(
                    f"dlkernels: no C++ compiler: there is no program {' '.join(cxx[:1])!r}, "
                    "install g++ or set CXX"
                )
            compiler = [*cxx, *self.compiler.compiler_so[1:], *FLAGS]
            with ThreadPoolExecutor() as pool:
                headers = pool.submit(self.precompile_torch_headers, compiler)
                kernels = build_kernels.build_cpu(Path("build/cpu"), compiler)
                headers.result()  # raises what was raised there
            self.extensions[0].extra_objects = list(map(str, kernels))
            super().build_extensions()

        def precompile_torch_headers(self, compiler):
            # Beside a copy: GCC looks for both in a folder, and for the precompiled one first.
            header = Path(self.build_temp, "ops", "core", "torch_headers.h").resolve()
            precompiled = header.with_suffix(".h.gch")
            header.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2("csrc/ops/core/torch_headers.h", header)
            if not precompiled.exists() or precompiled.stat().st_mtime < header.stat().st_mtime:
                # Unchecked: without it, or with another compiler, the build takes longer, no more.
                command = [*compiler, *include, "-w", "-xc++-header", header, "-o"]
                # Renamed when it is whole: GCC crashes on half of one.
                unfinished = precompiled.with_suffix(".unfinished")
                if subprocess.run([*command, unfinished]).returncode == 0:
                    unfinished.replace(precompiled)
            self.extensions[0].include_dirs.insert(0, str(header.parents[2]))

        def run(self):
            super().run()
            root = Path() if self.inplace else Path(self.build_lib)
            write_record(self.distribution.get_version(), root / "dlkernels")

    return BuildExt.with_options(use_ninja=ninja_on_path())


def write_record(version: str, package: Path) -> None:
    """Build the CUDA kernels if they are wanted, and write what this build is."""
    import torch

    record = {
        "VERSION": version,
        "TORCH_VERSION": str(torch.__version__),
        "FLAGS": " ".join(FLAGS),
        "CUDA_REASON": add_cuda(Path("build/cuda"), package / "_C_cuda.so"),
    }
    lines = ["# Written by setup.py: what this build is.\n"]
    lines += [f"{name} = {value!r}\n" for name, value in record.items()]
    (package / "_build.py").write_text("".join(lines))


def compiled() -> dict:
    """What setup() needs to build dlkernels._C."""
    from torch.utils.cpp_extension import CppExtension, include_paths

    include = [f"-isystem{path}" for path in include_paths()]
    extension = CppExtension(
        "dlkernels._C",
        sorted(glob("csrc/ops/**/*.cpp", recursive=True) + glob("csrc/python/*.cpp")),
        depends=sorted(glob("csrc/**/*.*", recursive=True)),
        # -isystem, so that the warnings shown are ours and not those of torch's headers.
        extra_compile_args=[*FLAGS, *include],
    )
    extension.include_dirs = [os.path.abspath("csrc")]
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build_command(include)}}


try:
    parts = compiled()
except ImportError:
    if not {"sdist", "egg_info"} & set(sys.argv):
        raise
    parts = {}  # an sdist needs no torch

setup(**parts)
