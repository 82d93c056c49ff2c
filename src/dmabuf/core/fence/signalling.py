"""``signalling``: marks code that a fence's signal depends on (semantics 3.11)."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager

from dmabuf.domain.forks import fork_lock
from dmabuf.errors import contract_warning

sections = 0  # open in the process: while there is none, no caller has to ask for its own
_counting = fork_lock()
_sections: contextvars.ContextVar[int] = contextvars.ContextVar("dmabuf signalling", default=0)


@contextmanager
def signalling() -> Iterator[None]:
    """Mark the code of a block as one that a fence's signal depends on: it must take no reservation lock.

    A section belongs to the thread or asyncio task, and may be nested. Taking a lock in it is a ``ContractWarning``, and the lock is taken.

    Kernel: dma_fence_begin_signalling, dma_fence_end_signalling.
    """
    global sections
    token = _sections.set(_sections.get() + 1)
    with _counting:
        sections += 1
    try:
        yield
    finally:
        with _counting:
            sections -= 1
        _sections.reset(token)


def in_signalling() -> bool:
    """Return True if the running thread or task is inside a signalling section."""
    return _sections.get() > 0


def check_signalling(operation: str, obj: object) -> None:
    """Warn, before a wait for a reservation lock, if the running thread or task is inside a signalling section."""
    if _sections.get():
        contract_warning(
            f"{operation}: {obj!r}: inside dmabuf.signalling(): the lock's holder may wait for the fence that this code is about to signal",
            4,
        )
