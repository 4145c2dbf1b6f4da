"""Several processes under torchrun: the example's, and modules and optimizers by FSDP2 and DDP."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_digits.py"


@pytest.fixture
def start(tmp_path):
    """Starts a script under torchrun, in two processes, in an empty folder."""
    running = []

    def start(*args):
        torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
        process = subprocess.Popen(
            [sys.executable, *torchrun, *map(str, args)],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return out


def losses(path):
    history = torch.load(path, weights_only=True)["history"]
    return [[epoch[kernels]["loss"] for kernels in ("torch", "dlkernels")] for epoch in history]


def test_two_processes_have_the_losses_of_one(start, tmp_path):
    # Of the 1,347 rows the last batch has one, so that one of the processes has none.
    args = SCRIPT, "--epochs", "3", "--batch-size", "673", "--checkpoint"
    assert "apart" in finish(start(*args, "two.pt"))
    one = [sys.executable, *args, "one.pt", "--threads", "1"]
    subprocess.run(one, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    two = torch.tensor(losses(tmp_path / "two.pt"))
    torch.testing.assert_close(two, torch.tensor(losses(tmp_path / "one.pt")), rtol=1e-4, atol=0)


def test_a_killed_process_ends_the_run_and_a_restart_resumes(start, tmp_path):
    checkpoint = tmp_path / "run.pt"
    args = SCRIPT, "--kernels", "dlkernels", "--checkpoint", checkpoint, "--resume", "--epochs"
    torchrun = start(*args, 100_000)
    deadline = time.monotonic() + 60
    while not checkpoint.exists():
        assert torchrun.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    killed = time.monotonic()
    _, err = torchrun.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert torchrun.returncode != 0 and "Signal 9 (SIGKILL)" in err
    epochs = len(torch.load(checkpoint, weights_only=True)["history"])
    out = finish(start(*args, epochs + 1))
    assert f"resumed after epoch {epochs}" in out and f"epoch {epochs + 1}/{epochs + 1}" in out


WRAPPED = """
import os
import sys
import torch
import dlkernels
from torch import nn
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

init_process_group("gloo")


def sharded(model):
    fully_shard(model[2])
    return fully_shard(model)


def train(wrap, make, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    x, y = torch.randn(4, 4, 6), torch.randint(3, (4, 4))
    if wrap:
        dlkernels.convert(model)
        model = wrap(model)
    opt = make(model.parameters(), lr=0.05, **options)
    for step in range(4):
        rows = slice(get_rank() * 2, get_rank() * 2 + 2) if wrap else slice(None)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[step, rows]), y[step, rows]).backward()
        before = [p._version for p in model.parameters()]
        opt.step()
        assert all(p._version > v for p, v in zip(model.parameters(), before))
    return opt, list(model.parameters())


# A step writes the parameter, its states, and the gradient that a scaler's step divides.
def assert_bumped(opt, p):
    for scale in (None, torch.tensor(2.0)):
        opt.grad_scale, opt.found_inf = scale, None if scale is None else torch.tensor(0.0)
        written = [p, *opt.state[p].values(), *([] if scale is None else [p.grad])]
        before = [t._version for t in written]
        opt.step()
        assert all(t._version > v for t, v in zip(written, before, strict=True))


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


OPTIONS = {"SGD": {"momentum": 0.9, "dampening": 0.5}, "RMSprop": {"momentum": 0.9}}
for name in dlkernels.optim.__all__:
    dlkernels.reset_stats()
    options = OPTIONS.get(name, {})
    opt, got = train(sharded, getattr(dlkernels.optim, name), options)
    stats = dlkernels.stats()
    assert all(isinstance(p, DTensor) for p in got)
    assert stats["linear"]["kernel"] + stats["linear_relu"]["kernel"] + stats["mlp"]["kernel"] >= 4
    assert stats[opt._op] == {"kernel": 4, "torch": 0}, stats
    torchs, expected = train(None, getattr(torch.optim, name), options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.full_tensor(), b)
        states, theirs = opt.state[a], torchs.state[b]
        assert list(states) == list(theirs)
        for key in theirs:
            assert isinstance(states[key], DTensor) == (theirs[key].dim() > 0)
            torch.testing.assert_close(whole(states[key]), theirs[key])
    assert_bumped(opt, got[0])
    assert dlkernels.stats()[opt._op] == {"kernel": 6, "torch": 0}

# The same with whole parameters.
dlkernels.reset_stats()
_, got = train(DistributedDataParallel, dlkernels.optim.Adam, {})
for op in ("mlp", "mlp_backward", "adam_"):
    assert dlkernels.stats()[op] == {"kernel": 4, "torch": 0}
for a, b in zip(got, train(None, torch.optim.Adam, {})[1], strict=True):
    torch.testing.assert_close(a, b)

# A gradient that is not split as its parameter is, and one that is terms of a sum: PyTorch's.
mesh = init_device_mesh("cpu", (2,))
for placement in (Replicate(), Partial()):
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    grad = DTensor.from_local(torch.ones(4, 3) / 2, mesh, [placement])
    p.grad = grad
    dlkernels.reset_stats()
    dlkernels.optim.SGD([p], lr=0.1).step()
    assert dlkernels.stats()["sgd_"] == {"kernel": 0, "torch": 1}
    torch.testing.assert_close(p.full_tensor(), 1 - 0.1 * grad.full_tensor())
destroy_process_group()
print("trained", flush=True)
os._exit(0)  # PyTorch's own threads may abort the interpreter's end
"""


def test_fsdp_and_ddp(start, tmp_path):
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    assert finish(start(tmp_path / "wrapped.py")).count("trained") == 2
