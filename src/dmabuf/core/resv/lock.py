"""The lock of a reservation object (semantics 4.8, 4.10).

A thread, or a task of asyncio or trio, holds the lock; the word in the domain file names it. A lock whose holder died is free. With a
:class:`~dmabuf.WwAcquireContext` an owner takes several locks without a deadlock (``core/resv/ww_mutex.py``).

``ResvLock`` is the base of :class:`~dmabuf.DmaResv`. The functions are for the package: they say who holds the
lock, lend it to a remote call, and find the record that has it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NoReturn, Self, TypeVar

from dmabuf._native import HeldBlock, HeldLock
from dmabuf.core.fence import signalling
from dmabuf.core.resv import ww_mutex
from dmabuf.core.resv.ww_mutex import WwAcquireContext
from dmabuf.core.task.owner import Owner, current
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import Taken, finished, guarded
from dmabuf.domain.records import Record
from dmabuf.errors import ContractError, DmaBufError, contract_warning, fail

_ANSWERS = {
    errno.EDEADLK: (
        "an older context holds the lock or waits for it",
        "unlock every lock of the context, take this one with lock_slow, then the rest again",
    ),
    errno.EALREADY: ("this context already holds it", "continue without locking it"),
    errno.EINTR: ("interrupted by a signal", "lock it again"),
}


class ResvLock:
    """The lock of a reservation object; see the module."""

    domain: Domain

    def __init__(self, record: Record) -> None:
        self._record, self.domain = record, record.domain
        self._held: HeldLock | None = None
        self._lost: HeldLock | None = None  # lent to a process that died with it; one unlock() of its owner is forgiven

    @guarded
    def lock(self, taken: Taken, ctx: WwAcquireContext | None = None) -> None:
        """Take the lock, and wait for it as long as it takes (semantics 4.8, 4.10).

        Args:
            ctx: The context under which the caller takes several locks; None for this one alone.

        Raises:
            DeadlockError: An older context holds the lock or waits for it: release every lock of ``ctx``, then call :meth:`lock_slow`. Or
                this thread or task already holds it without ``ctx``, with a ``ContractWarning`` (EDEADLK).
            AlreadyHeldError: ``ctx`` already holds it (EALREADY).
            CrossDomainError: ``ctx`` belongs to another domain (EXDEV).

        Kernel: dma_resv_lock, dma_resv.lock.
        """
        self._lock(taken, ctx, "lock")

    @guarded
    def lock_interruptible(self, taken: Taken, ctx: WwAcquireContext | None = None) -> None:
        """Take the lock as :meth:`lock` does, but let a signal end the wait.

        Raises:
            InterruptedWaitError: A signal arrived (EINTR).

        Kernel: dma_resv_lock_interruptible.
        """
        self._lock(taken, ctx, "lock_interruptible", interruptible=True)

    @guarded
    def lock_slow(self, taken: Taken, ctx: WwAcquireContext, *, interruptible: bool = False) -> None:
        """Take the contended lock after EDEADLK, holding no other: waits, and can't fail with EDEADLK (semantics 4.10).

        Args:
            ctx: The context that got EDEADLK from this lock.
            interruptible: Let a signal end the wait. The lock is still the one to take first.

        Raises:
            InterruptedWaitError: A signal arrived (EINTR).

        Kernel: dma_resv_lock_slow, dma_resv_lock_slow_interruptible.
        """
        self._lock(taken, ctx, "lock_slow", interruptible=interruptible, slow=True)

    def take(self, taken: Taken, ctx: WwAcquireContext, *, slow: bool, until: int) -> None:
        """Take the lock for a block of several (``core/resv/ww_mutex.py``)."""
        self._lock(taken, ctx, "lock_slow" if slow else "lock", slow=slow, until=until)

    def _lock(
        self,
        taken: Taken,
        ctx: WwAcquireContext | None,
        operation: str,
        *,
        interruptible: bool = False,
        slow: bool = False,
        until: int = -1,
    ) -> None:
        """Take the lock and note it in ``taken``."""
        owner = current(self.domain)
        held = self._held_by(owner)
        if held is not None and (ctx is None or held.ctx is not ctx):
            self._recursive(operation, 4)
        if ctx is not None:
            ctx.check(self, operation, slow=slow)
        if signalling.sections:
            signalling.check_signalling(operation, self)
        shm, index = self._record.at()
        answer = shm.resv_hold(taken, self, index, owner, ctx, slow, interruptible, False, until)
        if answer < 0:
            if answer == -errno.EBUSY:
                remedy = "don't await, or switch to another greenlet, while you hold the lock"
                raise fail(errno.EDEADLK, operation, self, remedy, what="another task of this thread holds it, which can't go on meanwhile")
            if answer == -errno.EDEADLK:
                if ctx is None:
                    self._recursive(operation, 4)
                ctx.contended = self
            raise self._refused(-answer, operation)
        if ctx is not None:
            if ctx.contended is self:
                ctx.contended = None
            if ww_mutex.deadlock_every and not slow and ww_mutex.inject(ctx):
                taken[-1].release()
                ctx.contended = self
                raise fail(errno.EDEADLK, operation, self, _ANSWERS[errno.EDEADLK][1], what="made up by the debug layer")

    def _refused(self, error: int, operation: str) -> DmaBufError:
        what, remedy = _ANSWERS.get(error, (None, None))
        return fail(error, operation, self, remedy, what=what)

    def _recursive(self, operation: str, level: int) -> NoReturn:
        contract_warning(f"{operation}: {self!r}: this thread or task already holds it", level)
        remedy = "unlock it first, or take all locks under one WwAcquireContext"
        raise fail(errno.EDEADLK, operation, self, remedy, what="this thread or task already holds it")

    @guarded
    def trylock(self, taken: Taken, ctx: WwAcquireContext | None = None) -> bool:
        """Take the lock if it is free. Never waits, and never fails with EDEADLK (semantics 4.10).

        Returns:
            True if the caller holds the lock now, False if it was already held.

        Kernel: dma_resv_trylock.
        """
        owner = current(self.domain)
        if ctx is not None:
            ctx.check(self, "trylock", slow=False)
        if self._held_by(owner) is not None:
            return False
        shm, index = self._record.at()
        if shm.resv_hold(taken, self, index, owner, ctx, True, False, True, -1) < 0:
            return False
        if ctx is not None and ctx.contended is self:
            ctx.contended = None
        return True

    @finished
    def unlock(self) -> None:
        """Release the lock, and forget what :meth:`~dmabuf.DmaResv.reserve` made room for.

        Raises:
            ContractError: This thread or task doesn't hold it.

        Kernel: dma_resv_unlock.
        """
        owner = current(self.domain)
        held = self._held_by(owner)
        if held is None:
            lost, self._lost = self._lost, None
            if lost is not None and lost.owner is owner:
                return
            raise ContractError(f"unlock: {self!r}: this thread or task doesn't hold it; unlock what was locked, once, by who locked it")
        held.release()

    def locked(self, ctx: WwAcquireContext | None = None) -> AbstractContextManager[Self]:
        """Hold the lock for a ``with`` block.

        The end of the block releases it, whichever thread or task it runs in. In a forked child it has no effect.

        Raises:
            DeadlockError: As :meth:`lock` (EDEADLK).
        """
        return HeldBlock(partial(_take, self, ctx))

    def is_locked(self) -> bool:
        """Return True if a living process holds the lock.

        Kernel: dma_resv_is_locked.
        """
        shm, index = self._record.at()
        return shm.resv_owner(index) != 0

    def locking_ctx(self) -> WwAcquireContext | None:
        """Return the context under which this thread or task holds the lock; None without one (semantics 4.8).

        Kernel: dma_resv_locking_ctx.
        """
        held = self._held_by(current(self.domain))
        return held.ctx if held else None

    def held_here(self) -> bool:
        """Return True if the running thread or task holds the lock.

        Kernel: dma_resv_held.
        """
        return self._held is not None and self._held_by(current(self.domain)) is not None

    def _held_by(self, owner: Owner) -> HeldLock | None:
        held = self._held
        return held if held is not None and held.owner is owner else None

    def _assert_held(self, operation: str) -> HeldLock:
        held = self._held_by(current(self.domain))
        if held is None:
            raise ContractError(f"{operation}: {self!r}: this thread or task doesn't hold its lock; call it inside `with resv.locked():`")
        return held


LockT = TypeVar("LockT", bound=ResvLock)


def _take(resv: LockT, ctx: WwAcquireContext | None, taken: Taken) -> LockT:
    resv._lock(taken, ctx, "lock")
    return resv


# ---- for the package ----


def record_of(resv: ResvLock) -> Record:
    """Return the record in the domain that has the lock."""
    return resv._record


def held_by(resv: ResvLock, owner: Owner) -> HeldLock | None:
    """Return what is known of the lock if ``owner`` holds it, else None."""
    held = resv._held
    return held if held is not None and held.owner is owner else None


def is_held(resv: ResvLock, held: HeldLock) -> bool:
    """Return True if the lock is still held as ``held``."""
    return resv._held is held


def holding(resv: ResvLock) -> HeldLock:
    """Return what is known of the lock, which the running thread or task holds. Raises ContractError if it doesn't."""
    return resv._assert_held("call")


@contextmanager
def lent(resv: ResvLock, word: int) -> Iterator[None]:
    """Count the lock as the running thread's for the block. The context ``word`` holds it, and waits for what the block does.

    For remote calls (``sharing/serving.py``).
    """
    before, owner = resv._held, current(resv.domain)
    held = resv._held = HeldLock(owner, word)
    owner.locks += 1
    try:
        yield
    finally:
        if resv._held is held:
            resv._held = before
        owner.locks -= 1


def lose(resv: ResvLock, held: HeldLock) -> None:
    """Note that the lock, lent for a remote call, won't come back. Its owner's next ``unlock`` has no effect."""
    if resv._held is held and not held.lent:
        resv._held, resv._lost = None, held
        held.owner.locks -= 1
        if held.ctx is not None:
            held.ctx.locks -= 1
