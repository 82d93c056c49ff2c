"""How a descriptor becomes a handle: ``get``, and what heaps and receivers use (semantics 2.3).

Each way checks that the descriptor is a buffer and of which domain, puts the reference lock on it, and finds or makes its record, in this
order. A function that takes a descriptor over closes it when a step fails.
"""

from __future__ import annotations

import fcntl

from dmabuf._native import owned, recognize_buffer, reference_buffer
from dmabuf.core.buffer import shared
from dmabuf.core.buffer.handle import close_fd
from dmabuf.core.buffer.identity import described, identify, put_reference_lock
from dmabuf.core.buffer.shared import MEMFD
from dmabuf.core.dma_buf import DmaBuf, new_handle
from dmabuf.domain.domain import Domain
from dmabuf.errors import needing_descriptors
from dmabuf.uapi.call import OwnedFd


def get(fd: int, *, domain: Domain | None = None) -> DmaBuf:
    """Return a new handle for the buffer behind a file descriptor (semantics 2.3). The caller keeps ``fd``.

    Args:
        fd: The descriptor of a buffer from this library, or of a kernel dma-buf, which is taken into the domain.
        domain: The domain to look in; None means the user's default domain.

    Returns:
        A handle with a descriptor of its own, equal to every other handle of the buffer.

    Raises:
        ClosedError: ``fd`` is not open (EBADF).
        InvalidError: ``fd`` is not a dma-buf (EINVAL).
        CrossDomainError: The buffer belongs to another domain (EXDEV).
        NoDeviceError: The exporter has released the buffer (ENODEV).
        NotPermittedError: ``fd`` is a kernel dma-buf that is open for writing only (EACCES).
        DmaBufError: The process has no descriptor left (EMFILE).

    Kernel: dma_buf_get.
    """
    domain = domain or Domain.default()
    identify(fd, domain)
    with needing_descriptors("get", f"fd {fd}"):
        own = owned(fcntl.fcntl, fd, fcntl.F_DUPFD_CLOEXEC, 0)
    return from_fd(own, domain)


def received(fd: OwnedFd, domain: Domain, dev: int, ino: int, nonce: bytes, name: bytes | None) -> DmaBuf:
    """:func:`from_fd` of what a process of this user and domain says it is; the inode and the record must agree.

    Then the link in /proc, the most expensive check of a new descriptor, need not be read.
    """
    try:
        size = reference_buffer(fd.number, dev, ino)
        found = shared.confirmed(domain, dev, ino, size, nonce) if size >= 0 else None
    except BaseException:
        fd.close()
        raise
    return from_fd(fd, domain, name=name) if found is None else new_handle(fd, found, name)


def from_fd(
    fd: int | OwnedFd,
    domain: Domain,
    *,
    exp_name: bytes = MEMFD,
    home: bytes = MEMFD,
    name: bytes | None = None,
    layout: bytes | None = None,
    part: int = 0,
) -> DmaBuf:
    """Return a handle that takes ``fd`` over; on an error it is closed. ``layout``, ``part``: of a buffer that has no record yet."""
    try:
        number = fd if isinstance(fd, int) else fd.number
        taken = recognize_buffer(number, domain.id)
        if taken is None:  # a kernel dma-buf, or what the slow way says it isn't
            found = identify(number, domain)
            taken = found[:4]
            put_reference_lock(number)
            if found.kernel:
                exp_name, home, name = described(number)
        buffer = shared.adopt(domain, *taken, exp_name, home)
        if layout is not None:
            buffer.layout = part, layout
    except BaseException:
        close_fd(fd)
        raise
    return new_handle(fd, buffer, name)
