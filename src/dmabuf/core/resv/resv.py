"""``DmaResv``: the reservation object, a lock and the fences of one buffer or of several (spec 4).

The lock is held by a thread or asyncio task. Under it: ``reserve``, ``add``, ``replace``, ``iterate``, ``describe`` (without it:
``ContractError``, and nothing is done). Without it: ``fences``, ``iterate_unlocked``, ``test_signaled``, ``wait``. A lock whose holder
died is free; whoever takes it goes on with the list as it is, because every change of the list is one store.

``reserve(n)`` makes room for n fences, may fail with ENOMEM or ENOSPC, and is forgotten at unlock; ``add`` then cannot fail.
"""

from __future__ import annotations

import errno
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NoReturn

from dmabuf._native import Shm
from dmabuf.core.base.clock import monotonic_deadline, seconds_left
from dmabuf.core.base.usage import Usage, checked_usage
from dmabuf.core.fence import signalling
from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.container import is_container
from dmabuf.core.fence.fence import DmaFence, wrap
from dmabuf.core.fence.lazy import ask, with_own_wait
from dmabuf.core.resv import ww_mutex
from dmabuf.core.resv.ww_mutex import WwAcquireContext
from dmabuf.core.task.owner import Owner, current
from dmabuf.domain.domain import Domain
from dmabuf.domain.records import Record, foreign_resv, standalone
from dmabuf.errors import ContractError, contract_warning, fail

MAX_RESERVE = 1 << 20
_SHOWN = ("kernel", "write", "read")


class _Hold:
    """What this process knows about the lock while one of its owners has it."""

    __slots__ = ("ctx", "lent", "owner", "room", "word")

    def __init__(self, owner: Owner, ctx: WwAcquireContext | None, lent: int = 0) -> None:
        self.owner, self.ctx, self.room = owner, ctx, 0
        self.word = lent or (ctx.word if ctx else owner.word)
        self.lent = lent != 0  # another process holds it meanwhile
        owner.locks += 1


@dataclass(frozen=True)
class ResvStatistics:
    """What a reservation object says of itself. ``locked_by``: the pid, 0 when it is free."""

    locked_by: int
    fences: int
    pending: int


class _Locked:
    """What :meth:`DmaResv.locked` returns. Not a generator: what a signal handler raises between the lock and the block finds it held."""

    __slots__ = ("_ctx", "_held", "_resv")

    def __init__(self, resv: DmaResv, ctx: WwAcquireContext | None) -> None:
        self._resv, self._ctx = resv, ctx
        self._held: _Hold | None = None

    def __enter__(self) -> DmaResv:
        resv = self._resv
        before = resv._held
        try:
            resv.lock(self._ctx)
            self._held = resv._held
        except BaseException:
            now = resv._mine(current(resv.domain))
            if now is not None and now is not before:
                resv.release(now)
            raise
        return resv

    def __exit__(self, *_: object) -> None:
        held, resv = self._held, self._resv
        if held is not None and resv._held is held and held.owner.life == resv._record.shm.life:
            resv.release(held)


class DmaResv:
    """A reservation object: ``buf.resv``, or ``DmaResv()`` to be shared by several buffers.

    Errors: ENOSPC the domain is full.

    Kernel: dma_resv, dma_resv_init.
    """

    def __init__(self, *, domain: Domain | None = None, _record: Record | None = None) -> None:
        self._record = _record or standalone(domain or Domain.default())
        self.domain = self._record.domain
        self._record.shared["resv"] = weakref.ref(self)
        self._held: _Hold | None = None
        self._lost: _Hold | None = None

    def __repr__(self) -> str:
        return f"<dmabuf.DmaResv {'of buffer ino ' + str(self._record.ino) if self._record.ino else 'of its own'}>"

    # ---- the lock ----

    def lock(self, ctx: WwAcquireContext | None = None) -> None:
        """Take the lock, waiting as long as it takes (spec 4.8, 4.10).

        Errors: EALREADY held under this context; EDEADLK the wait-die rule (release every lock of ``ctx``, then ``lock_slow``), or this
        owner holds it (with a ``ContractWarning``); EXDEV a context of another domain. Kernel: dma_resv_lock, dma_resv.lock.
        """
        self._lock(ctx, "lock", interruptible=False)

    def lock_interruptible(self, ctx: WwAcquireContext | None = None) -> None:
        """Like :meth:`lock`, but a signal ends the wait: EINTR. Kernel: dma_resv_lock_interruptible."""
        self._lock(ctx, "lock_interruptible", interruptible=True)

    def lock_slow(self, ctx: WwAcquireContext, *, interruptible: bool = False) -> None:
        """Take the contended lock after EDEADLK, holding nothing: waits and cannot die (spec 4.10).

        ``interruptible``: a signal ends the wait: EINTR, and the lock is the one to take first still.
        Kernel: dma_resv_lock_slow, dma_resv_lock_slow_interruptible.
        """
        self._lock(ctx, "lock_slow", interruptible=interruptible, slow=True)

    def _lock(self, ctx: WwAcquireContext | None, operation: str, *, interruptible: bool, slow: bool = False) -> None:
        owner = current(self.domain)
        held = self._mine(owner)
        if held is not None and held.ctx is not ctx:
            self._recursive(operation, 4)
        if ctx is None:
            if held is not None:
                self._recursive(operation, 4)
            self.acquire(owner, interruptible=interruptible, operation=operation)
            return
        ctx.check(self, operation, slow=slow)
        if signalling.sections:
            signalling.check_signalling(operation, self)
        shm, index = self._record.at()
        try:
            answer = shm.resv_lock(index, ctx.word, 0 if slow else ctx.acquired, interruptible, False, -1)
            if answer >= 0:
                self._held = _Hold(owner, ctx)
        except BaseException:
            self._undo(shm, index, ctx.word)
            raise
        if answer < 0:
            if answer == -errno.EDEADLK:
                ctx.contended = self
            raise fail(-answer, operation, self, _REMEDY.get(-answer))
        if ctx.contended is self:
            ctx.contended = None
        ctx.acquired += 1
        if ww_mutex.deadlock_every and not slow and ww_mutex.inject(ctx):
            self.unlock()
            ctx.contended = self
            raise fail(errno.EDEADLK, operation, self, _REMEDY[errno.EDEADLK], what="made up by the debug layer")

    def acquire(self, owner: Owner, *, interruptible: bool = False, until: int = -1, operation: str = "lock") -> None:
        """Take the lock for an owner without a context; the way in for the package's own short sections."""
        if signalling.sections:
            signalling.check_signalling(operation, self)
        shm, index = self._record.at()
        try:
            answer = shm.resv_lock(index, owner.word, 0, interruptible, False, until)
            if answer >= 0:
                self._held = _Hold(owner, None)
        except BaseException:
            self._undo(shm, index, owner.word)
            raise
        if answer < 0:
            if answer == -errno.EDEADLK:
                self._recursive(operation, 4)
            raise fail(-answer, operation, self, _REMEDY.get(-answer))

    def _undo(self, shm: Shm, index: int, word: int) -> None:
        """A signal handler raised around the moment of locking: whatever it came after, the lock is not held."""
        if self._held is not None and self._held.word == word:
            self._held.owner.locks -= 1
            self._held = None
        shm.resv_unlock(index, word)

    def _recursive(self, operation: str, level: int) -> NoReturn:
        contract_warning(f"{operation}: {self!r} is held by this thread or task already", level)
        raise fail(
            errno.EDEADLK,
            operation,
            self,
            "unlock it first, or take all locks under one WwAcquireContext",
            what="this owner holds it already",
        )

    def trylock(self, ctx: WwAcquireContext | None = None) -> bool:
        """Take the lock if it is free; never waits, never EDEADLK (spec 4.10). Kernel: dma_resv_trylock."""
        owner = current(self.domain)
        if ctx is not None:
            ctx.check(self, "trylock", slow=False)
        if self._mine(owner) is not None:
            return False
        shm, index = self._record.at()
        word = ctx.word if ctx else owner.word
        try:
            answer = shm.resv_lock(index, word, 0, False, True, -1)
            if answer < 0:
                return False
            self._held = _Hold(owner, ctx)
        except BaseException:
            self._undo(shm, index, word)
            raise
        if ctx is not None:
            ctx.acquired += 1
            if ctx.contended is self:
                ctx.contended = None
        return True

    def unlock(self) -> None:
        """Give the lock back. Errors: ``ContractError`` when this owner doesn't hold it. Kernel: dma_resv_unlock."""
        owner = current(self.domain)
        held = self._mine(owner)
        if held is None:
            lost, self._lost = self._lost, None
            if lost is not None and lost.owner is owner:
                return
            raise ContractError(f"unlock: {self!r} is not held by this thread or task")
        self.release(held)

    def release(self, held: _Hold | None = None) -> None:
        """Give back what :meth:`acquire` took."""
        held = held or self._held
        assert held is not None
        try:
            self._held = None
            held.owner.locks -= 1
        finally:
            self._record.shm.resv_unlock(self._record.index, held.word)
        if held.ctx is not None:
            held.ctx.acquired -= 1

    @contextmanager
    def lent(self, word: int) -> Iterator[None]:
        """For the block the lock counts as the running thread's: ``word`` holds it, who waits meanwhile for what is done here.

        For calls that are carried between processes (sharing/serving.py).
        """
        before, owner = self._held, current(self.domain)
        held = self._held = _Hold(owner, None, word)
        try:
            yield
        finally:
            if self._held is held:
                self._held = before
            owner.locks -= 1

    def holding(self) -> _Hold:
        """What the running thread or task knows about the lock that it holds. Errors: ``ContractError`` it doesn't."""
        return self._assert_held("call")

    def lose(self, held: _Hold) -> None:
        """The lock was lent for a carried call, and won't come back: it is no more this owner's, whose ``unlock`` does nothing."""
        if self._held is held and not held.lent:
            self._held, self._lost = None, held
            held.owner.locks -= 1
            if held.ctx is not None:
                held.ctx.acquired -= 1

    def locked(self, ctx: WwAcquireContext | None = None) -> AbstractContextManager[DmaResv]:
        """Hold the lock for a ``with`` block. In a forked child the block's end does nothing."""
        return _Locked(self, ctx)

    def is_locked(self) -> bool:
        """Does anybody living hold the lock? Kernel: dma_resv_is_locked."""
        shm, index = self._record.at()
        return shm.resv_owner(index) != 0

    def locking_ctx(self) -> WwAcquireContext | None:
        """The context that this owner holds the lock under; None without one (spec 4.8).

        Kernel: dma_resv_locking_ctx.
        """
        held = self._mine(current(self.domain))
        return held.ctx if held else None

    def held_here(self) -> bool:
        """Does the running thread or task hold the lock? Kernel: dma_resv_held."""
        return self._held is not None and self._mine(current(self.domain)) is not None

    def _mine(self, owner: Owner) -> _Hold | None:
        held = self._held
        return held if held is not None and held.owner is owner else None

    def _assert_held(self, operation: str) -> _Hold:
        held = self._mine(current(self.domain))
        if held is None:
            raise ContractError(f"{operation}: {self!r} must be locked by this thread or task: use `with resv.locked():`")
        return held

    # ---- the list, lock held ----

    def reserve(self, n: int) -> None:
        """Make room for n fences until unlock; for none, nothing (EINVAL from Linux 6.12 on) (spec 4.3).

        Errors: EINVAL n < 0; ENOMEM, ENOSPC no room, and nothing lost. Kernel: dma_resv_reserve_fences.
        """
        held = self._assert_held("reserve")
        if n < 0:
            raise fail(errno.EINVAL, "reserve", self, "reserve a number of slots")
        if n > MAX_RESERVE:
            raise fail(errno.ENOMEM, "reserve", self, f"at most {MAX_RESERVE} at once")
        answer = self._record.shm.resv_reserve(self._record.index, n)
        if answer < 0:
            raise fail(-answer, "reserve", self, "wait for fences, or drop some")
        held.room = max(held.room, n)

    def add(self, fence: DmaFence, usage: int) -> None:
        """Add a fence; it replaces one that it makes superfluous (spec 4.4). Cannot fail after ``reserve``.

        A fence with operations of its own is enabled. ``ContractWarning`` for an array or a chain: add what ``unwrap`` yields.

        Errors: ``ContractError`` without room; EINVAL no usage; EXDEV a fence of another domain; TypeError no fence.
        Kernel: dma_resv_add_fence.
        """
        held = self._assert_held("add")
        level = checked_usage(usage, "add", self)
        if "lazy" in self.domain.local:
            self.pending(Usage.BOOKKEEP)  # a fence that says it is done makes room
        taken = self._record.shm.resv_add(self._record.index, self._handle(fence, "add"), level, held.room)
        if taken < 0:
            raise ContractError(f"add: {self!r} has no room reserved: call reserve(1) under the same lock first")
        held.room -= taken

    def replace(self, context: int, fence: DmaFence, usage: int) -> None:
        """Every fence of ``context`` becomes ``fence`` with ``usage`` (spec 4.5). Errors: EINVAL, EXDEV as :meth:`add`.

        Kernel: dma_resv_replace_fences.
        """
        self._assert_held("replace")
        level = checked_usage(usage, "replace", self)
        self._record.shm.resv_replace(self._record.index, context, self._handle(fence, "replace"), level)

    def copy(self, source: DmaResv) -> None:
        """The fences become those that are pending on another reservation object, of every usage (spec 4.7); this one's lock is held.

        Who looks without the lock meanwhile misses none of the new ones, and may see some of the old ones.

        Errors: EXDEV reservation objects of two domains; ENOSPC no room, and nothing changed. Kernel: dma_resv_copy_fences.
        """
        self._assert_held("copy")
        if not isinstance(source, DmaResv):
            raise TypeError(f"copy: a DmaResv is expected, not {type(source).__name__}")
        shm, index = source._record.at()
        if shm is not self._record.shm:
            raise fail(errno.EXDEV, "copy", self, "copy fences inside one domain", what="the other one belongs to another domain")
        source.pending(Usage.BOOKKEEP)
        answer = shm.resv_copy(self._record.index, index)
        if answer < 0:
            raise fail(-answer, "copy", self, "wait for fences, or drop some")

    def _handle(self, fence: DmaFence, operation: str) -> int:
        if not isinstance(fence, DmaFence):
            raise TypeError(f"{operation}: a DmaFence is expected, not {type(fence).__name__}")
        if fence.shm is not self._record.shm:
            raise fail(
                errno.EXDEV,
                operation,
                self,
                "make the fence's timeline in the buffer's domain (domain=)",
                what="the fence belongs to another domain",
            )
        if is_container(fence):
            contract_warning(f"{operation}: {fence!r} is a container: add what unwrap() yields, each by itself", 4)
        fence.publish()
        return fence.handle

    def iterate(self, usage: int) -> Iterator[tuple[DmaFence, Usage]]:
        """(fence, usage) of every entry up to ``usage``, signalled ones too; lock held (spec 4.6).

        Kernel: dma_resv_for_each_fence, dma_resv_iter_first, dma_resv_iter_next, dma_resv_iter_usage.
        """
        self._assert_held("iterate")
        level = checked_usage(usage, "iterate", self)
        for handle, entry in self._record.shm.resv_entries(self._record.index, level, False):
            yield wrap(self.domain, handle), Usage(entry)

    def describe(self) -> str:
        """The text of debugfs, a line a fence up to READ; lock held (spec 4.7, 3.14). Kernel: dma_resv_describe."""
        self._assert_held("describe")
        return self.describe_unlocked()

    def describe_unlocked(self) -> str:
        """The same text without the lock: a snapshot."""
        shm, index = self._record.at()
        entries = shm.resv_entries(index, Usage.READ, False)
        return "".join(f"\t{_SHOWN[usage]} fence:{wrap(self.domain, handle).describe()}" for handle, usage in entries)

    # ---- queries, no lock needed ----

    def iterate_unlocked(self, usage: int) -> Iterator[tuple[DmaFence, Usage, bool]]:
        """(fence, usage, restarted) of every pending fence up to ``usage``; the first is flagged restarted (spec 4.6).

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
        """The pending fences up to ``usage`` (spec 4.7). Kernel: dma_resv_get_fences, dma_resv.fences."""
        level = checked_usage(usage, "fences", self)
        return [wrap(self.domain, handle) for handle in self.pending(level)]

    def pending(self, usage: int) -> list[int]:
        """Handles of the pending fences up to ``usage``."""
        shm, index = self._record.at()
        found = shm.resv_pending(index, usage, 0)
        if found and "lazy" in self.domain.local:
            ask(self.domain, found)
            return shm.resv_pending(index, usage, 0)
        return found

    def test_signaled(self, usage: int) -> bool:
        """No pending fence up to ``usage`` (spec 4.7). Kernel: dma_resv_test_signaled."""
        shm, index = self._record.at()
        level = checked_usage(usage, "test_signaled", self)
        return not shm.resv_busy(index, level) or ("lazy" in self.domain.local and not self.pending(level))

    def singleton(self, usage: int) -> DmaFence | None:
        """One fence for all that are pending up to ``usage``: None, the only one, or an array that is signalled with the last (spec 4.7).

        Not to be added to a reservation object again. Errors: ENOSPC the domain is full. Kernel: dma_resv_get_singleton.
        """
        found = self.fences(usage)
        return DmaFenceArray(found) if len(found) > 1 else next(iter(found), None)

    def set_deadline(self, usage: int, ns: int) -> None:
        """Hint that the pending fences up to ``usage`` are wanted by this CLOCK_MONOTONIC time, in ns (spec 4.7).

        Errors: EINVAL a negative time or no usage. Kernel: dma_resv_set_deadline.
        """
        for fence in self.fences(usage):
            fence.set_deadline(ns)

    def wait(self, usage: int, timeout: float | None = None, *, interruptible: bool = False) -> float:
        """Wait for every fence up to ``usage``; returns the seconds left (> 0; inf for None), 0.0 when timed out (spec 4.7).

        A custom fence's own wait may answer a negative number, which is returned at once.

        Errors: EINVAL a negative timeout or no usage; EINTR a signal, if ``interruptible``. A fence's own error is not raised.
        Kernel: dma_resv_wait_timeout.
        """
        level = checked_usage(usage, "wait", self)
        return self.wait_until(level, monotonic_deadline(timeout, "wait", self), interruptible=interruptible)

    def wait_until(self, usage: int, until: int, *, interruptible: bool = False, but: frozenset[int] = frozenset()) -> float:
        """:meth:`wait` with a CLOCK_MONOTONIC end in ns (-1: none), passing over the fences in ``but``."""
        shm = self._record.shm
        for handle in self.pending(usage):
            if handle in but:
                continue
            if "lazy" in self.domain.local and (own := with_own_wait(self.domain, handle)) is not None:
                left = own.wait(None if until < 0 else seconds_left(until), interruptible=interruptible)
                if left <= 0:
                    return left
                continue
            answer = shm.fence_wait(handle, until, interruptible)
            if answer == 0:
                return 0.0
            if answer < 0:
                raise fail(errno.EINTR, "wait", self, "a signal arrived; wait again")
        return seconds_left(until)

    def statistics(self) -> ResvStatistics:
        """A snapshot for programs."""
        shm, index = self._record.at()
        word = shm.resv_owner(index)
        info = shm.ctx_info(word) if word else None
        return ResvStatistics(
            self.domain.pid_of(info[0]) if info else 0, len(shm.resv_entries(index, 3, False)), len(shm.resv_pending(index, 3, 0))
        )


_REMEDY = {
    errno.EDEADLK: "unlock every lock of the context, take this one with lock_slow, then the rest again",
    errno.EALREADY: "it is held under this context already: go on without locking it",
    errno.EINTR: "a signal arrived; lock again",
}


def resv_of(record: Record) -> DmaResv:
    """The reservation object of a buffer, inside of its record or the one that its exporter gave; one object a process."""
    ref = record.shared.get("resv")
    found: DmaResv | None = ref() if ref else None
    if found is None:
        outer = foreign_resv(record)
        found = DmaResv(_record=record) if outer is None else resv_of(outer)
        record.shared["resv"] = weakref.ref(found)
    return found
