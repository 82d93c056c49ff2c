"""Memory in the buffer's own file, which may leave it and come back: what keeps it there, and who may look (promise: no stranger's zeros).

An exporter may carry its memory in the memfd that travels (`backing.make` with ``prepare``); such a file is not sealed against writing, so
everybody who has the fd knows it by the seals alone. The exporter may move the pages elsewhere and punch them out of the file. The fd, the
inode and the size stay; what a mapping shows meanwhile is zeros, which must never be taken for content. So everybody asks first:

- *An access* (``begin_cpu_access`` to ``end_cpu_access``, in which the window of ``read()`` and ``write()`` is looked through) asks the
  exporter, who brings the memory back and counts the access until its end. A dead exporter can't be asked: ENODEV.
- *A bare mapping* asks the exporter too, and then keeps the memory where it is by a lock on byte 1 of the file, for as long as it is mapped
  anywhere, forked children included: a read lock of an open file description of its own, whose only reference is the mapping.
- *The exporter* moves memory only while it holds the write lock on that byte. It decides by taking it, never by asking: success proves
  that nobody has mapped the buffer, and a newcomer's read lock fails until the memory is back.

Byte 0 is the lease, as of every buffer; a bare mapping has that too.

What a ``kill -9`` of the exporter leaves: who was let in keeps what was there, because only the exporter moves it; who comes later gets
ENODEV from the exporter's absence, whatever the file holds. Nobody has to know how far a move had come.

Source: fcntl(2), fallocate(2), memfd_create(2).
"""

from __future__ import annotations

import errno
import fcntl
import os

from dmabuf._native import Mapping
from dmabuf.core.buffer.identity import take_lease
from dmabuf.domain import place
from dmabuf.errors import fail

F_GET_SEALS, F_SEAL_WRITE = 1034, 8  # linux/fcntl.h
BYTE = 1


def in_file(fd: int) -> bool:
    """Does an exported buffer carry its memory in its own file? A token without memory is sealed against writing."""
    return not fcntl.fcntl(fd, F_GET_SEALS) & F_SEAL_WRITE


def may_write(fd: int) -> bool:
    """Is the descriptor open for writing?"""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def mapping(fd: int, operation: str, obj: object, offset: int, length: int, writable: bool) -> Mapping:
    """A bare mapping that keeps the memory where it is until nobody maps it any more. Only inside of an access.

    Errors: EACCES writable on a read-only fd; ENODEV the exporter has released the buffer; EBUSY the memory is away (the caller is in no
    access); EMFILE, ENOMEM.
    """
    if writable and not may_write(fd):
        raise fail(errno.EACCES, operation, obj, "receive a descriptor that is open for writing")
    try:
        own = os.open(f"/proc/self/fd/{fd}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as e:
        raise fail(e.errno or errno.EIO, operation, obj, "close descriptors, or raise RLIMIT_NOFILE") from None
    try:
        take_lease(own)
        if not place.ofd_lock(own, fcntl.F_RDLCK, BYTE):
            raise fail(errno.EBUSY, operation, obj, "map it inside of an access", what="its memory is away")
        return Mapping(own, length, offset=offset, writable=writable)
    finally:
        os.close(own)  # from here on the mapping alone keeps the description, and with it the locks


def is_away(fd: int) -> bool:
    """Is the memory elsewhere, or on its way? A hint of the moment: who has a fence on the reservation object finds it come, not go."""
    return place.ofd_locked(fd, BYTE, kind=fcntl.F_RDLCK)


def take_out(private: int) -> bool:
    """The exporter's first step of moving memory away; False: somebody has it mapped. Errors: ENOLCK."""
    return place.ofd_lock(private, fcntl.F_WRLCK, BYTE)


def put_back(private: int) -> None:
    """The exporter's last step of bringing memory back, or of giving up."""
    place.ofd_lock(private, fcntl.F_UNLCK, BYTE)
