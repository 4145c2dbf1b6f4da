"""The benchmarks compare like with like, and their command line works."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import dlkernels.benchmarks
from dlkernels.__main__ import main
from dlkernels.benchmarks import report, suite
from dlkernels.benchmarks.timing import Failed, interleave, median, ratio
from dlkernels.benchmarks.worker import Workers

SMALL = [
    pytest.param(case, mode, id=f"{op} {mode}")
    for op in suite.OPS
    for case in suite.cases(op)[:1]
    for mode in case.modes
]


@pytest.fixture(scope="module")
def workers():
    with Workers() as workers:
        yield workers


@pytest.mark.parametrize(("case", "mode"), SMALL)
def test_every_provider_computes_the_same(case, mode, workers):
    # prepare() itself checks that there are as many results, of the same shapes.
    _, errors, failed = suite.prepare(case, mode, suite.providers(case), workers)
    assert not failed
    assert {"python", "numpy", "torch", "compile", "dlkernels"} <= set(errors)
    assert all(error < 5e-6 for error in errors.values()), errors


def test_an_error_is_seen():
    case = suite.cases("relu")[0]
    off = {"off": lambda case, inputs: (lambda: [inputs["x"] * 1.01], lambda results: results)}
    assert "off by" in suite.prepare(case, "forward", off)[2]["off"]


@pytest.mark.parametrize("op", suite.OPS)
def test_every_case_counts_its_work(op):
    for case in suite.cases(op):
        work = [(case.flops(mode), case.bytes(mode)) for mode in case.modes]
        assert work == sorted(work) and all(size > 0 for _, size in work)
    assert len(suite.cases(op, quick=True)) == 3
    quick = suite.providers(suite.cases(op)[1], quick=True)
    assert "torch" in quick and not {"python", "compile", "tensorflow"} & set(quick)


# ---- timing -----------------------------------------------------------------------------------


@pytest.fixture
def fake_clock(monkeypatch):
    """Time that passes only where a step says so."""
    now = [0.0]

    def passes(seconds):
        now[0] += seconds

    monkeypatch.setattr("dlkernels.benchmarks.timing.clock", lambda: now[0])
    monkeypatch.setattr("time.sleep", passes)
    return passes


def test_interleave(fake_clock):
    steps = {"a": lambda: fake_clock(0.001), "b": lambda: fake_clock(0.004)}
    times = interleave(steps, {}, rounds=8, seconds=0)
    assert [len(t) for t in times.values()] == [8, 8]
    assert ratio(times["b"], times["a"]) == pytest.approx([4, 4, 4])
    assert median(times["b"]) == pytest.approx(0.004)


def test_interleave_lets_slow_steps_sit_out(fake_clock):
    steps = {"slow": lambda: fake_clock(3.0), "quick": lambda: fake_clock(0.001)}
    times = interleave(steps, {}, rounds=30, seconds=0)
    assert [t is None for t in times["slow"]] == [False] * 5 + [True] * 25
    assert None not in times["quick"]
    assert ratio(times["slow"], times["quick"])[1] == pytest.approx(3000)


def test_interleave_ends_when_all_sit_out(fake_clock):
    assert len(interleave({"slow": lambda: fake_clock(3.0)}, {})["slow"]) == 5


def test_interleave_goes_on_without_who_fails(fake_clock):
    calls = []

    def fails(at):
        calls.append(at)
        fake_clock(0.004)
        if len(calls) == at:
            raise MemoryError("no room\nfor it")

    def apart():
        raise Failed("died: SIGABRT")

    for name in ("a", "dlkernels"):
        for at in (1, 2, 9):  # while it is prepared, and in a batch
            calls.clear()
            steps, failed = {"torch": lambda: fake_clock(0.001), name: partial(fails, at)}, {}
            if name == "dlkernels":
                with pytest.raises(RuntimeError, match=r"^dlkernels: MemoryError: no room$"):
                    interleave(steps, failed, rounds=8, seconds=0)
                continue
            times = interleave(steps, failed, {"b": apart}, rounds=8, seconds=0)
            assert list(times) == ["torch"] and len(times["torch"]) == 8
            assert failed == {"a": "MemoryError: no room", "b": "died: SIGABRT"}


# ---- command line -----------------------------------------------------------------------------


def test_bench(tmp_path, capsys):
    found, picture = tmp_path / "b.json", tmp_path / "b.svg"
    pages = [tmp_path / name for name in (report.README, report.TABLES)]
    for page in pages:
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    options = ["--json", found, "--plot", picture, "--write", tmp_path]
    main(["bench", "cross_entropy", "--quick", *map(str, options)])
    out = capsys.readouterr().out
    assert "128x1000" in out and "a Python loop" in out

    found = json.loads(found.read_text())
    assert found["machine"]["flops_per_second"] > 1e9 and found["machine"]["versions"]["torch"]
    small, *cases = found["results"]
    assert small["small"] and "python" in small["providers"]
    assert [case["case"] for case in cases] == ["128x1000", "4096x1000"]
    for result in found["results"]:
        assert result["roofs"]["memory"] > 0
        for provider in result["providers"].values():
            assert len(provider["seconds"]) >= 5 and math.isfinite(provider["error"])

    for plot in (picture, tmp_path / report.PLOT):
        assert plot.read_text().lstrip().startswith("<?xml")
    readme, docs = (page.read_text() for page in pages)
    for text in (readme, docs):
        assert text.startswith(f"before\n{report.BEGIN}") and text.endswith(f"{report.END}after\n")
        assert "old" not in text and f"torch {torch.__version__}" in text
    assert "\n| cross_entropy | 2 | " in readme and "128x1000" not in readme
    assert "](speed.svg)" in docs and "| cross_entropy | 128x1000 |" in docs


# As `make bench` does. One of our modules was named as a package that torch imports: `cuda`.
def test_bench_runs_beside_its_modules():
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    command = [sys.executable, "-m", "dlkernels", "bench", "--help"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["conv3d"], "argument OP: invalid choice: 'conv3d' (choose from linear_relu, "),
        (["--threads", "0"], "argument --threads: must be from 1 to "),
        (["--json", "/no/such/folder/b.json"], "argument --json: must be a file in an existing"),
        (["--plot", "bench.txt"], "argument --plot: must end in .svg or .png"),
        (["--write", "none"], "argument --write: 'none/README.md' has no bench markers"),
    ],
)
def test_bad_arguments(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *args])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    for name in ("suite", "report"):
        monkeypatch.delitem(sys.modules, f"dlkernels.benchmarks.{name}")
        monkeypatch.delattr(dlkernels.benchmarks, name)
    for name in [name for name in sys.modules if name.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as stop:
        main(["bench"])
    message = "dlkernels bench needs rich: pip install 'dlkernels[bench]'\n"
    assert stop.value.code == 1 and capsys.readouterr().err == message


def test_slower_is_seen():
    header = ["op", "ratio [quartiles]"]
    table = report.markdown_table(header, [["a", "0.99 [0.9, 1.1]"], ["b", "1.01 [0.9, 1.1]"]])
    assert "| **0.99 [0.9, 1.1]** |" in table and "| 1.01 [0.9, 1.1] |" in table


def test_summary():
    def result(op, case, mode="forward+backward", small=False, **seconds):
        providers = {name.replace("_", " "): {"seconds": [s] * 5} for name, s in seconds.items()}
        return {"op": op, "case": case, "mode": mode, "small": small, "providers": providers}

    header, rows = report.summary_table(
        [
            result("conv", "a", torch=4, compile=8, dlkernels=2, dlkernels_channels=1),
            result("conv", "b", torch=1, compile=0.5, dlkernels=2, dlkernels_channels=1),
            result("conv", "b", mode="forward", torch=1, dlkernels=9),
            result("conv", "c", small=True, torch=1, dlkernels=9),
            result("step", "MLP", mode="train", small=False, jax=3, dlkernels=1),  # torch failed
        ]
    )
    assert rows == [
        ["conv", "2", "1 (0.5 to 2)", "1.41 (0.5 to 4)"],
        ["step of MLP", "1", "", "3"],
    ]
    assert report.is_slower(header[2], "0.99 (0.5 to 2)")


def test_inputs_repeat():
    case = suite.cases("conv2d_relu")[0]
    one, two = case.arrays("forward"), case.arrays("forward")
    assert all(np.array_equal(one[name], two[name]) for name in one) and "grad_y" not in one
