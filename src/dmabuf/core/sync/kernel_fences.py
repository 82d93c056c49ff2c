"""The kernel's ``sync_file`` descriptors as fences of this process (semantics 5.10).

One thread polls all of them. It starts with the first descriptor and ends with the last. When a descriptor becomes readable, the fence that
stands for it in this process is signaled with the kernel fence's error. The fence belongs to this process like any other. If the process
dies, waiters in other processes get ``-EOWNERDEAD``, whatever the kernel's fence does.
"""

from __future__ import annotations

import fcntl
import os
import select
import threading
from collections.abc import Callable

from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.timeline import Timeline
from dmabuf.domain.dispatcher import report
from dmabuf.domain.domain import Domain
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
    fence = timeline.fence()

    def signaled(own: int) -> None:
        status = uapi.file_info(own).status
        if domain.shm.life == life and not fence.is_signaled():
            fence.signal(min(status, 0))

    life = domain.shm.life
    if info.status:
        fence.signal(min(info.status, 0))
    else:
        watch(fd, signaled)
    return fence


class _Poller:
    """The thread, and the descriptors that it waits for. Each is a duplicate, which it closes when it was readable."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal handler or a finalizer may run in the middle
        self.calls: dict[int, Callable[[int], None]] = {}
        self.wake = -1

    def add(self, fd: int, call: Callable[[int], None]) -> None:
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        with self.lock:
            try:
                self.calls[own] = call
                if self.wake < 0:
                    self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    self._start()
                else:
                    os.eventfd_write(self.wake, 1)
            except BaseException:
                self.calls.pop(own, None)
                os.close(own)
                raise

    def _start(self) -> None:
        try:
            threading.Thread(target=self.run, name="dmabuf-kernel-sync", daemon=True).start()
        except RuntimeError:  # no thread can be started; the next descriptor tries again
            os.close(self.wake)
            self.wake = -1
            raise

    def run(self) -> None:
        while True:
            with self.lock:
                if not self.calls:
                    os.close(self.wake)
                    self.wake = -1
                    return
                waiting = select.poll()
                waiting.register(self.wake, select.POLLIN)
                for fd in list(self.calls):
                    waiting.register(fd, select.POLLIN)
            for fd, _ in waiting.poll():
                if fd == self.wake:
                    os.eventfd_read(fd)
                    continue
                with self.lock:
                    call = self.calls.pop(fd, None)
                if call is None:
                    continue  # its adder removed it, because a signal handler raised
                try:
                    call(fd)
                except BaseException as e:
                    report(e, call)
                finally:
                    os.close(fd)


_poller = _Poller()


def _after_fork() -> None:
    """Forget everything: a fork takes no thread along, and the fences are the parent's."""
    for fd in (*_poller.calls, _poller.wake):
        if fd >= 0:
            os.close(fd)
    _poller.__init__()  # type: ignore[misc]  # the lock too, which another thread may have held


os.register_at_fork(after_in_child=_after_fork)


def watch(fd: int, call: Callable[[int], None]) -> None:
    """Call ``call(a duplicate of fd)`` once, from the thread, when the descriptor is readable."""
    _poller.add(fd, call)
