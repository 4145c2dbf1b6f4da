"""examples/train_digits.py as a user runs it: a process, its output, its files, its exit code."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_digits.py"


def command(*args):
    return [sys.executable, str(SCRIPT), *map(str, args)]


@pytest.fixture
def run(tmp_path):
    # From an empty folder, so that the installed package is imported and not the source tree.
    def call(*args, code=0, env=None):
        done = subprocess.run(
            command(*args),
            cwd=tmp_path,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


def one_sentence(done):
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def curves(path):
    """The learning curves of a checkpoint; the seconds differ from run to run and are left out."""
    runs = torch.load(path, weights_only=True)["runs"]
    return {k: (r["history"]["loss"], r["history"]["accuracy"]) for k, r in runs.items()}


def assert_same_weights(a, b):
    a, b = (torch.load(path, weights_only=True)["runs"] for path in (a, b))
    assert a.keys() == b.keys()
    for kernels in a:
        assert a[kernels]["model"].keys() == b[kernels]["model"].keys()
        for key, value in a[kernels]["model"].items():
            assert torch.equal(value, b[kernels]["model"][key]), (kernels, key)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_both_print_a_table_and_draw_equal_curves(run, tmp_path, model):
    done = run("--model", model, "--epochs", 2, "--threads", 2, "--checkpoint", "run.pt")
    for word in (
        "torch",
        "dlkernels",
        "speed-up",
        "largest difference between the two loss curves",
    ):
        assert word in done.stdout
    assert (tmp_path / f"train_digits_{model}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run.pt",
        f"train_digits_{model}.png",
    ]
    loss = {kernels: curve[0] for kernels, curve in curves(tmp_path / "run.pt").items()}
    assert loss["torch"] == pytest.approx(loss["dlkernels"], rel=1e-3)


@pytest.mark.parametrize("model, least", [("mlp", 0.97), ("cnn", 0.98)])
def test_default_settings_reach_the_promised_accuracy(run, tmp_path, model, least):
    run("--model", model, "--kernels", "dlkernels", "--checkpoint", "run.pt")
    loss, accuracy = curves(tmp_path / "run.pt")["dlkernels"]
    assert accuracy[-1] >= least
    assert loss[-1] < loss[0] / 10


def test_one_kernels_has_no_speed_up_column(run):
    assert "speed-up" not in run("--epochs", 1, "--kernels", "torch").stdout


def test_resumed_run_repeats_the_uninterrupted_one(run, tmp_path):
    common = ("--model", "mlp", "--seed", 3, "--threads", 1)
    run(*common, "--epochs", 4, "--checkpoint", "whole.pt")
    run(*common, "--epochs", 2, "--checkpoint", "parts.pt", "--resume")  # nothing there yet: starts
    done = run(*common, "--epochs", 4, "--checkpoint", "parts.pt", "--resume")
    assert "resumed after epoch 2" in done.stdout
    assert curves(tmp_path / "whole.pt") == curves(tmp_path / "parts.pt")
    assert_same_weights(tmp_path / "whole.pt", tmp_path / "parts.pt")


def test_foreign_checkpoints_are_refused_and_left_alone(run, tmp_path):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    base = ("--kernels", "dlkernels", "--epochs", 1)
    run(*base, "--checkpoint", good)
    whole = good.read_bytes()

    other = torch.load(good, weights_only=True)
    other["runs"]["dlkernels"]["model"] = {"0.weight": torch.zeros(2, 2)}
    torch.save(other, bad)
    wrong_weights = bad.read_bytes()
    torch.save({"weight": torch.zeros(2)}, bad)
    cases = {
        whole[: len(whole) // 2]: "not a whole checkpoint",
        b"": "not a whole checkpoint",
        b"hello, world\n" * 100: "not a whole checkpoint",
        bad.read_bytes(): "not a whole checkpoint",
        wrong_weights: "does not fit the mlp model",
    }
    for content, reason in cases.items():
        bad.write_bytes(content)
        assert reason in one_sentence(run(*base, "--checkpoint", bad, "--resume", code=1))
        assert bad.read_bytes() == content

    for option, value in (("--model", "cnn"), ("--kernels", "both"), ("--seed", 1)):
        done = run(*base, "--checkpoint", good, "--resume", option, value, code=1)
        assert f"was made with {option}" in one_sentence(done)
        assert good.read_bytes() == whole

    assert "add --resume" in run(*base, "--checkpoint", good, code=2).stderr
    assert good.read_bytes() == whole


def test_disk_error_is_one_sentence_and_keeps_the_old_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    args = ("--kernels", "torch", "--checkpoint", "run.pt", "--resume")
    subprocess.run(command(*args, "--epochs", 1), cwd=tmp_path, check=True, capture_output=True)
    before = (tmp_path / "run.pt").read_bytes()

    def small_files_only():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        command(*args, "--epochs", 2),
        cwd=tmp_path,
        preexec_fn=small_files_only,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "File too large" in one_sentence(done)
    assert (tmp_path / "run.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_ctrl_c_keeps_the_last_whole_epoch(run, tmp_path):
    args = ("--model", "mlp", "--epochs", 100_000, "--checkpoint", "run.pt")
    process = subprocess.Popen(
        command(*args),
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
    assert "stopped by Ctrl-C" in err and "Traceback" not in err
    assert "speed-up" in out and (tmp_path / "train_digits_mlp.png").exists()
    assert not list(tmp_path.glob("*.tmp"))
    done = len(curves(tmp_path / "run.pt")["torch"][0])
    assert "resumed after epoch" in run(*args, "--epochs", done + 1, "--resume").stdout


@pytest.mark.parametrize(
    "args",
    [
        ("--epochs", "0"),
        ("--epochs", "-3"),
        ("--batch-size", "0"),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--threads", "0"),
        ("--seed", "-1"),
        ("--model", "transformer"),
        ("--kernels", "magic"),
        ("--checkpoint", "nowhere/run.pt"),
        ("--plot", "curves.txt"),
        ("--resume",),
    ],
    ids=" ".join,
)
def test_bad_arguments(run, args):
    last = run(*args, code=2).stderr.strip().splitlines()[-1]
    assert last.startswith(f"train_digits.py: error: argument {args[0]}: ")


@pytest.mark.skipif(importlib.util.find_spec("torchvision"), reason="torchvision is installed")
def test_mnist_without_torchvision_says_so(run):
    assert "needs torchvision" in one_sentence(run("--data", "mnist", code=1))


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
    done = run("--data", "mnist", "--epochs", 1, env={"PYTHONPATH": path})
    assert "MLP on mnist: 1 epochs" in done.stdout
