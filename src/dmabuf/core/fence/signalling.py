"""``signalling``: marks code that a fence's signal depends on (spec 3.11)."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager

from dmabuf.domain.forks import fork_lock
from dmabuf.errors import contract_warning

sections = 0  # open in the process: while there is none, nobody has to ask for one's own
_counting = fork_lock()
_sections: contextvars.ContextVar[int] = contextvars.ContextVar("dmabuf signalling", default=0)


@contextmanager
def signalling() -> Iterator[None]:
    """Code that a fence's signal depends on: reservation locks are not to be taken in it.

    A section belongs to the thread or asyncio task, and may be inside of another. Taking a lock in it: ``ContractWarning``, and the lock
    is taken. Kernel: dma_fence_begin_signalling, dma_fence_end_signalling.
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
    """Is the running thread or task inside of a signalling section?"""
    return _sections.get() > 0


def check_signalling(operation: str, obj: object) -> None:
    """Before a wait for a reservation lock."""
    if _sections.get():
        contract_warning(
            f"{operation}: {obj!r}: inside of dmabuf.signalling(): its holder may wait for the fence that this code is about to signal", 4
        )
