"""Polling a buffer: POLLIN when no write is pending, POLLOUT when no fence is (spec 5.6).

POLLIN is ready when no pending fence of usage KERNEL or WRITE is there, POLLOUT when none up to READ is; BOOKKEEP never counts. Other
bits are ignored. Readiness is of the moment: it says that the fences are done, not that nobody adds another; for access there is
``read()`` and ``write()``.

As in the kernel, a direction that ``poll()`` found busy is *armed*: one slot for each direction of a buffer, independent of the other, with
a callback on the first pending fence and a reference to the buffer (a descriptor of its own). Until that fence ends the direction is not
ready, even if the fence is taken off the list, and the buffer lives on, even if every other descriptor is closed; its exporter's
``release`` then comes from outside of the callback. The slots are the process's: what one process polls, others don't see.
"""

from __future__ import annotations

import errno
import os
import select
import time
from typing import TYPE_CHECKING

from dmabuf.core.base.clock import monotonic_deadline
from dmabuf.core.base.usage import Usage
from dmabuf.core.fence.fence import wrap
from dmabuf.core.fence.lazy import asks
from dmabuf.core.resv.lock import record_of
from dmabuf.core.resv.resv import pending
from dmabuf.core.task import waiting as awaiting
from dmabuf.domain.dispatcher import dispatcher
from dmabuf.domain.forks import fork_lock
from dmabuf.errors import fail, needing_descriptors

if TYPE_CHECKING:
    from dmabuf.core.dma_buf import DmaBuf

_SLOTS = "poll"  # in Record.shared: {event: _Slot}
_lock = fork_lock()  # of every buffer's slots: held for a look and a store


class _Slot:
    """A direction that was found busy: waits for one fence, and holds the buffer meanwhile."""

    __slots__ = ("event", "handle", "life", "ref", "slots")

    def __init__(self, buf: DmaBuf, event: int, handle: int, slots: dict[int, _Slot]) -> None:
        self.event, self.handle, self.slots, self.life = event, handle, slots, buf._record.shm.life
        self.ref: DmaBuf | None = None
        try:
            self.ref = buf.get_dma_buf()
        except OSError:
            pass  # no descriptor is free: a poll doesn't fail for that, the buffer is only not held

    def ended(self, _: int = 0) -> None:
        with _lock:
            if self.slots.get(self.event) is self:
                del self.slots[self.event]
            ref, self.ref = self.ref, None
        if ref is not None:
            ref.close()


def _armed(buf: DmaBuf, event: int) -> bool:
    """Is the direction's slot waiting for a fence that is still pending?"""
    slot = buf._record.shared.get(_SLOTS, {}).get(event)
    if slot is None:
        return False
    shm = buf._record.shm
    if slot.life == shm.life and shm.fence_pending(slot.handle):
        return True
    slot.ended()  # its callback is on the way; or it is our parent's
    return False


def _arm(buf: DmaBuf, event: int, usage: Usage) -> None:
    """Wait for the first pending fence of a direction that is busy."""
    shm, index = record_of(buf.resv).at()
    handle = shm.resv_busy(index, usage)
    if not handle:
        return
    with _lock:
        slots: dict[int, _Slot] = buf._record.shared.setdefault(_SLOTS, {})
        if event in slots:
            return
        slot = slots[event] = _Slot(buf, event, handle, slots)
    if wrap(buf.domain, handle).listen(slot.ended) is None:
        slot.ended()


def ready(buf: DmaBuf, events: int) -> int:
    """Those of POLLIN and POLLOUT in ``events`` that are ready now."""
    shm, index = record_of(buf.resv).at()
    if asks(buf.domain):
        pending(buf.resv, Usage.READ)
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
    shm, index = record_of(buf.resv).at()
    return shm.resv_busy(index, usage)


def _look(buf: DmaBuf, events: int) -> int:
    """:func:`ready`, arming what is busy: out first, then in, each by itself."""
    asked = 0
    for event in (select.POLLOUT, select.POLLIN):
        if events & event and not _armed(buf, event):
            asked |= event
    found = ready(buf, asked) if asked else 0
    for event, usage in ((select.POLLOUT, Usage.READ), (select.POLLIN, Usage.WRITE)):
        if asked & event and not found & event:
            _arm(buf, event, usage)
    return found


def poll(buf: DmaBuf, events: int, timeout: float | None) -> int:
    """Wait until one of the events is ready; 0 when none is within the timeout (which passes whole when there is nothing to wait for)."""
    until = monotonic_deadline(timeout, "poll", buf)
    events &= select.POLLIN | select.POLLOUT
    while not (found := _look(buf, events)):
        if not events:  # nothing that we could report: as poll(2) without a descriptor
            select.select([], [], [], timeout)
            return 0
        if until >= 0 and time.monotonic_ns() >= until:
            return 0
        handle = _waited(buf, events) or _blocking(buf, events)
        if handle:
            record_of(buf.resv).shm.fence_wait(handle, until, False)
        elif (kernel := buf._kernel()) is not None:
            kernel.settle(buf, not events & select.POLLIN, until)
    return found


def _waited(buf: DmaBuf, events: int) -> int:
    """The fence that an armed direction waits for; in's before out's, which needs more."""
    slots = buf._record.shared.get(_SLOTS, {})
    slot = slots.get(select.POLLIN if events & select.POLLIN else select.POLLOUT)
    return slot.handle if slot is not None else 0


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
        with needing_descriptors("poll_fd", self.buf):
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with needing_descriptors("poll_fd", self.buf):
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
                if own >= 0:  # else the buffer was closed in another thread meanwhile
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
