"""Polling a buffer: POLLIN when no write is pending, POLLOUT when no fence is (semantics 5.6).

POLLIN is ready when no fence of usage KERNEL or WRITE is pending, POLLOUT when none up to READ is. BOOKKEEP never counts, and other bits
are ignored. Readiness holds for a moment: the fences are done, but anybody may add another. For access there are ``read()`` and
``write()``.

As in the kernel, a direction that ``poll()`` finds busy is *armed*. Each direction of a buffer has one slot, independent of the other, with
a callback on the first pending fence and a reference to the buffer (a descriptor of its own). Until that fence ends the direction is not
ready, even if the fence is taken off the list, and the buffer lives on, even if every other descriptor is closed. Its exporter's
``release`` then comes from outside of the callback. The slots belong to the process: other processes don't see them.
"""

from __future__ import annotations

import errno
import os
import select
import time
from typing import Final

from dmabuf._native import OwnedFd, pollable_exists, pollable_open, pollable_wake
from dmabuf.core.base.clock import monotonic_deadline
from dmabuf.core.base.usage import Usage
from dmabuf.core.buffer.handle import Cancelable, Handle
from dmabuf.core.buffer.shared import SharedBuffer
from dmabuf.core.fence.fence import wrap
from dmabuf.core.fence.lazy import asks
from dmabuf.core.resv.lock import record_of
from dmabuf.core.resv.resv import pending
from dmabuf.core.task import waiting as awaiting
from dmabuf.domain.dispatcher import dispatcher, unwatch
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.weak_objects import WeakObjects
from dmabuf.errors import fail, needing_descriptors

_lock = fork_lock()  # of every buffer's slots: held to read and store one


class _Slot:
    """A direction that was found busy: waits for one fence, and references the buffer meanwhile."""

    __slots__ = ("_event", "_ref", "_slots", "fence", "life")

    def __init__(self, handle: Handle, event: int, fence: int) -> None:
        self._event, self.fence, self._slots, self.life = event, fence, handle.shared.armed, handle.shared.shm.life
        self._ref: Handle | None = None
        try:
            self._ref = handle.duplicate()
        except OSError:
            pass  # no descriptor is free: a poll doesn't fail for that, it only doesn't reference the buffer

    def ended(self, _: int = 0) -> None:
        with _lock:
            if self._slots.get(self._event) is self:
                del self._slots[self._event]
            ref, self._ref = self._ref, None
        if ref is not None:
            ref.close()


def _armed(shared: SharedBuffer, event: int) -> bool:
    """Return True if the direction's slot waits for a fence that is still pending."""
    slot = shared.armed.get(event)
    if slot is None:
        return False
    if slot.life == shared.shm.life and shared.shm.fence_pending(slot.fence):
        return True
    slot.ended()  # its callback is about to come; or it is the parent process's
    return False


def _arm(handle: Handle, event: int, usage: Usage) -> None:
    """Wait for the first pending fence of a direction that is busy."""
    shm, index = record_of(handle.resv).at()
    fence = shm.resv_busy(index, usage)
    if not fence:
        return
    slot = _Slot(handle, event, fence)  # before the lock: it may wait for the domain's table
    with _lock:
        first = handle.shared.armed.setdefault(event, slot) is slot
    if not first:
        slot.ended()
        return
    if wrap(handle.domain, fence).listen(slot.ended) is None:
        slot.ended()


def ready(handle: Handle, events: int) -> int:
    """Return those of POLLIN and POLLOUT in ``events`` that are ready now."""
    shm, index = record_of(handle.resv).at()
    if asks(handle.domain):
        pending(handle.resv, Usage.READ)
    found = 0
    kernel = handle.kernel()
    if kernel is not None:
        events = kernel.ready(handle, events)
    if events & select.POLLOUT and not shm.resv_busy(index, Usage.READ):
        found |= select.POLLOUT
    if events & select.POLLIN and not shm.resv_busy(index, Usage.WRITE):
        found |= select.POLLIN
    return found


def _blocking(handle: Handle, events: int) -> int:
    """Return a pending fence whose end may make something ready. POLLIN waits for fewer fences, so it is ready first."""
    usage = Usage.WRITE if events & select.POLLIN else Usage.READ
    shm, index = record_of(handle.resv).at()
    return shm.resv_busy(index, usage)


class _Look:
    """What one poll waits for. Each look goes on where the last one ended: fences that end one after the other cost one walk together."""

    __slots__ = ("_events", "_handle", "_place")

    def __init__(self, handle: Handle, events: int) -> None:
        self._handle, self._events, self._place = handle, events, 0

    def blocking(self) -> int:
        """Return a pending fence as :func:`_blocking` does."""
        usage = Usage.WRITE if self._events & select.POLLIN else Usage.READ
        shm, index = record_of(self._handle.resv).at()
        fence, self._place = shm.resv_busy_from(index, usage, self._place)
        return fence

    def quickly(self) -> int:
        """Do the same after the first look, unless someone must be asked first. 0 says nothing then."""
        return self.blocking() if self._place and not asks(self._handle.domain) else 0


def _check(handle: Handle, events: int) -> int:
    """:func:`ready`, and arm what is busy: out first, then in, independently."""
    asked = 0
    for event in (select.POLLOUT, select.POLLIN):
        if events & event and not _armed(handle.shared, event):
            asked |= event
    found = ready(handle, asked) if asked else 0
    for event, usage in ((select.POLLOUT, Usage.READ), (select.POLLIN, Usage.WRITE)):
        if asked & event and not found & event:
            _arm(handle, event, usage)
    return found


def poll(handle: Handle, events: int, timeout: float | None) -> int:
    """Wait until one of the events is ready; 0 if none is within the timeout, which passes in full if there is nothing to wait for."""
    handle.usable("poll")
    until = monotonic_deadline(timeout, "poll", handle)
    events &= select.POLLIN | select.POLLOUT
    while not (found := _check(handle, events)):
        if not events:  # nothing can become ready: behave as poll(2) without a descriptor
            select.select([], [], [], timeout)
            return 0
        if until >= 0 and time.monotonic_ns() >= until:
            return 0
        fence = _waited(handle.shared, events) or _blocking(handle, events)
        if fence:
            record_of(handle.resv).shm.fence_wait(fence, until, False)
        elif (kernel := handle.kernel()) is not None:
            kernel.wait_kernel(handle, not events & select.POLLIN, until)
    return found


def _waited(shared: SharedBuffer, events: int) -> int:
    """Return the fence that an armed direction waits for; in's before out's, which waits for more."""
    slot = shared.armed.get(select.POLLIN if events & select.POLLIN else select.POLLOUT)
    return slot.fence if slot is not None else 0


async def poll_async(handle: Handle, event: int) -> None:
    """Wait in a coroutine until the event is ready."""
    look = _Look(handle, event)
    while (fence := look.quickly()) or not ready(handle, event):
        fence = fence or look.blocking()
        if fence:
            await wrap(handle.domain, fence)
        elif (kernel := handle.kernel()) is not None:
            await kernel.wait_kernel_async(handle, event == select.POLLOUT, -1)
        else:
            await awaiting.checkpoint()


def poll_fd(handle: Handle, events: int) -> OwnedFd:
    """Return a descriptor that becomes readable once one of the events was ready."""
    handle.usable("poll_fd")
    if handle.kernel() is not None and events & (select.POLLIN | select.POLLOUT):
        return handle.dup_owned()
    with _lock:
        polls = handle.polls
        if polls is None:
            polls = handle.polls = _PollFds()
    waiting = _PollFd(handle, events)
    fd = waiting.open()
    if not waiting.done():
        polls.add(waiting)
        if handle.closed:  # in another thread, which perhaps didn't find it there yet
            waiting.cancel()
    return fd


class _PollFd:
    """Makes a one-shot pollable descriptor readable once its condition was met.

    It knows the descriptor by its name (``native/fds/pollable.h``) and has no duplicate. So it sees when the caller gave up and closed it.
    """

    def __init__(self, handle: Handle, events: int) -> None:
        self._handle, self._events = handle, events & (select.POLLIN | select.POLLOUT)
        if not self._events:
            what = f"events {events} have neither POLLIN nor POLLOUT"
            raise fail(errno.EINVAL, "poll_fd", handle, "ask for select.POLLIN or POLLOUT", what=what)
        self._name = b"dmabuf/poll-" + os.urandom(16).hex().encode()
        self._token: int | None = None
        self._fence = 0
        self._look = _Look(handle, self._events)
        self._done = False

    def done(self) -> bool:
        """Return True if the descriptor was made readable, or won't be."""
        return self._done

    def open(self) -> OwnedFd:
        """Return the descriptor."""
        with needing_descriptors("poll_fd", self._handle):
            fd = pollable_open(self._name)
        try:
            self.next(0)
        except BaseException:
            self.cancel()
            raise
        return fd

    def next(self, _: int) -> None:
        """Make the descriptor readable if the condition is met, else watch the next fence that blocks it."""
        while not self.done():
            fence = 0 if self._handle.closed else self._look.quickly()
            if not fence and (self._handle.closed or ready(self._handle, self._events)):
                self._done = True
                if not self._wake():
                    self._handle.domain.retries.later(self._wake)
                return
            self._fence = fence or self._look.blocking()
            if self._fence:
                self._token = dispatcher(self._handle.domain).watch(self._fence, self.next, foreign=True)
                if self._token is not None:
                    if self.done():  # canceled in another thread, before that could find the token
                        self.cancel()
                    return

    def _wake(self) -> bool:
        try:
            pollable_wake(self._name)
        except OSError:  # the system has no room for a socket at this moment
            return False
        return True

    def abandoned(self) -> bool:
        """Return True if no process has the descriptor any more."""
        try:
            return not pollable_exists(self._name)
        except OSError:
            return False  # no descriptor is free to look with

    def cancel(self) -> None:
        """Stop watching: the buffer's handle is closed, or the descriptor."""
        self._done = True
        if self._token is not None:
            unwatch(self._handle.domain, self._fence, self._token)


def _given_up(waiting: Cancelable) -> bool:
    """Cancel a descriptor that no process has any more."""
    gone = isinstance(waiting, _PollFd) and waiting.abandoned()
    if gone:
        waiting.cancel()
    return gone


class _PollFds(WeakObjects[Cancelable]):
    """The descriptors of a handle that aren't readable yet.

    A caller that gives up only closes its descriptor, and tells nobody. So whenever there are twice as many as the last time, those that no
    process has are taken back.
    """

    __slots__ = ("_most",)

    LEAST: Final = 16

    def __init__(self) -> None:
        super().__init__()
        self._most = self.LEAST

    def add(self, found: Cancelable) -> None:
        super().add(found)
        if len(self) > self._most:
            self.discard_where(_given_up)
            self._most = max(2 * len(self), self.LEAST)
