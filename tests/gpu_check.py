"""Everything that needs a GPU, in one command: ``make gpu``, in a tree that was built in place.

The tests marked `cuda`; compute-sanitizer's memcheck, racecheck, initcheck and synccheck on some of
them; the benchmark's CUDA cases. Uses what is installed, needs no network, takes some minutes. What
each part said is kept in build/gpu, the benchmark's times as JSON; its table is printed last.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import dlkernels

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Part:
    """A process whose output goes to a file."""

    def __init__(self, name, command, seconds):
        self.name, self.seconds, self.begin = name, seconds, time.monotonic()
        self.log = ROOT / "build" / "gpu" / f"{name}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Each tensor an allocation of its own, so that a tool sees where it ends.
        caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name in SANITIZERS else {}
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT / "tests",
                env={**os.environ, "PYTHONPATH": str(ROOT), **caching},
            )

    def passed(self):
        """Waits for it; says how it went."""
        try:
            code = self.process.wait(self.begin + self.seconds - time.monotonic())
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = f"none after {self.seconds} s"
        lines = self.log.read_text().strip().splitlines() or [""]
        took = time.monotonic() - self.begin
        print(f"{self.name}: exit {code}, {took:.0f} s: {lines[-1]}  ({self.log})", flush=True)
        if code != 0:
            print(*lines[-40:], sep="\n")
        return code == 0


def main():
    print(dlkernels.info(), flush=True)
    if not torch.cuda.is_available():
        sys.exit("gpu_check: PyTorch sees no GPU")
    if reason := dlkernels.info()["cuda_reason"]:
        sys.exit(f"gpu_check: no CUDA kernels: {reason}")
    passed = Part("tests", [*PYTEST, "."], 200).passed()
    if tool := shutil.which("compute-sanitizer"):
        # Of our kernels alone, all four beside one another.
        small = [*PYTEST, "test_cuda.py", "-k", "sanitized"]
        ours = ["--error-exitcode", "1", "--kernel-name", "kns=dlkernels"]
        parts = [Part(t, [tool, "--tool", t, *ours, *small], 150) for t in SANITIZERS]
        passed = all([part.passed() for part in parts]) and passed
    else:
        print("compute-sanitizer: skipped, it is not on PATH")
    times = ROOT / "build" / "gpu" / "times.json"
    command = [sys.executable, "-m", "dlkernels.benchmarks.gpu", str(times)]
    bench = Part("benchmark", command, 240)
    passed = bench.passed() and passed
    print(bench.log.read_text())
    sys.exit(not passed)


if __name__ == "__main__":
    main()
