"""``DmaFenceArray``: several fences as one (semantics 3.15).

It is signaled when all its members are, or with ``signal_on_any`` when the first one is. It watches nothing until a caller waits, adds
a callback or enables signaling. So, as up to Linux 6.12, an array that isn't enabled isn't signaled even when all its members are (from
6.13 on it polls them). Its error is that of the first member that fails before the array is signaled.

It belongs to the process that made it, and has a slot, a context and a number like any fence, so others may wait for it. It learns of a
member's signal after the member's own callbacks. Another process that gets it makes an array of its own over the same members
(``core/fence/travel.py``), which outlives the first one's maker.
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
    """Several fences as one. ``fences``: its members. Its context is a fresh one, and its seqno 1.

    A member that is a container gets a ``ContractWarning``: unwrap() it first.

    Args:
        fences: At least one fence, all of one domain.
        signal_on_any: Signal the array with the first member, not with the last.

    Raises:
        InvalidError: There is no member, with a ``ContractWarning`` (EINVAL).
        CrossDomainError: The members belong to several domains (EXDEV).
        NoSpaceError: The domain is full (ENOSPC).
        TypeError: ``fences`` is one fence.

    Kernel: dma_fence_array (fences, num_fences as fences), dma_fence_array_create, dma_fence_array_for_each as fences.
    """

    __slots__ = ("_errors", "_left", "fences", "signal_on_any")

    fences: tuple[DmaFence, ...]
    signal_on_any: bool
    # Adding to these and taking from them are single steps: any thread, signal handler or finalizer may signal a member.
    _left: dict[int, None]  # the members, by their places, that are not known to be signaled: each counts once
    _errors: list[int]  # of the members that failed, in the order in which they were signaled

    def __new__(cls, fences: Iterable[DmaFence], signal_on_any: bool = False) -> Self:
        if isinstance(fences, DmaFence):
            raise TypeError("DmaFenceArray: fences is a list of fences, as [a, b], not one DmaFence")
        members = tuple(fences)
        domain = one_domain(members, "DmaFenceArray")
        for member in members:
            if is_container(member):
                contract_warning(f"DmaFenceArray: {member!r} is a container itself; unwrap() it first", 2)
        return cls._made(members, bool(signal_on_any), domain.join().add64(OFF_CONTEXT, 1), 1)

    @classmethod
    def _made(cls, members: Sequence[DmaFence], signal_on_any: bool, context: int, seqno: int) -> Self:
        domain = members[0].domain
        shm = domain.join()
        self = cls.made(shm, unbound_timeline(domain, "dma_fence_array"), context, seqno, FF_CONTAINER)
        register(self, domain, None)
        self.fences, self.signal_on_any, self._not_enabled, self._copied = tuple(members), signal_on_any, True, None
        self._left, self._errors = dict.fromkeys(range(len(members))), []
        return self

    def members(self) -> Sequence[DmaFence]:
        return self.fences

    def _copy(self) -> Self:
        return self._made(self.fences, self.signal_on_any, self.context, self.seqno)

    def _enable(self) -> bool:
        for at, member in enumerate(self.fences):
            if member.listen(lambda _, at=at: self._member_signaled(at)) is None and self._count(at):  # type: ignore[misc]
                return False
        return True

    def _count(self, at: int) -> bool:
        """Note that a member is signaled. Return True if the array's work is done with it."""
        if at in self._left and (error := self.fences[at].error):
            self._errors.append(error)
        self._left.pop(at, None)
        return self._polled()

    def _member_signaled(self, at: int) -> None:
        if self._count(at):
            defer(self._finish)

    def _polled(self) -> bool:
        return len(self._left) < (len(self.fences) if self.signal_on_any else 1)

    def _error(self) -> int:
        return next(iter(self._errors), 0)

    def set_deadline(self, ns: int) -> None:
        """Set the deadline of the array and of every member (semantics 3.12).

        Raises:
            InvalidError: The time is negative (EINVAL).
        """
        super().set_deadline(ns)
        for member in self.fences:
            member.set_deadline(ns)

    def match_context(self, context: int) -> bool:
        """Return True if every member is of this context."""
        return all(member.match_context(context) for member in self.fences)


def array_as_sent(members: Sequence[DmaFence], signal_on_any: bool, context: int, seqno: int) -> DmaFenceArray:
    """Return an array of this process for one that another process sent, with the same numbers."""
    return DmaFenceArray._made(members, signal_on_any, context, seqno)


def array_first(head: DmaFence | None) -> DmaFence | None:
    """Return the first member of an array, any other fence itself, and None for None (semantics 3.15).

    Kernel: dma_fence_array_first.
    """
    return head.fences[0] if isinstance(head, DmaFenceArray) else head


def array_next(head: DmaFence | None, index: int) -> DmaFence | None:
    """Return a member of an array by its place. None past the end, and for anything else than an array.

    Kernel: dma_fence_array_next.
    """
    return head.fences[index] if isinstance(head, DmaFenceArray) and 0 <= index < len(head.fences) else None
