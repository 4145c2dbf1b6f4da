"""Optimizers in a training: what stands around a step, and what relies on it."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from support.common import assert_close, calls
from support.optim_table import PAIRS, full, pair


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 3))
    return model, torch.randn(8, 10), torch.randint(3, (8,))


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("overflow_at", [None, 0, 1])
def test_grad_scaler(name, fused, overflow_at):
    """Fused steps unscale gradients and skip overflows themselves. Not so PyTorch's beside ours:
    its SGD keeps a momentum it has never written, where the first step overflows."""
    results = []
    for make in PAIRS[name]:
        model, x, y = model_and_data()
        ours = make is PAIRS[name][0]
        opt = make(model.parameters(), lr=0.1, fused=fused if ours else None, **full(make))
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=2)
        for step in range(5):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if step == overflow_at:
                model[0].weight.grad[0, 0] = float("inf")
            if step == 3:
                scaler.unscale_(opt)
            with calls([opt._op]) if ours and step != overflow_at else nullcontext():
                scaler.step(opt)
            scaler.update()
        results.append([*model.parameters(), *(p.grad for p in model.parameters())])
        if name != "SGD":
            steps = {float(opt.state[p]["step"]) for p in model.parameters()}
            assert steps == {5.0 if overflow_at is None else 4.0}
    torch.testing.assert_close(*results)


@pair
def test_whole_training(pair):
    """Closure, scheduler, a later group, hooks, and the profiler's name for a step."""
    results = []
    ours, torchs = pair
    for make, dtype in ((ours, torch.float32), (torchs, torch.float32), (torchs, torch.float64)):
        model, x, y = model_and_data()
        model, x, late = model.to(dtype), x.to(dtype), nn.Parameter(torch.zeros(3, dtype=dtype))
        opt = make(model.parameters(), lr=0.1, **full(make))
        cycle = bool({"momentum", "betas"} & {*opt.defaults})
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            opt, 0.1, total_steps=20, cycle_momentum=cycle
        )
        seen = []
        opt.register_step_pre_hook(lambda *_, seen=seen: seen.append("pre"))
        opt.register_step_post_hook(lambda *_, seen=seen: seen.append("post"))

        def closure(model=model, late=late, opt=opt, x=x, y=y):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x) + late, y)
            loss.backward()
            return loss

        for step in range(20):
            if step == 5:
                group = {"params": [late], "max_lr": 0.1, "min_lr": 0.0, "initial_lr": 0.0}
                opt.add_param_group(group | {"max_momentum": 0.9, "base_momentum": 0.8})
            loss = opt.step(closure)
            assert loss.requires_grad
            scheduler.step() if step < 19 else None
        with torch.profiler.profile() as profile:
            opt.step(closure)
        assert f"Optimizer.step#{make.__name__}.step" in {e.key for e in profile.key_averages()}
        assert seen == ["pre", "post"] * 21
        results.append([*model.parameters(), late])
    for got, torchs, exact in zip(*results):
        assert_close(got, torchs, exact)


@pair
def test_later_backward_notices(pair):
    p = nn.Parameter(torch.ones(5))
    opt = pair[0]([p], **full(pair[0]))
    loss = (p * p).sum()
    p.grad = torch.ones(5)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pair
def test_every_write_is_seen(pair):
    """In the parameter, its state, and the gradient that a scaler's step divides."""
    p = nn.Parameter(torch.ones(5))
    opt = pair[0]([p], **full(pair[0]))
    for scale in (None, torch.tensor(2.0)):
        p.grad = torch.ones(5)
        opt.grad_scale, opt.found_inf = scale, scale and torch.tensor(0.0)
        tensors = [p, *opt.state[p].values(), *([p.grad] if scale else [])]
        before = [t._version for t in tensors]
        with calls([opt._op]):
            opt.step()
        assert all(t._version > version for t, version in zip(tensors, before))


@pair
def test_compiled_training(pair):
    results = []
    for make, compiled in ((pair[0], True), (pair[1], False)):
        model, x, y = model_and_data()
        opt = make(model.parameters(), lr=0.1, **full(make))

        def train_step(model=model, opt=opt, x=x, y=y):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()

        if compiled:
            train_step = torch.compile(train_step, backend="aot_eager")
        with calls([opt._op] if compiled else []):
            for _ in range(5):
                train_step()
        results.append([*model.parameters()])
    torch.testing.assert_close(*results)
