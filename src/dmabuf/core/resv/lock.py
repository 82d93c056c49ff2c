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
from typing import Generic, NoReturn, Self, TypeVar

from dmabuf._native import Shm
from dmabuf.core.fence import signalling
from dmabuf.core.resv import ww_mutex
from dmabuf.core.resv.ww_mutex import WwAcquireContext
from dmabuf.core.task.owner import Owner, current
from dmabuf.domain.domain import Domain
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


class HeldLock:
    """What this process knows about the lock while one of its owners holds it.

    ``room``: how many fences can still be added. ``lent``: a remote call has the lock, and ``word`` is its context.
    """

    __slots__ = ("ctx", "lent", "owner", "room", "word")

    def __init__(self, owner: Owner, ctx: WwAcquireContext | None, lent: int = 0) -> None:
        self.owner, self.ctx, self.room = owner, ctx, 0
        self.word = lent or (ctx.word if ctx else owner.word)
        self.lent = lent != 0
        owner.locks += 1


class ResvLock:
    """The lock of a reservation object; see the module."""

    domain: Domain

    def __init__(self, record: Record) -> None:
        self._record, self.domain = record, record.domain
        self._held: HeldLock | None = None
        self._lost: HeldLock | None = None  # lent to a process that died with it; one unlock() of its owner is forgiven

    def lock(self, ctx: WwAcquireContext | None = None) -> None:
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
        self._lock(ctx, "lock", interruptible=False)

    def lock_interruptible(self, ctx: WwAcquireContext | None = None) -> None:
        """Take the lock as :meth:`lock` does, but let a signal end the wait.

        Raises:
            InterruptedWaitError: A signal arrived (EINTR).

        Kernel: dma_resv_lock_interruptible.
        """
        self._lock(ctx, "lock_interruptible", interruptible=True)

    def lock_slow(self, ctx: WwAcquireContext, *, interruptible: bool = False) -> None:
        """Take the contended lock after EDEADLK, holding no other: waits, and can't fail with EDEADLK (semantics 4.10).

        Args:
            ctx: The context that got EDEADLK from this lock.
            interruptible: Let a signal end the wait. The lock is still the one to take first.

        Raises:
            InterruptedWaitError: A signal arrived (EINTR).

        Kernel: dma_resv_lock_slow, dma_resv_lock_slow_interruptible.
        """
        self._lock(ctx, "lock_slow", interruptible=interruptible, slow=True)

    def _lock(self, ctx: WwAcquireContext | None, operation: str, *, interruptible: bool, slow: bool = False) -> None:
        owner = current(self.domain)
        held = self._held_by(owner)
        if held is not None and held.ctx is not ctx:
            self._recursive(operation, 4)
        if ctx is None:
            if held is not None:
                self._recursive(operation, 4)
            self._acquire(owner, operation, interruptible)
            return
        ctx.check(self, operation, slow=slow)
        if signalling.sections:
            signalling.check_signalling(operation, self)
        shm, index = self._record.at()
        try:
            answer = shm.resv_lock(index, ctx.word, 0 if slow else ctx.acquired, interruptible, False, -1)
            if answer >= 0:
                self._held = HeldLock(owner, ctx)
        except BaseException:
            self._undo(shm, index, ctx.word)
            raise
        if answer < 0:
            if answer == -errno.EDEADLK:
                ctx.contended = self
            raise self._refused(-answer, operation)
        if ctx.contended is self:
            ctx.contended = None
        ctx.acquired += 1
        if ww_mutex.deadlock_every and not slow and ww_mutex.inject(ctx):
            self.unlock()
            ctx.contended = self
            raise fail(errno.EDEADLK, operation, self, _ANSWERS[errno.EDEADLK][1], what="made up by the debug layer")

    def _acquire(self, owner: Owner, operation: str, interruptible: bool) -> None:
        """Take the lock for an owner without a context."""
        if signalling.sections:
            signalling.check_signalling(operation, self)
        shm, index = self._record.at()
        try:
            answer = shm.resv_lock(index, owner.word, 0, interruptible, False, -1)
            if answer >= 0:
                self._held = HeldLock(owner, None)
        except BaseException:
            self._undo(shm, index, owner.word)
            raise
        if answer < 0:
            if answer == -errno.EDEADLK:
                self._recursive(operation, 4)
            raise self._refused(-answer, operation)

    def _undo(self, shm: Shm, index: int, word: int) -> None:
        """Release the lock, taken or not: a signal handler raised around the moment of locking."""
        if self._held is not None and self._held.word == word:
            self._held.owner.locks -= 1
            self._held = None
        shm.resv_unlock(index, word)

    def _refused(self, error: int, operation: str) -> DmaBufError:
        what, remedy = _ANSWERS.get(error, (None, None))
        return fail(error, operation, self, remedy, what=what)

    def _recursive(self, operation: str, level: int) -> NoReturn:
        contract_warning(f"{operation}: {self!r}: this thread or task already holds it", level)
        remedy = "unlock it first, or take all locks under one WwAcquireContext"
        raise fail(errno.EDEADLK, operation, self, remedy, what="this thread or task already holds it")

    def trylock(self, ctx: WwAcquireContext | None = None) -> bool:
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
        word = ctx.word if ctx else owner.word
        try:
            answer = shm.resv_lock(index, word, 0, False, True, -1)
            if answer < 0:
                return False
            self._held = HeldLock(owner, ctx)
        except BaseException:
            self._undo(shm, index, word)
            raise
        if ctx is not None:
            ctx.acquired += 1
            if ctx.contended is self:
                ctx.contended = None
        return True

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
        self._release(held)

    def _release(self, held: HeldLock) -> None:
        try:
            self._held = None
            held.owner.locks -= 1
        finally:
            self._record.shm.resv_unlock(self._record.index, held.word)
        if held.ctx is not None:
            held.ctx.acquired -= 1

    def locked(self, ctx: WwAcquireContext | None = None) -> AbstractContextManager[Self]:
        """Hold the lock for a ``with`` block. In a forked child the end of the block has no effect.

        Raises:
            DeadlockError: As :meth:`lock` (EDEADLK).
        """
        return _LockedBlock(self, ctx)

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


class _LockedBlock(Generic[LockT]):
    """The block of :meth:`ResvLock.locked`.

    Not a generator: what a signal handler raises between the lock and the block must find the lock noted in this object.
    """

    __slots__ = ("_ctx", "_held", "_resv")

    def __init__(self, resv: LockT, ctx: WwAcquireContext | None) -> None:
        self._resv, self._ctx = resv, ctx
        self._held: HeldLock | None = None

    def __enter__(self) -> LockT:
        resv = self._resv
        before = resv._held
        try:
            resv.lock(self._ctx)
            self._held = resv._held
        except BaseException:
            now = resv._held_by(current(resv.domain))
            if now is not None and now is not before:
                resv._release(now)
            raise
        return resv

    def __exit__(self, *_: object) -> None:
        held, resv = self._held, self._resv
        if held is not None and resv._held is held and held.owner.life == resv._record.shm.life:
            resv._release(held)


# ---- for the package ----


def record_of(resv: ResvLock) -> Record:
    """Return the record in the domain that has the lock."""
    return resv._record


def held_by(resv: ResvLock, owner: Owner) -> HeldLock | None:
    """Return what is known of the lock if ``owner`` holds it, else None."""
    held = resv._held
    return held if held is not None and held.owner is owner else None


def holding(resv: ResvLock) -> HeldLock:
    """Return what is known of the lock, which the running thread or task holds. Raises ContractError if it doesn't."""
    return resv._assert_held("call")


@contextmanager
def lent(resv: ResvLock, word: int) -> Iterator[None]:
    """Count the lock as the running thread's for the block. The context ``word`` holds it, and waits for what the block does.

    For remote calls (``sharing/serving.py``).
    """
    before, owner = resv._held, current(resv.domain)
    held = resv._held = HeldLock(owner, None, word)
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
            held.ctx.acquired -= 1
