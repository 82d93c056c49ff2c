"""``TimelineSemaphore``: a place for fences that may not be there yet, as DRM's sync objects (spec 5.14).

It holds nothing, one fence (binary use, point 0), or a timeline of points, each of which stands for its fences and those of all points
before. ``signal`` and ``import_fence`` put something there; who waits names a point, and can also wait for it to be *submitted*. Points
should rise; one that does not is taken as the highest so far, and ``query`` begins anew (spec 3.16).

It is a descriptor, shared like a :class:`~dmabuf.SwSync`: every holder may do everything, and sees what the others do. What is in it
belongs to those who made the fences: one whose owner dies ends with ``-EOWNERDEAD``, and counts as ended like every other. The state is
changed under its lock, in one step that a death leaves done or not done.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from dmabuf._native import FF_ANYBODY, OFF_CONTEXT, Shm, step
from dmabuf.core.base.clock import monotonic_deadline, seconds_left
from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.fence import DmaFence, flagged, unbound_timeline, wrap
from dmabuf.core.fence.stub import private_stub
from dmabuf.core.fence.unwrap import leaves_of
from dmabuf.core.fence.wait_any import wait_any
from dmabuf.core.sync.semaphore_state import EMPTY, TIMELINE, Leaf, State, added, leaves_at, packed, settled, unpacked
from dmabuf.core.sync.shared_object import SharedObject
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.domain.dispatcher import report
from dmabuf.domain.domain import Domain
from dmabuf.domain.local import Local
from dmabuf.domain.shared_file import SharedFile
from dmabuf.errors import fail, needing_descriptors

KIND: Final = "semaphore"
MAX_POINT: Final = 0xFFFFFFFFFFFFFFFF
_MAGIC: Final = b"dmabufT\1"
_EVENT: Final = 8  # offset of the handle of the fence that ends when something is submitted
_HANDLE: Final = struct.Struct("=Q")
# Handles of the fences of this process that stand for a submission to a semaphore.
EVENTS: Local[set[int]] = Local(lambda _: set())
_EVENTFD: Final = "anon_inode:[eventfd]"
_here = threading.local()  # looks: the notices that are to look again when this thread has given back the lock


@dataclass(frozen=True)
class SemaphoreStatistics:
    """A snapshot. ``point``: reached; ``submitted``: the last that has a fence; ``pending``: fences that have not ended."""

    point: int
    submitted: int
    pending: int


class TimelineSemaphore(SharedObject):
    """A semaphore of points. ``signaled``: begin with an ended fence, for binary use.

    Errors: EMFILE; ENOSPC the domain is full.
    """

    __slots__ = ("_watching",)

    KIND, NOUN = KIND, "semaphore"

    def __init__(self, *, signaled: bool = False, domain: Domain | None = None) -> None:
        self._set(SharedFile.make(KIND, domain or Domain.default(), _MAGIC.ljust(_EVENT, b"\0")))
        if signaled:
            self.signal()

    def _set(self, file: SharedFile) -> None:
        super()._set(file)
        self._watching: set[_Notice] = set()

    def __repr__(self) -> str:
        return f"<dmabuf.TimelineSemaphore {'closed' if self.closed else f'at {self.query()} of {self.query(submitted=True)}'}>"

    def close(self) -> None:
        """Close the descriptor, and take back what ``eventfd`` asked for; again: nothing. Fences in it go on by themselves."""
        if self.closed:
            return
        self.closed = True
        for notice in list(self._watching):
            notice.cancel()
        self._let_go()

    def _let_go(self) -> None:
        """The last holder ends the fence that stands for a submission: there will be none, and its slot is its maker's again."""
        shm = self.domain.shm
        try:
            if self._file.close_fd() and shm.life:
                shm.fence_end_any(self._event(), 0)
        except OSError:  # no descriptor to look with: it ends with its maker
            pass
        finally:
            self._file.close()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not getattr(self, "closed", True) and not ending():
            self.closed = True
            self._let_go()

    # ---- the state, under the lock ----

    def _load(self) -> State:
        """What is there; what has ended is left out."""
        data = self._file.load()
        if not data:
            return State(EMPTY, 0, 0, [])
        try:
            return settled(self.domain.shm.fence_pending, *unpacked(data))
        except (struct.error, IndexError):
            raise fail(
                errno.EUCLEAN, "look up", "a semaphore", "somebody else wrote to its descriptor", what="its state is nonsense"
            ) from None

    def _change(self, operation: str, change: Callable[[State], State]) -> None:
        self._check(operation)
        shm = self.domain.join()
        before: list[_Notice] | None = getattr(_here, "looks", None)  # of a change that this one came in the middle of
        looks: list[_Notice] = []
        try:
            _here.looks = looks
            self._change_locked(shm, change)
        finally:
            _here.looks = before
            for notice in looks:
                notice.next()

    def _change_locked(self, shm: Shm, change: Callable[[State], State]) -> None:
        with self._file.locked():
            state = change(self._load())
            data = packed(state)
            # Who waits for something to be submitted is woken first, and then stands at the lock: if we die now, he looks and waits again.
            event = self._event()
            if event:
                shm.fence_end_any(event, 0)  # first: a death in here leaves it to the next change
                self._file.write(_EVENT, _HANDLE.pack(0))
                step("sem_woken")
            self._file.store(data)

    def _event(self) -> int:
        raw = self._file.read(_EVENT, 8)
        return int(_HANDLE.unpack(raw)[0]) if len(raw) == 8 else 0

    def _submission(self) -> DmaFence:
        """A fence that ends at the next change; of whoever first waited for one. Any holder ends it."""
        shm, domain = self.domain.shm, self.domain
        mine = EVENTS.of(domain)
        for handle in list(mine):  # those of other semaphores too, whose locks other threads hold
            if not shm.fence_pending(handle):
                with contextlib.suppress(KeyError):
                    mine.remove(handle)
                    shm.fence_signal(handle, 0, True)
        handle = self._event()
        if not handle or not shm.fence_pending(handle):
            handle = shm.fence_alloc(unbound_timeline(domain, KIND), shm.add64(OFF_CONTEXT, 1), 1, FF_ANYBODY, 0, 0)
            mine.add(handle)
            self._file.write(_EVENT, _HANDLE.pack(handle))
            step("sem_event")
        return wrap(domain, handle)

    def _blocking(self, point: int, operation: str, *, for_submit: bool, available: bool) -> DmaFence | None:
        """What to wait for next; None when there is nothing more. Errors: EINVAL the point has no fence; EBADF closed meanwhile."""
        self._check(operation)
        with self._file.locked():
            leaves = leaves_at(self._load(), point)
            if leaves is None and (for_submit or available):
                return self._submission()
            if available or (leaves is not None and not leaves):
                return None
        if leaves is None:
            raise self._missing(operation, point)
        return self._wrap(leaves[0])

    def _missing(self, operation: str, point: int) -> OSError:
        return fail(errno.EINVAL, operation, self, "submit it first, or wait with for_submit=True", what=f"point {point} has no fence yet")

    def _wrap(self, leaf: Leaf) -> DmaFence:
        return wrap(self.domain, leaf.handle, (leaf.context, leaf.seqno, leaf.timeline))

    # ---- putting something there ----

    def signal(self, point: int = 0) -> None:
        """Put an ended fence there: for binary use, or at a point of the timeline (SYNCOBJ_SIGNAL, TIMELINE_SIGNAL).

        Errors: EBADF; EINVAL no point.
        """
        _checked(point, "signal")
        self._change("signal", lambda state: added(state, point, []))

    def import_fence(self, fence: DmaFence, point: int = 0) -> None:
        """Put a fence there. Point 0 replaces all that was there.

        The fence's owner keeps it: one that is dropped unsignalled ends with ``-EDEADLK``. Errors: EBADF; EINVAL no point; EXDEV a fence of
        another domain; TypeError no fence.
        """
        _checked(point, "import_fence")
        if not isinstance(fence, DmaFence):
            raise TypeError(f"import_fence: a DmaFence is expected, not {type(fence).__name__}")
        if fence.domain is not self.domain:
            raise fail(errno.EXDEV, "import_fence", fence, "make both in one domain (domain=)", what="the fence belongs to another domain")
        leaves = []
        for leaf in leaves_of(fence):
            leaf.publish()
            leaf.shm.fence_mark(leaf.handle, "shared", 1)
            leaves.append(Leaf(leaf.handle, leaf.context, leaf.seqno, leaf.timeline_index))
        self._change("import_fence", lambda state: added(state, point, leaves))

    def import_sync_file(self, sync_file: SyncFile | int, point: int = 0) -> None:
        """Put a sync file's fences there; ``sync_file``: or a descriptor of one.

        Errors: EBADF this semaphore is closed; EINVAL no point, no sync file; EXDEV of another domain.
        """
        self._check("import_sync_file")
        _checked(point, "import_sync_file")
        if isinstance(sync_file, SyncFile) and not sync_file.closed:
            self.import_fence(sync_file.fence, point)
            return
        if isinstance(sync_file, int):
            try:
                with SyncFile.from_fd(sync_file, domain=self.domain) as found:
                    self.import_fence(found.fence, point)
                return
            except OSError as e:
                if e.errno != errno.EBADF:
                    raise
        raise fail(
            errno.EINVAL, "import_sync_file", self, "pass an open SyncFile, or its descriptor", what="what it was given is no sync file"
        )

    def reset(self) -> None:
        """Take everything out (SYNCOBJ_RESET). Errors: EBADF."""
        self._change("reset", lambda _: State(EMPTY, 0, 0, []))

    def transfer(self, source: TimelineSemaphore, source_point: int = 0, point: int = 0, *, for_submit: bool = False) -> None:
        """Put here what is at a point of another (SYNCOBJ_TRANSFER). ``for_submit``: wait until it is there.

        Errors: EBADF; ENOENT the source is closed; EINVAL no point, or the source's has no fence; EXDEV another domain's.
        """
        self._check("transfer")
        _checked(point, "transfer")
        self.import_fence(_held(source, "transfer")._fence_at(source_point, "transfer", for_submit), point)

    # ---- taking something out ----

    def export_fence(self, point: int = 0) -> DmaFence:
        """The fence that a point stands for; an ended one where it has been reached. Point 0: all that is there.

        Errors: EBADF; EINVAL no point, or one that has no fence yet.
        """
        return self._fence_at(point, "export_fence", False)

    def _fence_at(self, point: int, operation: str, for_submit: bool) -> DmaFence:
        self._check(operation)
        _checked(point, operation)
        self.domain.join()
        if for_submit:
            wait_semaphores([self], [point], available=True)
        with self._file.locked():
            leaves = leaves_at(self._load(), point)
        if leaves is None:
            raise self._missing(operation, point)
        fences = list(dict.fromkeys(map(self._wrap, leaves)))
        if not fences:
            return private_stub(0, domain=self.domain)
        return fences[0] if len(fences) == 1 else DmaFenceArray(fences)

    def export_sync_file(self, point: int = 0) -> SyncFile:
        """:meth:`export_fence` as a sync file, a snapshot. Errors: as there."""
        return SyncFile(self._fence_at(point, "export_sync_file", False))

    def query(self, *, submitted: bool = False) -> int:
        """The last point that was reached; ``submitted``: that has a fence. 0 in binary use (SYNCOBJ_QUERY). Errors: EBADF."""
        self._check("query")
        self.domain.join()
        with self._file.locked():
            state = self._load()
        if state.kind != TIMELINE:
            return 0
        if submitted:
            return state.head
        return 0 if any(node.point == 0 for node in state.nodes) else state.reached

    def statistics(self) -> SemaphoreStatistics:
        """A snapshot for programs. Errors: EBADF."""
        self._check("statistics")
        with self._file.locked():
            pending = sum(len(node.leaves) for node in self._load().nodes)
        return SemaphoreStatistics(self.query(), self.query(submitted=True), pending)

    # ---- waiting ----

    def wait(
        self,
        point: int = 0,
        timeout: float | None = None,
        *,
        for_submit: bool = False,
        available: bool = False,
        interruptible: bool = False,
    ) -> float:
        """Wait until a point is reached; the seconds left (> 0; inf for None). See :func:`wait_semaphores`.

        Errors: EBADF; ETIME (also ``TimeoutError``); EINVAL no point, one without a fence and neither ``for_submit`` nor ``available``, a
        negative timeout; EINTR a signal, if ``interruptible``.
        """
        self._check("wait")
        return wait_semaphores([self], [point], timeout, for_submit=for_submit, available=available, interruptible=interruptible)[1]

    async def reached(self, point: int = 0, *, for_submit: bool = True, available: bool = False) -> None:
        """Wait in a coroutine until a point is reached. Cancelling leaves nothing registered. Errors: EBADF; EINVAL as :meth:`wait`."""
        self._check("reached")
        _checked(point, "reached")
        self.domain.join()
        while (fence := self._blocking(point, "reached", for_submit=for_submit, available=available)) is not None:
            await fence

    def eventfd(self, fd: int, point: int = 0, *, available: bool = False) -> None:
        """Add 1 to an eventfd when a point is reached, or with ``available`` when it is submitted (SYNCOBJ_EVENTFD).

        The descriptor stays the caller's. What was asked for ends with :meth:`close`. Errors: EBADF; EINVAL no point, no eventfd; EMFILE.
        """
        self._check("eventfd")
        _checked(point, "eventfd")
        self.domain.join()
        try:
            kind = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            raise fail(errno.EBADF, "eventfd", f"fd {fd}", "pass an open eventfd") from None
        if kind != _EVENTFD:
            raise fail(errno.EINVAL, "eventfd", f"fd {fd}", "pass what os.eventfd() gave", what="it is no eventfd")
        with needing_descriptors("eventfd", f"fd {fd}"):
            own = os.dup(fd)
        notice = _Notice(self, own, point, available)
        self._watching.add(notice)
        notice.next()


class _Notice:
    """Who tells an eventfd."""

    def __init__(self, semaphore: TimelineSemaphore, fd: int, point: int, available: bool) -> None:
        self.semaphore, self.fd, self.point, self.available = semaphore, fd, point, available
        self.lock = threading.RLock()  # a signal handler may come in the middle
        self.waits: tuple[DmaFence, int] | None = None

    def next(self, _: int = 0) -> None:
        """Look again; another fence has ended."""
        looks: list[_Notice] | None = getattr(_here, "looks", None)
        if looks is not None:  # this thread holds the lock
            looks.append(self)
            return
        try:
            while self.fd >= 0:
                fence = self.semaphore._blocking(self.point, "eventfd", for_submit=True, available=self.available)
                if fence is None:
                    with self.lock:  # cancelled meanwhile, the number would be somebody else's
                        if self.fd >= 0:
                            os.eventfd_write(self.fd, 1)
                    self.end()
                    return
                token = fence.listen(self.next)
                if token is not None:
                    self.waits = (fence, token)
                    if self.fd < 0:  # cancelled before it could see that
                        fence.remove_callback(token)
                    return
        except OSError as e:
            if e.errno == errno.EDEADLK:  # a fence that is ended by a signal handler or a finaliser, in the middle of a call
                self.semaphore.domain.retries.later(self._again)
                return
            cancelled = self.fd < 0
            self.end()
            if not cancelled:
                report(e, self.semaphore.eventfd)

    def _again(self) -> bool:
        self.next()
        return True

    def end(self) -> None:
        with self.lock:
            fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        self.semaphore._watching.discard(self)

    def cancel(self) -> None:
        waits, self.waits = self.waits, None
        if waits is not None and not flagged(waits[0]):
            waits[0].remove_callback(waits[1])
        self.end()


def wait_semaphores(
    semaphores: Iterable[TimelineSemaphore],
    points: Sequence[int] | None = None,
    timeout: float | None = None,
    *,
    all: bool = True,
    for_submit: bool = False,
    available: bool = False,
    deadline: int | None = None,
    interruptible: bool = False,
) -> tuple[int, float]:
    """Wait for points of semaphores: for all of them, or with ``all=False`` for the first (SYNCOBJ_WAIT, TIMELINE_WAIT).

    ``points``: one for each, None for 0 everywhere. ``for_submit``: a point that has no fence yet is waited for too; ``available``: to have
    a fence is enough. ``deadline``: CLOCK_MONOTONIC ns, told to the fences as a hint. Returns (the lowest index that is reached, the
    seconds left); (0, …) for all, and for no semaphores at all.

    Errors: ETIME the time is over; EINVAL as many points as semaphores are needed, no point, a point without a fence and neither
    ``for_submit`` nor ``available``, a negative timeout or deadline; ENOENT a closed semaphore; EXDEV of several domains; EINTR a signal,
    if ``interruptible``.
    """
    found = [_held(semaphore, "wait") for semaphore in semaphores]
    wanted = [0] * len(found) if points is None else list(points)
    until = monotonic_deadline(timeout, "wait", f"{len(found)} semaphores")
    if len(wanted) != len(found):
        raise fail(errno.EINVAL, "wait", f"{len(found)} semaphores", f"give a point for each, not {len(wanted)}")
    for point in wanted:
        _checked(point, "wait")
    if deadline is not None and deadline < 0:
        raise fail(errno.EINVAL, "wait", f"deadline {deadline}", "a deadline is CLOCK_MONOTONIC nanoseconds")
    if len({semaphore.domain.id for semaphore in found}) > 1:
        raise fail(errno.EXDEV, "wait", f"{len(found)} semaphores", "wait for those of each domain by themselves")
    for semaphore in found:
        semaphore.domain.join()
    while True:
        blocking: list[DmaFence] = []
        for index, (semaphore, point) in enumerate(zip(found, wanted, strict=True)):
            fence = semaphore._blocking(point, "wait", for_submit=for_submit, available=available)
            if fence is None:
                if not all:
                    return index, seconds_left(until)
                continue
            if deadline is not None:
                fence.set_deadline(deadline)
            blocking.append(fence)
        if not blocking:
            return 0, seconds_left(until)
        left = math.inf if until < 0 else max(0.0, (until - time.monotonic_ns()) / 1e9)
        if not left:
            raise fail(errno.ETIME, "wait", f"{len(found)} semaphores", "wait longer, or see with query() who is late")
        waits = blocking[:1] if all else blocking
        wait_any(waits, None if until < 0 else left, interruptible=interruptible)


def _held(semaphore: TimelineSemaphore, operation: str) -> TimelineSemaphore:
    if not isinstance(semaphore, TimelineSemaphore):
        raise TypeError(f"{operation}: a TimelineSemaphore is expected, not {type(semaphore).__name__}")
    if semaphore.closed:
        raise fail(errno.ENOENT, operation, semaphore, "make or receive it again", what="the semaphore is closed")
    return semaphore


def _checked(point: int, operation: str) -> None:
    if not 0 <= point <= MAX_POINT:
        raise fail(errno.EINVAL, operation, f"point {point}", f"a point is 0 to {MAX_POINT}")
