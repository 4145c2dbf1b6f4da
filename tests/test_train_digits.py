"""examples/train_digits.py as a user runs it: its output, its files, its exit code.

Where the process itself matters (signals, limits, resuming, what ran) it is one; elsewhere the
script is called in this one, which saves the seconds that importing torch takes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_digits.py"


@pytest.fixture
def call(call_example):
    return partial(call_example, "train_digits")


@pytest.fixture
def run(tmp_path):
    """Runs the script as a process in an empty folder: its output, its complaint."""

    def run(*args, code=0, **options):
        done = subprocess.run(
            [sys.executable, SCRIPT, *map(str, args)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            **options,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    return run


def load(path):
    return torch.load(path, weights_only=True)


def curves(path):
    """Losses and accuracies of a checkpoint; the seconds differ from run to run."""
    return [
        {run: (results["loss"], results["accuracy"]) for run, results in epoch.items()}
        for epoch in load(path)["history"]
    ]


def assert_one_sentence(complaint, words):
    assert len(complaint.strip().splitlines()) == 1, complaint
    assert words in complaint


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_both_print_a_table_and_draw_equal_curves(call, tmp_path, model):
    out, _ = call("--model", model, "--epochs", 2, "--checkpoint", "run.pt")
    for words in ("torch", "dlkernels", "speed-up", "apart"):
        assert words in out
    picture = f"train_digits_{model}.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pt", picture]
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for epoch in curves(tmp_path / "run.pt"):
        assert epoch["torch"][0] == pytest.approx(epoch["dlkernels"][0], rel=1e-3)


# As a process of its own, whose counts are those of the script alone.
COUNTED = """
import json, runpy, sys
import dlkernels
script = sys.argv[1]
sys.argv = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
runpy.run_path(script, run_name="__main__")
print(json.dumps(dlkernels.stats()))
"""
OPS = {
    "mlp": {"mlp", "cross_entropy", "adam_"},
    "cnn": {"conv2d_relu_max_pool2d", "mlp", "cross_entropy", "adam_"},
}


@pytest.mark.parametrize("model, least", [("mlp", 0.97), ("cnn", 0.98)])
def test_default_settings_reach_the_promised_accuracy_on_our_kernels(tmp_path, model, least):
    args = ["--model", model, "--kernels", "dlkernels", "--checkpoint", "run.pt"]
    command = [sys.executable, "-c", COUNTED, str(SCRIPT), *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    history = [epoch["dlkernels"] for epoch in curves(tmp_path / "run.pt")]
    (first_loss, _), (loss, accuracy) = history[0], history[-1]
    assert accuracy >= least
    assert loss < first_loss / 10
    stats = json.loads(done.stdout.splitlines()[-1])
    assert {op for op, count in stats.items() if count["kernel"]} >= OPS[model]
    assert not {op for op, count in stats.items() if count["torch"]}


def test_resumed_run_repeats_the_uninterrupted_one(run, tmp_path):
    common = ("--seed", 3, "--threads", 1)
    run(*common, "--epochs", 4, "--checkpoint", "whole.pt")
    run(*common, "--epochs", 2, "--checkpoint", "parts.pt", "--resume")  # nothing there yet: starts
    out, _ = run(*common, "--epochs", 4, "--checkpoint", "parts.pt", "--resume")
    assert "resumed after epoch 2" in out
    assert curves(tmp_path / "whole.pt") == curves(tmp_path / "parts.pt")
    whole, parts = (load(tmp_path / name)["runs"] for name in ("whole.pt", "parts.pt"))
    for kernels in ("torch", "dlkernels"):
        for key, value in whole[kernels]["model"].items():
            assert torch.equal(value, parts[kernels]["model"][key]), (kernels, key)


@pytest.fixture
def checkpoint(call, tmp_path):
    call("--kernels", "dlkernels", "--epochs", 1, "--checkpoint", "run.pt")
    return tmp_path / "run.pt"


RESUME = ("--kernels", "dlkernels", "--checkpoint", "run.pt", "--resume")


def test_truncated_checkpoint_is_refused_and_left_alone(run, checkpoint):
    half = checkpoint.read_bytes()[: checkpoint.stat().st_size // 2]
    checkpoint.write_bytes(half)
    assert_one_sentence(run(*RESUME, code=1)[1], "not a whole checkpoint")
    assert checkpoint.read_bytes() == half


def test_foreign_checkpoints_are_refused_and_left_alone(call, checkpoint):
    def refused(words, *args):
        before = checkpoint.read_bytes()
        assert_one_sentence(call(*RESUME, *args, code=1)[1], words)
        assert checkpoint.read_bytes() == before

    refused("made with model mlp, not cnn", "--model", "cnn")
    refused("made with kernels dlkernels, not both", "--kernels", "both")
    refused("made with seed 0, not 1", "--seed", 1)
    assert "add --resume" in call(*RESUME[:-1], code=2)[1]

    saved = load(checkpoint)
    saved["runs"]["dlkernels"]["model"] = {"0.weight": torch.zeros(2, 2)}
    for foreign in (saved, {"weight": torch.zeros(2)}, torch.zeros(2)):
        torch.save(foreign, checkpoint)
        refused("not a whole checkpoint")
    for content in (b"", b"hello, world\n" * 100):
        checkpoint.write_bytes(content)
        refused("not a whole checkpoint")


def test_disk_error_is_one_sentence_and_keeps_the_old_checkpoint(run, checkpoint, tmp_path):
    resource = pytest.importorskip("resource")

    def small_files_only():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    before = checkpoint.read_bytes()
    _, complaint = run(*RESUME, "--epochs", 2, code=1, preexec_fn=small_files_only)
    assert_one_sentence(complaint, "File too large")
    assert checkpoint.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_ctrl_c_keeps_the_last_whole_epoch(call, tmp_path):
    args = ("--epochs", "100000", "--checkpoint", "run.pt")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *args],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell without job control ignores SIGINT and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert_one_sentence(err, "stopped by Ctrl-C")
    assert "speed-up" in out and (tmp_path / "train_digits_mlp.png").exists()
    assert not list(tmp_path.glob("*.tmp"))
    epochs = len(curves(tmp_path / "run.pt"))
    out, _ = call("--epochs", epochs + 1, "--checkpoint", "run.pt", "--resume")
    assert f"resumed after epoch {epochs}" in out


@pytest.mark.parametrize(
    "args",
    [
        ("--epochs", "0"),
        ("--epochs", "-3"),
        ("--epochs", "many"),
        ("--batch-size", "0"),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--threads", "0"),
        ("--seed", "-1"),
        ("--model", "transformer"),
        ("--kernels", "magic"),
        ("--checkpoint", "nowhere/run.pt"),
        ("--plot", "."),
        ("--resume",),
    ],
    ids=" ".join,
)
def test_bad_arguments(call, args):
    _, complaint = call(*args, code=2)
    last = complaint.strip().splitlines()[-1]
    assert last.startswith(f"train_digits.py: error: argument {args[0]}: ")


def test_mnist_without_torchvision_says_so(call, monkeypatch):
    for name in ("torchvision", "torchvision.datasets"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, name, None)
    assert_one_sentence(call("--data", "mnist", code=1)[1], "needs torchvision")


def test_mnist_comes_from_torchvision(run, tmp_path):
    # torchvision's interface with few invented images: the path is tested without a download.
    package = tmp_path / "stand_in" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "datasets.py").write_text(
        "import torch\n"
        "class MNIST:\n"
        "    def __init__(self, root, train=True, download=False):\n"
        "        n, g = (300 if train else 100), torch.Generator().manual_seed(0)\n"
        "        self.data = torch.randint(256, (n, 28, 28), generator=g, dtype=torch.uint8)\n"
        "        self.targets = torch.randint(10, (n,), generator=g)\n"
    )
    path = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))
    out, _ = run("--data", "mnist", "--epochs", 1, env=os.environ | {"PYTHONPATH": path})
    assert "MLP on mnist" in out
