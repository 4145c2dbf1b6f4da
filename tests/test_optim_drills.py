"""What is done with optimizers besides steps: ours and PyTorch's must be seen to do the same."""

import copy
import io

import pytest
import torch
from torch import nn

from dlkernels import optim as ours
from support.optim_samples import INFO, make, names, seen, steps
from support.samples import assert_same, outcome

# Each takes (name, library, the other library, options) and returns what is compared.


def with_closure(name, library, other, options):
    optimizer, params = make(library, name, options)

    def evaluate():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        return [optimizer.step(evaluate), optimizer.step(closure=evaluate), seen(optimizer)]


def with_a_group_more(name, library, other, options):
    optimizer, params = make(library, name, options)
    steps(optimizer, params)
    late = nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": late, "lr": 0.5, "weight_decay": 0.1})
    steps(optimizer, [*params, late])
    again = outcome(optimizer.add_param_group, {"params": [late]})
    return [seen(optimizer), again]


def with_zeroed_gradients(name, library, other, options):
    optimizer, params = make(library, name, options)
    steps(optimizer, params)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    return seen(optimizer)


def with_parameters_frozen_and_replaced(name, library, other, options):
    optimizer, params = make(library, name, options)
    steps(optimizer, params)
    params[0].requires_grad_(False)
    params[0].grad = None
    params[1].data = torch.ones_like(params[1])
    steps(optimizer, params[1:])
    return seen(optimizer)


def in_inference_mode(name, library, other, options):
    optimizer, params = make(library, name, options)
    with torch.inference_mode():
        results = [outcome(steps, optimizer, params), [p.detach().clone() for p in params]]
    return [*results, outcome(steps, optimizer, params)]


def with_float64_by_default(name, library, other, options):
    torch.set_default_dtype(torch.float64)
    try:
        optimizer, params = make(library, name, options)
        steps(optimizer, params)
        return seen(optimizer)
    finally:
        torch.set_default_dtype(torch.float32)


def with_schedulers(name, library, other, options):
    results = []
    for make_schedulers in INFO[name].scheduler_inputs:
        optimizer, params = make(library, name, options)
        schedulers = [each(optimizer) for each in make_schedulers]
        for step in range(4):
            steps(optimizer, params, 1, step)
            for scheduler in schedulers:
                on_plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[1.0] * on_plateau)
        results.append(seen(optimizer))
    return results


def with_a_gradient_scaler(name, library, other, options):
    optimizer, params = make(library, name, options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    for step in range(4):
        optimizer.zero_grad()
        factor = torch.inf if step == 1 else 1.0
        scaler.scale(sum(p.square().sum() for p in params) * factor).backward()
        if step == 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(optimizer)
        scaler.update()
    return [seen(optimizer)[:2], [p.grad for p in params], scaler.state_dict()]


def with_copies(name, library, other, options):
    optimizer, params = make(library, name, options)
    steps(optimizer, params)
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    results = []
    for twin in (copy.deepcopy(optimizer), torch.load(file, weights_only=False)):
        steps(twin, twin.param_groups[0]["params"])
        results.append(seen(twin))
    return [*results, seen(optimizer)]


def from_the_others_checkpoint(name, library, other, options):
    optimizer, params = make(other, name, options)
    steps(optimizer, params)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed, params = make(library, name, {**options, "lr": 7.0})
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    steps(resumed, params)
    return seen(resumed)[:4]


def from_an_old_checkpoint(name, library, other, options):
    """Steps were numbers once, and groups had fewer keys."""
    optimizer, params = make(library, name, options)
    steps(optimizer, params)
    old = optimizer.state_dict()
    for state in old["state"].values():
        state["step"] = 2.0
    for key in INFO[name].not_og_supported_flags:
        old["param_groups"][0].pop(key, None)
    optimizer.load_state_dict(old)
    steps(optimizer, params)
    return seen(optimizer)


def from_a_wrong_checkpoint(name, library, other, options):
    optimizer, params = make(library, name, options)
    steps(optimizer, params)
    few = optimizer.state_dict()
    few["param_groups"][0]["params"] = few["param_groups"][0]["params"][1:]
    return [outcome(optimizer.load_state_dict, bad) for bad in (few, {}, None)]


def with_names(name, library, other, options):
    params = [("first", nn.Parameter(torch.ones(3))), ("second", nn.Parameter(torch.ones(2)))]
    optimizer = getattr(library, name)(params, **options)
    steps(optimizer, [p for _, p in params])
    return seen(optimizer)


def with_hooks(name, library, other, options):
    optimizer, params = make(library, name, options)
    log = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: log.append(["pre", args, kwargs]))
    optimizer.register_step_post_hook(lambda o, args, kwargs: log.append(["post", args, kwargs]))
    optimizer.register_state_dict_post_hook(lambda o, state: state | {"note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: log.append(list(state)))
    hook = torch.optim.optimizer.register_optimizer_step_pre_hook(
        lambda o, args, kwargs: log.append("global")
    )
    steps(optimizer, params)
    hook.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    return [log, seen(optimizer)]


DRILLS = [
    *(with_closure, with_a_group_more, with_zeroed_gradients, with_parameters_frozen_and_replaced),
    *(in_inference_mode, with_float64_by_default, with_schedulers, with_a_gradient_scaler),
    *(with_copies, from_the_others_checkpoint, from_an_old_checkpoint, from_a_wrong_checkpoint),
    *(with_names, with_hooks),
]


@names
@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: drill.__name__)
@pytest.mark.parametrize("flag", [None, "foreach", "fused"])
def test_drill(name, drill, flag):
    if flag not in (None, *INFO[name].supported_impls):
        return
    options = {flag: True} if flag else {}
    assert_same(
        outcome(drill, name, ours, torch.optim, options),
        outcome(drill, name, torch.optim, ours, options),
    )


@names
def test_gradient_through_steps(name):
    """differentiable=True: of the parameter before them, and of the gradient they were given."""
    results = []
    for library in (ours, torch.optim):
        before, gradient = (torch.tensor([x, 2.0], requires_grad=True) for x in (1.0, -3.0))
        p = before.clone()
        optimizer = getattr(library, name)([p], differentiable=True)
        for factor in (1.0, 2.0):
            p.grad = gradient * factor
            optimizer.step()
        results.append(torch.autograd.grad(p.square().sum(), [before, gradient]))
    assert_same(*results)


@names
def test_a_step_is_seen_by_autograd(name):
    """A backward pass that saved a parameter notices that it has changed."""
    optimizer, params = make(ours, name, {})
    loss = params[0].square().sum()
    steps(optimizer, params, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_classes_and_signatures():
    for name in ours.__all__:
        mine, theirs = getattr(ours, name), getattr(torch.optim, name)
        assert issubclass(mine, theirs) and mine.__name__ == name
        assert mine.__init__ is theirs.__init__
