"""Methods that a signal handler that raises can't cut short.

Python runs signal handlers between two bytecodes, so one may raise after a method's last act, or before the first line of an ``__exit__``
or a ``__del__``. The decorators here put a caller in C around such a method, which nothing interrupts (native/domain/guard.c).

Signal handlers run in the main thread only. In other threads the decorators add nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

from dmabuf._native import OwnedFd, set_own_errors
from dmabuf._native import finalizer as _finalizer
from dmabuf._native import finished as _finished
from dmabuf._native import guarded as _guarded
from dmabuf._native import numbered as _numbered
from dmabuf.errors import ContractError, ContractWarning, DmaBufError

P = ParamSpec("P")
K = TypeVar("K")
R = TypeVar("R")
S = TypeVar("S")
V = TypeVar("V")

Taken = list[Any]
"""What an operation or a block has taken so far: locks and contexts, which are released, and anything else, which is only dropped."""


class WeakKeys(WeakKeyDictionary[K, V]):
    """A WeakKeyDictionary whose keys may go at any moment, without the loss of what a signal handler raises just then."""

    def __init__(self) -> None:
        super().__init__()
        self._remove = _finalizer(self._remove)  # type: ignore[has-type]


set_own_errors((DmaBufError, ContractError, ContractWarning))


def guarded(fn: Callable[Concatenate[S, Taken, P], R]) -> Callable[Concatenate[S, P], R]:
    """Give a method a list ``taken`` after ``self``. If the method raises, what it has put there is undone."""
    made = _guarded(fn)
    signature = inspect.signature(fn)
    self, _, *others = signature.parameters.values()
    made.__signature__ = signature.replace(parameters=[self, *others])
    return cast("Callable[Concatenate[S, P], R]", made)


def finished(fn: Callable[P, R]) -> Callable[P, R]:
    """Call a method again until it ends, and then raise what a signal handler raised meanwhile.

    The method must be callable again after an exception at any point: it does first what must be done, and forgets afterwards.
    """
    return cast("Callable[P, R]", _finished(fn))


def finalizer(fn: Callable[P, R]) -> Callable[P, R]:
    """Do the same as :func:`finished` for a ``__del__``. What a handler raised is raised in the main thread a moment later."""
    return cast("Callable[P, R]", _finalizer(fn))


def numbered(fn: Callable[P, OwnedFd]) -> Callable[P, int]:
    """Return a method's new descriptor as a number, which the caller owns. The last step is in C, so that none is lost on the way."""
    made = _numbered(fn)
    signature = inspect.signature(fn)
    made.__signature__ = signature.replace(return_annotation="int")
    return cast("Callable[P, int]", made)
