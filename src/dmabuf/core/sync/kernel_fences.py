"""The kernel's ``sync_file`` descriptors as fences of this process (semantics 5.10).

One thread polls all of them. It starts with the first descriptor and ends with the last. When a descriptor becomes readable, the fence that
stands for it in this process is signaled with the kernel fence's error. The fence belongs to this process like any other. If the process
dies, waiters in other processes get ``-EOWNERDEAD``, whatever the kernel's fence does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import threading
import weakref
from collections.abc import Callable

from dmabuf._native import FF_SEQNO64, OwnedFd
from dmabuf.core.fence.fence import DmaFence, flagged, register
from dmabuf.core.fence.timeline import Timeline, slot_of
from dmabuf.domain.dispatcher import DISPATCHER, report
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import finalizer
from dmabuf.errors import ClosedError
from dmabuf.uapi import sync_file as uapi

_LINK = "anon_inode:sync_file"


def is_kernel_sync_file(fd: int) -> bool:
    """Return True for a kernel sync_file."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == _LINK
    except OSError:
        return False


def fence_of(fd: int, domain: Domain) -> DmaFence:
    """Return a fence of this process that is signaled when a kernel sync_file is, with its error. The caller keeps the descriptor.

    Raises:
        DmaBufError: No descriptor is free (EMFILE).
        NoSpaceError: The domain is full (ENOSPC).
    """
    info = uapi.file_info(fd)
    one = info.fences[0] if len(info.fences) == 1 else None
    driver, name = (one.driver_name, one.obj_name) if one else (b"dma_fence_array", b"unbound")
    # A context of its own: fences of one context are signaled in order, and the kernel's order is unknown.
    timeline = Timeline(name, driver=driver, domain=domain)
    if info.status:
        fence = timeline.fence()
        fence.signal(min(info.status, 0))
        return fence
    shm = domain.shm
    fence = KernelFence(shm, shm.fence_alloc(slot_of(timeline) + 1, timeline.context, 1, FF_SEQNO64, 0, 0), True)
    register(fence, domain, timeline)
    # The descriptor's call has the timeline, whose names others may look up, but not the fence: somebody may lose interest in it.
    handle, ref, life = fence.handle, weakref.ref(fence), shm.life

    def signaled(own: int) -> None:
        error, there = min(uapi.file_info(own).status, 0), _dropped.pop(own, None) or ref()
        if timeline.domain.shm.life != life:
            return
        shm.fence_signal(handle, error, there is None)

    fence.own = watch(fd, signaled)
    return fence


class KernelFence(DmaFence):
    """A fence that stands for a kernel sync_file. ``own``: the descriptor that is polled for it."""

    __slots__ = ("own",)

    own: int

    @finalizer
    def __del__(self) -> None:
        own = getattr(self, "own", -1)  # -1: it was never complete, and nobody knows it
        if own < 0 or not self.owned or flagged(self):
            return
        local = DISPATCHER.peek(self.domain)
        if (local is None or not local.watches(self.handle)) and self.shm.fence_drop(self.handle, 0):
            _poller.remove(own)  # nobody waits for it
        elif not flagged(self):
            again = KernelFence(self.shm, self.handle, True)
            self.disown()
            register(again, self.domain, self._timeline)
            again.own = own
            _dropped[own] = again  # others wait for it


# Fences whose objects were dropped while others wait for them, by the descriptor that is polled.
_dropped: dict[int, KernelFence] = {}


class _Poller:
    """The thread, and the descriptors that it waits for. Each is a duplicate, which it closes when it was readable."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal handler or a finalizer may run in the middle
        self.calls: dict[int, tuple[OwnedFd, Callable[[int], None]]] = {}
        self._wake: OwnedFd | None = None
        self.epoll: select.epoll | None = None

    @property
    def wake(self) -> int:
        """The eventfd that wakes the thread, -1 if it doesn't run."""
        return -1 if self._wake is None else self._wake.number

    def add(self, fd: int, call: Callable[[int], None]) -> int:
        """Call ``call(own)`` once, when the descriptor is readable. Returns ``own``, the duplicate that is polled."""
        duplicate = next(map(OwnedFd, map(fcntl.fcntl, (fd,), (fcntl.F_DUPFD_CLOEXEC,), (3,))))
        duplicate.mark()  # all kernel sync_files have one inode
        own = duplicate.number
        with self.lock:
            try:
                self.calls[own] = duplicate, call
                if self.epoll is None:
                    self._start()
                assert self.epoll is not None
                self.epoll.register(own, select.EPOLLIN)
            except BaseException:
                self.remove(own)
                raise
        return own

    def remove(self, own: int) -> None:
        """Take back what :meth:`add` returned. Too late, this has no effect."""
        with self.lock:
            found = self.calls.pop(own, None)
            if found is None:
                return
            self._close(found[0])
            if not self.calls and self._wake is not None:
                with contextlib.suppress(ClosedError):  # somebody else closed it: the thread stays
                    self._wake.add_one()  # the thread ends

    def _close(self, own: OwnedFd) -> None:
        if self.epoll is not None:
            with contextlib.suppress(OSError):  # it wasn't registered yet
                self.epoll.unregister(own.fileno())  # closing alone wouldn't do that while a duplicate is open
        own.close()

    def _start(self) -> None:
        self._wake = next(map(OwnedFd, map(os.eventfd, (0,), (os.EFD_CLOEXEC | os.EFD_NONBLOCK,))))
        try:
            self._wake.mark()
            self.epoll = select.epoll()
            self.epoll.register(self._wake.number, select.EPOLLIN)
            threading.Thread(target=self.run, args=(self.epoll,), name="dmabuf-kernel-sync", daemon=True).start()
        except BaseException:  # no descriptor is free, or no thread can be started; the next descriptor tries again
            self._stop()
            raise

    def _stop(self) -> None:
        """Close what the thread waits with."""
        epoll, self.epoll = self.epoll, None
        if epoll is not None:
            epoll.close()
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.close()

    def run(self, epoll: select.epoll) -> None:
        while True:
            found = [fd for fd, _ in epoll.poll()]
            with self.lock:
                # Look again: one may have been removed, and its number given to another, since epoll told of it.
                ready = [(fd, self.calls.pop(fd)) for fd in found if fd in self.calls and _is_readable(fd)]
            for _, (own, call) in ready:
                try:
                    call(own.fileno())
                except BaseException as e:
                    report(e, call)
                finally:
                    with self.lock:
                        self._close(own)
            with self.lock:
                if not self.calls:
                    self._stop()
                    return
                if self.wake in found and self._wake is not None:
                    os.eventfd_read(self._wake.fileno())


def _is_readable(fd: int) -> bool:
    asked = select.poll()
    asked.register(fd, select.POLLIN)
    return bool(asked.poll(0))


_poller = _Poller()


def _after_fork() -> None:
    """Forget everything: a fork takes no thread along, and the fences are the parent's."""
    if _poller.epoll is not None:
        _poller.epoll.close()  # first: what is unregistered in it would be unregistered for the parent too
    _poller.__init__()  # type: ignore[misc]  # the lock too, which another thread may have held


os.register_at_fork(after_in_child=_after_fork)


def watch(fd: int, call: Callable[[int], None]) -> int:
    """Call ``call(own)`` once, from the thread, when the descriptor is readable. Returns ``own``, a duplicate that the thread polls."""
    return _poller.add(fd, call)
