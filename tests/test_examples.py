"""The scripts of examples/ at reduced size; train_digits.py has a file of its own."""

import importlib
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from support.common import calls

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LINEAR = {"linear", "linear_backward"}
MLP = LINEAR | {"mlp", "mlp_backward"}
CNN = {"conv2d", "conv2d_backward", "relu", "relu_backward", "max_pool2d", "max_pool2d_backward"}
OPTIMIZERS = {"sgd_", "adagrad_", "adadelta_", "rmsprop_", "adam_"}
SCRIPTS = {  # arguments, our ops that run, and the part of the first loss that the last may be
    "circles": (("--epochs", 300), LINEAR | {"adam_"}, 0.6),
    "cnn_regularised": (
        ("--epochs", 2),
        CNN | LINEAR | {"linear_relu", "cross_entropy", "adam_"},
        0.7,
    ),
    "digits_3_vs_7": (("--epochs", 6), MLP | {"sgd_"}, 0.3),
    "linear_regression": (("--epochs", 3), LINEAR | {"sgd_"}, 0.7),
    "optimizers": (("--epochs", 20), LINEAR | OPTIMIZERS, 0.5),
    "schedules": (("--epochs", 9), LINEAR | {"sgd_"}, 0.5),
}
scripts = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture
def module(call_example):
    """Imports a module of examples/."""
    return importlib.import_module


@pytest.fixture
def reports(module, monkeypatch):
    """The histories that the scripts report."""
    results, got = module("results"), []
    report = results.report

    def record(path, title, histories, *args):
        got.append(histories)
        report(path, title, histories, *args)

    monkeypatch.setattr(results, "report", record)
    return got


def test_every_script_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert names == {*SCRIPTS, "train_digits"}


@scripts
def test_both_learn_and_their_curves_agree(call_example, reports, tmp_path, name):
    args, ops, part = SCRIPTS[name]
    with calls(ops):
        out, _ = call_example(name, *args)
    for words in ("torch", "dlkernels", "speed-up", f"{name}.png"):
        assert words in out
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for history in reports[0].values():
        assert len(history) == args[1]
        assert history[-1]["dlkernels"]["loss"] < part * history[0]["dlkernels"]["loss"]
        for epoch in history:
            assert epoch["torch"]["loss"] == pytest.approx(epoch["dlkernels"]["loss"], rel=1e-3)


@scripts
@pytest.mark.parametrize("kernels", ["torch", "dlkernels"])
def test_one_side_alone(call_example, reports, name, kernels):
    out, _ = call_example(name, "--epochs", 1, "--kernels", kernels, "--plot", "here.png")
    assert "speed-up" not in out and "here.png" in out
    for history in reports[0].values():
        assert [*history[0]] == [kernels]


@scripts
def test_ctrl_c_leaves_nothing_behind(call_example, module, monkeypatch, tmp_path, name):
    @contextmanager
    def interrupted(total):
        yield lambda: signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module("harness"), "progress", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    _, complaint = call_example(name, code=130)
    assert complaint == "stopped by Ctrl-C\n"
    assert not [*tmp_path.iterdir()]


@scripts
@pytest.mark.parametrize(
    "args",
    [("--epochs", "0"), ("--kernels", "magic"), ("--seed", "-1"), ("--plot", "nowhere/here.png")],
    ids=" ".join,
)
def test_bad_arguments_of_all(call_example, name, args):
    assert_refused(call_example, name, args)


@pytest.mark.parametrize(
    "name, args",
    [
        ("circles", ("--lr", "nan")),
        ("cnn_regularised", ("--patience", "0")),
        ("digits_3_vs_7", ("--lr", "2")),
        ("optimizers", ("--batch-size", "0")),
        ("schedules", ("--batch-size", "many")),
    ],
)
def test_bad_arguments_of_one(call_example, name, args):
    assert_refused(call_example, name, args)


def assert_refused(call_example, name, args):
    _, complaint = call_example(name, *args, code=2)
    last = complaint.strip().splitlines()[-1]
    assert last.startswith(f"{name}.py: error: argument {args[0]}: ")


def test_bar_moves_where_a_terminal_watches(call_example, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out, _ = call_example("linear_regression", "--epochs", 1)
    assert "training" in out and "100%" in out


def test_as_a_process_without_a_warning(tmp_path):
    command = [sys.executable, EXAMPLES / "schedules.py", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_distances_to_the_mean_images(module):
    digits = module("digits_3_vs_7")
    (x, y), (test_x, _) = digits.load_3_and_7()
    means = torch.stack([x[y[:, 0] == label].mean(0) for label in (0, 1)])
    apart = test_x.double()[:, None] - means.double()
    exact = {"L1": apart.abs().sum(2), "L2": apart.square().sum(2)}
    exact["L2 as linear"] = exact["L2"]
    providers = digits.distances(test_x, means)
    assert [len(functions) for functions in providers.values()] == [2, 2, 3, 1]
    for functions in providers.values():
        for name, f in functions.items():
            got = torch.as_tensor(f(), dtype=torch.float64)
            # Of sums of 784 terms as large as |x|^2, which is below 784.
            torch.testing.assert_close(got, exact[name], rtol=0, atol=784 * 784 * 2**-24)


def test_digits_3_vs_7_compares_the_accuracies(call_example):
    out, _ = call_example("digits_3_vs_7", "--epochs", 10, "--kernels", "dlkernels")
    line = next(line for line in out.splitlines() if "dlkernels" in line and "%" in line)
    accuracies = [float(cell.rstrip("% ")) for cell in line.split("│")[2:-1]]
    assert len(accuracies) == 4 and min(accuracies) > 95


def test_schedules_lower_the_learning_rate(call_example, reports):
    call_example("schedules", "--epochs", 10, "--lr", 0.01)
    rates = {
        name: [epoch["dlkernels"]["lr"] for epoch in history]
        for name, history in reports[0].items()
    }
    assert rates["constant"] == [0.01] * 10
    assert rates["step"] == pytest.approx([1e-2] * 4 + [1e-3] * 4 + [1e-4] * 2)
    assert rates["exponential"] == pytest.approx([0.01 * 0.01 ** (i / 10) for i in range(10)])
    cosine = 0.005 * (1 + torch.cos(torch.pi * torch.arange(10) / 10))
    assert rates["cosine"] == pytest.approx(cosine.tolist())


def test_early_stopping_takes_the_best_weights(call_example, reports):
    args = "--epochs", 30, "--patience", 1, "--lr", 0.1, "--kernels", "dlkernels"
    out, _ = call_example("cnn_regularised", *args)
    losses = [epoch["dlkernels"]["held_out"] for epoch in reports[0]["cnn"]]
    assert len(losses) < 30 and losses[-1] >= min(losses[:-1])
    assert losses[:-1] == sorted(losses[:-1], reverse=True)
    assert f"the weights of epoch {len(losses) - 1}" in out


def test_a_diverging_run_still_reports(call_example, reports):
    call_example("schedules", "--lr", 1, "--epochs", 2, "--kernels", "torch")
    assert not torch.tensor(reports[0]["constant"][-1]["torch"]["loss"]).isfinite()
