"""Polling a buffer: POLLIN when no write is pending, POLLOUT when no fence is (spec 5.6).

POLLIN is ready when no pending fence of usage KERNEL or WRITE is there, POLLOUT when none up to READ is; BOOKKEEP never counts. Other
bits are ignored. Readiness is of the moment: it says that the fences are done, not that nobody adds another; for access there is
``read()`` and ``write()``.
"""

from __future__ import annotations

import errno
import os
import select
import time
from typing import TYPE_CHECKING

from dmabuf.core import awaiting
from dmabuf.core.fence import monotonic_deadline, wrap
from dmabuf.core.usage import Usage
from dmabuf.domain.dispatcher import dispatcher
from dmabuf.errors import fail

if TYPE_CHECKING:
    from dmabuf.core.buffer import DmaBuf


def ready(buf: DmaBuf, events: int) -> int:
    """Those of POLLIN and POLLOUT in ``events`` that are ready now."""
    shm, index = buf.resv._record.at()
    if "lazy" in buf.domain.local:
        buf.resv.pending(Usage.READ)
    found = 0
    kernel = buf._kernel()
    if kernel is not None:
        events = kernel.ready(buf, events)
    if events & select.POLLOUT and not shm.resv_busy(index, Usage.READ):
        found |= select.POLLOUT
    if events & select.POLLIN and not shm.resv_busy(index, Usage.WRITE):
        found |= select.POLLIN
    return found


def _blocking(buf: DmaBuf, events: int) -> int:
    """A pending fence whose end may make something ready. POLLIN waits for fewer fences, so it is ready first."""
    usage = Usage.WRITE if events & select.POLLIN else Usage.READ
    shm, index = buf.resv._record.at()
    return shm.resv_busy(index, usage)


def poll(buf: DmaBuf, events: int, timeout: float | None) -> int:
    """Wait until one of the events is ready; 0 when none is within the timeout (which passes whole when there is nothing to wait for)."""
    until = monotonic_deadline(timeout, "poll", buf)
    events &= select.POLLIN | select.POLLOUT
    while not (found := ready(buf, events)):
        if not events:  # nothing that we could report: as poll(2) without a descriptor
            select.select([], [], [], timeout)
            return 0
        if until >= 0 and time.monotonic_ns() >= until:
            return 0
        handle = _blocking(buf, events)
        if handle:
            buf.resv._record.shm.fence_wait(handle, until, False)
        elif (kernel := buf._kernel()) is not None:
            kernel.settle(buf, not events & select.POLLIN, until)
    return found


async def poll_async(buf: DmaBuf, event: int) -> None:
    """Wait in a coroutine until the event is ready."""
    while not ready(buf, event):
        handle = _blocking(buf, event)
        if handle:
            await wrap(buf.domain, handle)
        elif (kernel := buf._kernel()) is not None:
            await kernel.settle_async(buf, event == select.POLLOUT, -1)
        else:
            await awaiting.checkpoint()


class PollFd:
    """What rings a one-shot pollable fd once its condition was met."""

    def __init__(self, buf: DmaBuf, events: int) -> None:
        self.buf, self.events = buf, events & (select.POLLIN | select.POLLOUT)
        if not self.events:
            raise fail(errno.EINVAL, "poll_fd", buf, "ask for select.POLLIN or POLLOUT")
        self.token: int | None = None
        self.handle = 0
        self.own = -1

    def open(self) -> int:
        """The caller's fd; ours is a duplicate, closed when it has rung or the buffer's handle is closed."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.own = os.dup(fd)
            self.next(0)
        except BaseException:
            os.close(fd)
            self.cancel()
            raise
        return fd

    def next(self, _: int) -> None:
        """Ring if the condition is met, else watch the next fence in the way."""
        while self.own >= 0:
            if self.buf.closed or ready(self.buf, self.events):
                own, self.own = self.own, -1
                os.eventfd_write(own, 1)
                os.close(own)
                return
            self.handle = _blocking(self.buf, self.events)
            if self.handle:
                self.token = dispatcher(self.buf.domain).watch(self.handle, self.next, foreign=True)
                if self.token is not None:
                    return

    def cancel(self) -> None:
        """The buffer's handle is closed: nobody rings any more."""
        if self.token is not None:
            dispatcher(self.buf.domain).unwatch(self.handle, self.token)
        own, self.own = self.own, -1
        if own >= 0:
            os.close(own)
