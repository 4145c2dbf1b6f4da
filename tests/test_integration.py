"""What training scripts put around a model: each gives with ours what it gives with PyTorch's."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrize
from torch.optim import lr_scheduler, swa_utils

import dlkernels
from dlkernels import _C
from dlkernels._check import CASES
from support.common import calls

TARGET = torch.tensor([0, 1, 2, 0, 1, 2])


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip


def batch():
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def compare(train):
    """train(model, optimizer's class, loss's class) changes models alike, ours on our kernels."""
    trained = []
    for library in (torch, dlkernels):
        model = make_model()
        if library is dlkernels:
            dlkernels.convert(model)
        dlkernels.reset_stats()
        result = train(model, library.optim.AdamW, library.nn.CrossEntropyLoss)
        trained.append([*(result or model).parameters()])
    stats = dlkernels.stats()
    for op in ("conv2d_relu_max_pool2d", "mlp", "cross_entropy", "adam_"):
        assert stats[op]["kernel"] and not stats[op]["torch"], op
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


def step(model, optimizer, loss_fn):
    optimizer.zero_grad()
    loss_fn(model(batch()), TARGET).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
        lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
        lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
        lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
        lambda opt: lr_scheduler.SequentialLR(
            opt, [lr_scheduler.LinearLR(opt), lr_scheduler.CosineAnnealingLR(opt, 4)], [3]
        ),
    ],
    ids=["step", "exponential", "warm restarts", "plateau", "sequential"],
)
def test_schedulers(make):
    def train(model, optim, loss):
        optimizer = optim(model.parameters(), lr=0.01)
        scheduler = make(optimizer)
        rates = []
        for _ in range(6):
            step(model, optimizer, loss())
            scheduler.step(
                *([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ())
            )
            rates.append(optimizer.param_groups[0]["lr"])
        assert len(set(rates)) > 1

    compare(train)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    results = []
    for library in (torch, dlkernels):
        model = make_model()
        if library is dlkernels:
            dlkernels.convert(model)
        dlkernels.reset_stats()
        with torch.autocast("cpu", dtype):
            y = model(batch())
            loss = library.nn.CrossEntropyLoss()(y, TARGET)
        assert y.dtype is dtype
        loss.backward()
        results.append([y, loss, *(p.grad for p in model.parameters())])
    stats = dlkernels.stats()
    left = dtype is torch.bfloat16 and _C.multiplies_bfloat16()
    for op in ("conv2d_relu_max_pool2d", "mlp"):
        assert stats[op]["torch" if left else "kernel"] == 1, op
    torch.testing.assert_close(*results, rtol=0.05, atol=0.01)


def test_gradients_are_clipped():
    def train(model, optim, loss):
        optimizer = optim(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss()(model(batch()), TARGET).backward()
            assert clip_grad_norm_(model.parameters(), 0.01) > 0.01
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)
            optimizer.step()

    compare(train)


@pytest.mark.parametrize("average", [None, swa_utils.get_ema_multi_avg_fn(0.9)], ids=["SWA", "EMA"])
def test_averaged_models(average):
    def train(model, optim, loss):
        optimizer = optim(model.parameters(), lr=0.01)
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
        scheduler = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for _ in range(4):
            step(model, optimizer, loss())
            averaged.update_parameters(model)
            scheduler.step()
        swa_utils.update_bn([batch()], averaged)
        assert [type(m) for m in averaged.module] == [type(m) for m in model]
        return averaged

    compare(train)


def test_profiler_names_our_ops():
    model = make_model()
    dlkernels.convert(model)
    optimizer = dlkernels.optim.AdamW(model.parameters())
    with torch.profiler.profile() as profile:
        step(model, optimizer, dlkernels.nn.CrossEntropyLoss())
    names = {event.key for event in profile.key_averages()}
    for op in ("conv2d_relu_max_pool2d", "mlp"):
        assert names >= {f"dlkernels::{op}", f"dlkernels::{op}_backward"}
    assert names >= {"dlkernels::cross_entropy", "dlkernels::adam_", "Optimizer.step#AdamW.step"}


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("before", [True, False], ids=["before convert", "after convert"])
def test_parametrized(before):
    model, x = make_model(), batch()
    dlkernels.convert(model) if not before else None
    parametrize.register_parametrization(model[4], "weight", Scaled())
    dlkernels.convert(model)
    got = model(x)
    parametrize.remove_parametrizations(model[4], "weight")
    plain = make_model()
    with torch.no_grad():
        plain[4].weight *= 2
    torch.testing.assert_close(got, plain(x))
    torch.testing.assert_close(model(x), plain(x))


def test_saved_by_one_and_loaded_by_the_other():
    def saved(x):
        buffer = io.BytesIO()
        torch.save(x, buffer)
        buffer.seek(0)
        return buffer

    pairs = [(make_model(), torch.optim.AdamW), (make_model(), dlkernels.optim.AdamW)]
    dlkernels.convert(pairs[1][0])
    for (model, optim), (other, other_optim) in (pairs, pairs[::-1]):
        optimizer = optim(model.parameters(), lr=0.02)
        step(model, optimizer, nn.CrossEntropyLoss())
        other.load_state_dict(torch.load(saved(model.state_dict())))
        loaded = other_optim(other.parameters())
        loaded.load_state_dict(torch.load(saved(optimizer.state_dict())))
        step(model, optimizer, nn.CrossEntropyLoss())
        step(other, loaded, nn.CrossEntropyLoss())
        expected = model.state_dict()
        for name, value in other.state_dict().items():
            torch.testing.assert_close(value, expected[name])
        whole = torch.load(saved(other), weights_only=False)
        assert [type(m) for m in whole] == [type(m) for m in other]
        assert torch.equal(whole(batch()), other(batch()))


# ---- transforms and subclasses: every op against PyTorch's ---------------------------------------


SHAPES = {  # of the arguments of CASES
    "linear": [(4, 5), (3, 5), (3,)],
    "linear_relu": [(4, 5), (3, 5), (3,)],
    "mlp": [(4, 5), (3, 5), (3,), (2, 3), (2,)],
    "relu": [(4, 5)],
    "conv2d": [(2, 2, 4, 4), (3, 2, 3, 3), (3,)],
    "conv2d_relu": [(2, 2, 4, 4), (3, 2, 3, 3), (3,)],
    "conv2d_relu_max_pool2d": [(2, 2, 5, 4), (3, 2, 3, 3), (3,)],
    "max_pool2d": [(2, 2, 4, 5)],
    "cross_entropy": [(4, 5)],
}
every = pytest.mark.parametrize(
    ("f", "torchs", "shapes"), [(*CASES[op][:2], SHAPES[op]) for op in SHAPES], ids=SHAPES
)


@every
def test_func_transforms(f, torchs, shapes):
    args = tuple(torch.randn(shape) for shape in shapes)
    tangents = tuple(torch.randn(shape) for shape in shapes)
    batches = tuple(torch.randn(3, *shape) for shape in shapes)
    all_args = tuple(range(len(args)))

    def all_of(f):
        def loss(*args):
            return f(*args).square().sum()

        grad = torch.func.grad(loss, all_args)
        return [
            grad(*args),
            torch.func.vmap(f)(*batches),
            torch.func.vmap(grad)(*batches),
            torch.func.jvp(f, args, tangents),
            torch.func.jacrev(f)(*args),
            torch.func.jvp(grad, args, tangents),  # of a second derivative
        ]

    torch.testing.assert_close(all_of(f), all_of(torchs), rtol=1e-4, atol=1e-4)


@every
def test_second_gradients(f, torchs, shapes):
    args = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(f, args) and torch.autograd.gradgradcheck(f, args)


class Marked(nn.Parameter):
    """A Parameter that counts the functions it is passed to."""

    seen = 0

    @classmethod
    def __torch_function__(cls, f, types, args=(), kwargs=None):
        Marked.seen += 1
        return super().__torch_function__(f, types, args, kwargs or {})


def test_parameter_subclasses():
    model, x = make_model(), batch()
    expected = copy.deepcopy(model)
    for m in (model[0], model[4]):
        m.weight = Marked(m.weight.detach().clone())
    dlkernels.convert(model)
    optimizers = [
        dlkernels.optim.Adam(model.parameters()),
        torch.optim.Adam(expected.parameters()),
    ]
    Marked.seen = 0
    for m, optimizer in zip((model, expected), optimizers):
        for _ in range(2):
            step(m, optimizer, nn.CrossEntropyLoss())
    assert Marked.seen and type(model[0].weight) is Marked
    for a, b in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(a.detach().as_subclass(torch.Tensor), b.detach())
    torch.testing.assert_close(model(x).as_subclass(torch.Tensor), expected(x))


@pytest.fixture
def mesh():
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensors(mesh):
    from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor

    model, x = make_model(), batch()
    expected = model(x)
    dlkernels.convert(model)
    mlp = model[4:]
    inner = model[:4](x)
    distribute_module(mlp, mesh)
    optimizer = dlkernels.optim.Adam(mlp.parameters())
    with calls(torchs={"linear", "relu", "adam_"}):
        y = mlp(distribute_tensor(inner.detach(), mesh, [Shard(0)]))
        assert isinstance(y, DTensor)
        torch.testing.assert_close(y.full_tensor(), expected)
        y.sum().backward()
        before = mlp[0].weight.full_tensor().clone()
        optimizer.step()
    assert not torch.equal(mlp[0].weight.full_tensor(), before)
