"""A reservation lock that goes along with a remote call, and comes back.

*The lender* holds the lock. It passes the lock to a *return context*, which exists for this one call, and names that in the request. *The
borrower*, a thread of the other process, takes the lock from the return context, acts under it, and passes it back before it answers. Then
the lender takes the lock back. Each step is one compare-and-swap that succeeds only from the expected owner. So at every instant one living
context has the lock, and either process can be killed at any point:

- If the borrower dies, its context says to which context the lock returns, and the reaper of its life does that first (native/lend.c). The
  lender waits for it, and has the lock back before any other process.
- If the lender dies, the return context ends with it. The borrower goes on under the lock to the end of the op, and then frees it.

A lender that goes on without waiting closes the return context. Then a request that has not begun is refused (EPERM), and a borrower frees
the lock. If the lock is lent already, as in a ``move_notify`` that calls back, there is no return context. The borrower takes the lock from
its holder, which waits for all of it, and returns it there.

*Signals.* The lender waits for the end of the call whatever its signal handlers raise. They run, and what they raised comes when the lock
is back (:func:`finish_shielded`). The kernel doesn't leave an op under its lock either.

If of two borrowers in a row the first dies before the second has ended, the lock is lost. It is free then, and the lender's ``unlock`` has
no effect.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from dmabuf._native import OFF_ID, Context, HeldLock
from dmabuf._native import step as native_step
from dmabuf.core.resv.lock import ResvLock, holding, is_held, lent, lose, record_of
from dmabuf.core.task.owner import current
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.domain.guards import finished
from dmabuf.errors import fail

_MOST_EXCEPTIONS: Final = 1000  # of signal handlers during one wait
T = TypeVar("T")


def finish_shielded(step: Callable[[], T]) -> T:
    """Call ``step`` until it ends, and then raise the last exception that a signal handler raised meanwhile.

    An exception may end ``step`` at any point, and it is called again.
    """
    raised: BaseException | None = None
    for _ in range(_MOST_EXCEPTIONS):
        try:
            value = step()
        except BaseException as e:
            raised = e
            continue
        if raised is None:
            return value
        break
    assert raised is not None
    raise raised


class _ReturnContext(Context):
    """A context in the lender's place. Once it is closed, a lock that it has is free, and no process can pass it one."""

    def __init__(self, domain: Domain, holder: int) -> None:
        info = domain.shm.ctx_info(holder)
        domain.ctx_open(self, info[1] if info else 0, False)


class Lent:
    """Lend the lock of the running thread or task for the block. ``peer``: the life of the borrower's process.

    ``with`` yields the number for the request. After the block the lock is held again, or lost if it could not come back.
    """

    __slots__ = ("_held", "_loan", "_peer", "_resv")

    def __init__(self, resv: ResvLock, peer: int) -> None:
        self._resv, self._peer, self._held = resv, peer, holding(resv)
        self._loan: _ReturnContext | None = None

    def __enter__(self) -> int:
        resv, held = self._resv, self._held
        if held.lent:
            return held.word
        try:
            self._loan = _ReturnContext(resv.domain, held.word)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            return held.word  # the domain is full: without a return context, ops that only give back work still
        try:
            record_of(resv).shm.resv_pass(record_of(resv).index, held.word, self._loan.word)
        except BaseException:
            self._back()
            raise
        return self._loan.word

    @finished
    def __exit__(self, *_: object) -> None:
        self._back()

    @finished
    def _back(self) -> None:
        loan, held = self._loan, self._held
        if held.owner.life == record_of(self._resv).shm.life:
            regain(self._resv, held, loan.word if loan else held.word, self._peer)
        if loan is not None:
            loan.close()


def regain(resv: ResvLock, held: HeldLock, loan: int, life: int) -> None:
    """Wait, whatever signal handlers raise, until ``held`` has the lock again, perhaps from ``loan``, or until it is lost (:func:`lose`).

    ``life``: while an owner of this life has the lock, it will come back, with the end of a call or the end of the life.
    """
    if not finish_shielded(lambda: _regained(resv, held.word, loan, life)):
        lose(resv, held)
    elif not is_held(resv, held):  # another thread ended the block of the lock during the call
        record_of(resv).shm.resv_unlock(record_of(resv).index, held.word)


def _regained(resv: ResvLock, word: int, loan: int, life: int) -> bool:
    (shm, index), domain = record_of(resv).at(), resv.domain
    while True:
        owner = shm.resv_owner(index)
        if owner == word:
            return True
        if owner == loan:
            shm.resv_pass(index, loan, word)
            continue
        holder = shm.ctx_info(owner) if owner else None
        if holder is None or holder[0] != life:
            if shm.resv_owner(index) == owner:
                return False
            continue
        # The sockets of a dead process are closed before its life's lock is freed, which follows in a moment.
        shm.wait(OFF_ID, shm.load32(OFF_ID), TICK_NS / 1e9)
        domain.reap_dead()


@contextmanager
def borrowed(resv: ResvLock, loan: int, operation: str, obj: object) -> Iterator[None]:
    """Borrow a caller's lock for the running thread, which serves. A return context that doesn't have the lock is EPERM."""
    (shm, index), me = record_of(resv).at(), current(resv.domain).word
    if not shm.resv_borrow(index, loan, me):
        raise fail(errno.EPERM, operation, obj, "call it with the reservation lock held", what="the caller doesn't hold the lock")
    try:
        native_step("service_locked")
        with lent(resv, me):
            yield
    finally:
        shm.resv_return(index, me)
