"""A reservation lock that goes along with a call to another process, and comes back.

*The lender* holds the lock. It hands it to a *loan*, a context of its own that exists for this one call, and names the loan in the request.
*The borrower*, a thread of the other process, takes the lock from the loan, acts under it, and gives it to the loan again before it
answers; then the lender takes it back. Each of these is one compare-and-swap that succeeds only from the owner that it expects, so at
every instant one living context has the lock, and whoever acts under it can be killed anywhere:

- the borrower: its context names the loan as its heir, and who reaps its life gives the lock to the heir first (native/lend.c). The lender
  waits for that, and has it back before anybody else;
- the lender: its loan ends with it. The borrower goes on under the lock to the end of the op, and then frees it.

A lender that goes on without waiting closes its loan: a request that was not begun is refused (EPERM), and a borrower frees the lock.
Where the lock is lent already, as in a ``move_notify`` that calls back, there is no loan: it is borrowed from and returned to its holder,
which waits for all of it.

*Signals.* The lender waits for the end of the call whatever its signal handlers raise; they run, and what they raised comes when the lock
is back (:func:`finish_shielded`): the kernel doesn't leave an op under its lock either.

If of two borrowers in a row the first dies before the second has ended, the lock is lost: it is free then, and
the lender's ``unlock`` does nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from dmabuf._native import OFF_ID
from dmabuf._native import step as native_step
from dmabuf.core.resv.lock import HeldLock, ResvLock, holding, lent, lose, record_of
from dmabuf.core.task.owner import current
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.errors import fail

_MOST_EXCEPTIONS: Final = 1000  # exceptions of signal handlers during one wait
T = TypeVar("T")


def finish_shielded(step: Callable[[], T]) -> T:
    """Call ``step`` until it comes to its end; what signal handlers raised meanwhile, the last of it, is raised after that.

    ``step`` must bear being ended anywhere and begun again.
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


class _ReturnContext:
    """A context that stands for the lender; closed, what it has is free, and nobody can give it anything."""

    __slots__ = ("domain", "life", "word")

    def __init__(self, domain: Domain, holder: int) -> None:
        info = domain.shm.ctx_info(holder)
        self.domain, self.life = domain, domain.shm.life
        self.word = domain.ctx_open(info[1] if info else 0, False)

    def close(self) -> None:
        word, self.word = self.word, 0
        if word:
            self.domain.ctx_close(word, self.life)

    def __del__(self) -> None:
        if hasattr(self, "word"):
            self.close()


class Lent:
    """For the block the lock, which the running thread or task holds, can be borrowed by ``peer``, a life; after it, it is held again.

    ``with`` gives the number for the request. If the lock could not come back, it is lost.
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
            return held.word  # the domain is full: without a loan, what gives back works still
        try:
            record_of(resv).shm.resv_pass(record_of(resv).index, held.word, self._loan.word)
        except BaseException:
            self._back()
            raise
        return self._loan.word

    def __exit__(self, *_: object) -> None:
        self._back()

    def _back(self) -> None:
        loan, held = self._loan, self._held
        try:
            if held.owner.life == record_of(self._resv).shm.life:
                regain(self._resv, held, loan.word if loan else held.word, self._peer)
        finally:
            if loan is not None:
                loan.close()


def regain(resv: ResvLock, held: HeldLock, loan: int, life: int) -> None:
    """Wait, and see it through, until ``held`` has the lock again, perhaps by way of ``loan``; or it is lost (:func:`lose`).

    ``life``: while an owner of this life has the lock, it is on its way back, with a call that goes on or with the end of the life.
    """
    if not finish_shielded(lambda: _regained(resv, held.word, loan, life)):
        lose(resv, held)


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
        # Of who died the sockets are closed already; the lock of its life will be in a moment.
        shm.wait(OFF_ID, shm.load32(OFF_ID), TICK_NS / 1e9)
        domain.reap_dead()


@contextmanager
def borrowed(resv: ResvLock, loan: int, operation: str, obj: object) -> Iterator[None]:
    """For the block the running thread, one that serves, has the lock that a caller lends it. Errors: EPERM it is not the loan's."""
    (shm, index), me = record_of(resv).at(), current(resv.domain).word
    if not shm.resv_borrow(index, loan, me):
        raise fail(errno.EPERM, operation, obj, "hold its reservation lock", what="the caller doesn't hold the lock")
    try:
        native_step("service_locked")
        with lent(resv, me):
            yield
    finally:
        shm.resv_return(index, me)
