"""What happens to processes: forks, workers, threads, signals, kills, full disks, no memory."""

import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

import dlkernels.functional as ours
from support.common import FULL

KILLS = 200 if FULL else 5
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Every kernel on two threads; call it step() as often as you like, it gives the same bits.
STEP = """
import torch, dlkernels, dlkernels.functional as ours
torch.set_num_threads(2)
def step(seed=0):
    g = torch.Generator().manual_seed(seed)
    def t(*shape): return torch.randn(shape, generator=g).requires_grad_()
    images, target = t(32, 8, 28, 28), torch.arange(4096) % 10
    tensors = images, t(16, 8, 3, 3), t(16), t(128, 400), t(300, 128), t(10, 300)
    x, w, b, v, w1, w2 = tensors
    y = ours.conv2d_relu_max_pool2d(x, w, b, padding=1)
    y = ours.max_pool2d(ours.conv2d_relu(y, w[:, :, :1, :1].repeat(1, 2, 1, 1), b), 2)
    z = ours.mlp(ours.relu(v.t().contiguous().view(-1, 128)), [w1, w2]).repeat(11, 1)[:4096]
    loss = ours.cross_entropy(z, target) + ours.linear_relu(y, w1[:40, :7]).mean()
    with torch.no_grad():
        grads = torch.autograd.grad(loss, tensors)
        state = [[torch.zeros_like(x) for x in tensors] for _ in range(2)]
        params = [x.detach().clone() for x in tensors]
        ours.adam_(params, list(grads), *state, [torch.zeros(()) for _ in tensors], lr=0.1,
                   beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8)
    return [loss.detach(), *grads, *params]
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
"""


@pytest.fixture(scope="module")
def steps():
    names = {}
    exec(STEP, names)
    return names["step"], names["same"]


def test_fork_after_a_parallel_region(python):
    """PyTorch's own ops hang in such a child, with GNU OpenMP; ours must not."""
    program = """
import os, signal, time
from dlkernels import functional as ours
import torch
torch.set_num_threads(2)
x, w, images = torch.randn(400, 400), torch.randn(300, 400), torch.randn(16, 8, 32, 32)
grad_y = torch.randn(400, 300)
w.requires_grad_()
filters = torch.randn(16, 8, 3, 3)
def results():
    y = ours.linear_relu(x, w)
    return [y, *torch.autograd.grad(y, w, grad_y), ours.conv2d(images, filters),
            ours.max_pool2d(images, 2), ours.cross_entropy(x, torch.arange(400)), ours.relu(images)]
before = results()
assert len(os.listdir("/proc/self/task")) > 1
child = os.fork()
if child == 0:
    for a, b in zip(results(), before):
        assert a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
    os._exit(0)
deadline = time.monotonic() + 60
while True:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    if time.monotonic() > deadline:
        os.kill(child, signal.SIGKILL)
        raise SystemExit("the child hangs")
    time.sleep(0.01)
assert status == 0, status
for a, b in zip(results(), before):
    assert torch.equal(a, b)
"""
    python(program)


def test_a_child_of_one_thread_has_threads(python):
    program = """
import os
import torch, dlkernels
torch.set_num_threads(2)
child = os.fork()
if child == 0:
    x = torch.empty(600, 600)  # no parallel region of PyTorch's
    before = len(os.listdir("/proc/self/task"))  # OpenBLAS may have started its own
    dlkernels.functional.linear(x, x)
    os._exit(len(os.listdir("/proc/self/task")) - before)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
"""
    python(program)


WAIT = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
BEFORE_A_FORK = {
    "nothing": "",
    "an idle thread": WAIT,
    "a region of ours": "ours.relu(x)",
    "a region of PyTorch's": "torch.relu(x)",
    "both": "ours.relu(x); torch.relu(x)",
    "both in a thread that has ended": "in_thread(lambda: (ours.relu(x), torch.relu(x))).join()",
    "in one that waits": "in_thread(lambda: (ours.relu(x), ready.set(), never.wait()))"
    "; ready.wait()",
    "in one that goes on": "in_thread(lambda: [(ours.relu(x), ready.set()) for _ in iter(int, 1)])"
    "; ready.wait()",
}


@pytest.mark.parametrize("before", BEFORE_A_FORK)
def test_a_child_has_threads(python, before):
    """Right results on as many threads as before in children, one after the other and several at
    once, and in a child's child."""
    program = f"""
import os, signal, sys, threading
import numpy, torch, dlkernels.functional as ours
torch.set_num_threads(2)
x = torch.from_numpy(numpy.arange(-1e6, 1e6, dtype=numpy.float32))  # no parallel region
expected = numpy.maximum(x.numpy(), 0)
ready, never = threading.Event(), threading.Event()
def in_thread(f):
    thread = threading.Thread(target=f, daemon=True)
    thread.start()
    return thread
def fork(generations):
    child = os.fork()
    if child:
        return child
    signal.alarm(60)  # ends it
    before = len(os.listdir("/proc/self/task"))  # OpenBLAS may have started its own
    try:
        assert numpy.array_equal(ours.relu(x).numpy(), expected)
        threads = len(os.listdir("/proc/self/task"))
        assert threads > before, threads
        if generations > 1:
            wait(fork(generations - 1))
            assert numpy.array_equal(ours.relu(x).numpy(), expected)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
def wait(child):
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, status
{BEFORE_A_FORK[before]}
wait(fork(2))
for child in [fork(1) for _ in range(3)]:
    wait(child)
assert numpy.array_equal(ours.relu(x).numpy(), expected)
os._exit(0)  # whatever the threads do
"""
    python(program)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context):
    x, w = torch.randn(8, 40, 60), torch.randn(50, 60)
    expected = [ours.linear(part, w) for part in x]
    ours.relu(torch.randn(10**6))  # a parallel region before the fork
    loader = torch.utils.data.DataLoader(
        list(x),
        batch_size=None,
        collate_fn=partial(ours.linear, weight=w),
        num_workers=2,
        multiprocessing_context=context,
        timeout=120,
    )
    got = list(loader)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_many_python_threads(steps):
    step, same = steps
    expected, wrong = [step(seed) for seed in range(8)], []

    def work(seed):
        for _ in range(3):
            if not same(step(seed), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_number_of_threads_changes_before_backward():
    x, w = torch.randn(300, 200, requires_grad=True), torch.randn(100, 200, requires_grad=True)
    images = torch.randn(16, 8, 20, 20, requires_grad=True)
    filters = torch.randn(8, 8, 3, 3, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    for forward, backward in ((1, 1), (2, 1), (1, 2), (3, 2), (2, 8)):
        torch.set_num_threads(forward)
        y = ours.linear_relu(x, w).sum() + ours.conv2d_relu_max_pool2d(images, filters).sum()
        torch.set_num_threads(backward)
        results.append(torch.autograd.grad(y, (x, w, images, filters)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_ctrl_c_in_a_long_kernel(python):
    program = """
import os, signal, threading, time
import torch, dlkernels.functional as ours
signal.signal(signal.SIGINT, signal.default_int_handler)
x = torch.randn(1500, 3000)
interrupted = []
def interrupt():
    interrupted.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
timer = threading.Timer(0.5, interrupt)
timer.start()
try:
    while True:
        ours.linear_relu(x, x)
except KeyboardInterrupt:
    assert time.monotonic() - interrupted[0] < 10
y = ours.linear(x[:50], x[:40])
assert torch.allclose(y.double(), x[:50].double() @ x[:40].double().t(), atol=1e-2)
"""
    python(program)


def test_no_memory(python):
    """Every allocation of a step fails once: an exception, nothing kept, the next step right."""
    program = (
        STEP
        + """
import resource
def size(): return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
unlimited = resource.getrlimit(resource.RLIMIT_AS)
expected = step()
failed = after = 0
start = size()
for room in range(0, 2**40, 2**18):
    resource.setrlimit(resource.RLIMIT_AS, (size() + room, unlimited[1]))
    try:
        got = step()
    except (RuntimeError, MemoryError):
        got = None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    failed += got is None
    if got is not None:
        assert same(got, expected)
        break
    if failed % 10 == 0:
        assert same(step(), expected)
        if failed == 10: start = size()
assert failed > 20, failed
assert size() - start < 2**22, (size(), start)
"""
    )
    python(
        program, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_ARENA_MAX="1"
    )


def test_memory_does_not_grow(python):
    program = """
import torch, dlkernels, dlkernels.functional as ours
torch.manual_seed(0)
cnn = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
                          torch.nn.Flatten(), torch.nn.Linear(36, 8), torch.nn.ReLU(),
                          torch.nn.Linear(8, 3))
dlkernels.convert(cnn)
optimizer = dlkernels.optim.Adam(cnn.parameters())
x, target = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
for i in range(10_000):
    optimizer.zero_grad()
    ours.cross_entropy(cnn(x), target).backward()
    optimizer.step()
    for bad in ((x, x), (x[0, 0], None)):
        try:
            ours.linear(*bad)
        except (RuntimeError, TypeError):
            pass
    if i == 1000:
        before = rss()
assert rss() - before < 2**20, (before, rss())
assert dlkernels.stats()["adam_"] == {"kernel": 10_000, "torch": 0}
"""
    python(program)


# The script in a child that has all imported already, killed at a random moment.
KILLED = """
import importlib.util, os, random, signal, sys, time
sys.path.insert(0, {examples!r})
import torch, dlkernels
spec = importlib.util.spec_from_file_location("train_digits", {examples!r} + "/train_digits.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
random.seed(0)

def start(epochs, checkpoint):
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.argv = ["train_digits.py", "--threads", "1", "--batch-size", "1024", "--kernels",
                    "dlkernels", "--checkpoint", checkpoint, "--resume", "--epochs", str(epochs)]
        try:
            script.harness.run(script.main)
        except SystemExit as stop:
            os._exit(1 if stop.code else 0)
        os._exit(0)
    return child

def load(path):
    saved = torch.load(path, weights_only=True)
    return [epoch["dlkernels"]["loss"] for epoch in saved["history"]], saved["runs"]["dlkernels"]

torch.set_num_threads(1)  # a fork copies no other thread
digits = script.harness.load_digits()
script.harness.load_digits = lambda: digits
script.results.report = lambda *results: None
begin = time.monotonic()
os.waitpid(start(1, "first.pt"), 0)
first = time.monotonic() - begin

done, early = 0, 0
for kill in range({kills}):
    child = start(10**6, "killed.pt")
    time.sleep(first * random.uniform(0.5, 2))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9, "ended by itself"
    epochs = len(load("killed.pt")[0]) if os.path.exists("killed.pt") else 0
    early += epochs == done
    assert epochs >= done
    done = epochs
assert early < {kills}, "no run came as far as a checkpoint"
for path in ("killed.pt", "whole.pt"):
    assert os.waitstatus_to_exitcode(os.waitpid(start(done + 1, path), 0)[1]) == 0
killed, whole = load("killed.pt"), load("whole.pt")
assert killed[0] == whole[0] and len(whole[0]) == done + 1
for key, value in whole[1]["model"].items():
    assert torch.equal(value, killed[1]["model"][key])
print(done, first, early)
"""


def test_killed_training_resumes(python):
    program = KILLED.format(examples=str(EXAMPLES), kills=KILLS)
    python(program, timeout=1800)


def test_full_disk(tmp_path):
    """The old checkpoint stays, and one sentence says why."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"]).returncode:
        pytest.skip("needs a file system of its own")
    (tmp_path / "disk").mkdir()
    path = os.pathsep.join([str(Path(ours.__file__).parents[1]), str(EXAMPLES)])
    train = f"{sys.executable} {EXAMPLES}/train_digits.py --kernels dlkernels --checkpoint run.pt"
    done = subprocess.run(
        [
            *inside,
            "sh",
            "-c",
            "mount -t tmpfs -o size=9m none disk && cd disk && set -e\n"
            f"{train} --epochs 1 && cp run.pt before.pt\n"
            "dd if=/dev/zero of=rest bs=4096 2>/dev/null || true\n"
            f"! {train} --epochs 2 --resume\n"
            "cmp run.pt before.pt && ! ls *.tmp 2>/dev/null && rm rest\n"
            f"{train} --epochs 2 --resume",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("No space left on device")
    assert "resumed after epoch 1" in done.stdout
