"""Compile csrc/cpu to objects and csrc/cuda to the library _C_cuda.so. They know no torch: once for
every torch there is, and any Python will do.

python build_kernels.py FOLDER     csrc/cuda, warnings as errors, and what the assembler says
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
GEMM_SOURCES, MIN_CAPABILITY_OF_GEMM = ("gemm", "conv2d"), 80
FLAGS = ["-std=c++20", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden"]
STRICT = ["--Werror=all-warnings"]

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


def architectures(min_capability: int = 0) -> list[str]:
    """nvcc's options for those of TORCH_CUDA_ARCH_LIST, as "8.0;9.0+PTX", that are not below
    `min_capability`, or for that."""
    options = []
    for name in re.split("[; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES):
        number = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+[af]?", number):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must be like {ARCHITECTURES!r}, got {name!r}")
        if int(number.rstrip("af")) < min_capability:
            continue
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options or [f"-gencode=arch=compute_{min_capability},code=sm_{min_capability}"]


def run(command: list) -> str:
    """What the command says; a RuntimeError with it where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{done.args}\n{done.stdout}{done.stderr}")
    return done.stderr


def compile_all(folder: Path, commands: dict[Path, list]) -> list[Path]:
    """The objects of the sources, each by its command unless that, or that and STRICT, has made it
    since the last change; what the compiler said stands beside it, below the command."""

    def compile_one(source: Path) -> Path:
        command, out = commands[source], folder / f"{source.stem}.o"
        said, good = out.with_suffix(".txt"), [str(command), str([*command, *STRICT])]
        kernels = SOURCE / source.relative_to(SOURCE).parts[0]
        sources = [source, *kernels.rglob("*.*h"), *SOURCE.glob("*.h")]
        newest = max(path.stat().st_mtime for path in sources)
        fresh = said.exists() and said.stat().st_mtime > newest
        if not fresh or said.read_text().partition("\n")[0] not in good:
            said.unlink(missing_ok=True)
            text = run([*command, f"-I{SOURCE}", "-c", source, "-o", out])
            said.write_text(f"{command}\n{text}")  # last, so that it stands for the object
        return out

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, commands))


def build_cpu(folder: Path, compiler: list) -> list[Path]:
    """The objects of csrc/cpu, by the C++ compiler with its flags; its warnings are shown."""
    objects = compile_all(folder, dict.fromkeys(sorted(SOURCE.glob("cpu/**/*.cpp")), compiler))
    for path in objects:
        print(end=path.with_suffix(".txt").read_text().partition("\n")[2], file=sys.stderr)
    return objects


def build_cuda(folder: Path, library: Path, strict: bool = False) -> str:
    """Write the library, its objects to `folder`; returns what the assembler said."""
    commands = {}
    for source in sorted(SOURCE.glob("cuda/**/*.cu")):
        min_capability = MIN_CAPABILITY_OF_GEMM if source.stem in GEMM_SOURCES else 0
        commands[source] = [
            nvcc(),
            *FLAGS,
            *architectures(min_capability),
            *(STRICT if strict else []),
        ]
    objects = compile_all(folder, commands)
    # The runtime inside, out of sight: PyTorch has its own, maybe of another release.
    run([nvcc(), "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", *architectures(),
         *objects, "-o", library])  # fmt: skip
    return "".join(path.with_suffix(".txt").read_text() for path in objects)


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
    said = build_cuda(folder, folder / "_C_cuda.so", strict=True)
    wrong = local_memory(said)
    kernels = said.count("Function properties for")
    toolkit = ".".join(map(str, version()))
    print(
        f"CUDA {toolkit}: {kernels} kernels built, {len(wrong)} use local memory", *wrong, sep="\n"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
