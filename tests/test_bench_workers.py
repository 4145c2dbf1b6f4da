"""Nothing that a peer does ends the benchmark, and one that was interrupted goes on."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from dlkernels.__main__ import main
from dlkernels.benchmarks import suite
from dlkernels.benchmarks.timing import Failed, Others, cpu_time
from dlkernels.benchmarks.worker import Workers
from support import planted
from support.planted import FIRST, LATER, Planted


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(suite, "fma_roof", lambda: 1e9)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs `dlkernels bench` with peers that do (what, in which call): the results."""

    def run(*peers, kind=Planted):
        cases = [kind(1 << 10, *peer, tmp_path) for peer in peers]
        jobs = {str(case): partial(suite.run, case, "forward", True) for case in cases}
        monkeypatch.setitem(suite.JOBS, "relu", lambda quick: jobs)
        assert not main(["bench", "relu", "--json", str(tmp_path / "b.json")])  # exit status 0
        return json.loads((tmp_path / "b.json").read_text())["results"]

    return run


def test_a_peer_that_fails_is_a_line(bench, tmp_path, capsys):
    results = bench((planted.aborts, LATER), (planted.raises, FIRST), (planted.computes, FIRST))
    failed = ["died: SIGABRT: the last line", "MemoryError", None]
    assert [result["failed"].get("jax planted") for result in results] == failed
    assert "failed: jax planted, aborts: died: SIGABRT: the last line" in capsys.readouterr().out
    for result in results:
        assert {*result["providers"], *result["failed"]} == set(Planted.providers)
        assert all(len(p["seconds"]) >= 10 for p in result["providers"].values())
    peer = results[-1]["providers"]["jax planted"]
    assert peer["error"] == 0 and 1e-3 < min(filter(None, peer["seconds"])) < 1
    # Who has died gets another process, who has raised does not.
    died, raised, last = (
        (tmp_path / str(name)).read_text() for name in ("aborts", "raises", "computes")
    )
    assert died != raised == last and not Path(f"/proc/{last}").exists() and not Others.children


def test_torch_compile_is_tried_elsewhere(bench):
    peers = (planted.aborts, FIRST), (planted.computes, FIRST)
    died, works = bench(*peers, kind=planted.PlantedCompile)
    assert died["failed"] == {"compile planted": "died: SIGABRT: the last line"}
    assert set(died["providers"]) == {"torch", "dlkernels"}
    assert set(works["providers"]) == set(planted.PlantedCompile.providers)


def test_a_peer_that_hangs_is_a_line(bench, monkeypatch):
    monkeypatch.setattr("dlkernels.benchmarks.worker.LIMIT", 0.5)
    (result,) = bench((planted.hangs, FIRST))
    assert result["failed"] == {"jax planted": "gave no answer within 0.5 s"}
    assert set(result["providers"]) == {"torch", "dlkernels"} and not Others.children


def test_our_own_failure_is_an_error(bench, monkeypatch):
    def ours(case, inputs):
        raise MemoryError

    monkeypatch.setitem(Planted.providers, "dlkernels", ours)
    monkeypatch.delitem(Planted.providers, "jax planted")
    with pytest.raises(RuntimeError, match=r"^dlkernels: MemoryError$"):
        bench((planted.computes, FIRST))


def test_ctrl_c_leaves_no_process(bench, tmp_path, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
    with pytest.raises(SystemExit) as stop:
        bench((planted.interrupts, FIRST))
    signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and "stopped by Ctrl-C" in capsys.readouterr().err
    assert not Path(f"/proc/{(tmp_path / 'interrupts').read_text()}").exists()


def test_a_worker_that_is_killed():
    with Workers() as workers:
        workers["jax"].begin(planted.computes)
        assert Others.children == {workers["jax"].process.pid}  # its CPU time is not others'
        os.kill(workers["jax"].process.pid, signal.SIGKILL)
        with pytest.raises(Failed, match=r"^died: SIGKILL, as when memory runs out"):
            workers["jax"].answer()
    assert cpu_time(os.getpid()) == pytest.approx(sum(os.times()[:4]), abs=0.1)


# ---- going on ---------------------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path, monkeypatch, capsys):
    """Runs `dlkernels bench` on two jobs: what ran, what is in the file, what was said."""
    provider = {"seconds": [1.0] * 5, "error": 0.0}
    result = {
        **{"op": "relu", "case": "8", "mode": "forward", "small": False, "failed": {}},
        **{"roofs": {"memory": 1.0}, "busy_cores": 0.0},
        "providers": {"torch": provider, "dlkernels": provider},
    }

    def run(interrupted=False, options=()):
        ran = []

        def job(name, machine, workers):
            if interrupted and name == "b":
                raise KeyboardInterrupt
            ran.append(name)
            return result

        known = {name: partial(job, name) for name in "ab"}
        monkeypatch.setitem(suite.JOBS, "relu", lambda quick: known)
        arguments = ["bench", "relu", "--json", str(tmp_path / "b.json"), *options]
        if interrupted:
            with pytest.raises(SystemExit):
                main(arguments)
        else:
            main(arguments)
        found = json.loads((tmp_path / "b.json").read_text())
        done = [result["job"] for result in found["results"]], found["complete"]
        return ran, done, capsys.readouterr().out

    return run


def test_an_interrupted_benchmark_goes_on(jobs, tmp_path):
    ran, done, _ = jobs(interrupted=True)
    assert ran == ["a"] and done == (["a"], False)
    ran, done, out = jobs()
    assert ran == ["b"] and done == (["a", "b"], True)
    assert f"goes on from 1 of 2 results in {tmp_path / 'b.json'}" in out
    ran, done, out = jobs()  # a complete one starts anew
    assert ran == ["a", "b"] and done == (["a", "b"], True) and "goes on" not in out


@pytest.mark.parametrize("change", ["threads", "environment", "build", "quick", "no JSON"])
def test_another_machine_starts_anew(jobs, tmp_path, monkeypatch, change):
    jobs(interrupted=True)
    options = ["--quick"] if change == "quick" else []
    if change == "threads":
        monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    elif change == "environment":
        monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    elif change == "build":
        monkeypatch.setattr(suite, "build", lambda: "another")
    elif change == "no JSON":
        (tmp_path / "b.json").write_text('{"complete": fal')
    ran, done, out = jobs(options=options)
    assert ran == ["a", "b"] and done == (["a", "b"], True) and "goes on" not in out


def test_what_is_written_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "b.json"
    suite.save(file, {}, False, {"a": {}})
    before = file.read_text()

    def fills_the_disk(path, text):
        path.write_bytes(text.encode()[:9])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", fills_the_disk)
    with pytest.raises(OSError, match="no space"):
        suite.save(file, {}, False, {"a": {}, "b": {}})
    assert file.read_text() == before
