"""The optimizers of :mod:`torch.optim` on our kernels: same arguments, state and state dicts.

A step on plain float32 CPU tensors is one call of our op a parameter group. A step on anything
else, or with ``amsgrad``, ``capturable`` or ``differentiable``, is left as a whole to PyTorch's own
optimizer. :func:`dlkernels.stats` counts both as ``adam_``.
"""

import torch
from torch import Tensor

from . import _C, functional

__all__ = ["Adam", "AdamW"]


class Adam(torch.optim.Adam):
    """:class:`torch.optim.Adam`. ``foreach`` and ``fused`` choose among PyTorch's own steps, where
    the step is left to it; state dicts load from and into PyTorch's class."""

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
            functional._torch("adam_", self._torch_step)
        return loss

    def _torch_step(self):
        """PyTorch's step; not its fused one on tensors that are no runs of memory in one order: on
        the CPU it takes them for such, and reads and writes outside of them."""
        groups = [g for g in self.param_groups if g["fused"] and not self._are_runs(g["params"])]
        for group in groups:
            group["fused"] = False
        try:
            _unhooked(super().step)()
        finally:
            for group in groups:
                group["fused"] = True

    def _are_runs(self, params):
        return all(
            t.is_contiguous()
            for p in params
            if p.grad is not None and p.is_cpu and p.is_floating_point()
            for t in (p, p.grad, *self.state.get(p, {}).values())
            if isinstance(t, Tensor) and t.layout == torch.strided
        )

    def _step(self):
        """Our op on every group; False, with nothing done, where one of them is not for it."""
        groups = [(group["params"], _scalars(group)) for group in self.param_groups]
        if not all(scalars for _, scalars in groups):
            return False
        scales = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if _C.adam_step(self.state, groups, *scales):
            return True
        for group in self.param_groups:  # a first step: parameters without state
            self._init_group(group, [], [], [], [], [], [])
        return _C.adam_step(self.state, groups, *scales)


class AdamW(Adam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`: see :class:`Adam`."""


_NUMBERS = float, int


def _scalars(group):
    """Our op's scalars, as _C.adam_step takes them, or None for options that it does not have."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    weight_decay, eps = group["weight_decay"], group["eps"]
    if group["amsgrad"] or group["capturable"] or group["differentiable"]:
        return None
    # What a group was given after its construction, PyTorch has not checked yet.
    if not all(isinstance(x, _NUMBERS) for x in (beta1, beta2, weight_decay, eps)):
        return None
    if isinstance(lr, Tensor):
        if lr.requires_grad or lr.is_complex() or lr.numel() != 1 or type(lr) is not Tensor:
            return None
    elif not isinstance(lr, _NUMBERS):
        return None
    if beta1 == 1 or beta2 == 1:  # a division by zero
        return None
    return (
        float(lr),
        float(beta1),
        float(beta2),
        float(weight_decay),
        float(eps),
        bool(group["maximize"]),
        bool(group["decoupled_weight_decay"]),
    )


def _unhooked(step):
    """A bound step without the hooks that torch wraps around it: they run around ours."""
    function = step.__func__
    if getattr(function, "hooked", False):
        function = function.__wrapped__
    return function.__get__(step.__self__)
