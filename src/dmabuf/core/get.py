"""How a descriptor becomes a handle: ``get``, and what heaps and receivers use (spec 2.3).

Each way checks that it is a buffer and of which domain, takes the lease on it, and finds or makes its record, in this order. What takes a
descriptor over closes it when a step fails.
"""

from __future__ import annotations

import fcntl
import os

from dmabuf import _native
from dmabuf.core.buffer.handle import MEMFD, close_fd
from dmabuf.core.buffer.identity import described, identify, take_lease
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.domain.domain import Domain
from dmabuf.domain.records import adopt, confirmed
from dmabuf.errors import needing_descriptors
from dmabuf.uapi.call import OwnedFd


def get(fd: int, *, domain: Domain | None = None) -> DmaBuf:
    """An own reference to the buffer behind an fd that came as a plain number; the caller keeps the fd (spec 2.3).

    A real dma-buf, whoever made it, is taken into the domain. Errors: EBADF no open fd; EINVAL no dma-buf; EXDEV a buffer of another
    domain; ENODEV its exporter has released it; EACCES a real one that is open for writing only; EMFILE.
    Kernel: dma_buf_get.
    """
    domain = domain or Domain.default()
    identify(fd, domain)
    with needing_descriptors("get", f"fd {fd}"):
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    return from_fd(own, domain)


def received(fd: int, domain: Domain, dev: int, ino: int, nonce: bytes, name: bytes | None) -> DmaBuf:
    """:func:`from_fd` of what a process of this user and domain says it is; the inode and the record must agree.

    Then the link in /proc, which is the dearest of all looks at a fresh descriptor, need not be read.
    """
    try:
        size = _native.reference_buffer(fd, dev, ino)
        record = confirmed(domain, dev, ino, size, nonce) if size >= 0 else None
    except BaseException:
        os.close(fd)
        raise
    return from_fd(fd, domain, name=name) if record is None else DmaBuf._make(fd, record, name)


def from_fd(fd: int | OwnedFd, domain: Domain, *, exp_name: bytes = MEMFD, home: bytes = MEMFD, name: bytes | None = None) -> DmaBuf:
    """A handle that takes over fd; on an error the fd is closed."""
    try:
        number = fd if isinstance(fd, int) else fd.number
        taken = _native.recognize_buffer(number, domain.id)
        if taken is None:  # a real dma-buf, or what the slow way says it isn't
            found = identify(number, domain)
            taken = found[:4]
            take_lease(number)
            if found.kernel:
                exp_name, home, name = described(number)
        record = adopt(domain, *taken, exp_name, home, name)
    except BaseException:
        close_fd(fd)
        raise
    return DmaBuf._make(fd, record, name)
