"""A real dma-buf behind a buffer: udmabuf, a dma-heap, or a driver's (spec 5.2–5.7).

It belongs to no domain: whoever gets it takes it into its own, and two domains do not know of each other. The lease is an OFD read lock on
it, as on a memfd; that the last reference goes is known from the kernel's count.

What waits for a buffer waits for the kernel's fences *and* the domain's. ``read()`` and ``write()`` take their place in the domain, in the
order of their arrival, then wait for the kernel's fences (poll(2), with the timeout; spec 5.6), and only then are granted; the block is
bracketed by DMA_BUF_IOCTL_SYNC. Other programs, and devices, know nothing of the domain: no block keeps them out. A fence that a driver
adds between that wait and SYNC is waited for in SYNC, without a timeout.

The kernel's name and the record's are set together; the kernel's is what ``name`` reads. User fences never go into the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import select
import time
from typing import TYPE_CHECKING, Any

from dmabuf import _native
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer.backing import _MEMFD_OPS, SERVERS, Backing, _Memfd
from dmabuf.core.buffer.identity import IMPORTED
from dmabuf.core.task import waiting as awaiting
from dmabuf.domain.records import Record
from dmabuf.errors import fail
from dmabuf.uapi import dma_buf as uapi
from dmabuf.uapi.call import OwnedFd, told

if TYPE_CHECKING:
    from dmabuf.core.dma_buf import DmaBuf

_SYNC = {Direction.FROM_DEVICE: uapi.READ, Direction.TO_DEVICE: uapi.WRITE, Direction.BIDIRECTIONAL: uapi.RW}


class KernelBacking(Backing):
    """The kernel's side of a real dma-buf."""

    in_file = True

    def __init__(self, record: Record) -> None:
        super().__init__(_KERNEL, _MEMFD_OPS, record, False)
        SERVERS.find("kernel")(record.domain)

    def mappable(self, buf: DmaBuf, operation: str) -> None:
        """Nothing to ask before: the kernel says at mmap."""

    def mmap(self, buf: DmaBuf, operation: str, offset: int, length: int, writable: bool) -> _native.Mapping:
        # DRM's buffers show their first page in a partial mapping, whatever its offset (seen on Linux 6.12): mapped from the start.
        whole = self.record.home == IMPORTED
        try:
            return _native.Mapping(buf.fileno(), length, offset=offset, writable=writable, from_start=whole)
        except OSError as e:
            raise fail(e.errno or errno.EIO, operation, buf) from None

    def leaving(self) -> None:
        """Nothing to remember: the kernel counts."""

    def departed(self, quiet: bool) -> None:
        """Nothing of ours ends with a handle."""

    # ---- the bracket ----

    def begin(self, buf: Any, direction: Direction, interruptible: bool = False) -> None:
        """START. The kernel's fences are waited for in it, too."""
        uapi.sync(buf.fileno(), uapi.START | self._flags(direction), of=buf, interruptible=interruptible)

    def end(self, buf: Any, direction: Direction) -> None:
        """END. ``buf``: the handle, or what :meth:`keep_open` gave."""
        uapi.sync(buf.fileno(), uapi.END | self._flags(direction), of=buf)

    def _flags(self, direction: Direction) -> int:
        return _SYNC.get(direction, uapi.READ)  # NONE waits as a reader does (spec 2.15)

    def keep_open(self, buf: DmaBuf) -> OwnedFd | None:
        """A duplicate; None: no descriptor is left."""
        try:
            return _duplicate(buf)
        except OSError:
            return None

    # ---- the kernel's fences ----

    def ready(self, buf: DmaBuf, events: int) -> int:
        """Those of POLLIN and POLLOUT in ``events`` that no fence of the kernel's is in the way of."""
        return poll_until(buf.fileno(), events, 0, buf) & events

    def settle(self, buf: DmaBuf, write: bool, until: int) -> bool:
        """Wait for the kernel's fences in the way of a reader or writer. ``until``: CLOCK_MONOTONIC ns, -1 for ever; False: timed out."""
        event = select.POLLOUT if write else select.POLLIN
        return bool(poll_until(buf.fileno(), event, until, buf))

    async def settle_async(self, buf: DmaBuf, write: bool, until: int) -> bool:
        """:meth:`settle` in a coroutine."""
        event = select.POLLOUT if write else select.POLLIN
        if poll_until(buf.fileno(), event, 0, buf):
            return True
        with _duplicate(buf) as own:
            while not poll_until(own.number, event, 0, buf):
                left = None if until < 0 else max(0.0, (until - time.monotonic_ns()) / 1e9)
                if not await awaiting.descriptor(own.number, write, left):
                    return False
        return True

    def export_sync_file(self, buf: DmaBuf, write: bool) -> OwnedFd:
        """The kernel's own sync_file of what a reader (or writer) would wait for in the kernel."""
        return uapi.export_sync_file(buf.fileno(), uapi.RW if write else uapi.READ, of=buf)

    def import_sync_file(self, buf: DmaBuf, sync_file: int, write: bool) -> None:
        """Add the fences of a kernel's sync_file."""
        uapi.import_sync_file(buf.fileno(), uapi.WRITE if write else uapi.READ, sync_file, of=buf)

    # ---- name and references ----

    def name(self, buf: DmaBuf) -> bytes | None:
        return uapi.fdinfo(buf.fileno()).name

    def set_name(self, buf: DmaBuf, name: bytes) -> None:
        uapi.set_name(buf.fileno(), name, of=buf)

    def fdinfo(self, buf: DmaBuf) -> str:
        head, size, rest = uapi.fdinfo(buf.fileno()).text.partition(b"\nsize:\t")
        # Without the handle's lease, which shows as a lock.
        own = b"\n".join(line for line in head.split(b"\n") if not line.startswith(b"lock:\t"))
        return os.fsdecode(own + size + rest)

    def lseek(self, buf: DmaBuf, offset: int, whence: int) -> int:
        try:
            return os.lseek(buf.fileno(), offset, whence)
        except (OSError, OverflowError) as e:
            number = e.errno if isinstance(e, OSError) and e.errno else errno.EINVAL
            raise fail(number, "lseek", buf, "only (0, SEEK_SET) and (0, SEEK_END)") from None

    def last(self, fd: int) -> bool:
        """Is fd the only reference to the buffer that is left anywhere? By the kernel's own count, so it is a proof."""
        try:
            return uapi.fdinfo(fd).references == 1
        except OSError:
            return False


class _Kernel(_Memfd):
    """A real dma-buf as an exporter for the devices of this process: static, its memory the file of the buffer."""

    __slots__ = ()


_KERNEL = _Kernel()


def _duplicate(buf: DmaBuf) -> OwnedFd:
    try:
        return next(map(OwnedFd, map(fcntl.fcntl, (buf.fileno(),), (fcntl.F_DUPFD_CLOEXEC,), (0,))))
    except OSError as e:
        raise told(e, "wait", buf) from None


def poll_until(fd: int, events: int, until: int, of: object) -> int:
    """poll(2) until a CLOCK_MONOTONIC time; 0 asks only, -1 waits for ever. What is ready, or wrong (POLLERR); 0 when the time is over.

    Errors: EBADF somebody closed the descriptor behind the back of its owner ``of``.
    """
    waiting = select.poll()
    waiting.register(fd, events)
    while True:
        left: int | None = 0
        if until < 0:
            left = None
        elif until:
            left = min((1 << 31) - 1, math.ceil(max(0, until - time.monotonic_ns()) / 1e6))
        found = next((one for _, one in waiting.poll(left)), 0)
        if found & select.POLLNVAL:
            raise fail(errno.EBADF, "wait", of, "leave the closing of its descriptor to it", what=f"fd {fd} was closed by somebody else")
        if found or (until >= 0 and time.monotonic_ns() >= until):
            return found
