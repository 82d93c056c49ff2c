"""``DmaResv``: the reservation object, which is a lock and the fences of one buffer or of several (semantics 4).

A thread, or a task of asyncio or trio, holds the lock (``core/resv/lock.py``). ``reserve``, ``add``, ``replace``, ``copy``, ``iterate`` and
``describe`` need it: without it they raise ``ContractError`` and do nothing. ``fences``, ``iterate_unlocked``, ``test_signaled`` and
``wait`` don't. A lock whose holder died is free. The next holder continues with the list as it is, because every change of the list is one
store.

``reserve(n)`` makes room for n fences, and may fail with ENOMEM or ENOSPC. ``add`` then can't fail. ``unlock`` forgets the room.
"""

from __future__ import annotations

import errno
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from dmabuf.core.base.clock import monotonic_deadline, seconds_left
from dmabuf.core.base.usage import Usage, checked_usage
from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.container import is_container
from dmabuf.core.fence.fence import DmaFence, wrap
from dmabuf.core.fence.lazy import CUSTOM, ask, asks, with_own_wait
from dmabuf.core.resv.lock import ResvLock, record_of
from dmabuf.domain.domain import Domain
from dmabuf.domain.records import Record, foreign_resv, standalone
from dmabuf.errors import ContractError, contract_warning, fail

MAX_RESERVE = 1 << 20
_SHOWN = ("kernel", "write", "read")


@dataclass(frozen=True)
class ResvStatistics:
    """A snapshot of a reservation object. ``locked_by``: the pid of the lock's holder, 0 when it is free."""

    locked_by: int
    fences: int
    pending: int


class DmaResv(ResvLock):
    """A reservation object: that of a buffer (``buf.resv``), or ``DmaResv()`` for several buffers to share.

    Args:
        domain: The domain to make it in; None means the user's default domain.

    Raises:
        NoSpaceError: The domain is full (ENOSPC).

    Kernel: dma_resv, dma_resv_init.
    """

    def __init__(self, *, domain: Domain | None = None, _record: Record | None = None) -> None:
        super().__init__(_record or standalone(domain or Domain.default()))
        self._record.resv_ref = weakref.ref(self)

    def __repr__(self) -> str:
        return f"<dmabuf.DmaResv {f'of {self._record}' if self._record.ino else 'of its own'}>"

    # ---- the list, lock held ----

    def reserve(self, n: int) -> None:
        """Make room for n fences, until the lock is released (semantics 4.3). Zero has no effect (EINVAL from Linux 6.12 on).

        Raises:
            ContractError: The caller doesn't hold the lock.
            InvalidError: ``n`` is negative (EINVAL).
            NoMemoryError: ``n`` is too large (ENOMEM).
            NoSpaceError: The domain is full (ENOSPC). No fence is lost.

        Kernel: dma_resv_reserve_fences.
        """
        held = self._assert_held("reserve")
        if n < 0:
            raise fail(errno.EINVAL, "reserve", self, "reserve 0 or more", what=f"{n} is negative")
        if n > MAX_RESERVE:
            raise fail(errno.ENOMEM, "reserve", self, f"reserve at most {MAX_RESERVE} at once", what=f"no room for {n} fences")
        answer = self._record.shm.resv_reserve(self._record.index, n)
        if answer < 0:
            raise fail(-answer, "reserve", self, "wait for its fences, or drop other fences and buffers", what=f"no room for {n} fences")
        held.room = max(held.room, n)

    def add(self, fence: DmaFence, usage: int) -> None:
        """Add a fence, in place of one that it makes superfluous (semantics 4.4). Can't fail after :meth:`reserve`.

        A fence with operations of its own is enabled. An array or a chain gets a ``ContractWarning``: add what ``unwrap`` yields.

        Args:
            fence: A fence of the same domain.
            usage: A :class:`~dmabuf.Usage`: what the fence stands for.

        Raises:
            ContractError: The caller doesn't hold the lock, or has no room reserved.
            InvalidError: ``usage`` is not a level (EINVAL).
            CrossDomainError: The fence belongs to another domain (EXDEV).

        Kernel: dma_resv_add_fence.
        """
        held = self._assert_held("add")
        level = checked_usage(usage, "add", self)
        if self.domain.local.get(CUSTOM):  # asks(), without a call: a fence that says it is done makes room
            pending(self, Usage.BOOKKEEP)
        taken = self._record.shm.resv_add(self._record.index, self._handle(fence, "add"), level, held.room)
        if taken < 0:
            raise ContractError(f"add: {self!r}: no room is reserved; call reserve(1) first, under the same lock")
        held.room -= taken

    def replace(self, context: int, fence: DmaFence, usage: int) -> None:
        """Put ``fence``, with ``usage``, in the place of every fence of a context (semantics 4.5).

        Raises:
            ContractError: The caller doesn't hold the lock.
            InvalidError: ``usage`` is not a level (EINVAL).
            CrossDomainError: The fence belongs to another domain (EXDEV).

        Kernel: dma_resv_replace_fences.
        """
        self._assert_held("replace")
        level = checked_usage(usage, "replace", self)
        self._record.shm.resv_replace(self._record.index, context, self._handle(fence, "replace"), level)

    def copy(self, source: DmaResv) -> None:
        """Replace the fences by those that are pending on another reservation object, of every usage (semantics 4.7).

        The caller holds this object's lock. A reader without the lock misses none of the new fences, and may see some of the old ones.

        Raises:
            ContractError: The caller doesn't hold the lock.
            CrossDomainError: The other object belongs to another domain (EXDEV).
            NoSpaceError: The domain is full (ENOSPC). Nothing has changed.

        Kernel: dma_resv_copy_fences.
        """
        self._assert_held("copy")
        if not isinstance(source, DmaResv):
            raise TypeError(f"copy: a DmaResv is expected, not {type(source).__name__}")
        shm, index = record_of(source).at()
        if shm is not self._record.shm:
            raise fail(errno.EXDEV, "copy", self, "copy fences inside one domain", what="the other one belongs to another domain")
        pending(source, Usage.BOOKKEEP)
        answer = shm.resv_copy(self._record.index, index)
        if answer < 0:
            raise fail(-answer, "copy", self, "wait for its fences, or drop other fences and buffers", what="no room for the fences")

    def _handle(self, fence: DmaFence, operation: str) -> int:
        if not isinstance(fence, DmaFence):
            raise TypeError(f"{operation}: a DmaFence is expected, not {type(fence).__name__}")
        if fence.shm is not self._record.shm:
            remedy = "make the fence's timeline in the buffer's domain (domain=)"
            raise fail(errno.EXDEV, operation, self, remedy, what="the fence belongs to another domain")
        if is_container(fence):
            contract_warning(f"{operation}: {fence!r} is a container; add what unwrap() yields, one by one", 4)
        fence.publish()
        return fence.handle

    def iterate(self, usage: int) -> Iterator[tuple[DmaFence, Usage]]:
        """Yield (fence, usage) of every entry up to ``usage``, signaled ones too (semantics 4.6). The caller holds the lock.

        Raises:
            ContractError: The caller doesn't hold the lock.
            InvalidError: ``usage`` is not a level (EINVAL).

        Kernel: dma_resv_for_each_fence, dma_resv_iter_first, dma_resv_iter_next, dma_resv_iter_usage.
        """
        self._assert_held("iterate")
        level = checked_usage(usage, "iterate", self)
        for handle, entry in self._record.shm.resv_entries(self._record.index, level, False):
            yield wrap(self.domain, handle), Usage(entry)

    def describe(self) -> str:
        """Return the text that debugfs prints, a line for each fence up to READ (semantics 4.7, 3.14). The caller holds the lock.

        Raises:
            ContractError: The caller doesn't hold the lock.

        Kernel: dma_resv_describe.
        """
        self._assert_held("describe")
        return self.describe_unlocked()

    def describe_unlocked(self) -> str:
        """Return the text of :meth:`describe` without the lock: a snapshot."""
        shm, index = self._record.at()
        entries = shm.resv_entries(index, Usage.READ, False)
        return "".join(f"\t{_SHOWN[usage]} fence:{wrap(self.domain, handle).describe()}" for handle, usage in entries)

    # ---- queries, no lock needed ----

    def iterate_unlocked(self, usage: int) -> Iterator[tuple[DmaFence, Usage, bool]]:
        """Yield (fence, usage, restarted) of every pending fence up to ``usage``; the first one is marked restarted (semantics 4.6).

        Raises:
            InvalidError: ``usage`` is not a level (EINVAL).

        Kernel: dma_resv_for_each_fence_unlocked, dma_resv_iter_first_unlocked, dma_resv_iter_next_unlocked, dma_resv_iter_is_restarted.
        """
        level = checked_usage(usage, "iterate_unlocked", self)
        first = True
        shm, index = self._record.at()
        for handle, entry in shm.resv_entries(index, level, True):
            ask(self.domain, (handle,))
            if shm.fence_pending(handle):
                yield wrap(self.domain, handle), Usage(entry), first
                first = False

    def fences(self, usage: int) -> list[DmaFence]:
        """Return the pending fences up to ``usage`` (semantics 4.7).

        Raises:
            InvalidError: ``usage`` is not a level (EINVAL).

        Kernel: dma_resv_get_fences, dma_resv.fences.
        """
        level = checked_usage(usage, "fences", self)
        return [wrap(self.domain, handle) for handle in pending(self, level)]

    def test_signaled(self, usage: int) -> bool:
        """Return True if no fence up to ``usage`` is pending (semantics 4.7).

        Raises:
            InvalidError: ``usage`` is not a level (EINVAL).

        Kernel: dma_resv_test_signaled.
        """
        shm, index = self._record.at()
        level = checked_usage(usage, "test_signaled", self)
        return not shm.resv_busy(index, level) or (asks(self.domain) and not pending(self, level))

    def singleton(self, usage: int) -> DmaFence | None:
        """Return one fence for all that are pending up to ``usage`` (semantics 4.7). Don't add it to a reservation object.

        Returns:
            None if nothing is pending, the fence if it is the only one, or an array that is signaled with the last.

        Raises:
            InvalidError: ``usage`` is not a level (EINVAL).
            NoSpaceError: The domain is full (ENOSPC).

        Kernel: dma_resv_get_singleton.
        """
        found = self.fences(usage)
        return DmaFenceArray(found) if len(found) > 1 else next(iter(found), None)

    def set_deadline(self, usage: int, ns: int) -> None:
        """Hint that the pending fences up to ``usage`` are wanted by a time, in CLOCK_MONOTONIC ns (semantics 4.7).

        Raises:
            InvalidError: The time is negative, or ``usage`` is not a level (EINVAL).

        Kernel: dma_resv_set_deadline.
        """
        for fence in self.fences(usage):
            fence.set_deadline(ns)

    def wait(self, usage: int, timeout: float | None = None, *, interruptible: bool = False) -> float:
        """Wait for every fence up to ``usage`` that is there when the call begins (semantics 4.7). A fence's own error is not raised.

        Args:
            usage: The highest level to wait for.
            timeout: Seconds; None waits without a limit.
            interruptible: Let a signal end the wait.

        Returns:
            The seconds left: more than 0 (inf without a timeout), or 0.0 when the time is over. A custom fence's own wait may answer a
            negative number, which is returned at once.

        Raises:
            InvalidError: The timeout is negative, or ``usage`` is not a level (EINVAL).
            InterruptedWaitError: A signal arrived (EINTR).

        Kernel: dma_resv_wait_timeout.
        """
        level = checked_usage(usage, "wait", self)
        return wait_until(self, level, monotonic_deadline(timeout, "wait", self), interruptible=interruptible)

    def statistics(self) -> ResvStatistics:
        """Return a snapshot for programs."""
        shm, index = self._record.at()
        word = shm.resv_owner(index)
        info = shm.ctx_info(word) if word else None
        locked_by = self.domain.pid_of(info[0]) if info else 0
        return ResvStatistics(locked_by, len(shm.resv_entries(index, 3, False)), len(shm.resv_pending(index, 3, 0)))


# ---- for the package ----


def pending(resv: DmaResv, usage: int) -> list[int]:
    """Return the handles of the pending fences up to ``usage``."""
    shm, index = record_of(resv).at()
    found = shm.resv_pending(index, usage, 0)
    if found and asks(resv.domain):
        ask(resv.domain, found)
        return shm.resv_pending(index, usage, 0)
    return found


def wait_until(resv: DmaResv, usage: int, until: int, *, interruptible: bool = False, but: frozenset[int] = frozenset()) -> float:
    """Wait as :meth:`DmaResv.wait` does, until a CLOCK_MONOTONIC time in ns (-1: without a limit), for all fences but those in ``but``."""
    shm = record_of(resv).shm
    for handle in pending(resv, usage):
        if handle in but:
            continue
        if (own := with_own_wait(resv.domain, handle)) is not None:
            left = own.wait(None if until < 0 else seconds_left(until), interruptible=interruptible)
            if left <= 0:
                return left
            continue
        answer = shm.fence_wait(handle, until, interruptible)
        if answer == 0:
            return 0.0
        if answer < 0:
            raise fail(errno.EINTR, "wait", resv, "wait again", what="interrupted by a signal")
    return seconds_left(until)


def resv_of(record: Record) -> DmaResv:
    """Return the reservation object of a buffer: the one in its record, or the one that its exporter gave. One object in a process."""
    found = in_use(record)
    if found is None:
        outer = foreign_resv(record)
        given = None if outer is None else resv_of(outer)
        with record.lock:  # two threads that come at once get the same one, which knows who holds the lock
            found = in_use(record)
            if found is None:
                found = given or DmaResv(_record=record)
                record.resv_ref = weakref.ref(found)
    return found


def in_use(record: Record) -> DmaResv | None:
    """Return the reservation object of a buffer if this process has one, else None."""
    ref = record.resv_ref
    found = ref() if ref is not None else None
    return found if isinstance(found, DmaResv) else None
