"""What of a model runs on our kernels, worked out from the model as it is."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from . import forward, patterns
from .classes import ORIGINALS, REPLACEMENTS


class Converted(NamedTuple):
    name: str  # as in model.named_modules(); "" is the model itself
    before: str
    after: str


class Fused(NamedTuple):
    name: str  # of the module whose forward runs them
    op: str
    modules: str  # and functions, in order


class Left(NamedTuple):
    name: str
    type: str
    reason: str


class Report:
    """``converted``, ``fused`` and ``left``, lists of named tuples; prints as a table."""

    def __init__(self) -> None:
        self.converted: list[Converted] = []
        self.fused: list[Fused] = []
        self.left: list[Left] = []

    def __str__(self) -> str:
        tables: dict[str, Sequence[tuple[str, str, str]]] = {
            "converted": self.converted,
            "fused": self.fused,
            "left": self.left,
        }
        rows = [row for table in tables.values() for row in table]
        widths = [max((len(row[i] or "(model)") for row in rows), default=0) for i in (0, 1)]
        lines = [", ".join(f"{title} {len(table)}" for title, table in tables.items())]
        if not self.converted:
            lines.append("nothing is converted: dlkernels.convert(model) does that")
        for title, table in tables.items():
            lines += [f"{title}:"] if table else []
            arrow = "-> " if title == "converted" else ""
            lines += [
                f"  {name or '(model)':{widths[0]}}  {second:{widths[1]}}  {arrow}{third}"
                for name, second, third in table
            ]
        return "\n".join(lines)

    __repr__ = __str__


def report(model: torch.nn.Module) -> Report:
    """What of `model` runs on our kernels, as it is now: ``print(dlkernels.report(model))``.

    Args:
        model: any module

    Returns:
        A report with three lists of named tuples, which prints as a table:

        * ``converted`` (name, before, after): the modules of :mod:`dlkernels.nn`
        * ``fused`` (name, op, modules): what containers and forwards among them run as one op
        * ``left`` (name, type, reason): the modules that stay PyTorch's

    Raises:
        TypeError: if `model` is no module.
    """
    check("report", model)
    result = Report()
    for name, m in model.named_modules():
        cls = type(m)
        before = ORIGINALS.get(cls, forward.base_of(cls))
        if before is not cls:
            result.converted.append(Converted(name, _class_name(before), _class_name(cls)))
            result.fused += [Fused(name, op, ", ".join(texts)) for op, texts in _rows(m)]
        elif reason := _why_left(m):
            result.left.append(Left(name, _class_name(cls), reason))
    return result


def check(function: str, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {got}")


def why_kept(m: torch.nn.Module) -> str | None:
    """Why convert() keeps the class of a module, one of those that it replaces; or None."""
    if "forward" in m.__dict__:
        return "its forward was replaced on the instance"
    if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and "weight" not in m._parameters:
        return "its weight is computed by a hook (pruned or normalised)"
    return None


def _why_left(m: torch.nn.Module) -> str | None:
    """Why a module is PyTorch's or its author's, or None where nothing of ours would fit."""
    cls = type(m)
    if cls is torch.nn.Sequential:
        return _NOT_FUSED if any(_rows(m)) else None
    if cls in REPLACEMENTS:
        return why_kept(m) or "not converted: dlkernels.convert(model) does that"
    if cls.__module__ == REPLACEMENTS[torch.nn.Linear].__module__:
        return None  # one that PyTorch does not have
    if isinstance(m, tuple(REPLACEMENTS)) and not isinstance(m, torch.nn.Sequential):
        return "not exactly PyTorch's class: a subclass may compute something else"
    if not m._modules:
        return "no kernel of ours for this class"
    if "forward" in m.__dict__:
        return None
    fused, reason = forward.fused(m)
    return _NOT_FUSED if fused is not cls else reason


_NOT_FUSED = "not fused: dlkernels.convert(model) does that, but for fuse=False"


def _rows(m: torch.nn.Module) -> Iterator[tuple[str, list[str]]]:
    """What a container or a forward runs as one op: (op, the source of its parts)."""
    if isinstance(m, torch.nn.Sequential):
        names, modules, i = list(m._modules), list(m._modules.values()), 0
        while i < len(modules):
            op, end = patterns.match(modules, i)
            if op:
                yield op.__name__, names[i:end]
            i = end
        return
    for texts, steps in forward.chains(m):
        if steps[0] is None:
            yield "linear_relu or conv2d_relu", texts  # known when it is called
        op, end = patterns.match(steps, 0)
        if op:
            yield op.__name__, texts[:end]


def _class_name(cls: type) -> str:
    module = "torch.nn" if cls.__module__.startswith("torch.nn.modules.") else cls.__module__
    fused = " (fused)" if forward.base_of(cls) is not cls else ""
    return f"{module}.{cls.__qualname__}{fused}"
