"""``Timeline``: a fence context of this process, which makes fences with rising numbers (semantics 3.2, 3.10)."""

from __future__ import annotations

import errno
import itertools
import operator
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from dmabuf._native import FF_SEQNO64, WeakValues
from dmabuf.core.fence.fence import DmaFence, flagged, register
from dmabuf.core.fence.lazy import CustomFence, customize, flags_for
from dmabuf.core.fence.ops import FenceOps
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import finalizer, finished
from dmabuf.errors import fail

NAME_BYTES = 63


@dataclass(frozen=True)
class TimelineStatistics:
    """A snapshot of a timeline. ``seqno``: of the newest fence; ``pending``: how many are not signaled."""

    driver: str
    name: str
    context: int
    seqno: int
    pending: int
    closed: bool


class Timeline:
    """A fence context of this process: makes fences with rising numbers, and signals them (semantics 3.2, 3.10).

    ``close()``, or the end of a ``with`` block, signals the pending fences with ``-ENOENT``. A fence keeps its timeline alive. In a forked
    child the timeline has no effect.

    Args:
        name: At most 63 bytes, which ``describe`` and ``dmabuf ls`` show.
        driver: At most 63 bytes, likewise.
        seqno64: False for numbers of 32 bits that wrap, as most drivers and sw_sync have them (semantics 3.10).
        domain: The domain to make it in; None means the user's default domain.

    Raises:
        InvalidError: A name is too long or has a NUL (EINVAL).
        TypeError: A name is neither str nor bytes.
        NoSpaceError: The domain is full (ENOSPC).

    Kernel: dma_fence_context_alloc, dma_fence_ops.use_64bit_seqno as seqno64.
    """

    def __init__(
        self,
        name: str | bytes = "",
        *,
        driver: str | bytes = "dmabuf",
        seqno64: bool = True,
        domain: Domain | None = None,
        _context: int = 0,
    ) -> None:
        self.domain = domain or Domain.default()
        self.driver, self.name = _checked(driver, "driver"), _checked(name, "name")
        self._slot = self.domain.timeline_open(os.fsencode(self.driver), os.fsencode(self.name), _context)
        self._index, self.context = self._slot.index, self._slot.context
        self._life = self.domain.shm.life
        self._shm = self.domain.shm
        self._seqno = 0  # of the newest fence
        self._numbers = itertools.count(1)  # taking the next one is one step, whatever interrupts it
        self._flags = FF_SEQNO64 if seqno64 else 0
        self._pending: WeakValues[int, DmaFence] = WeakValues()
        self.closed = False

    def __repr__(self) -> str:
        return f"<dmabuf.Timeline {self.name!r} context {self.context} seqno {self._seqno}{' closed' if self.closed else ''}>"

    def fence(self, *, seqno: int | None = None, ops: FenceOps | None = None) -> DmaFence:
        """Make the next fence.

        Args:
            seqno: Its number; None for one more than the newest.
            ops: Its behavior (:class:`FenceOps`); None for a plain fence.

        Raises:
            NotPermittedError: The timeline was made before a fork, in the parent (EPERM).
            ClosedError: The timeline is closed (EBADF).
            InvalidError: The timeline's numbers don't go that far (EINVAL).
            NoSpaceError: Every fence of the domain is in use (ENOSPC).

        Kernel: dma_fence_init, dma_fence.ops as ops.
        """
        if inherited(self):
            raise fail(errno.EPERM, "fence", self, "make a timeline in this process", what="it belongs to the parent process")
        if self.closed:
            raise fail(errno.EBADF, "fence", self, "make a new timeline", what="the timeline is closed")
        flags = 0 if ops is None else flags_for(ops)
        number = self._number(seqno)
        fence = (DmaFence if ops is None else CustomFence).made(self._shm, self._index + 1, self.context, number, self._flags | flags)
        self._seqno = number
        register(fence, self.domain, self)
        if ops is not None:
            customize(fence, ops)
        self._pending[fence.handle] = fence
        return fence

    def _number(self, given: int | None) -> int:
        top = 0xFFFFFFFFFFFFFFFF if self._flags else 0xFFFFFFFF
        if given is None:
            return next(self._numbers) & top
        if not 0 <= operator.index(given) <= top:
            raise fail(errno.EINVAL, "fence", self, f"pass 0 to {top}", what=f"its numbers don't go to {given}")
        self._numbers = itertools.count(given + 1)
        return operator.index(given)

    def pending(self) -> Sequence[DmaFence]:
        """Return the fences that are not signaled, lowest number first."""
        return sorted((fence for fence in self._pending.values() if not flagged(fence)), key=lambda fence: fence.seqno)

    @finished
    def close(self) -> None:
        """Signal the pending fences with ``-ENOENT``. Closing twice, or in a forked child, has no effect."""
        if not self._slot.open or inherited(self):
            return
        self.closed = True
        for fence in self.pending():
            self._shm.fence_signal(fence.handle, -errno.ENOENT, False)
        self._slot.close()

    def statistics(self) -> TimelineStatistics:
        """Return a snapshot for programs."""
        return TimelineStatistics(self.driver, self.name, self.context, self._seqno, len(self.pending()), self.closed)

    def __enter__(self) -> Self:
        return self

    @finished
    def __exit__(self, *_: object) -> None:
        self.close()

    @finalizer
    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:  # bound: at the interpreter's end modules are empty
        # Fences keep their timeline, so none is pending here, and only the slot is left to free.
        if hasattr(self, "closed") and not ending():
            self.close()


# ---- for the package ----


def slot_of(timeline: Timeline) -> int:
    """Return the number of the timeline's slot in the domain file."""
    return timeline._index


def inherited(timeline: Timeline) -> bool:
    """Return True if this is a forked child's copy of its parent's timeline, which has no effect."""
    return timeline._shm.life != timeline._life


def _checked(name: str | bytes, what: str) -> str:
    if not isinstance(name, (str, bytes)):
        raise TypeError(f"timeline: {what} is str or bytes, not {type(name).__name__}")
    raw = os.fsencode(name)
    if len(raw) > NAME_BYTES or b"\0" in raw:
        wrong = "it has a NUL" if b"\0" in raw else f"it has {len(raw)} bytes"
        raise fail(errno.EINVAL, "timeline", f"{what} {name!r}", f"use at most {NAME_BYTES} bytes, without a NUL", what=wrong)
    return os.fsdecode(raw)
