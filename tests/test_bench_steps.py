"""Whole steps: every provider trains the same model, and processes of theirs are timed."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dlkernels.benchmarks import models, report, steps
from dlkernels.benchmarks.models import MODELS


def losses(build, model, n=4):
    step = build(model, 8)
    return [float(step()) for _ in range(n)]


@pytest.mark.parametrize("provider", models.PROVIDERS)
@pytest.mark.parametrize("name", MODELS)
def test_every_provider_trains_the_same_model(ieee, name, provider):
    if provider in ("jax", "tensorflow"):
        pytest.importorskip(provider)
    if provider == "compile" and name != "lenet":
        pytest.skip("takes seconds, and LeNet has every layer")
    exact = losses(lambda *a: models.torch_step(*a, dtype=torch.float64), MODELS[name])
    assert losses(models.PROVIDERS[provider], MODELS[name]) == pytest.approx(exact, rel=1e-4)
    assert exact[-1] < exact[0]


def test_processes_are_timed(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)  # whose dlkernels is not built
    names = ["torch", "nonsense", "dlkernels"]
    result = steps.run("mlp", 32, names, busy=True, quick=True)
    assert list(result["providers"]) == ["torch", "dlkernels"]
    for provider in result["providers"].values():
        seconds = [s for s in provider["seconds"] if s]
        assert len(seconds) >= 5 and all(1e-5 < s < 1 for s in seconds)
        assert provider["error"] < 1e-5 and 1e5 < provider["peak"] < 1e9
    assert result["failed"] == {"nonsense": "KeyError: 'nonsense'"}
    report.show([result])
    assert "failed" in capsys.readouterr().out
    text = report.markdown_table(*report.all_steps_table([result]))
    assert "| a step takes | MLP 784-256-10, batch 32, a core busy |" in text


def test_results_without_us_or_peers_are_shown_as_failed(capsys):
    result = steps.run("mlp", 32, ["torch", "nonsense"], busy=False, quick=True)
    report.show([result])
    assert "failed: nonsense, MLP 784-256-10, batch 32: KeyError" in capsys.readouterr().out
    assert list(report.tables([result])) == [
        "Time and peak memory of all; tuned: after dlkernels.tune_allocator()"
    ]


def test_our_own_failure_is_an_error():
    with pytest.raises(RuntimeError, match=r"^dlkernels nonsense: KeyError: "):
        steps.run("mlp", 32, ["dlkernels nonsense"], busy=False, quick=True)


def test_another_allocator_is_no_error(monkeypatch):
    monkeypatch.setattr("dlkernels.tune_allocator", lambda: False)
    here = SimpleNamespace()  # a worker's part, in this process
    here.begin = lambda job, *args: setattr(here, "answer", partial(next, job(*args)))
    failed = {}
    assert not steps.begin(["dlkernels tuned"], "mlp", 32, {"dlkernels tuned": here}, failed)
    assert failed == {"dlkernels tuned": "the allocator is not glibc's"}


def test_jobs():
    assert list(steps.jobs("mlp", quick=False)) == ["step mlp 32", "step mlp 256"]
    assert list(steps.jobs("mlp", quick=True, busy=True)) == ["step mlp 32 busy"]
    quick = steps.providers(MODELS["cnn"], quick=True)
    assert "torch" in quick and "tensorflow" not in quick
    assert "dlkernels channels_last" not in steps.providers(MODELS["mlp"], quick=False)
