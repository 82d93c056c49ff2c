"""``WwAcquireContext`` and ``lock_all``: many reservation locks at once without a deadlock (semantics 4.10).

The lock of a reservation object is a ww_mutex in wait-die mode. A context has a stamp, and a smaller stamp is older. An owner that holds
locks under a context, and meets a lock whose holder or waiter is older, gets EDEADLK. It then releases every lock of the context, takes the
contended one with ``lock_slow``, and takes the others again. The stamp stays the same, so the oldest context always gets through. An owner
that holds no lock waits.

A thread or task has at most one open context, and only its maker uses it.
"""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol, Self, TypeVar

from dmabuf._native import Context, HeldBlock, HeldLock
from dmabuf.core.base.debug import Switched, setting
from dmabuf.core.task.owner import Owner, current
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import Taken, finished
from dmabuf.errors import ContractError, contract_warning, fail


class Lock(Protocol):
    """What a context takes: the lock of a reservation object."""

    domain: Domain

    def take(self, taken: Taken, ctx: WwAcquireContext, *, slow: bool, until: int) -> None:
        """Take it, and note it in ``taken``.

        Raises DeadlockError when an older context is in the way, which ``ctx.contended`` then names. ``slow``: after that, and with no lock
        held.
        """


class WwAcquireContext(Context):
    """An acquire context: the age under which one owner takes several locks.

    ``acquired``: how many locks it holds. ``contended``: the reservation object that last answered EDEADLK, until it is taken. A
    ``ContractWarning`` tells of a second open context of the same owner, of ``fini`` with locks held, and of locking after ``done``.

    Args:
        domain: The domain of its locks; None means the user's default domain.

    Raises:
        NoSpaceError: The domain is full (ENOSPC).
    """

    def __init__(self, *, domain: Domain | None = None) -> None:
        self.domain = domain or Domain.default()
        self.owner: Owner = current(self.domain)
        other = self.owner.open_context() if self.owner.open_context is not None else None
        if other is not None and other.word:
            contract_warning("WwAcquireContext: this thread or task already has one open; finish it first", 2)
        self.domain.ctx_open(self, threading.get_native_id(), True)
        self.owner.open_context = weakref.ref(self)
        self.contended: Lock | None = None
        self.injection: tuple[int, int] | None = None  # for inject(): locks left to the next made-up deadlock, and its distance
        self.is_done = False

    @property
    def acquired(self) -> int:
        """How many locks it holds."""
        return self.locks

    @property
    def closed(self) -> bool:
        """Whether it is finished."""
        return not self.word

    @property
    def stamp(self) -> int:
        """The context's age: a smaller number is older. 0 when it is finished."""
        info = self.domain.shm.ctx_info(self.word)
        return info[3] if info else 0

    def check(self, lock: Lock, operation: str, *, slow: bool) -> None:
        """Check the rules that the kernel's lock debugging knows (semantics 4.10, last paragraph).

        Raises:
            ContractError: The context is finished, or belongs to another thread, task or process.
            CrossDomainError: The lock belongs to another domain (EXDEV).
        """
        if self.closed or self.inherited:
            raise ContractError(f"{operation}: {lock!r}: the context is finished, or belongs to the parent process; make a new one")
        if self.domain is not lock.domain:
            remedy = "make the context in the lock's domain (domain=)"
            raise fail(errno.EXDEV, operation, lock, remedy, what="the context belongs to another domain")
        if self.owner is not current(self.domain):
            raise ContractError(f"{operation}: {lock!r}: the context belongs to another thread or task; make one in this one")
        if self.is_done:
            contract_warning(f"{operation}: {lock!r}: done() declared the lock phase over", 3)
        if slow:
            if self.contended is not lock:
                contract_warning(f"{operation}: {lock!r}: lock_slow without EDEADLK from it before", 3)
            if self.acquired:
                contract_warning(f"{operation}: {lock!r}: lock_slow with {self.acquired} locks held; release every lock first", 3)
        elif self.contended is not None:
            if self.acquired:
                contract_warning(f"{operation}: {lock!r}: locks are held after EDEADLK; release every lock of the context first", 3)
            elif self.contended is not lock:
                contract_warning(f"{operation}: {lock!r}: not the contended lock; after EDEADLK take that one first, with lock_slow", 3)

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy of its parent's context, which has no effect."""
        return self.domain.shm.life != self.life

    def done(self) -> None:
        """Declare the lock phase over: locking more is a ``ContractWarning``."""
        if self.is_done:
            contract_warning("done: the lock phase is already over", 2)
        self.is_done = True

    def fini(self) -> None:
        """Finish the context. No effect in a forked child.

        With locks held it is a ``ContractWarning``, and the context stays open.
        """
        if self.closed or self.inherited:
            return
        if self.acquired:
            contract_warning(f"fini: {self.acquired} locks are still held; unlock them first", 2)
            return
        self.close()

    def __enter__(self) -> Self:
        return self

    @finished
    def __exit__(self, *_: object) -> None:
        self.fini()


LockT = TypeVar("LockT", bound=Lock)


def lock_all(resvs: Iterable[LockT]) -> AbstractContextManager[WwAcquireContext | None]:
    """Hold the locks of several reservation objects for a block: the back-off loop, written once. Waits as long as it takes.

    The end of the block releases them, whichever thread or task it runs in.

    Args:
        resvs: The reservation objects; one that is named twice is locked once.

    Returns:
        The context manager. It gives the context, or None if there was nothing to lock.

    Raises:
        CrossDomainError: They belong to several domains (EXDEV).
        NoSpaceError: The domain is full (ENOSPC).
        TypeError: One is not a reservation object.
    """
    return lock_all_until(resvs, -1)


def lock_all_until(resvs: Iterable[LockT], until: int) -> AbstractContextManager[WwAcquireContext | None]:
    """Do the same as :func:`lock_all`, but wait until a CLOCK_MONOTONIC time in ns at most (-1: without a limit).

    Raises:
        DmaBufTimeout: Others held one of the locks at that time (ETIMEDOUT).
    """
    return HeldBlock(partial(_take_all, resvs, until))


def _take_all(resvs: Iterable[LockT], until: int, taken: Taken) -> WwAcquireContext | None:
    wanted = list(dict.fromkeys(resvs))
    if not wanted:
        return None
    for resv in wanted:
        if not hasattr(resv, "take"):
            raise TypeError(f"lock_all: a DmaResv is expected, as buf.resv, not {type(resv).__name__}")
    ctx = WwAcquireContext.__new__(WwAcquireContext)
    taken.append(ctx)  # before it is open, so that an interruption closes it at once
    ctx.__init__(domain=wanted[0].domain)  # type: ignore[misc]
    held: dict[LockT, None] = {}
    while len(held) < len(wanted):
        for resv in wanted:
            if resv in held:
                continue
            try:
                resv.take(taken, ctx, slow=False, until=until)
            except OSError as e:
                if e.errno != errno.EDEADLK or ctx.contended is not resv:
                    raise
                _release_to(ctx, taken)
                held.clear()
                resv.take(taken, ctx, slow=True, until=until)
                held[resv] = None
                break
            held[resv] = None
    return ctx


def _release_to(ctx: WwAcquireContext, taken: Taken) -> None:
    """Release what was taken since the context was."""
    while taken[-1] is not ctx:
        if isinstance(taken[-1], HeldLock):
            taken[-1].release()
        del taken[-1]


# ---- made-up deadlocks (CONFIG_DEBUG_WW_MUTEX_SLOWPATH) ----

deadlock_every = setting("DMABUF_DEBUG_WW")  # 0: never


def inject_deadlocks(every: int = 2) -> AbstractContextManager[None]:
    """Let the n-th lock under each context answer EDEADLK, and later ones at growing distances. Holds for the whole process.

    Args:
        every: n, or 0 for none.
    """
    return Switched(globals(), "deadlock_every", every)


def inject(ctx: WwAcquireContext) -> bool:
    """Return True if this lock must answer EDEADLK. The distance grows each time in a context, so that every back-off gets through."""
    left, distance = ctx.injection or (deadlock_every, deadlock_every)
    if left > 1:
        ctx.injection = left - 1, distance
        return False
    distance = distance * 7 // 2 + 1
    ctx.injection = distance, distance
    return True
