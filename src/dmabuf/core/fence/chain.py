"""``DmaFenceChain``: a growing timeline as one fence, in which each point is a fence and all points before it (semantics 3.16).

A point is signaled when the fence that it contains and all earlier ones are. Numbers have 64 bits and never fall. A point made with a
number that isn't higher than its predecessor's begins a context of its own, with the predecessor's number.

Walking a chain goes from the newest point back, and unlinks predecessors that are signaled. A chain that is walked now and then is
therefore as long as what is pending. Enabling a point adds one callback, to the newest pending fence, and walks again when that is
signaled. Walking, enabling, signaling and releasing don't recurse, however long the chain is.

The points belong to the process that made them. Another process that gets a chain makes one of its own from what is pending
(``core/fence/travel.py``). A chain is signaled without an error, whatever its fences are signaled with.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Self

from dmabuf._native import FF_CONTAINER, FF_SEQNO64, OFF_CONTEXT
from dmabuf.core.fence.container import Container, one_domain
from dmabuf.core.fence.fence import DmaFence, register, unbound_timeline
from dmabuf.domain.dispatcher import defer
from dmabuf.errors import contract_warning, fail

_FLAGS = FF_CONTAINER | FF_SEQNO64
_TOP = 0xFFFFFFFFFFFFFFFF


class DmaFenceChain(Container):
    """A point of a chain.

    ``prev``: what came before, None once that was signaled and unlinked. ``fence``: what the point adds. ``prev_seqno``: the number before
    it on its context, 0 when it begins one. A ``fence`` that is a chain itself gets a ``ContractWarning``; an array may be contained.

    Args:
        prev: A chain, another fence, or None.
        fence: The fence to contain.
        seqno: The point's number, 0 to 2⁶⁴-1.

    Raises:
        InvalidError: The number is outside of that range (EINVAL).
        CrossDomainError: The fences belong to several domains (EXDEV).
        NoSpaceError: The domain is full (ENOSPC).

    Kernel: dma_fence_chain (prev, prev_seqno, fence), dma_fence_chain_init.
    """

    __slots__ = ("_prev", "fence", "prev_seqno")

    _prev: DmaFence | None
    fence: DmaFence
    prev_seqno: int

    def __new__(cls, prev: DmaFence | None, fence: DmaFence, seqno: int) -> Self:
        if not 0 <= seqno <= _TOP:
            raise fail(errno.EINVAL, "DmaFenceChain", f"seqno {seqno}", f"pass 0 to {_TOP}", what="the number is out of range")
        domain = one_domain((fence,) if prev is None else (prev, fence), "DmaFenceChain")
        if isinstance(fence, DmaFenceChain):
            contract_warning(f"DmaFenceChain: {fence!r} is a chain itself; contain its fence", 2)
        if isinstance(prev, DmaFenceChain) and seqno > prev.seqno:
            return cls._point(prev, fence, prev.context, seqno, prev.seqno)
        number = max(prev.seqno, seqno) if isinstance(prev, DmaFenceChain) else seqno
        return cls._point(prev, fence, domain.join().add64(OFF_CONTEXT, 1), number, 0)

    @classmethod
    def _point(cls, prev: DmaFence | None, fence: DmaFence, context: int, seqno: int, prev_seqno: int) -> Self:
        domain = fence.domain
        shm = domain.join()
        self = cls.made(shm, unbound_timeline(domain, "dma_fence_chain"), context, seqno, _FLAGS)
        register(self, domain, None)
        self._prev, self.fence, self.prev_seqno, self._not_enabled, self._copied = prev, fence, prev_seqno, True, None
        return self

    def members(self) -> Sequence[DmaFence]:
        prev = self._prev
        return (self.fence,) if prev is None else (self.fence, prev)

    def _copy(self) -> Self:
        return self._point(self._prev, self.fence, self.context, self.seqno, self.prev_seqno)

    @property
    def prev(self) -> DmaFence | None:
        """What came before, as it is linked now."""
        return self._prev

    def walk(self) -> DmaFence | None:
        """Return the newest predecessor that isn't signaled, None if all are. Unlinks the signaled ones on the way.

        Kernel: dma_fence_chain_walk.
        """
        while (prev := self._prev) is not None:
            if not contained(prev).is_signaled():
                return prev
            # Another thread may have walked further. Then this links signaled points again, until the next walk.
            self._prev = prev._prev if isinstance(prev, DmaFenceChain) else None
        return None

    def __iter__(self) -> Iterator[DmaFence]:
        """Yield this point and those before it, newest first, as :meth:`walk` finds them.

        Kernel: dma_fence_chain_for_each.
        """
        point: DmaFence | None = self
        while point is not None:
            yield point
            point = walk(point)

    def find_seqno(self, seqno: int) -> DmaFence | None:
        """Return the point that covers a number; see :func:`find_seqno`.

        Raises:
            InvalidError: The chain hasn't come that far (EINVAL).

        Kernel: dma_fence_chain_find_seqno.
        """
        return find_seqno(self, seqno)

    def _enable(self) -> bool:
        return any(contained(point).listen(self._fence_signaled) is not None for point in self)

    def _fence_signaled(self, _: int) -> None:
        defer(self._enable_again)

    def _enable_again(self) -> None:
        if not self._enable():
            self._finish()

    def _polled(self) -> bool:
        return all(contained(point).is_signaled() for point in self)

    def set_deadline(self, ns: int) -> None:
        """Set the deadline of the point and of every pending fence of the chain (semantics 3.12).

        Raises:
            InvalidError: The time is negative (EINVAL).
        """
        super().set_deadline(ns)
        for point in self:
            contained(point).set_deadline(ns)


def point_as_sent(prev: DmaFence | None, fence: DmaFence, context: int, seqno: int, prev_seqno: int) -> DmaFenceChain:
    """Return a point of this process for one that another process sent, with the same numbers."""
    return DmaFenceChain._point(prev, fence, context, seqno, prev_seqno)


def contained(point: DmaFence) -> DmaFence:
    """Return the fence in a chain's point, or any other fence itself.

    Kernel: dma_fence_chain_contained.
    """
    return point.fence if isinstance(point, DmaFenceChain) else point


def walk(fence: DmaFence | None) -> DmaFence | None:
    """Return the newest unsignaled predecessor of a chain's point, and None for anything else."""
    return fence.walk() if isinstance(fence, DmaFenceChain) else None


def find_seqno(fence: DmaFence | None, seqno: int) -> DmaFence | None:
    """Return the fence that stands for a number on a chain: the point with that number or, in a gap, the next one.

    Args:
        fence: The newest point of the chain.
        seqno: The number; 0 returns ``fence`` itself.

    Returns:
        The fence, or None if everything up to there is signaled.

    Raises:
        InvalidError: ``fence`` isn't a chain, or hasn't come that far (EINVAL).
    """
    if not seqno:
        return fence
    if not isinstance(fence, DmaFenceChain):
        raise fail(errno.EINVAL, "find_seqno", repr(fence), "pass a DmaFenceChain", what="it is not a chain")
    if fence.seqno < seqno:
        remedy = f"pass a number up to {fence.seqno}, or a newer point"
        raise fail(errno.EINVAL, "find_seqno", fence, remedy, what=f"the chain hasn't come to {seqno}")
    for point in fence:
        if point.context != fence.context or not isinstance(point, DmaFenceChain) or point.prev_seqno < seqno:
            return point
    return None
