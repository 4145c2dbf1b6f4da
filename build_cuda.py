"""Compile csrc/cuda to the library _C_cuda.so. It knows no torch, so any Python will do:

python build_cuda.py FOLDER     with warnings as errors, and a look at what the assembler says
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "csrc"
ARCHITECTURES = "7.5;8.0;9.0+PTX"  # what TORCH_CUDA_ARCH_LIST is for PyTorch's own builds
# Their tensor cores must know bfloat16, and copies be asynchronous: for nothing before this.
PRODUCTS, LEAST_OF_PRODUCTS = ("gemm", "conv2d"), 80
FLAGS = ["-std=c++20", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden"]

# Kernels that may use local memory, by a part of their name, each with its reason.
LOCAL_MEMORY: dict[str, str] = {}


def nvcc() -> str | None:
    """The compiler of CUDA_HOME, or the one on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=Path(home) / "bin") if home else shutil.which("nvcc")


def version() -> tuple[int, int]:
    """The toolkit's, as (13, 0)."""
    text = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def architectures(least: int = 0) -> list[str]:
    """nvcc's options for those of TORCH_CUDA_ARCH_LIST, as "8.0;9.0+PTX", that are not below
    `least`, or for that."""
    options = []
    for name in re.split("[; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES):
        number = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+[af]?", number):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must be like {ARCHITECTURES!r}, got {name!r}")
        if int(number.rstrip("af")) < least:
            continue
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options or [f"-gencode=arch=compute_{least},code=sm_{least}"]


def run(command: list) -> str:
    """What the command says; a RuntimeError with it where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{done.args}\n{done.stdout}{done.stderr}")
    return done.stderr


def build(folder: Path, library: Path, strict: bool = False) -> str:
    """Write the library, its objects to `folder`; returns what the assembler said."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(SOURCE.glob("cuda/*.cu"))
    headers = [*SOURCE.glob("cuda/*.h"), *SOURCE.glob("cuda/*.cuh"), Path(__file__)]

    def compile_one(source: Path) -> Path:
        out, said = folder / f"{source.stem}.o", folder / f"{source.stem}.txt"
        newest = max(path.stat().st_mtime for path in [source, *headers])
        least = LEAST_OF_PRODUCTS if source.stem in PRODUCTS else 0
        command = [nvcc(), *FLAGS, *architectures(least), f"-I{SOURCE}", "-c", source, "-o", out]
        strictly = [*command, "--Werror=all-warnings"]
        chosen = strictly if strict else command
        good = {f"{chosen}", f"{strictly}"}  # what was built strictly is good for others, too
        fresh = said.exists() and said.stat().st_mtime > newest
        if not fresh or said.read_text().partition("\n")[0] not in good:
            said.unlink(missing_ok=True)
            said.write_text(f"{chosen}\n{run(chosen)}")  # last, so that it stands for the object
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    # The runtime inside, out of sight: PyTorch has its own, maybe of another release.
    run([nvcc(), "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", *architectures(),
         *objects, "-o", library])  # fmt: skip
    return "".join((folder / f"{source.stem}.txt").read_text() for source in sources)


def local_memory(said: str) -> list[str]:
    """The kernels that spill registers or keep arrays in local memory, but for those listed."""
    found = re.findall(
        r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        said,
    )
    if not found:
        raise RuntimeError("the assembler's report has no kernel in it")
    return [
        f"{name}: {stack} bytes of stack, {stores} spilled, {loads} loaded again"
        for name, stack, stores, loads in found
        if (stack, stores, loads) != ("0", "0", "0")
        and not any(allowed in name for allowed in LOCAL_MEMORY)
    ]


def main() -> None:
    if nvcc() is None:
        print("CUDA: skipped, there is no nvcc (set CUDA_HOME)")
        return
    folder = Path(sys.argv[1])
    said = build(folder, folder / "_C_cuda.so", strict=True)
    wrong = local_memory(said)
    kernels = said.count("Function properties for")
    toolkit = ".".join(map(str, version()))
    print(
        f"CUDA {toolkit}: {kernels} kernels built, {len(wrong)} use local memory", *wrong, sep="\n"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
