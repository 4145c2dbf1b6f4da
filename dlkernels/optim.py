"""The optimizers of :mod:`torch.optim` on our kernels: same arguments, state and state dicts.

A step on plain float32 CPU tensors is one call of our op a parameter group. A step on anything
else, or with ``amsgrad``, ``capturable`` or ``differentiable``, is left as a whole to PyTorch's own
optimizer. :func:`dlkernels.stats` counts both as ``adam_``.
"""

import torch
from torch import Tensor

from . import _C, functional

_adam = torch.ops.dlkernels.adam_.default


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
        calls = self._calls() if functional._ours() else None
        if calls is None:
            functional._torch("adam_", _unhooked(super().step))
        else:
            with torch.no_grad():
                for lists, scalars in calls:
                    _adam(*lists, **scalars)
        return loss

    def _calls(self):
        """The arguments of our op, group by group; None where one of them is not for our op."""
        scales = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        if not _C.are_ours([t for t in scales.values() if t is not None]):
            return None
        calls = []
        for group in self.param_groups:
            scalars = _scalars(group)
            if scalars is None:
                return None
            lists = [], [], [], [], []
            params, grads, exp_avgs, exp_avg_sqs, steps = lists
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
            # A parameter listed twice: how often it is updated, with what, is PyTorch's affair.
            if not _C.are_ours(*lists) or len(set(map(id, params))) < len(params):
                return None
            if params:
                calls.append((lists, scalars | scales))
        return calls


class AdamW(Adam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`: see :class:`Adam`."""


def _scalars(group):
    """Our op's scalar arguments, or None for options that it does not have."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    weight_decay, eps = group["weight_decay"], group["eps"]
    if group["amsgrad"] or group["capturable"] or group["differentiable"]:
        return None
    if any(isinstance(x, Tensor) for x in (beta1, beta2, weight_decay, eps)):
        return None
    if isinstance(lr, Tensor) and (lr.requires_grad or type(lr) is not Tensor):
        return None
    return {
        "lr": float(lr),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "weight_decay": float(weight_decay),
        "eps": float(eps),
        "maximize": bool(group["maximize"]),
        "decoupled_weight_decay": bool(group["decoupled_weight_decay"]),
    }


def _unhooked(step):
    """A bound step without the hooks that torch wraps around it: they run around ours."""
    function = step.__func__
    if getattr(function, "hooked", False):
        function = function.__wrapped__
    return function.__get__(step.__self__)
