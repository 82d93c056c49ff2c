"""``WwAcquireContext`` and ``lock_all``: many reservation locks at once without a deadlock (spec 4.10).

The lock of a reservation object is a ww_mutex in wait-die mode. A context has a stamp, and a smaller stamp is older. Who holds locks
under a context and meets a lock whose holder, or a waiter, is older gets EDEADLK: it releases every lock of the context, takes the
contended one first with ``lock_slow`` and does the rest again. The stamp is kept across that, so the oldest always gets through. Who
holds nothing just waits.

One open context a thread or task; it is used by the owner that made it alone.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from dmabuf.core.base.debug import setting
from dmabuf.core.task.owner import Owner, current
from dmabuf.domain.domain import Domain
from dmabuf.errors import ContractError, contract_warning, fail

if TYPE_CHECKING:
    from dmabuf.core.resv.resv import DmaResv


class WwAcquireContext:
    """An acquire context: the age under which one owner takes several locks.

    ``acquired``: how many locks it holds. ``contended``: the reservation object that answered EDEADLK last, until it is taken.
    ``ContractWarning``: a second open context of the same owner; ``fini`` with locks held; locking after ``done``.
    """

    def __init__(self, *, domain: Domain | None = None) -> None:
        self.domain = domain or Domain.default()
        self.owner: Owner = current(self.domain)
        open_contexts = self.domain.local.setdefault("ww", {})
        if self.owner.word in open_contexts:
            contract_warning("WwAcquireContext: this thread or task has one open already; finish it first", 2)
        self.word = self.domain.ctx_open(threading.get_native_id(), True)
        self.life = self.domain.shm.life
        open_contexts[self.owner.word] = self.word
        self.acquired = 0
        self.contended: DmaResv | None = None
        self.injection: tuple[int, int] | None = None  # the debug layer's count of locks until it makes up a deadlock
        self.is_done = False
        self.closed = False

    @property
    def stamp(self) -> int:
        """The context's age: smaller is older. 0 when it is finished."""
        info = self.domain.shm.ctx_info(self.word)
        return info[3] if info else 0

    def check(self, resv: DmaResv, operation: str, *, slow: bool) -> None:
        """The rules that the kernel's lock debugging knows (spec 4.10, last paragraph)."""
        if self.closed or self.inherited:
            raise ContractError(f"{operation}: the context is finished, or belongs to the parent process")
        if self.domain is not resv.domain:
            raise fail(errno.EXDEV, operation, resv, "a context and its locks are of one domain")
        if self.owner is not current(self.domain):
            raise ContractError(f"{operation}: the context belongs to another thread or task")
        if self.is_done:
            contract_warning(f"{operation}: {resv!r}: done() declared the lock phase over", 3)
        if slow:
            if self.contended is not resv:
                contract_warning(f"{operation}: {resv!r}: lock_slow without EDEADLK from it before", 3)
            if self.acquired:
                contract_warning(f"{operation}: {resv!r}: lock_slow with {self.acquired} locks held: release every lock first", 3)
        elif self.contended is not None:
            if self.acquired:
                contract_warning(f"{operation}: {resv!r}: after EDEADLK every lock of the context is to be released first", 3)
            elif self.contended is not resv:
                contract_warning(f"{operation}: {resv!r}: after EDEADLK the contended lock comes first, with lock_slow", 3)

    @property
    def inherited(self) -> bool:
        """Is this a forked child's copy of its parent's context, which does nothing?"""
        return self.domain.shm.life != self.life

    def done(self) -> None:
        """Declare the lock phase over: locking more is a ``ContractWarning``."""
        if self.is_done:
            contract_warning("done: the lock phase was over already", 2)
        self.is_done = True

    def fini(self) -> None:
        """Finish the context. ``ContractWarning`` when locks are held; they stay held by nobody's age. In a forked child: nothing."""
        if self.closed or self.inherited:
            return
        if self.acquired:
            contract_warning(f"fini: {self.acquired} locks are still held: unlock them first", 2)
            return
        self._close()

    def _close(self) -> None:
        self.closed = True
        contexts = self.domain.local.get("ww", {})
        if contexts.get(self.owner.word) == self.word:
            del contexts[self.owner.word]
        self.domain.ctx_close(self.word, self.life)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.fini()

    def __del__(self) -> None:
        if not getattr(self, "closed", True) and not self.acquired:
            self._close()


@contextmanager
def lock_all(resvs: Iterable[DmaResv]) -> Iterator[WwAcquireContext | None]:
    """Hold the locks of all these reservation objects: the back-off loop, written once.

    The same object twice counts once. Yields the context, None for an empty collection. Waits as long as it takes.
    """
    wanted = list(dict.fromkeys(resvs))
    if not wanted:
        yield None
        return
    with WwAcquireContext(domain=wanted[0].domain) as ctx:
        held: list[DmaResv] = []
        try:
            _take(wanted, held, ctx)
            yield ctx
        finally:
            if not ctx.inherited:
                for resv in reversed(held):
                    resv.unlock()


def _take(wanted: list[DmaResv], held: list[DmaResv], ctx: WwAcquireContext) -> None:
    while True:
        for resv in wanted:
            if resv in held:
                continue
            try:
                resv.lock(ctx)
            except OSError as e:
                if e.errno != errno.EDEADLK or ctx.contended is not resv:
                    raise
                while held:
                    held.pop().unlock()
                resv.lock_slow(ctx)
                held.append(resv)
                break
            held.append(resv)
        else:
            return


deadlock_every = setting("DMABUF_DEBUG_WW")  # 0: never


@contextmanager
def inject_deadlocks(every: int = 2) -> Iterator[None]:
    """Let the n-th lock under each context answer EDEADLK, and later ones at growing distances (CONFIG_DEBUG_WW_MUTEX_SLOWPATH).

    In the whole process; ``every``: n, 0 for none.
    """
    global deadlock_every
    before, deadlock_every = deadlock_every, every
    try:
        yield
    finally:
        deadlock_every = before


def inject(ctx: WwAcquireContext) -> bool:
    """Is it this lock's turn? Each time in a context the distance to the next grows, so that every back-off gets through."""
    left, distance = ctx.injection or (deadlock_every, deadlock_every)
    if left > 1:
        ctx.injection = left - 1, distance
        return False
    distance = distance * 7 // 2 + 1
    ctx.injection = distance, distance
    return True
