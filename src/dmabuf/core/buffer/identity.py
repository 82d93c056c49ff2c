"""Which buffer a descriptor is: one of this domain, of another one, or none.

A kernel dma-buf is recognized by its file system (fstatfs(2)). Its nonce is a digest of its ``(st_dev, st_ino)``, because the kernel never
gives the inode number of a dma-buf twice. The boot's id is not in it: containers are told ids of their own, and would not find the record.
A domain forgets its buffers when it sees another boot (``Shm.begin_boot``).

A memfd buffer is a memfd named ``dmabuf:<domain>:<nonce>`` (16 and 32 hexadecimal digits), sealed against shrinking, growing and further
seals. Either descriptor carries an OFD read lock on byte 0, the reference lock. Every dup, every descriptor in flight and every mapping
keeps it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from hashlib import blake2b
from typing import Final, NamedTuple

from dmabuf._native import probe_fd
from dmabuf.domain import place
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail
from dmabuf.uapi import dma_buf as uapi

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_NAME = re.compile(rb"/memfd:dmabuf:([0-9a-f]{16}):([0-9a-f]{32})(?: \(deleted\))?\Z")


IMPORTED: Final = b"imported"
UDMABUF: Final = b"udmabuf"
DMA_HEAP: Final = b"dma_heap:"
HEAPS: Final = "/dev/dma_heap"
NAME_BYTES: Final = 31  # DMA_BUF_NAME_LEN without its NUL
_HOME_BYTES: Final = 31  # what a record has room for
probe = probe_fd
"""What the kernel says of a descriptor; a name of its own, so that tests can replace it."""


class Identity(NamedTuple):
    """Which buffer a descriptor is, by the descriptor alone: nothing of this was read from shared memory."""

    dev: int
    ino: int
    size: int
    nonce: bytes
    kernel: bool = False


def memfd_name(domain: Domain, nonce: bytes) -> str:
    """Return the name for a buffer's memfd (memfd_create(2))."""
    return f"dmabuf:{domain.id}:{nonce.hex()}"


def checked_name(value: str | bytes, operation: str, obj: object = None) -> bytes:
    """Return a buffer's name as bytes. ``obj``: what an error is about, by default the name.

    Raises:
        InvalidError: It is too long or has a NUL (EINVAL).
        TypeError: It is neither str nor bytes.
    """
    if not isinstance(value, (str, bytes)):
        raise TypeError(f"{operation}: a name is str or bytes, not {type(value).__name__}")
    raw = os.fsencode(value)
    if len(raw) > NAME_BYTES or b"\0" in raw:
        what = "the name has a NUL" if b"\0" in raw else f"the name has {len(raw)} bytes"
        raise fail(
            errno.EINVAL, operation, obj or f"name {os.fsdecode(raw)!r}", f"use at most {NAME_BYTES} bytes, without a NUL", what=what
        )
    return raw


def put_reference_lock(fd: int) -> None:
    """Put the reference lock on a descriptor. It has no effect on an open file description that has it.

    Raises:
        NoDeviceError: The exporter has released the buffer (ENODEV).
        NotPermittedError: The descriptor is open for writing only (EACCES).
    """
    try:
        locked = place.ofd_lock(fd, fcntl.F_RDLCK, 0)
    except OSError as e:
        if e.errno != errno.EBADF or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY:
            raise
        what = "it is open for writing only, so the reference lock can't be put on it"
        raise fail(errno.EACCES, "get", f"fd {fd}", "open or export it for reading and writing", what=what) from None
    if not locked:
        raise fail(errno.ENODEV, "get", f"fd {fd}", "ask its exporter for a new buffer", what="the exporter has released this buffer")


def identify(fd: int, domain: Domain, operation: str = "get") -> Identity:
    """Return which buffer a descriptor is (semantics 2.3).

    Raises:
        ClosedError: ``fd`` is not open (EBADF).
        InvalidError: It is not a buffer (EINVAL).
        CrossDomainError: It is a buffer of another domain (EXDEV).
        TypeError: ``fd`` is not an int.
    """
    try:
        dev, ino, size, seals, link, system = probe(fd)
    except TypeError:
        raise TypeError(f"{operation}: fd is the number of a descriptor, an int, not {type(fd).__name__}") from None
    except (OSError, OverflowError) as e:
        if isinstance(e, OSError) and e.errno != errno.EBADF:
            raise
        raise fail(errno.EBADF, operation, f"fd {fd}", "pass an open file descriptor", what="the descriptor is not open") from None
    if system == uapi.MAGIC:
        return Identity(dev, ino, _size_of(fd, size), nonce_of(dev, ino), True)
    match = _NAME.match(link)
    if match is None or seals < 0 or seals & SEALS != SEALS:
        raise fail(
            errno.EINVAL,
            operation,
            f"fd {fd}",
            "pass the descriptor of a buffer, or copy the data into one made by dmabuf.allocate()",
            what=f"not a dma-buf but {os.fsdecode(link) or 'something unknown'}",
        )
    if match[1].decode() != domain.id:
        place.check_set_aside(domain.path, match[1].decode(), operation, f"fd {fd}")
        raise fail(
            errno.EXDEV,
            operation,
            f"fd {fd}",
            place.SHARE_DOMAIN,
            what=f"the buffer belongs to domain {match[1].decode()}, this process uses {domain.id}",
        )
    return Identity(dev, ino, size, bytes.fromhex(match[2].decode()))


# ---- kernel dma-bufs ----


def is_kernel_home(home: bytes) -> bool:
    """Return True if it is the home of a kernel dma-buf."""
    return home in (IMPORTED, UDMABUF) or home.startswith(DMA_HEAP)


def home_of(exp_name: bytes) -> bytes:
    """Return the home of a dma-buf, by its exporter's name, which is the heap's name for a heap."""
    if exp_name == UDMABUF:
        return UDMABUF
    home = DMA_HEAP + exp_name
    if exp_name and b"/" not in exp_name and len(home) <= _HOME_BYTES and os.path.exists(os.fsencode(HEAPS) + b"/" + exp_name):
        return home
    return IMPORTED


def described(fd: int) -> tuple[bytes, bytes, bytes | None]:
    """Return the exporter's name, the home and the name of a dma-buf, as the kernel says now. Fails without /proc (ENOENT)."""
    info = uapi.fdinfo(fd)
    return info.exp_name[:_HOME_BYTES], home_of(info.exp_name), info.name


def nonce_of(dev: int, ino: int) -> bytes:
    """Return the nonce: the same in every process that has the dma-buf, and never used for another one."""
    return blake2b(b"%d %d" % (dev, ino), digest_size=16).digest()


def _size_of(fd: int, told: int) -> int:
    """Return the size by lseek, as users find it. ``told``: by fstat, if that fails."""
    with contextlib.suppress(OSError):
        return os.lseek(fd, 0, os.SEEK_END)
    return told
