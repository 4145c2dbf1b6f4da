"""The optimizers of :mod:`torch.optim` on our kernels: same arguments, state and state dicts.

A step on plain float32 CPU tensors, or for Adam on CUDA tensors, is one call of our op a parameter
group; so is one on DTensors of such (FSDP2), each process stepping its shards. A step on anything
else, or with ``amsgrad`` or ``differentiable``, is left as a whole to PyTorch's own optimizer. So
is ``capturable`` but for Adam on CUDA, whose learning rate may be a tensor there.
:func:`dlkernels.stats` counts both by the name of the op: ``sgd_``, ``adam_``, ...
"""

import sys

import torch
from torch import Tensor

from . import _C, functional

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "RMSprop"]


class _Optimizer:
    """What stands between an optimizer of PyTorch's and our op."""

    _op = None  # its name
    _lists = None  # how many of them PyTorch's _init_group fills

    def _arguments(self, group):
        """What our op takes of a group, each in the op's order: the keys of a parameter's state,
        with None for an option that is off; numbers, lr first; and options."""
        raise NotImplementedError

    @torch._disable_dynamo  # torch.compiler.disable, but imports torch._dynamo at the first step
    def step(self, closure=None):
        """One step on all parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not (functional._ours() and self._step()):
            functional._torch(self._op, self._torch_step)
        return loss

    def _torch_step(self):
        """PyTorch's step; not its fused one on tensors that are no runs of memory in one order: on
        the CPU it takes them for such, and reads and writes outside of them."""
        groups = [g for g in self.param_groups if g.get("fused") and not self._are_runs(g)]
        for group in groups:
            group["fused"] = False
        try:
            _unhooked(super().step)()
        finally:
            for group in groups:
                group["fused"] = True

    def _are_runs(self, group):
        return all(
            t.is_contiguous()
            for p in group["params"]
            if p.grad is not None and p.is_cpu and p.is_floating_point()
            for t in (p, p.grad, *self.state.get(p, {}).values())
            if isinstance(t, Tensor) and t.layout == torch.strided
        )

    def _step(self):
        """Our op on every group; False, with nothing done, where one of them is not for it."""
        groups = []
        for group in self.param_groups:
            if not _has_op(group):
                return False
            groups.append((group["params"], *self._arguments(group)))
        scales = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        done = _C.optim_step(self._op, self.state, groups, *scales)
        if done is None:  # a first step
            groups = self._with_states(groups)
            done = _C.optim_step(self._op, self.state, groups, *scales)
        return done or self._step_shards(groups, scales)

    def _step_shards(self, groups, scales):
        """The same on the shards of DTensors that this process has."""
        shards = _shards(self.state, groups)
        done = shards is not None and _C.optim_step(self._op, *shards, *scales)
        if done is None:
            shards = _shards(self.state, self._with_states(groups))
            done = _C.optim_step(self._op, *shards, *scales)
        if done:
            for p in (p for params, *_ in groups for p in params if p.grad is not None):
                written = [p, *self.state.get(p, {}).values()]
                written += [] if scales[0] is None else [p.grad]
                torch.autograd.graph.increment_version(t for t in written if isinstance(t, Tensor))
        return done

    def _with_states(self, groups):
        """The same groups, once every parameter that has a gradient has a state."""
        for group in self.param_groups:
            self._init_group(group, *([] for _ in range(self._lists)))
        return groups


class SGD(_Optimizer, torch.optim.SGD):
    """:class:`torch.optim.SGD`: see :class:`Adam`."""

    _op = "sgd_"

    def _arguments(self, group):
        momentum = group["momentum"]
        return (
            ("momentum_buffer" if momentum != 0 else None,),
            (group["lr"], momentum, group["dampening"], group["weight_decay"]),
            (group["nesterov"], group["maximize"], False),  # not the first step
        )

    def _with_states(self, groups):
        """Parameters without a buffer in groups of their own: a first step is not damped."""
        split = []
        for params, keys, numbers, options in groups:
            old, new = [], []
            for p in params:
                if p.grad is not None:
                    known = keys == (None,) or self.state[p].get("momentum_buffer") is not None
                    (old if known else new).append(p)
            split.append((old, keys, numbers, options))
            # A step that is skipped is not the first.
            found_inf = getattr(self, "found_inf", None)
            if new and not (found_inf is not None and found_inf.item()):
                for p in new:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                split.append((new, keys, numbers, (*options[:-1], True)))
        return split


class Adam(_Optimizer, torch.optim.Adam):
    """:class:`torch.optim.Adam`. ``foreach`` and ``fused`` choose among PyTorch's own steps, where
    the step is left to it; state dicts load from and into PyTorch's class."""

    _op = "adam_"
    _lists = 6

    def _arguments(self, group):
        beta1, beta2 = group["betas"]
        return (
            ("exp_avg", "exp_avg_sq", "step"),
            (group["lr"], beta1, beta2, group["weight_decay"], group["eps"]),
            (group["maximize"], group["decoupled_weight_decay"]),
        )


class AdamW(Adam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`: see :class:`Adam`."""


class Adagrad(_Optimizer, torch.optim.Adagrad):
    """:class:`torch.optim.Adagrad`: see :class:`Adam`."""

    _op = "adagrad_"
    _lists = 4

    def _arguments(self, group):
        return (
            ("sum", "step"),
            (group["lr"], group["lr_decay"], group["weight_decay"], group["eps"]),
            (group["maximize"],),
        )


class Adadelta(_Optimizer, torch.optim.Adadelta):
    """:class:`torch.optim.Adadelta`: see :class:`Adam`."""

    _op = "adadelta_"
    _lists = 5

    def _arguments(self, group):
        return (
            ("square_avg", "acc_delta", "step"),
            (group["lr"], group["rho"], group["eps"], group["weight_decay"]),
            (group["maximize"],),
        )


class RMSprop(_Optimizer, torch.optim.RMSprop):
    """:class:`torch.optim.RMSprop`: see :class:`Adam`."""

    _op = "rmsprop_"
    _lists = 6

    def _arguments(self, group):
        centered, momentum = group["centered"], group["momentum"]
        return (
            (
                "square_avg",
                "grad_avg" if centered else None,
                "momentum_buffer" if momentum > 0 else None,
                "step",
            ),
            (group["lr"], group["alpha"], group["eps"], group["weight_decay"], momentum),
            (centered, group["maximize"]),
        )


def _has_op(group):
    """Whether our ops have the options that a group asks for."""
    if group.get("amsgrad"):
        return False
    if group.get("capturable") and not all(p.is_cuda for p in group["params"]):
        return False
    return group.get("differentiable", False) is False and 1 not in group.get("betas", ())


def _shards(state, groups):
    """`state` and `groups` with local tensors in the place of DTensors; None where there are none,
    or one has a gradient or a state that is not split as it is."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if not any(type(p) is dtensor for params, *_ in groups for p in params):
        return None
    seen, local_state, local_groups = set(), {}, []
    for params, *arguments in groups:
        local = []
        for p in (p for p in params if p.grad is not None):
            if p in seen:
                return None
            seen.add(p)
            states = state.get(p, {})
            if type(p) is dtensor:
                whole = [t for t in states.values() if isinstance(t, Tensor) and t.numel() != 1]
                if not all(_split_alike(p, t, dtensor) for t in (p.grad, *whole)):
                    return None
                states = {key: getattr(t, "_local_tensor", t) for key, t in states.items()}
                p, grad = p._local_tensor.detach(), p.grad._local_tensor
                p.grad = grad
            local.append(p)
            local_state[p] = states
        local_groups.append((local, *arguments))
    return local_state, local_groups


def _split_alike(p, t, dtensor):
    return (
        type(t) is dtensor
        and t.device_mesh == p.device_mesh
        and t.placements == p.placements
        and not any(placement.is_partial() for placement in p.placements)
    )


def _unhooked(step):
    """A bound step without the hooks that torch wraps around it: they run around ours."""
    function = step.__func__
    if getattr(function, "hooked", False):
        function = function.__wrapped__
    return function.__get__(step.__self__)
