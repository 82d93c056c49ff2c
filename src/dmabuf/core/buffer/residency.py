"""Memory in the buffer's own file that may be moved out and in: what keeps it in memory, and who may look.

An exporter may keep its memory in the memfd that travels (``export.make`` with ``prepare``). Such a file is not sealed against writing, so
every process that has the descriptor recognizes it by the seals. The exporter may copy the pages elsewhere and punch them out of the file.
The descriptor, the inode and the size stay. A mapping shows zeros meanwhile, which must never be taken for content. So everybody asks
first:

- *An access* (``begin_cpu_access`` to ``end_cpu_access``, and the block of ``read()`` and ``write()``) asks the exporter, which makes the
  memory resident and counts the access until its end. A dead exporter can't be asked: ENODEV.
- *A bare mapping* asks the exporter too. Then it keeps the memory where it is with a lock on byte 1 of the file, for as long as any process
  maps it, forked children included. It is a read lock of an open file description of its own, to which the mapping is the only reference.
- *The exporter* moves memory out only while it holds the write lock on that byte. Taking the lock decides; nothing else does. Success
proves
  that nobody has mapped the buffer, and a newcomer's read lock fails until the memory is resident again.

Byte 0 has the reference lock, as for every buffer, and a bare mapping has that one too.

After a ``kill -9`` of the exporter, an access or mapping that began before keeps its content, because only the exporter moves it. Later
ones get ENODEV, because the exporter is gone, whatever the file holds. Nobody has to know how far a move had come.

Source: fcntl(2), fallocate(2), memfd_create(2).
"""

from __future__ import annotations

import errno
import fcntl
import os

from dmabuf._native import Mapping, OwnedFd, map_same
from dmabuf.core.buffer.identity import put_reference_lock
from dmabuf.domain import place
from dmabuf.domain.limits import cant_map
from dmabuf.domain.ofd import no_proc_at_all
from dmabuf.errors import fail

F_GET_SEALS, F_SEAL_WRITE = 1034, 8  # linux/fcntl.h
BYTE = 1


def in_file(fd: int) -> bool:
    """Return True if an exported buffer has its memory in its own file. A placeholder without memory is sealed against writing."""
    return not fcntl.fcntl(fd, F_GET_SEALS) & F_SEAL_WRITE


def may_write(fd: int) -> bool:
    """Return True if the descriptor is open for writing."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def mapping(fd: int, inode: tuple[int, int], operation: str, obj: object, offset: int, length: int, writable: bool) -> Mapping:
    """Return a bare mapping that keeps the memory where it is until nobody maps it any more. The caller is inside an access.

    ``inode``: (st_dev, st_ino) of the buffer, of which ``fd`` is a descriptor.

    Raises:
        ClosedError: Somebody else closed the descriptor (EBADF).
        NotPermittedError: A writable mapping of a read-only descriptor (EACCES).
        NoDeviceError: The exporter has released the buffer (ENODEV).
        BusyError: The memory is moved out, since the caller is in no access (EBUSY).
        DmaBufError: The process has no descriptor left (EMFILE).
        NoMemoryError: The process can't map more (ENOMEM).
    """
    if writable and not may_write(fd):
        what = "its descriptor is read-only"
        raise fail(errno.EACCES, operation, obj, "receive a descriptor that is open for writing", what=what)
    try:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        own = next(map(OwnedFd, map(os.open, (f"/proc/self/fd/{fd}",), (flags,))))
    except FileNotFoundError:
        raise no_proc_at_all(operation) from None
    except OSError as e:
        raise fail(e.errno or errno.EIO, operation, obj, "close descriptors, or raise RLIMIT_NOFILE") from None
    with own:  # afterwards only the mapping keeps the description, and with it the locks
        if (own.dev, own.ino) != inode:
            what = f"fd {fd} was closed by somebody else, and the number is another file's now"
            raise fail(errno.EBADF, operation, obj, "close the buffer, not its descriptor", what=what)
        put_reference_lock(own.number)
        if not own.set_lock(fcntl.F_RDLCK, BYTE):
            raise fail(errno.EBUSY, operation, obj, "map it inside an access", what="its memory is moved out")
        try:
            return map_same(own.number, length, offset, writable, False, own.dev, own.ino)
        except OSError as e:
            if e.errno != errno.ENOMEM:
                raise
            raise cant_map(operation, obj, length) from None


def is_evicted(fd: int) -> bool:
    """Return True if the memory is moved out, or on its way. A hint: for a caller that has a fence on the buffer it can only come in."""
    return place.ofd_locked(fd, BYTE, kind=fcntl.F_RDLCK)


def evict(private: OwnedFd) -> bool:
    """Take the lock for moving the memory out, the exporter's first step. Returns False if somebody has it mapped.

    Raises:
        ClosedError: Somebody else closed the descriptor (EBADF).
        DmaBufError: The kernel has no room for the lock (ENOLCK).
    """
    return private.set_lock(fcntl.F_WRLCK, BYTE)


def make_resident(private: OwnedFd) -> None:
    """Release the lock: the exporter's last step of moving memory in, or of giving up."""
    private.set_lock(fcntl.F_UNLCK, BYTE)
