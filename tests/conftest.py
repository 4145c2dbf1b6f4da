"""Every test that takes `machine` runs on each instruction set, with one thread and with two."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import dlkernels
from dlkernels import _C

ISAS = [isa for isa in ("baseline", "avx2", "avx512") if _C.set_isa(isa)]  # the last is the best


@pytest.fixture(
    params=[(isa, threads) for isa in ISAS for threads in (1, 2)], ids="{0[0]}-{0[1]}".format
)
def machine(request):
    isa, threads = request.param
    before = torch.get_num_threads()
    _C.set_isa(isa)
    torch.set_num_threads(threads)
    yield isa
    torch.set_num_threads(before)
    _C.set_isa(ISAS[-1])


@pytest.fixture
def ieee():
    """For tests that compare with the error of PyTorch's direct convolution."""
    with dlkernels.set_precision("ieee"):
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def call_example(tmp_path, monkeypatch, capsys):
    """Runs a script of examples/ in this process, in an empty folder: its output, its complaint."""
    examples = Path(__file__).resolve().parents[1] / "examples"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(examples)
    threads = torch.get_num_threads()

    def call(name, *args, code=0):
        path = examples / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, args)])
        spec = importlib.util.spec_from_file_location(name, path)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        try:
            script.harness.run(script.main)
            complaint = ""
        except SystemExit as stop:
            # Python prints a text and exits with 1.
            complaint = stop.code if isinstance(stop.code, str) else ""
            assert code == (1 if complaint else stop.code)
        else:
            assert code == 0
        out, err = capsys.readouterr()
        return out, complaint or err

    yield call
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` need a GPU and our kernels for it."""
    reason = "there is no GPU" if not torch.cuda.is_available() else dlkernels.info()["cuda_reason"]
    if reason:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=reason))
