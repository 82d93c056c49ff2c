"""The backing of a kernel dma-buf: of udmabuf, a dma-heap, or a driver (semantics 5.2–5.7).

It belongs to no domain: every process that gets it takes it into its own domain, and two domains don't know of each other. The reference
lock is an OFD read lock on it, as on a memfd. The kernel's count tells when the last reference goes.

A caller that waits for the buffer waits for the kernel's fences *and* the domain's. ``read()`` and ``write()`` queue in the domain, in the
order of their arrival. Then they wait for the kernel's fences (poll(2), with the timeout; semantics 5.6), and only then they are granted.
DMA_BUF_IOCTL_SYNC brackets the block. Other programs and devices don't know the domain, so no block excludes them. SYNC waits, without a
timeout, for a fence that a driver adds between that wait and SYNC.

The kernel's name and the record's are set together, and ``name`` reads the kernel's. User fences never go into the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import select
import time

from dmabuf._native import Access, Mapping, is_same, map_same
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer.backing import SERVERS, Backing, Descriptor, KernelSide
from dmabuf.core.buffer.backing_memfd import FILE_EXPORTER, FILE_OPS
from dmabuf.core.buffer.identity import IMPORTED
from dmabuf.core.buffer.shared import BACKINGS, SharedBuffer
from dmabuf.core.contract import Buffer
from dmabuf.core.task import waiting as awaiting
from dmabuf.domain.records import Record
from dmabuf.errors import DmaBufError, fail
from dmabuf.uapi import dma_buf as uapi
from dmabuf.uapi.call import OwnedFd, told

_SYNC = {Direction.FROM_DEVICE: uapi.READ, Direction.TO_DEVICE: uapi.WRITE, Direction.BIDIRECTIONAL: uapi.RW}


class KernelBacking(Backing, KernelSide):
    """The kernel's side of a kernel dma-buf. To the devices of this process it is a static exporter of the file."""

    in_file = True

    def __init__(self, record: Record) -> None:
        super().__init__(FILE_EXPORTER, FILE_OPS, record, False)
        SERVERS.find("kernel")(record.domain)

    @property
    def kernel(self) -> KernelSide:
        return self

    def check_reachable(self, operation: str) -> None:
        """Nothing: the kernel is everywhere."""

    def mappable(self, buf: Buffer, operation: str) -> None:
        """Nothing: the kernel answers in mmap."""

    def mmap(self, buf: Buffer, operation: str, offset: int, length: int, writable: bool) -> Mapping:
        # DRM's buffers show their first page in a partial mapping, whatever its offset (seen on Linux 6.12): mapped from the start.
        whole = self.record.home == IMPORTED
        try:
            return map_same(buf.fileno(), length, offset, writable, whole, self.record.dev, self.record.ino)
        except DmaBufError:
            raise
        except OSError as e:
            raise fail(e.errno or errno.EIO, operation, buf) from None

    def before_close(self, handle: object) -> None:
        """Nothing to note: the kernel counts."""

    def after_close(self, handle: object, quiet: bool) -> None:
        """Nothing ends with a handle."""

    # ---- the bracket ----

    def begin(self, buf: Descriptor, direction: Direction, access: Access | None = None, *, interruptible: bool = False) -> None:
        """START, which waits for the kernel's fences too."""
        flags = uapi.START | self._flags(direction)
        uapi.sync(buf.fileno(), flags, of=buf, interruptible=interruptible, noted=None if access is None else access.begun)

    def end(self, buf: Descriptor, direction: Direction, access: Access | None = None) -> None:
        """END."""
        uapi.sync(buf.fileno(), uapi.END | self._flags(direction), of=buf, noted=None if access is None else access.told)

    def _flags(self, direction: Direction) -> int:
        return _SYNC.get(direction, uapi.READ)  # NONE waits as a reader does (semantics 2.15)

    def keep_open(self, buf: Descriptor) -> OwnedFd | None:
        """Return a duplicate; None: no descriptor is left."""
        try:
            return _duplicate(buf)
        except OSError:
            return None

    # ---- the kernel's fences ----

    def ready(self, buf: Descriptor, events: int) -> int:
        return poll_until(buf.fileno(), events, 0, buf) & events

    def wait_kernel(self, buf: Descriptor, write: bool, until: int) -> bool:
        event = select.POLLOUT if write else select.POLLIN
        return bool(poll_until(buf.fileno(), event, until, buf))

    async def wait_kernel_async(self, buf: Descriptor, write: bool, until: int) -> bool:
        event = select.POLLOUT if write else select.POLLIN
        if poll_until(buf.fileno(), event, 0, buf):
            return True
        with _duplicate(buf) as own:
            while not poll_until(own.number, event, 0, buf):
                left = None if until < 0 else max(0.0, (until - time.monotonic_ns()) / 1e9)
                if not await awaiting.descriptor(own.number, write, left):
                    return False
        return True

    def export_sync_file(self, buf: Descriptor, write: bool) -> OwnedFd:
        return uapi.export_sync_file(buf.fileno(), uapi.RW if write else uapi.READ, of=buf)

    def import_sync_file(self, buf: Descriptor, sync_file: int, write: bool) -> None:
        uapi.import_sync_file(buf.fileno(), uapi.WRITE if write else uapi.READ, sync_file, of=buf)

    # ---- name and references ----

    def name(self, buf: Descriptor) -> bytes | None:
        return uapi.fdinfo(buf.fileno()).name

    def set_name(self, buf: Descriptor, name: bytes) -> None:
        uapi.set_name(buf.fileno(), name, of=buf)

    def fdinfo(self, buf: Descriptor) -> str:
        head, size, rest = uapi.fdinfo(buf.fileno()).text.partition(b"\nsize:\t")
        # Leave out the handle's reference lock.
        own = b"\n".join(line for line in head.split(b"\n") if not line.startswith(b"lock:\t"))
        return os.fsdecode(own + size + rest)

    def lseek(self, buf: Descriptor, offset: int, whence: int) -> int:
        try:
            return os.lseek(buf.fileno(), offset, whence)
        except (OSError, OverflowError) as e:
            number = e.errno if isinstance(e, OSError) and e.errno else errno.EINVAL
            what = "unsupported offset or whence" if number == errno.EINVAL else None
            raise fail(number, "lseek", buf, "use (0, SEEK_SET) or (0, SEEK_END)", what=what) from None

    def last(self, fd: int) -> bool:
        """Return True if fd is the only reference to the buffer that is left anywhere. The kernel's count proves it."""
        try:
            return uapi.fdinfo(fd).references == 1 and is_same(fd, self.record.dev, self.record.ino)
        except OSError:
            return False


def _duplicate(buf: Descriptor) -> OwnedFd:
    try:
        return next(map(OwnedFd, map(fcntl.fcntl, (buf.fileno(),), (fcntl.F_DUPFD_CLOEXEC,), (0,))))
    except OSError as e:
        raise told(e, "wait", buf) from None


def poll_until(fd: int, events: int, until: int, of: object) -> int:
    """Call poll(2) until a CLOCK_MONOTONIC time; 0 only asks, -1 waits for ever.

    Returns:
        The events that are ready, or wrong (POLLERR); 0 when the time is over.

    Raises:
        ClosedError: Somebody other than its owner ``of`` closed the descriptor (EBADF).
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
            raise fail(errno.EBADF, "wait", of, "close the object, not its descriptor", what=f"fd {fd} was closed by somebody else")
        if found or (until >= 0 and time.monotonic_ns() >= until):
            return found


def _make(record: SharedBuffer, fd: int) -> Backing:
    made = KernelBacking(record)
    record.last = made.last
    return made


BACKINGS.register("kernel", _make)
