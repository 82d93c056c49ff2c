"""``DmaFenceChain``: a growing timeline as one fence, each point a fence and all that came before (spec 3.16).

A point is signalled when the fence that it contains and every earlier one are. Numbers are of 64 bits and never fall: a point made with a
number that isn't higher than its predecessor's begins a context of its own with the predecessor's number.

Walking a chain goes from the newest point back and unlinks predecessors that have signalled, so a chain that is looked at stays as long as
what is pending. Enabling puts one callback on the newest pending fence; when that ends the walk is done again. A chain of any length is
walked, enabled, signalled and let go of without recursion.

A chain's points belong to the process that made them. Sent to another process, what is pending of the chain is made anew there
(``core/fence/travel.py``). A chain ends without an error, whatever its fences ended with.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Self

from dmabuf._native import FF_CONTAINER, FF_SEQNO64, OFF_CONTEXT
from dmabuf.core.fence.container import Container, one_domain
from dmabuf.core.fence.fence import DmaFence, register, unbound_timeline
from dmabuf.domain.dispatcher import defer
from dmabuf.errors import contract_warning, fail

_FLAGS = FF_CONTAINER | FF_SEQNO64
_TOP = 0xFFFFFFFFFFFFFFFF


class DmaFenceChain(Container):
    """A point of a chain. ``prev``: what came before (None once that has signalled and was unlinked); ``fence``: what it adds;
    ``prev_seqno``: the number before it on its context, 0 when it begins one.

    ``prev``: a chain, another fence or None. ``seqno``: 0 to 2⁶⁴-1.

    Errors: EINVAL a seqno outside; EXDEV fences of several domains; TypeError no fence; ENOSPC the domain is full. ``ContractWarning`` when
    ``fence`` is a chain itself (an array may be contained).

    Kernel: dma_fence_chain (prev, prev_seqno, fence), dma_fence_chain_init.
    """

    __slots__ = ("_prev", "fence", "prev_seqno")

    _prev: DmaFence | None
    fence: DmaFence
    prev_seqno: int

    def __new__(cls, prev: DmaFence | None, fence: DmaFence, seqno: int) -> Self:
        if not 0 <= seqno <= _TOP:
            raise fail(errno.EINVAL, "DmaFenceChain", f"seqno {seqno}", f"a chain's numbers are 0 to {_TOP}")
        domain = one_domain((fence,) if prev is None else (prev, fence), "DmaFenceChain")
        if isinstance(fence, DmaFenceChain):
            contract_warning(f"DmaFenceChain: {fence!r} is a chain itself: contain its fence", 2)
        if isinstance(prev, DmaFenceChain) and seqno > prev.seqno:
            return cls._point(prev, fence, prev.context, seqno, prev.seqno)
        number = max(prev.seqno, seqno) if isinstance(prev, DmaFenceChain) else seqno
        return cls._point(prev, fence, domain.join().add64(OFF_CONTEXT, 1), number, 0)

    @classmethod
    def _point(cls, prev: DmaFence | None, fence: DmaFence, context: int, seqno: int, prev_seqno: int) -> Self:
        domain = fence.domain
        shm = domain.join()
        handle = shm.fence_alloc(unbound_timeline(domain, "dma_fence_chain"), context, seqno, _FLAGS, 0, 0)
        self = super().__new__(cls, shm, handle, True)
        register(self, domain, None)
        self._prev, self.fence, self.prev_seqno, self._unasked, self._twin = prev, fence, prev_seqno, True, None
        return self

    def _copy(self) -> Self:
        return self._point(self._prev, self.fence, self.context, self.seqno, self.prev_seqno)

    @property
    def prev(self) -> DmaFence | None:
        """What came before, as it is linked now."""
        return self._prev

    def walk(self) -> DmaFence | None:
        """The predecessor, None when all have signalled; those that have are unlinked on the way. Kernel: dma_fence_chain_walk."""
        while (prev := self._prev) is not None:
            if not contained(prev).is_signaled():
                return prev
            # Another thread may have gone further meanwhile; then signalled points are linked again, until the next walk.
            self._prev = prev._prev if isinstance(prev, DmaFenceChain) else None
        return None

    def __iter__(self) -> Iterator[DmaFence]:
        """This point and those before it, newest first, as :meth:`walk` finds them. Kernel: dma_fence_chain_for_each."""
        here: DmaFence | None = self
        while here is not None:
            yield here
            here = walk(here)

    def find_seqno(self, seqno: int) -> DmaFence | None:
        """The point that covers this number; see :func:`find_seqno`. Kernel: dma_fence_chain_find_seqno."""
        return find_seqno(self, seqno)

    def _enable(self) -> bool:
        return any(contained(point).listen(self._ended) is not None for point in self)

    def _ended(self, _: int) -> None:
        defer(self._look_again)

    def _look_again(self) -> None:
        if not self._enable():
            self._finish()

    def _polled(self) -> bool:
        return all(contained(point).is_signaled() for point in self)

    def set_deadline(self, ns: int) -> None:
        """Forwarded to every fence of the chain that is pending (spec 3.12)."""
        super().set_deadline(ns)
        for point in self:
            contained(point).set_deadline(ns)


def point_as_sent(prev: DmaFence | None, fence: DmaFence, context: int, seqno: int, prev_seqno: int) -> DmaFenceChain:
    """Return a point of this process for one that another process sent, with the same numbers."""
    return DmaFenceChain._point(prev, fence, context, seqno, prev_seqno)


def contained(point: DmaFence) -> DmaFence:
    """The fence in a chain's point; another fence itself. Kernel: dma_fence_chain_contained."""
    return point.fence if isinstance(point, DmaFenceChain) else point


def walk(fence: DmaFence | None) -> DmaFence | None:
    """The predecessor of a chain's point that has not signalled; None for anything else."""
    return fence.walk() if isinstance(fence, DmaFenceChain) else None


def find_seqno(fence: DmaFence | None, seqno: int) -> DmaFence | None:
    """The fence that stands for ``seqno`` on a chain: the point with that number or, in a gap, the next one.

    ``seqno`` 0: ``fence`` itself. None: everything up to there has signalled.

    Errors: EINVAL not a chain, or it hasn't come that far yet.
    """
    if not seqno:
        return fence
    if not isinstance(fence, DmaFenceChain) or fence.seqno < seqno:
        raise fail(errno.EINVAL, "find_seqno", f"{fence!r}, seqno {seqno}", "look on a chain that has come that far")
    for point in fence:
        if point.context != fence.context or not isinstance(point, DmaFenceChain) or point.prev_seqno < seqno:
            return point
    return None
