"""The package: import, info, and what the compiled files look like."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlkernels
from dlkernels import _C, _build
from dlkernels._check import CASES, check

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(dlkernels.__file__).parent


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def copied(tmp_path):
    """A copy of the installed package whose files a test may change."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "copy" / "dlkernels"))


# ---- import ---------------------------------------------------------------------------------


def test_public_names():
    assert set(dlkernels.__all__) <= set(dir(dlkernels))
    assert dlkernels.__version__ == _build.VERSION
    assert not [name for name in dlkernels.__all__ if getattr(dlkernels, name) is None]


@pytest.mark.parametrize(
    "first",
    ["dlkernels", "torch", "numpy", "sklearn.linear_model", "dlkernels, sklearn.linear_model"],
)
def test_import_in_any_order(python, first):
    program = f"""
try:
    import {first}
except ModuleNotFoundError as error:  # scikit-learn is there only with the examples
    assert error.name == "sklearn", error
import numpy, dlkernels, torch
x = torch.randn(300, 300)
y = dlkernels.functional.linear(x, x)
assert torch.allclose(y, torch.from_numpy(x.numpy() @ x.numpy().T), atol=1e-3)
assert dlkernels.stats()["linear"] == {{"kernel": 1, "torch": 0}}
"""
    python(program)


def test_import_changes_nothing_global(python):
    program = """
import os, random, signal, sys, threading, warnings
import torch
def state():
    tiny = torch.full((64,), 1e-40)
    return {
        "denormals": bool((tiny * 0.5 > 0).all()) and sys.float_info.min / 4 > 0,
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "seed": (torch.initial_seed(), torch.get_rng_state().tolist(), random.getstate()),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "filters": list(warnings.filters),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGSEGV)],
        "python threads": threading.active_count(),
        "modules": (torch.nn.Linear.forward, torch.nn.functional.linear, torch.optim.Adam.step),
    }
before = state()
assert before["denormals"]
import dlkernels
after = state()
assert before == after, [key for key in before if before[key] != after[key]]
x = torch.full((1000,), 1e-40)
assert (dlkernels.functional.relu(x) == x).all() and (x != 0).all()
"""
    python(program)


def test_built_for_another_torch(python, copied):
    build = copied / "_build.py"
    text = build.read_text()
    build.write_text(text.replace(_build.TORCH_VERSION, "2.11.0+other"))
    message = last_line(python("import dlkernels", code=1, path=copied.parent))
    assert message.startswith("ImportError: dlkernels was built for torch 2.11.0+other and torch ")
    assert torch.__version__ in message and "pip install" in message


def test_source_tree_in_place_of_the_package(python, copied):
    for name in ("_build.py", next(copied.glob("_C.*.so")).name):
        (copied / name).rename(copied / f"{name}.away")
        message = last_line(python("import dlkernels", code=1, path=copied.parent))
        assert message.startswith("ImportError: dlkernels: ") and "source tree" in message
        (copied / f"{name}.away").rename(copied / name)


def in_environments(python, expression, environments):
    """What the value is of an expression in dlkernels, or what its import raises, in each of the
    environments: in forks, because torch's import takes the longest and reads none of them."""
    program = f"""
import json, os, sys
import torch
for environment in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.environ.update(environment)
        try:
            import dlkernels
            print(json.dumps({expression}))
        except ValueError as error:
            print(json.dumps(str(error)))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""
    return map(json.loads, python("-c", program, json.dumps(environments)).stdout.splitlines())


def test_isa_is_chosen_by_the_environment(python):
    order = ["baseline", "avx2", "avx512"]
    best = order.index(json.loads(python("-m", "dlkernels", "info", "--json").stdout)["isa"])
    wishes = [
        ({"DLKERNELS_ISA": "default"}, 0),
        ({"DLKERNELS_ISA": "baseline"}, 0),
        ({"DLKERNELS_ISA": "avx2"}, 1),
        ({"DLKERNELS_ISA": "avx512"}, 2),
        ({"DLKERNELS_ISA": ""}, 2),
        ({"ATEN_CPU_CAPABILITY": "default"}, 0),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, 1),
    ]
    found = in_environments(python, "dlkernels.info()['isa']", [wish for wish, _ in wishes])
    assert list(found) == [order[min(level, best)] for _, level in wishes]


def test_words_of_the_environment(python):
    forced = "dlkernels._C.set_conv_algorithm('')"
    words = ["", "direct", "winograd2", "winograd4"]
    found = in_environments(python, forced, [{"DLKERNELS_CONV": word} for word in words])
    assert list(found) == words
    wrong = {
        "DLKERNELS_ISA": ["avx1024", "AVX2", " avx2"],
        "DLKERNELS_CONV": ["winograd", "Direct", "fft"],
    }
    for name, words in wrong.items():
        found = in_environments(python, "'imported'", [{name: word} for word in words])
        for word, message in zip(words, found, strict=True):
            assert message.startswith(f"{name} must be one of") and word in message


# ---- info -----------------------------------------------------------------------------------


def test_info():
    info = dlkernels.info()
    assert info["torch_running"] == info["torch_built_for"] == torch.__version__
    assert info["isa"] == _C.isa() and info["threads"] == torch.get_num_threads()
    assert "-std=c++20" in info["build_flags"] and "-march" not in info["build_flags"]
    assert "fast" not in info["build_flags"]  # -ffast-math, -Ofast
    assert info["cuda"] or info["cuda_reason"]
    assert json.loads(json.dumps(info)) == info
    lines = str(info).splitlines()
    assert len(lines) == len(info) and all(key in line for key, line in zip(info, lines))


def test_which_kernels_there_are():
    kernels = dlkernels.info()["kernels"]
    assert {*kernels, *(f"{op}_backward" for op in kernels)} >= set(_C.stats())
    for op in kernels.values():
        assert op["cpu"]["float32"] == "yes" and "PyTorch" in op["cpu"]["float64"]
    assert kernels["linear"]["cpu"]["float16"] == kernels["conv2d"]["cpu"]["float16"] == "yes"
    for dtype in ("bfloat16", "float16"):
        assert "PyTorch" in kernels["relu"]["cpu"][dtype]
    assert "kernels          cpu float32: all ops" in str(dlkernels.info())


def test_info_check(python):
    _C.reset_stats()
    assert check() == dict.fromkeys(CASES, "ok")
    assert set(CASES) == set(dlkernels.info()["kernels"])
    idle = {op for op, (kernel, torchs) in _C.stats().items() if not kernel or torchs}
    assert not idle
    assert "linear ok; " in python("-m", "dlkernels", "info", "--check").stdout
    # One that is wrong in one place, one that is not there, one whose gradient is NaN.
    program = """
import sys
import dlkernels
from dlkernels import _check
from dlkernels.__main__ import main
def wrong(x):
    return x.relu() + (x == x.max()) * 1e-3
def absent(x):
    raise NotImplementedError("no kernel")
def nan(x):
    return dlkernels.functional.linear(x, x) + (x - x).sqrt().sum()
_check.CASES["linear"] = nan, lambda x: x @ x.T, [(5, 5)]
for op, f in {"relu": wrong, "max_pool2d": absent}.items():
    _check.CASES[op] = f, *_check.CASES[op][1:]
sys.exit(main(["info", "--check", "--json"]))
"""
    found = json.loads(python(program, code=1).stdout)["check"]
    wrong = {op: text for op, text in found.items() if text != "ok"}
    assert set(wrong) == {"relu", "max_pool2d", "linear"}
    assert wrong["max_pool2d"] == "raised NotImplementedError: no kernel"
    assert "differs by" in wrong["relu"] and "nan" in wrong["linear"]


def test_command_line(python):
    assert re.search(r"^isa +\w+$", python("-m", "dlkernels", "info").stdout, re.M)
    assert json.loads(python("-m", "dlkernels", "info", "--json").stdout)["python"]
    assert "usage: dlkernels" in python("-m", "dlkernels", code=2).stderr
    assert "invalid choice" in python("-m", "dlkernels", "other", code=2).stderr
    program = "import sys; from dlkernels.__main__ import main; sys.exit(main(['info']))"
    assert "torch_running" in python(program).stdout


def test_info_warns_where_the_wish_is_not_met(python):
    program = "import dlkernels; print(dlkernels.info()['warnings'])"
    stdout = python(program, DLKERNELS_ISA="avx512", ATEN_CPU_CAPABILITY="default").stdout
    assert "asks for avx512, and baseline is used" in stdout
    assert "DLKERNELS_ISA" not in python(program, DLKERNELS_ISA="default").stdout


# ---- what was compiled ----------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_isa_files_define_their_table_alone(isa):
    # A weak symbol is one that the linker may keep for every machine: SIGILL on the older ones.
    built = ROOT / "build" / "cpu" / f"isa_{isa}.o"
    if not built.exists():
        pytest.skip("dlkernels was not built in this folder: there are no objects")
    listed = subprocess.run(["nm", "-C", str(built)], check=True, capture_output=True, text=True)
    symbols = [line[17:].split(" ", 1) for line in listed.stdout.splitlines()]
    shared = [(kind, name) for kind, name in symbols if kind.isupper() or kind in "uvw"]
    defined = [(kind, name) for kind, name in shared if kind != "U"]
    local = {kind for kind, _ in symbols} - {kind for kind, _ in shared}
    assert [name for _, name in defined] == [f"dlkernels::cpu::{isa}"], defined
    assert defined[0][0] in "DR" and "t" in local


def test_parallel_for_is_compiled_with_openmp():
    # Without -fopenmp at::parallel_for is a plain loop, and nothing but the speed tells.
    library = next(PACKAGE.glob("_C.*.so"))
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True
    )
    assert re.search(r"\b(GOMP_parallel|__kmpc_fork_call)\b", listed.stdout)


def test_ops_run_on_as_many_threads_as_torch_has(python):
    # Threads are counted and not timed: the pool is made by the first region that forks.
    program = """
import os, sys
import torch, dlkernels
threads = int(sys.argv[1])
torch.set_num_threads(threads)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
x = torch.empty(600, 600)
dlkernels.functional.linear(x, x)
assert dlkernels.stats()["linear"]["kernel"] == 1
assert count() - before == threads - 1, (before, count())
"""
    for threads in ("1", "2", "3"):
        python("-c", program, threads)


def test_the_example_in_the_readme(python):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    done = python(example + "\nimport json; print(json.dumps(dlkernels.stats()))")
    stats = json.loads(done.stdout.splitlines()[-1])
    ran = {op for op, count in stats.items() if count["kernel"]}
    assert ran >= {"mlp", "mlp_backward", "cross_entropy", "adam_"}
    assert not any(count["torch"] for count in stats.values())


# ---- to build it ----------------------------------------------------------------------------


def test_torch_on_pythonpath_is_found_in_isolation(tmp_path):
    """pip puts a PYTHONPATH of its own in the place of the one that it was started with."""
    torchs, overlay = tmp_path / "torchs", tmp_path / "overlay"
    (torchs / "torch").mkdir(parents=True)
    (torchs / "torch" / "__init__.py").write_text(f"__version__ = {torch.__version__!r}")
    overlay.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        found = importlib.util.find_spec(name).submodule_search_locations[0]
        (overlay / name).symlink_to(found)
    build = "import build_backend as b; b.require_torch(); import torch; print(torch.__file__)"
    pip = f"""
import os, subprocess, sys
path = os.pathsep.join([{str(ROOT)!r}, {str(overlay)!r}])
env = dict(os.environ, PYTHONPATH=path)
sys.exit(subprocess.run([sys.executable, "-S", "-c", {build!r}], env=env).returncode)
"""
    for path in (str(torchs), "torchs"):
        done = subprocess.run(
            [sys.executable, "-c", pip],
            env=os.environ | {"PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == str(torchs / "torch" / "__init__.py"), done.stderr


@pytest.mark.parametrize("cxx", ["no-such-c++ -v", ""])
def test_no_compiler_is_one_sentence(cxx, tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"CXX": cxx},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last_line(done).startswith("dlkernels: no C++ compiler") and "set CXX" in last_line(done)
