"""``DmaFenceArray``: several fences as one (spec 3.15).

It is signalled when all its members are, or with ``signal_on_any`` when the first is. Nothing is watched until somebody waits, adds a
callback or enables signalling; so, as up to Linux 6.12, an array whose members have all signalled but that nobody enabled polls as
unsignalled (from 6.13 on it polls its members). Its error is that of the first failing member to complete before it signals.

It belongs to the process that made it and has a slot, a context and a number like any fence, so others may wait for it; ends of members
reach it after the members' own callbacks. Sent to another process it is made anew there over the same members
(``core/fence/travel.py``), so it outlives its maker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

from dmabuf._native import FF_CONTAINER, OFF_CONTEXT
from dmabuf.core.fence.container import Container, is_container, one_domain
from dmabuf.core.fence.fence import DmaFence, register, unbound_timeline
from dmabuf.domain.dispatcher import defer
from dmabuf.errors import contract_warning


class DmaFenceArray(Container):
    """Several fences as one; ``fences``: its members.

    ``fences``: at least one, all of one domain. ``signal_on_any``: the first end counts, not the last. Its context is a fresh one, its
    seqno 1.

    Errors: EINVAL no member (with a ``ContractWarning``); EXDEV members of several domains; TypeError no fence; ENOSPC the domain is full.
    ``ContractWarning`` for a member that is a container itself: unwrap() it first.

    Kernel: dma_fence_array (fences, num_fences as fences), dma_fence_array_create, dma_fence_array_for_each as fences.
    """

    __slots__ = ("_errors", "_left", "fences", "signal_on_any")

    fences: tuple[DmaFence, ...]
    signal_on_any: bool
    # Taking from these and adding to them are single steps: members end in any thread, in signal handlers and finalisers too.
    _left: dict[int, None]  # the members, by their places, whose ends are missing: each counts once, however often it is told
    _errors: list[int]  # of the members that failed, in the order of their ends

    def __new__(cls, fences: Iterable[DmaFence], signal_on_any: bool = False) -> Self:
        members = tuple(fences)
        domain = one_domain(members, "DmaFenceArray")
        for member in members:
            if is_container(member):
                contract_warning(f"DmaFenceArray: {member!r} is a container itself: unwrap() it first", 2)
        return cls._made(members, bool(signal_on_any), domain.join().add64(OFF_CONTEXT, 1), 1)

    @classmethod
    def _made(cls, members: Sequence[DmaFence], signal_on_any: bool, context: int, seqno: int) -> Self:
        domain = members[0].domain
        shm = domain.join()
        handle = shm.fence_alloc(unbound_timeline(domain, "dma_fence_array"), context, seqno, FF_CONTAINER, 0, 0)
        self = super().__new__(cls, shm, handle, True)
        register(self, domain, None)
        self.fences, self.signal_on_any, self._unasked, self._twin = tuple(members), signal_on_any, True, None
        self._left, self._errors = dict.fromkeys(range(len(members))), []
        return self

    def _copy(self) -> Self:
        return self._made(self.fences, self.signal_on_any, self.context, self.seqno)

    def _enable(self) -> bool:
        for at, member in enumerate(self.fences):
            if member.listen(lambda _, at=at: self._ended(at)) is None and self._count(at):  # type: ignore[misc]
                return False
        return True

    def _count(self, at: int) -> bool:
        """A member has ended; does that end the array?"""
        if at in self._left and (error := self.fences[at].error):
            self._errors.append(error)
        self._left.pop(at, None)
        return self._over()

    def _over(self) -> bool:
        return len(self._left) < (len(self.fences) if self.signal_on_any else 1)

    def _ended(self, at: int) -> None:
        if self._count(at):
            defer(self._finish)

    def _polled(self) -> bool:
        return self._over()

    def _error(self) -> int:
        return next(iter(self._errors), 0)

    def set_deadline(self, ns: int) -> None:
        """Forwarded to every member (spec 3.12)."""
        super().set_deadline(ns)
        for member in self.fences:
            member.set_deadline(ns)

    def match_context(self, context: int) -> bool:
        """Are all members of this context?"""
        return all(member.match_context(context) for member in self.fences)


def array_as_sent(members: Sequence[DmaFence], signal_on_any: bool, context: int, seqno: int) -> DmaFenceArray:
    """Return an array of this process for one that another process sent, with the same numbers."""
    return DmaFenceArray._made(members, signal_on_any, context, seqno)


def array_first(head: DmaFence | None) -> DmaFence | None:
    """The first member of an array; another fence itself; None for None (spec 3.15). Kernel: dma_fence_array_first."""
    return head.fences[0] if isinstance(head, DmaFenceArray) else head


def array_next(head: DmaFence | None, index: int) -> DmaFence | None:
    """Member ``index`` of an array; None past its end, and for anything else. Kernel: dma_fence_array_next."""
    return head.fences[index] if isinstance(head, DmaFenceArray) and 0 <= index < len(head.fences) else None
