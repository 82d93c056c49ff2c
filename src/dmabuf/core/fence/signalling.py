"""``signalling``: marks code that a fence's signal depends on (semantics 3.11)."""

from __future__ import annotations

import contextvars
from contextlib import AbstractContextManager

from dmabuf._native import Bracket
from dmabuf.errors import contract_warning

sections: set[int] = set()  # the open ones of the process: while there is none, no caller has to ask for its own
_sections: contextvars.ContextVar[int] = contextvars.ContextVar("dmabuf signalling", default=0)


def signalling() -> AbstractContextManager[None]:
    """Mark the code of a block as one that a fence's signal depends on: it must take no reservation lock.

    A section belongs to the thread or asyncio task, and may be nested. Taking a lock in it is a ``ContractWarning``, and the lock is taken.

    Kernel: dma_fence_begin_signalling, dma_fence_end_signalling.
    """
    return _Section()


class _Section(Bracket):
    __slots__ = ("_before",)

    def enter(self) -> None:
        self._before = _sections.get()
        sections.add(id(self))
        _sections.set(self._before + 1)

    def leave(self) -> None:
        sections.discard(id(self))
        if _sections.get() > self._before:  # not in another thread or task, which a generator may end in
            _sections.set(self._before)


def in_signalling() -> bool:
    """Return True if the running thread or task is inside a signalling section."""
    return _sections.get() > 0


def check_signalling(operation: str, obj: object, level: int = 4) -> None:
    """Warn, before a wait for a reservation lock, if the running thread or task is inside a signalling section.

    ``level``: how far the warning points up from here, as for ``contract_warning``.
    """
    if _sections.get():
        contract_warning(
            f"{operation}: {obj!r}: inside dmabuf.signalling(): the lock's holder may wait for the fence that this code is about to signal",
            level,
        )
