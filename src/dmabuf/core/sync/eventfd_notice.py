"""``EventfdNotice``: what adds 1 to an eventfd when a point of a semaphore is reached (semantics 5.14)."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import threading
from collections.abc import Callable

from dmabuf._native import OwnedFd
from dmabuf.core.fence.fence import DmaFence, flagged
from dmabuf.domain.dispatcher import report
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail, needing_descriptors

_EVENTFD = "anon_inode:[eventfd]"
_here = threading.local()  # deferred: the notices to advance when this thread has released the semaphore's lock


class EventfdNotice:
    """One request: waits for one fence after another, and then writes to the eventfd.

    Args:
        fd: A descriptor of the eventfd, which the notice owns, with a mark (``OwnedFd.mark``).
        domain: The semaphore's domain.
        blocking: Returns the fence to wait for next, None when the point is reached.
        over: Called when the notice is done or canceled.
        where: Named by ``sys.unraisablehook`` when the semaphore fails, since no caller catches the error.
    """

    def __init__(
        self, fd: OwnedFd, domain: Domain, blocking: Callable[[], DmaFence | None], over: Callable[[EventfdNotice], object], where: object
    ) -> None:
        self.fd, self.domain, self.blocking, self.over, self.where = fd, domain, blocking, over, where
        self.lock = threading.RLock()  # a signal handler may run in the middle
        self.waits: tuple[DmaFence, int] | None = None

    def advance(self, _: int = 0) -> None:
        """Wait for the next fence, or write to the eventfd. Called when a fence is signaled."""
        deferred: list[EventfdNotice] | None = getattr(_here, "deferred", None)
        if deferred is not None:  # this thread holds the lock
            deferred.append(self)
            return
        try:
            while self.fd.number >= 0:
                fence = self.blocking()
                if fence is None:
                    with self.lock:  # if another thread canceled it now, the number could become somebody else's
                        if self.fd.number >= 0 and _has_room(self.fd.fileno()):
                            self.fd.add_one()
                    self.end()
                    return
                token = fence.listen(self.advance)
                if token is not None:
                    self.waits = (fence, token)
                    if self.fd.number < 0:  # canceled before that could find the callback
                        fence.remove_callback(token)
                    return
        except OSError as e:
            if e.errno == errno.EDEADLK:  # a signal handler or a finalizer signaled the fence in the middle of a call
                self.domain.retries.later(self._again)
                return
            canceled = self.fd.number < 0
            self.end()
            if not canceled:
                report(e, self.where)

    def _again(self) -> bool:
        self.advance()
        return True

    def end(self) -> None:
        """Close the descriptor."""
        with self.lock:
            self.fd.close()
        self.over(self)

    def cancel(self) -> None:
        """Take the request back. The eventfd is not written any more. Canceling twice, or too late, has no effect."""
        waits = self.waits
        if waits is not None and not flagged(waits[0]):
            waits[0].remove_callback(waits[1])
        self.end()
        self.waits = None


def _has_room(fd: int) -> bool:
    """Return True unless the eventfd's count is at its most, at which a write to a blocking one would wait for a reader."""
    asked = select.poll()
    asked.register(fd, select.POLLOUT)
    return bool(asked.poll(0))


def duplicate(fd: int) -> OwnedFd:
    """Return a duplicate of an eventfd, for a notice to own.

    Raises:
        ClosedError: ``fd`` is not open (EBADF).
        InvalidError: ``fd`` is not an eventfd (EINVAL).
        DmaBufError: No descriptor is free (EMFILE).
    """
    try:
        kind = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        raise fail(errno.EBADF, "eventfd", f"fd {fd}", "pass an open eventfd") from None
    if kind != _EVENTFD:
        raise fail(errno.EINVAL, "eventfd", f"fd {fd}", "pass what os.eventfd() returned", what="not an eventfd")
    with needing_descriptors("eventfd", f"fd {fd}"):
        own = next(map(OwnedFd, map(fcntl.fcntl, (fd,), (fcntl.F_DUPFD_CLOEXEC,), (3,))))
    own.mark()  # all eventfds have one inode
    return own


def deferring(change: Callable[[], object]) -> None:
    """Call ``change``, which takes a semaphore's lock, and advance the notices whose fences it signals after it has released the lock."""
    before: list[EventfdNotice] | None = getattr(_here, "deferred", None)  # of a change that this one interrupted
    deferred: list[EventfdNotice] = []
    try:
        _here.deferred = deferred
        change()
    finally:
        _here.deferred = before
        for notice in deferred:
            notice.advance()
