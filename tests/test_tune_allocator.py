"""tune_allocator(), in processes of its own: what it changes lasts."""

import os
import subprocess
import sys

STEPS = """
import resource, sys
import torch
import dlkernels

if "tuned" in sys.argv:
    assert dlkernels.tune_allocator() is True
    assert dlkernels.tune_allocator() is True
model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU())
x = torch.randn(64, 3, 64, 64)  # 32 MB a tensor behind the convolution

def step():
    model(x).sum().backward()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(5):
    step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) / 10)
"""


def run(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_page_faults():
    installed, tuned = float(run(STEPS)), float(run(STEPS, "tuned"))
    assert installed > 4000  # otherwise this test shows nothing
    assert tuned < installed / 10


def test_another_allocator(tmp_path):
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(
        "void *__libc_malloc(unsigned long);\n"
        "void __libc_free(void *);\n"
        "static _Alignas(64) char large[1 << 26];\n"
        "void *malloc(unsigned long n) { return n < sizeof large ? __libc_malloc(n) : large; }\n"
        "void free(void *p) { if (p != large) __libc_free(p); }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    code = "import dlkernels; print(dlkernels.tune_allocator())"
    assert run(code) == "True"
    assert run(code, LD_PRELOAD=str(library)) == "False"
