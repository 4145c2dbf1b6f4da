"""The optimizers of :mod:`torch.optim` on our kernels: same arguments, state and state dicts.

A step on plain float32 CPU tensors, or for Adam on CUDA tensors, is one call of our op a parameter
group; so is one on DTensors of such (FSDP2), each process stepping its shards. A step on anything
else, or with ``amsgrad`` or ``differentiable``, is left as a whole to PyTorch's own optimizer. So
is ``capturable`` but for Adam on CUDA, whose learning rate may be a tensor there.
:func:`dlkernels.stats` counts both by the name of the op: ``sgd_``, ``adam_``, ...
"""

import sys
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from . import _C
from ._dispatch import aten, is_eligible

Group = dict[str, Any]  # of an optimizer's param_groups
# The parameters of a group, and what _arguments() returns.
OpGroup = tuple[Sequence[Tensor], tuple[str | None, ...], tuple[Any, ...], tuple[bool, ...]]
State = MutableMapping[Tensor, dict[str, Any]]
R = TypeVar("R")

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "RMSprop"]


class _Optimizer:
    """What stands between an optimizer of PyTorch's and our op."""

    _op: str  # its name
    _lists: int  # how many of them PyTorch's _init_group fills
    param_groups: list[Group]
    state: Any
    _init_group: Any

    def _arguments(
        self, group: Group
    ) -> tuple[tuple[str | None, ...], tuple[Any, ...], tuple[bool, ...]]:
        """What our op takes of a group, each in the op's order: the keys of a parameter's state,
        with None for an option that is off; numbers, lr first; and options."""
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], R]) -> R: ...
    @torch._disable_dynamo  # torch.compiler.disable, but imports torch._dynamo at the first step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
        if not (is_eligible() and self._step()):
            aten(self._op, self._step_aten)
        return loss

    def _step_aten(self) -> None:
        """PyTorch's step, but never its fused one on tensors that are not contiguous: on the CPU it
        takes them for contiguous ones, and reads and writes outside of them."""
        groups = [g for g in self.param_groups if g.get("fused") and not self._are_contiguous(g)]
        for group in groups:
            group["fused"] = False
        try:
            _unhooked(super().step)()  # type: ignore[misc]
        finally:
            for group in groups:
                group["fused"] = True

    def _are_contiguous(self, group: Group) -> bool:
        return all(
            t.is_contiguous()
            for p in group["params"]
            if p.grad is not None and p.is_cpu and p.is_floating_point()
            for t in (p, p.grad, *self.state.get(p, {}).values())
            if isinstance(t, Tensor) and t.layout == torch.strided
        )

    def _step(self) -> bool | None:
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

    def _step_shards(
        self, groups: list[OpGroup], scales: tuple[Tensor | None, Tensor | None]
    ) -> bool | None:
        """The same on the shards of DTensors that this process has."""
        shards = _shards(self.state, groups)
        if shards is None:
            return False
        done = _C.optim_step(self._op, *shards, *scales)
        if done is None:
            shards = _shards(self.state, self._with_states(groups))
            done = shards is not None and _C.optim_step(self._op, *shards, *scales)
        if done:
            for p in (p for params, *_ in groups for p in params if p.grad is not None):
                written = [p, *self.state.get(p, {}).values()]
                written += [] if scales[0] is None else [p.grad]
                torch.autograd.graph.increment_version(t for t in written if isinstance(t, Tensor))
        return done

    def _with_states(self, groups: list[OpGroup]) -> list[OpGroup]:
        """The same groups, once every parameter that has a gradient has a state."""
        for group in self.param_groups:
            self._init_group(group, *([] for _ in range(self._lists)))
        return groups


class SGD(_Optimizer, torch.optim.SGD):
    """:class:`torch.optim.SGD`: see :class:`Adam`."""

    _op = "sgd_"

    def _arguments(self, group: Group) -> Any:
        momentum = group["momentum"]
        return (
            ("momentum_buffer" if momentum != 0 else None,),
            (group["lr"], momentum, group["dampening"], group["weight_decay"]),
            (group["nesterov"], group["maximize"], False),  # not the first step
        )

    def _with_states(self, groups: list[OpGroup]) -> list[OpGroup]:
        """Parameters without a buffer in groups of their own: a first step is not damped."""
        split: list[OpGroup] = []
        for params, keys, numbers, options in groups:
            old: list[Tensor] = []
            new: list[Any] = []
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

    def _arguments(self, group: Group) -> Any:
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

    def _arguments(self, group: Group) -> Any:
        return (
            ("sum", "step"),
            (group["lr"], group["lr_decay"], group["weight_decay"], group["eps"]),
            (group["maximize"],),
        )


class Adadelta(_Optimizer, torch.optim.Adadelta):
    """:class:`torch.optim.Adadelta`: see :class:`Adam`."""

    _op = "adadelta_"
    _lists = 5

    def _arguments(self, group: Group) -> Any:
        return (
            ("square_avg", "acc_delta", "step"),
            (group["lr"], group["rho"], group["eps"], group["weight_decay"]),
            (group["maximize"],),
        )


class RMSprop(_Optimizer, torch.optim.RMSprop):
    """:class:`torch.optim.RMSprop`: see :class:`Adam`."""

    _op = "rmsprop_"
    _lists = 6

    def _arguments(self, group: Group) -> Any:
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


def _has_op(group: Group) -> bool:
    """Whether our ops have the options that a group asks for."""
    if group.get("amsgrad"):
        return False
    if group.get("capturable") and not all(p.is_cuda for p in group["params"]):
        return False
    return group.get("differentiable", False) is False and 1 not in group.get("betas", ())


def _shards(state: State, groups: list[OpGroup]) -> tuple[State, list[OpGroup]] | None:
    """`state` and `groups` with local tensors in the place of DTensors; None where there are none,
    or one has a gradient or a state that is not split as it is."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if not any(type(p) is dtensor for params, *_ in groups for p in params):
        return None
    seen: set[Tensor] = set()
    local_state: State = {}
    local_groups: list[OpGroup] = []
    for params, keys, numbers, options in groups:
        local: list[Tensor] = []
        p: Any
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
        local_groups.append((local, keys, numbers, options))
    return local_state, local_groups


def _split_alike(p: Any, t: Any, dtensor: Any) -> bool:
    return (
        type(t) is dtensor
        and t.device_mesh == p.device_mesh
        and t.placements == p.placements
        and not any(placement.is_partial() for placement in p.placements)
    )


def _unhooked(step: Any) -> Callable[[], object]:
    """A bound step without the hooks that torch wraps around it: they run around ours."""
    function = step.__func__
    if getattr(function, "hooked", False):
        function = function.__wrapped__
    return function.__get__(step.__self__)
