"""The memfd heap: plain memory, without kernel support (memfd_create(2)).

The memory is zeroed, rounded up to whole pages, sealed against shrinking, growing and further seals, and *reserved*: allocated in full
before use, so that no later write gets SIGBUS. A size that the limits of the machine don't allow is refused with ENOMEM.

The steps are: the memfd, its memory, its seals, its reference lock, its record. A process that dies before the record leaves nothing,
because the kernel frees the memfd. After it, a record is left that no process references, which the next sweep frees.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets

from dmabuf._native import step
from dmabuf.core.buffer.handle import PAGE
from dmabuf.core.buffer.identity import SEALS, checked_name, memfd_name
from dmabuf.core.buffer.shared import MEMFD
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.get import from_fd
from dmabuf.domain.domain import Domain
from dmabuf.domain.limits import file_too_large, no_memfd
from dmabuf.errors import fail
from dmabuf.heap import budget
from dmabuf.uapi.call import OwnedFd

NAME = "memfd"
_SLICE = 64 << 20  # a signal makes fallocate start over, so it is called for slices, which end in time
_ZEROS = bytes(1 << 20)
_F_ADD_SEALS = 1033


reserve_range, write_at = OwnedFd.reserve, OwnedFd.pwrite
"""Names of their own, so that tests can replace them."""


def unavailable() -> str | None:
    """Return why this heap can't be used here, None if it can."""
    return None if hasattr(os, "memfd_create") else "the kernel has no memfd_create"


def allocate(
    size: int, *, name: str | bytes | None = None, domain: Domain | None = None, layout: bytes | None = None, part: int = 0
) -> DmaBuf:
    """Return a new zeroed buffer of ``size`` bytes, rounded up to pages. See :func:`dmabuf.allocate`.

    ``layout``, ``part``: a layout that fits. Whoever finds the buffer finds it described.
    """
    size, raw, domain = asked(size, name, domain)
    with budget.claim(size):
        fd = reserved(memfd_name(domain, secrets.token_bytes(16)), size)
    return from_fd(fd, domain, exp_name=MEMFD, name=raw, layout=layout, part=part)


def asked(size: int, name: str | bytes | None, domain: Domain | None) -> tuple[int, bytes | None, Domain]:
    """Check what every heap checks first. Return (size in whole pages, the name's bytes, the domain, joined).

    Raises:
        InvalidError: The size is below 1, or the name is bad (EINVAL).
        TypeError: The size is not an int, or ``domain`` is not a domain.
    """
    size = budget.whole(size, "allocate: size")
    if not 0 < size <= (1 << 63) - PAGE:
        raise fail(errno.EINVAL, "allocate", f"{size} bytes", f"ask for 1 to {(1 << 63) - PAGE} bytes", what="the size is out of range")
    raw = None if name is None else checked_name(name, "allocate")
    if domain is None:
        domain = Domain.default()
    elif not isinstance(domain, Domain):
        raise TypeError(f"allocate: domain is a dmabuf.Domain, as Domain.open(path) gives, not {type(domain).__name__}")
    domain.join()
    return -(-size // PAGE) * PAGE, raw, domain


def reserved(name: str, size: int, *, filled: bool = False) -> OwnedFd:
    """Return a sealed memfd with reserved memory.

    Args:
        name: The memfd's name.
        size: Its bytes.
        filled: Whether to write zeros. Pages that are only reserved read as zeros, but still have their former content, and udmabuf exports
            them like that (seen on Linux 6.12).

    Raises:
        NoMemoryError, NoSpaceError: There is no memory, or the tmpfs or the cgroup doesn't allow it (ENOMEM, ENOSPC).
        DmaBufError: No descriptor is free (EMFILE).
    """
    try:
        fd = next(map(OwnedFd, map(os.memfd_create, (name,), (os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING,))))
    except OSError as e:
        raise no_memfd("allocate", f"{size} bytes", e.errno or errno.EIO) from None
    try:
        os.ftruncate(fd.number, size)
        for start in range(0, size, _SLICE):
            reserve_range(fd, start, min(_SLICE, size - start))
        done = 0 if filled else size
        while done < size:
            done += write_at(fd, memoryview(_ZEROS)[: size - done], done)
        step("memfd_reserved")
        fcntl.fcntl(fd.number, _F_ADD_SEALS, SEALS)
    except OSError as e:
        fd.close()
        otherwise = "free memory, or raise the limit of the tmpfs or cgroup"
        raise file_too_large("allocate", f"{size} bytes", e.errno or errno.EIO, otherwise) from None
    return fd
