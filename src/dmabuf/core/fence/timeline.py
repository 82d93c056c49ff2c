"""``Timeline``: a fence context of this process, which makes fences with rising numbers (spec 3.2, 3.10)."""

from __future__ import annotations

import errno
import itertools
import operator
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from dmabuf._native import FF_SEQNO64, Shm
from dmabuf.core.fence.fence import DmaFence, flagged, register
from dmabuf.core.fence.lazy import custom
from dmabuf.core.fence.ops import FenceOps
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail

NAME_BYTES = 63


@dataclass(frozen=True)
class TimelineStatistics:
    """What a timeline says of itself. ``seqno``: of the newest fence; ``pending``: how many are not signalled."""

    driver: str
    name: str
    context: int
    seqno: int
    pending: int
    closed: bool


class Timeline:
    """A fence context of this process: makes fences with rising numbers, and ends them (spec 3.2, 3.10).

    ``name``, ``driver``: at most 63 bytes, shown by ``describe`` and ``dmabuf ls``. ``close()`` (or leaving the ``with`` block) ends what
    is pending with ``-ENOENT``. Fences keep their timeline. In a forked child it is inert. ``seqno64=False``: its numbers have 32 bits and
    wrap, as those of most drivers and of sw_sync (spec 3.10).

    Errors: EINVAL a name that is too long or has a NUL; ENOSPC the domain is full.

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
        self._index, self.context = self.domain.timeline_open(os.fsencode(self.driver), os.fsencode(self.name), _context)
        self._life = self.domain.shm.life
        self._shm = self.domain.shm
        self._seqno = 0  # of the newest fence
        self._numbers = itertools.count(1)  # the next one is taken in one step, whatever comes in between
        self._flags = FF_SEQNO64 if seqno64 else 0
        self._pending: weakref.WeakValueDictionary[int, DmaFence] = weakref.WeakValueDictionary()
        self.closed = False

    def __repr__(self) -> str:
        return f"<dmabuf.Timeline {self.name!r} context {self.context} seqno {self._seqno}{' closed' if self.closed else ''}>"

    def fence(self, *, seqno: int | None = None, ops: FenceOps | None = None) -> DmaFence:
        """The next fence. ``seqno``: its number, instead of one more than the newest; ``ops``: its behaviour (:class:`FenceOps`).

        Errors: EPERM in a forked child; EBADF when closed; EINVAL a number that the timeline has no room for; ENOSPC when every fence of
        the domain is in use. Kernel: dma_fence_init, dma_fence.ops as ops.
        """
        if inherited(self):
            raise fail(errno.EPERM, "fence", self, "what a fork inherits is inert in the child: make a timeline in this process")
        if self.closed:
            raise fail(errno.EBADF, "fence", self, "make a new timeline", what="the timeline is closed")
        kind: Callable[[Shm, int, bool], DmaFence] = DmaFence
        flags = 0
        if ops is not None:
            kind, flags = custom(ops, self.domain)
        number = self._number(seqno)
        handle = self._shm.fence_alloc(self._index + 1, self.context, number, self._flags | flags, 0, 0)
        self._seqno = number
        fence = kind(self._shm, handle, True)
        register(fence, self.domain, self)
        self._pending[handle] = fence
        return fence

    def _number(self, given: int | None) -> int:
        top = 0xFFFFFFFFFFFFFFFF if self._flags else 0xFFFFFFFF
        if given is None:
            return next(self._numbers) & top
        if not 0 <= operator.index(given) <= top:
            raise fail(errno.EINVAL, "fence", self, f"a seqno of this timeline is 0 to {top}")
        self._numbers = itertools.count(given + 1)
        return operator.index(given)

    def pending(self) -> Sequence[DmaFence]:
        """The fences that are not signalled, lowest number first."""
        known = (ref() for ref in self._pending.valuerefs())  # a list made in one step: other threads may add
        return sorted((fence for fence in known if fence is not None and not flagged(fence)), key=lambda fence: fence.seqno)

    def close(self) -> None:
        """End what is pending with ``-ENOENT``. Again, or in a forked child: nothing."""
        if self.closed or inherited(self):
            return
        self.closed = True
        for fence in self.pending():
            self._shm.fence_signal(fence.handle, -errno.ENOENT, False)
        self.domain.timeline_close(self._index, self._life)

    def statistics(self) -> TimelineStatistics:
        """A snapshot for programs."""
        return TimelineStatistics(self.driver, self.name, self.context, self._seqno, len(self.pending()), self.closed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Fences keep their timeline, so nothing is pending here; what is left is to give the slot back.
        if hasattr(self, "closed") and not sys.is_finalizing():
            self.close()


def slot_of(timeline: Timeline) -> int:
    """Return the number of the timeline's slot in the domain file."""
    return timeline._index


def inherited(timeline: Timeline) -> bool:
    """Return True if this is a forked child's copy of its parent's timeline, which has no effect."""
    return timeline._shm.life != timeline._life


def _checked(name: str | bytes, what: str) -> str:
    raw = os.fsencode(name)
    if len(raw) > NAME_BYTES or b"\0" in raw:
        raise fail(errno.EINVAL, "timeline", f"{what} {name!r}", f"at most {NAME_BYTES} bytes, without a NUL")
    return os.fsdecode(raw)
