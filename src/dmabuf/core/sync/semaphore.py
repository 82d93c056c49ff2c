"""``TimelineSemaphore``: a place for fences that may not be there yet, as DRM's sync objects are (semantics 5.14).

It holds nothing, one fence (binary use, point 0), or a timeline of points. Each point stands for its own fences and those of all points
before. ``signal`` and ``import_fence`` put something there. A waiter names a point, and can also wait until it is *submitted*. Points
should rise. A point that doesn't is taken as the highest so far, and ``query`` begins again (semantics 3.16).

It is a descriptor, shared like a :class:`~dmabuf.SwSync`: every holder may do everything, and sees what the others do. Its fences belong to
the processes that made them: a fence whose owner dies is signaled with ``-EOWNERDEAD``, and counts like every other. A change of the state
is made under its lock, in one step that a death leaves done or not done.

While nothing in it is pending, ``signal`` with a higher point and ``wait`` don't take the lock (``core/sync/semaphore_file.py``). A waiter
that needs a fence to wait for (in a task, or for several semaphores) makes the next signal take it.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from dmabuf._native import FF_ANYBODY, OFF_CONTEXT, finish
from dmabuf.core.base.clock import monotonic_deadline, seconds_left
from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.fence import DmaFence, unbound_timeline, wrap
from dmabuf.core.fence.stub import private_stub
from dmabuf.core.fence.unwrap import leaves_of
from dmabuf.core.fence.wait_any import wait_until
from dmabuf.core.sync.eventfd_notice import EventfdNotice, deferring, duplicate
from dmabuf.core.sync.semaphore_file import CONTENT, SemaphoreFile
from dmabuf.core.sync.semaphore_state import TIMELINE, Leaf, checked_point, leaves_at
from dmabuf.core.sync.shared_object import SharedObject
from dmabuf.core.sync.submitters import Looks, nobody_left
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import finalizer, finished
from dmabuf.domain.local import Local
from dmabuf.domain.shared_file import SharedFile
from dmabuf.errors import fail

KIND: Final = "semaphore"
# Handles of the fences of this process that stand for a submission to a semaphore.
EVENTS: Local[set[int]] = Local(lambda _: set())


@dataclass(frozen=True)
class SemaphoreStatistics:
    """A snapshot. ``point``: the last that is reached; ``submitted``: the last that has a fence; ``pending``: how many fences are."""

    point: int
    submitted: int
    pending: int


class TimelineSemaphore(SharedObject):
    """A semaphore of points.

    Args:
        signaled: Begin with a signaled fence, for binary use.
        domain: The domain to make it in; None means the user's default domain.

    Raises:
        DmaBufError: No descriptor is free (EMFILE).
        NoSpaceError: The domain is full (ENOSPC).
    """

    __slots__ = ("_notices", "_points", "_state")

    KIND, NOUN = KIND, "semaphore"

    def __init__(self, *, signaled: bool = False, domain: Domain | None = None) -> None:
        self._set(SharedFile.make(KIND, domain or Domain.default(), CONTENT, sealed=True))
        if signaled:
            self.signal()

    def _set(self, file: SharedFile) -> None:
        self._state = SemaphoreFile(file)
        self._points = self._state.points
        self._notices: set[EventfdNotice] = set()
        super()._set(file)

    def __repr__(self) -> str:
        return f"<dmabuf.TimelineSemaphore {'closed' if self.closed else f'at {self.query()} of {self.query(submitted=True)}'}>"

    @finished
    def close(self) -> None:
        """Close the descriptor, and cancel what ``eventfd`` asked for. Closing twice has no effect. The fences in it stay as they are."""
        if self.closed and not self._file.opened:
            return
        self.closed = True
        for notice in list(self._notices):
            notice.cancel()
        self._close_file()

    def _close_file(self) -> None:
        """Close the file. The last holder signals the fence that stands for a submission, so that its maker gets the slot back."""
        with contextlib.suppress(OSError):  # no descriptor is free to look with; it is signaled when its maker dies
            if self._file.close_fd() and self.domain.shm.life:
                self.domain.shm.fence_end_any(self._event(), 0)
        self._file.close()

    @finalizer
    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if hasattr(self, "closed") and self._file.opened and not ending():
            self.closed = True
            self._close_file()

    # ---- waiting for a submission ----

    def _event(self) -> int:
        return self._state.event()

    def _submission(self) -> DmaFence:
        """Return a fence that any holder signals at the next change. The first waiter makes it."""
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
            self._state.set_event(handle)
        return wrap(domain, handle)

    def _is_submission(self, fence: DmaFence) -> bool:
        """Return True if a fence that :meth:`_blocking` returned stands for a submission."""
        return bool(fence.flags & FF_ANYBODY) and fence.handle == self._event()

    def _nobody_left(self, listening: int = 0) -> bool:
        return nobody_left(self._file, self.domain, listening)

    def _blocking(self, point: int, operation: str, *, for_submit: bool, available: bool) -> DmaFence | None:
        """Return the fence to wait for next, None when there is none. Raises EINVAL if the point has no fence, EBADF if it was closed."""
        self._check(operation)
        with self._file.locked():
            for folded in (False, True):
                try:
                    leaf = self._state.look().first(point)
                except LookupError:
                    if not (for_submit or available):
                        break
                    if folded:
                        return self._submission()
                    self._state.fold()  # so that the next signal finds the fence of the submission
                else:
                    return None if available or leaf is None else self._wrap(leaf)
        raise self._missing(operation, point)

    def _missing(self, operation: str, point: int) -> OSError:
        return fail(errno.EINVAL, operation, self, "submit it first, or wait with for_submit=True", what=f"point {point} has no fence yet")

    def _wrap(self, leaf: Leaf) -> DmaFence:
        return wrap(self.domain, leaf.handle, (leaf.context, leaf.seqno, leaf.timeline))

    # ---- putting something there ----

    def _put(self, operation: str, point: int, leaves: list[Leaf]) -> None:
        self._check(operation)
        shm = self.domain.join()
        deferring(lambda: self._state.put(shm, point, leaves))

    def signal(self, point: int = 0) -> None:
        """Put a signaled fence at a point of the timeline, or at 0 for binary use (SYNCOBJ_SIGNAL, TIMELINE_SIGNAL).

        Raises:
            ClosedError: The semaphore is closed (EBADF).
            InvalidError: The point is out of range (EINVAL).
        """
        if not self.closed and self._points.signal(point):
            return
        checked_point(point, "signal")
        self._put("signal", point, [])

    def import_fence(self, fence: DmaFence, point: int = 0) -> None:
        """Put a fence at a point. Point 0 replaces everything.

        The fence's owner must keep it: a fence that is dropped unsignaled is signaled with ``-EDEADLK``.

        Raises:
            ClosedError: The semaphore is closed (EBADF).
            InvalidError: The point is out of range (EINVAL).
            CrossDomainError: The fence belongs to another domain (EXDEV).
        """
        checked_point(point, "import_fence")
        if not isinstance(fence, DmaFence):
            raise TypeError(f"import_fence: a DmaFence is expected, not {type(fence).__name__}")
        if fence.domain is not self.domain:
            raise fail(errno.EXDEV, "import_fence", fence, "make both in one domain (domain=)", what="the fence belongs to another domain")
        leaves = []
        for leaf in leaves_of(fence):
            leaf.publish()
            leaf.shm.fence_share(leaf.handle)
            leaves.append(Leaf(leaf.handle, leaf.context, leaf.seqno, leaf.timeline_index))
        self._put("import_fence", point, leaves)

    def import_sync_file(self, sync_file: SyncFile | int, point: int = 0) -> None:
        """Put the fences of a sync file at a point.

        Args:
            sync_file: A SyncFile, or a descriptor of one.
            point: As for :meth:`import_fence`.

        Raises:
            ClosedError: The semaphore is closed (EBADF).
            InvalidError: The point is out of range, or ``sync_file`` is closed or not a sync file (EINVAL).
            CrossDomainError: The sync file belongs to another domain (EXDEV).
        """
        self._check("import_sync_file")
        checked_point(point, "import_sync_file")
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
            errno.EINVAL, "import_sync_file", self, "pass an open SyncFile, or its descriptor", what="the argument is not a sync file"
        )

    def reset(self) -> None:
        """Take everything out (SYNCOBJ_RESET).

        Raises:
            ClosedError: The semaphore is closed (EBADF).
        """
        self._check("reset")
        shm = self.domain.join()
        deferring(lambda: self._state.reset(shm))

    def transfer(self, source: TimelineSemaphore, source_point: int = 0, point: int = 0, *, for_submit: bool = False) -> None:
        """Put at a point what is at a point of another semaphore (SYNCOBJ_TRANSFER).

        Args:
            source: The other semaphore.
            source_point: Its point.
            point: As for :meth:`import_fence`.
            for_submit: Wait until the source's point is submitted.

        Raises:
            ClosedError: This semaphore is closed (EBADF).
            NotFoundError: The source is closed (ENOENT).
            InvalidError: A point is out of range, or the source's has no fence (EINVAL).
            CrossDomainError: The source belongs to another domain (EXDEV).
        """
        self._check("transfer")
        checked_point(point, "transfer")
        self.import_fence(_held(source, "transfer")._fence_at(source_point, "transfer", for_submit), point)

    # ---- taking something out ----

    def export_fence(self, point: int = 0) -> DmaFence:
        """Return the fence that a point stands for, a signaled one if the point is reached. Point 0 stands for everything.

        Raises:
            ClosedError: The semaphore is closed (EBADF).
            InvalidError: The point is out of range, or has no fence yet (EINVAL).
        """
        return self._fence_at(point, "export_fence", False)

    def _fence_at(self, point: int, operation: str, for_submit: bool) -> DmaFence:
        self._check(operation)
        checked_point(point, operation)
        self.domain.join()
        if for_submit:
            wait_semaphores([self], [point], available=True)
        with self._file.locked():
            leaves = leaves_at(self._state.whole(), point)
        if leaves is None:
            raise self._missing(operation, point)
        fences = list(dict.fromkeys(map(self._wrap, leaves)))
        if not fences:
            return private_stub(0, domain=self.domain)
        return fences[0] if len(fences) == 1 else DmaFenceArray(fences)

    def export_sync_file(self, point: int = 0) -> SyncFile:
        """Return what :meth:`export_fence` does as a sync file, which is a snapshot.

        Raises:
            ClosedError: The semaphore is closed (EBADF).
            InvalidError: The point is out of range, or has no fence yet (EINVAL).
        """
        return SyncFile(self._fence_at(point, "export_sync_file", False))

    def query(self, *, submitted: bool = False) -> int:
        """Return the last point that is reached, 0 in binary use (SYNCOBJ_QUERY).

        Args:
            submitted: Return the last point that has a fence.

        Raises:
            ClosedError: The semaphore is closed (EBADF).
        """
        self._check("query")
        point = self._points.value()
        if point >= 0:
            return point
        self.domain.join()
        with self._file.locked():
            seen = self._state.look()
            if seen.kind != TIMELINE:
                return 0
            if submitted:
                return seen.head
            return 0 if seen.nodes and seen.nodes[0].point == 0 else seen.reached

    def statistics(self) -> SemaphoreStatistics:
        """Return a snapshot for programs.

        Raises:
            ClosedError: The semaphore is closed (EBADF).
        """
        self._check("statistics")
        with self._file.locked():
            pending = sum(len(node.leaves) for node in self._state.whole().nodes)
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
        """Wait until a point is reached. See :func:`wait_semaphores` for the arguments.

        Returns:
            The seconds left: more than 0, inf without a timeout.

        Raises:
            ClosedError: The semaphore is closed (EBADF).
            DmaBufTimeout: The time is over (ETIME).
            InvalidError: The point is out of range, or has no fence and neither ``for_submit`` nor ``available`` is set, or the timeout is
                negative (EINVAL).
            DeadlockError: The point has no fence, and nobody else is left who could submit one (EDEADLK).
            InterruptedWaitError: A signal arrived, and ``interruptible`` is set (EINTR).
        """
        self._check("wait")
        until = -1 if timeout is None else monotonic_deadline(timeout, "wait", self)
        shm, wait, looks, goes_on = self.domain.join(), self._points.wait, None, True
        while True:
            left = wait(shm, point, until if goes_on else 1, for_submit or available, interruptible)  # 1 is past
            if left:  # until then, the fence doesn't have to be asked for
                return left if goes_on else seconds_left(until)
            if (goes_on and left is not None) or self._points.value() < 0:
                break  # the record says more
            self._check("wait")
            goes_on = (looks := looks or Looks(self.domain)).look([self._nobody_left], self)
        if timeout is not None:
            timeout = max(0.0, (until - time.monotonic_ns()) / 1e9)
        return wait_semaphores([self], [point], timeout, for_submit=for_submit, available=available, interruptible=interruptible)[1]

    async def reached(self, point: int = 0, *, for_submit: bool = True, available: bool = False) -> None:
        """Wait in a task of asyncio or trio until a point is reached. Canceling leaves nothing registered.

        Raises:
            ClosedError: The semaphore is closed (EBADF).
            InvalidError: As :meth:`wait` (EINVAL).
        """
        self._check("reached")
        checked_point(point, "reached")
        self.domain.join()
        while (fence := self._blocking(point, "reached", for_submit=for_submit, available=available)) is not None:
            await fence

    def eventfd(self, fd: int, point: int = 0, *, available: bool = False) -> EventfdNotice:
        """Add 1 to an eventfd when a point is reached (SYNCOBJ_EVENTFD). :meth:`close` cancels it.

        The request has a descriptor of its own. A caller that gives up before the point is reached cancels the request too.

        Args:
            fd: The eventfd. The caller keeps it.
            point: The point.
            available: Add 1 as soon as the point is submitted.

        Returns:
            The request, whose ``cancel()`` takes it back.

        Raises:
            ClosedError: The semaphore is closed, or ``fd`` is not open (EBADF).
            InvalidError: The point is out of range, or ``fd`` is not an eventfd (EINVAL).
            DmaBufError: No descriptor is free (EMFILE).
        """
        self._check("eventfd")
        checked_point(point, "eventfd")
        self.domain.join()
        notice = EventfdNotice(
            duplicate(fd),
            self.domain,
            lambda: self._blocking(point, "eventfd", for_submit=True, available=available),
            self._notices.discard,
            self.eventfd,
        )
        try:
            self._notices.add(notice)
            notice.advance()
        except BaseException:
            finish(notice.cancel)
            raise
        return notice


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

    Args:
        semaphores: Semaphores of one domain.
        points: One for each; None for 0 everywhere.
        timeout: Seconds; None waits without a limit.
        all: False to wait for the first one only.
        for_submit: Wait for a point that has no fence yet, too.
        available: It is enough that a point has a fence.
        deadline: CLOCK_MONOTONIC ns, passed to the fences as a hint.
        interruptible: Let a signal end the wait.

    Returns:
        The lowest index that is reached, and the seconds left. The index is 0 for all, and for no semaphores.

    Raises:
        DmaBufTimeout: The time is over (ETIME).
        InvalidError: There is not one point for each semaphore; a point is out of range, or has no fence and neither ``for_submit`` nor
            ``available`` is set; the timeout or the deadline is negative (EINVAL).
        NotFoundError: A semaphore is closed (ENOENT).
        CrossDomainError: They belong to several domains (EXDEV).
        DeadlockError: A point has no fence, and nobody else is left who could submit one (EDEADLK).
        InterruptedWaitError: A signal arrived (EINTR).
    """
    found = [_held(semaphore, "wait") for semaphore in semaphores]
    wanted = [0] * len(found) if points is None else list(points)
    named = f"{len(found)} semaphores"
    until = monotonic_deadline(timeout, "wait", named)
    if len(wanted) != len(found):
        raise fail(errno.EINVAL, "wait", named, "pass one point for each", what=f"there are {len(wanted)} points")
    for point in wanted:
        checked_point(point, "wait")
    if deadline is not None and deadline < 0:
        raise fail(errno.EINVAL, "wait", f"deadline {deadline}", "pass CLOCK_MONOTONIC ns", what="it is negative")
    if len({semaphore.domain.id for semaphore in found}) > 1:
        raise fail(errno.EXDEV, "wait", named, "wait for those of each domain separately", what="they belong to several domains")
    for semaphore in found:
        semaphore.domain.join()
    looks = Looks(found[0].domain) if found else None
    while True:
        blocking: list[tuple[TimelineSemaphore, DmaFence]] = []
        for index, (semaphore, point) in enumerate(zip(found, wanted, strict=True)):
            fence = semaphore._blocking(point, "wait", for_submit=for_submit, available=available)
            if fence is None:
                if not all:
                    return index, seconds_left(until)
                continue
            if deadline is not None:
                fence.set_deadline(deadline)
            blocking.append((semaphore, fence))
        if not blocking:
            return 0, seconds_left(until)
        if 0 <= until <= time.monotonic_ns():
            raise fail(errno.ETIME, "wait", named, "wait longer, or see with query() which one is late", what="timed out")
        waits = blocking[:1] if all else blocking
        go_on = None
        if looks is not None and builtins.all(semaphore._is_submission(fence) for semaphore, fence in waits):
            look = partial(_look, looks, [semaphore for semaphore, _ in waits], waits[0][0] if all else named)
            if not look(0):
                continue
            go_on = partial(look, len(waits))
        wait_until(tuple(fence for _, fence in waits), until, interruptible, go_on)


def _look(looks: Looks, semaphores: list[TimelineSemaphore], what: object, listening: int) -> bool:
    return looks.look([partial(semaphore._nobody_left, listening) for semaphore in semaphores], what)


def _held(semaphore: TimelineSemaphore, operation: str) -> TimelineSemaphore:
    if not isinstance(semaphore, TimelineSemaphore):
        raise TypeError(f"{operation}: a TimelineSemaphore is expected, not {type(semaphore).__name__}")
    if semaphore.closed:
        raise fail(errno.ENOENT, operation, semaphore, "make or receive it again", what="the semaphore is closed")
    return semaphore
