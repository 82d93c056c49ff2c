"""The memfd heap: plain memory of ours, without kernel support (memfd_create(2)).

Zeroed, rounded up to whole pages, sealed against shrinking, growing and further seals, and *promised*: what the limits of the machine
don't allow is refused here, with ENOMEM, and what is allowed is reserved here, so that no later write meets SIGBUS.

Steps of making one: the memfd, its memory, its seals, its lease, its record. A death before the record leaves nothing (the kernel frees
the memfd); after it, a record that nobody holds, which the next sweep takes.
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
from dmabuf.errors import fail
from dmabuf.heap import budget
from dmabuf.uapi.call import OwnedFd

NAME = "memfd"
_SLICE = 64 << 20  # a signal makes fallocate start over: in slices it gets through
_ZEROS = bytes(1 << 20)
_F_ADD_SEALS = 1033


def unavailable() -> str | None:
    """Why this heap can't be used here, None when it can."""
    return None if hasattr(os, "memfd_create") else "the kernel has no memfd_create"


def allocate(size: int, *, name: str | bytes | None = None, domain: Domain | None = None) -> DmaBuf:
    """A new zeroed buffer of ``size`` bytes, rounded up to pages. See :func:`dmabuf.allocate`."""
    size, raw, domain = asked(size, name, domain)
    with budget.claim(size):
        fd = promised(memfd_name(domain, secrets.token_bytes(16)), size)
    return from_fd(fd, domain, exp_name=MEMFD, name=raw)


def asked(size: int, name: str | bytes | None, domain: Domain | None) -> tuple[int, bytes | None, Domain]:
    """What every heap checks first: (whole pages, the name's bytes, the domain joined).

    Errors: EINVAL a size below 1 or a bad name; TypeError a size that is no int, or no domain.
    """
    size = budget.whole(size, "allocate: size")
    if not 0 < size <= (1 << 63) - PAGE:
        raise fail(errno.EINVAL, "allocate", f"{size} bytes", "ask for at least one byte, and fewer than 2**63")
    raw = None if name is None else checked_name(name, f"{size} bytes")
    if domain is None:
        domain = Domain.default()
    elif not isinstance(domain, Domain):
        raise TypeError(f"allocate: domain is a dmabuf.Domain, as Domain.open(path) gives, not {type(domain).__name__}")
    domain.join()
    return -(-size // PAGE) * PAGE, raw, domain


def promised(name: str, size: int, *, filled: bool = False) -> OwnedFd:
    """A sealed memfd whose memory is there.

    ``filled``: with zeros. Pages that are only reserved read as zeros, but hold what was there before, and udmabuf hands them out like
    that (seen on Linux 6.12). Errors: EMFILE; ENOMEM, ENOSPC.
    """
    try:
        fd = next(map(OwnedFd, map(os.memfd_create, (name,), (os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING,))))
    except OSError as e:
        raise fail(e.errno or errno.EIO, "allocate", f"{size} bytes", "close buffers or raise RLIMIT_NOFILE") from None
    try:
        os.ftruncate(fd.number, size)
        for start in range(0, size, _SLICE):
            os.posix_fallocate(fd.number, start, min(_SLICE, size - start))
        done = 0 if filled else size
        while done < size:
            done += os.pwrite(fd.number, memoryview(_ZEROS)[: size - done], done)
        step("memfd_reserved")
        fcntl.fcntl(fd.number, _F_ADD_SEALS, SEALS)
    except OSError as e:
        fd.close()
        raise fail(e.errno or errno.EIO, "allocate", f"{size} bytes", "free memory, or raise the limit of the tmpfs or cgroup") from None
    return fd
