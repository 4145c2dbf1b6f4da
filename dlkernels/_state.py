"""The switches, and the counters that tell which kernels ran."""

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import torch

from . import _C

# Whether no thread is in disabled(): all that an op reads while nobody uses the switch, and a
# plain global, because torch.compile guards on it and recompiles.
enabled = True

_module: Any = sys.modules[__name__]
P = ParamSpec("P")
R = TypeVar("R")
_lock = threading.Lock()
_inside = 0  # entries of all threads


class _Thread(threading.local):
    inside = 0


_thread = _Thread()


def enabled_here() -> bool:
    """Whether this thread is outside disabled(), asked while some thread is inside.

    torch.compile can't guard on a thread, so what it compiles then is PyTorch's for all of them.
    """
    return not torch.compiler.is_compiling() and not _thread.inside


class disabled:
    """Runs PyTorch's own ops instead, not counted: ``with disabled():`` or ``@disabled()``.

    Holds for the thread that enters it, as :class:`torch.no_grad` does, and may be nested. A
    backward pass is what its forward recorded, wherever it runs. A generator or coroutine is
    only created inside the decorator, not run there: use ``with`` in its body.
    """

    def __enter__(self) -> None:
        self._step(1)

    def __exit__(self, *exception: object) -> None:
        self._step(-1)

    def __call__(self, f: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(f)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            with disabled():  # a new one: torch.compile can't enter one made outside its region
                return f(*args, **kwargs)

        return wrapper

    def _step(self, by: int) -> None:
        global enabled, _inside
        if torch.compiler.is_compiling():
            # No lock, which can't be traced, and an attribute, because a write to a global of the
            # compiled function's own file goes unseen by who reads it as an attribute.
            if by > 0:
                self._before = _module.enabled
            _module.enabled = by < 0 and self._before
            return
        with _lock:
            _inside += by
            enabled = _inside == 0
        _thread.inside += by


def stats() -> dict[str, dict[str, int]]:
    """How often each op ran: ``{op: {"kernel": calls of our kernel, "torch": left to PyTorch}}``.

    Ops that torch.compile traced into PyTorch's own are not counted.
    """
    return {op: {"kernel": k, "torch": t} for op, (k, t) in sorted(_C.stats().items())}


def reset_stats() -> None:
    """Sets every count of :func:`stats` to 0."""
    _C.reset_stats()


class set_fallback:
    """What happens where an op has no kernel for its arguments, in all threads, from now on.

    Args:
        to: "torch", where PyTorch's own op runs, or "error", a NotImplementedError

    As a context manager it puts back what was before: ``with set_fallback("error"):``.

    Raises:
        ValueError: for any other `to`.
    """

    def __init__(self, to: Literal["torch", "error"]) -> None:
        if not isinstance(to, str) or to not in ("torch", "error"):
            raise ValueError(f'set_fallback: to must be "torch" or "error", got {to!r}')
        self._before = _C.set_fallback_error(to == "error")

    def __enter__(self) -> "set_fallback":
        return self

    def __exit__(self, *exception: object) -> None:
        _C.set_fallback_error(self._before)


class set_precision:
    """What convolutions may do for speed, in all threads, from now on.

    Args:
        to: "fast", the default: 3x3 convolutions may use Winograd's algorithm (Lavin and Gray,
            2016), F(4x4,3x3) or F(2x2,3x3): its error is up to four times that of direct summation
            (with 64 channels 1.1e-6 of the result's RMS instead of 3e-7), in a weight's gradient
            up to ten times, and an infinity or a NaN may make any output of the tiles that see it
            NaN, or all nine gradients of a window; or "ieee": direct summation, always

    As a context manager it puts back what was before: ``with set_precision("ieee"):``. What holds
    when a backward pass runs holds for its convolutions.

    Raises:
        ValueError: for any other `to`.
    """

    def __init__(self, to: Literal["fast", "ieee"]) -> None:
        if not isinstance(to, str) or to not in ("ieee", "fast"):
            raise ValueError(f'set_precision: to must be "ieee" or "fast", got {to!r}')
        self._before = _C.set_precision_ieee(to == "ieee")

    def __enter__(self) -> "set_precision":
        return self

    def __exit__(self, *exception: object) -> None:
        _C.set_precision_ieee(self._before)
