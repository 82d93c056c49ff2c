"""What an fd is: a buffer of this domain, of another one, or none.

A memfd buffer is a memfd named ``dmabuf:<domain>:<nonce>`` (16 and 32 hexadecimal digits), sealed against shrinking, growing and
further seals. The fd carries an OFD read lock on byte 0, the lease: every dup, every fd in flight and every mapping keeps it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from typing import NamedTuple

from dmabuf import _native
from dmabuf.domain import place
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_NAME = re.compile(rb"/memfd:dmabuf:([0-9a-f]{16}):([0-9a-f]{32})(?: \(deleted\))?\Z")


class Identity(NamedTuple):
    """Who a buffer is, from its fd alone: nothing of this was read from shared memory."""

    dev: int
    ino: int
    size: int
    nonce: bytes


def memfd_name(domain: Domain, nonce: bytes) -> str:
    """The name to give a buffer's memfd (memfd_create(2))."""
    return f"dmabuf:{domain.id}:{nonce.hex()}"


def take_lease(fd: int) -> None:
    """Put the lease on an fd; nothing new on a description that has it. Errors: ENODEV its exporter has taken the buffer back."""
    if not place.ofd_lock(fd, fcntl.F_RDLCK, 0):
        raise fail(errno.ENODEV, "get", f"fd {fd}", "ask its exporter for a new buffer", what="the exporter has released this buffer")


def identify(fd: int, domain: Domain, operation: str = "get") -> Identity:
    """The buffer behind an fd.

    Errors: EBADF no open fd; EINVAL no buffer; EXDEV a buffer of another domain (spec 2.3).
    """
    try:
        dev, ino, size, seals, link, _ = _native.probe_fd(fd)
    except (OSError, OverflowError) as e:
        if isinstance(e, OSError) and e.errno != errno.EBADF:
            raise
        raise fail(errno.EBADF, operation, f"fd {fd}", "pass an open file descriptor") from None
    match = _NAME.match(link)
    if match is None or seals < 0 or seals & SEALS != SEALS:
        raise fail(
            errno.EINVAL,
            operation,
            f"fd {fd}",
            "make buffers with dmabuf.allocate(); other memory is shared by copying into one",
            what=f"it is no dma-buf ({os.fsdecode(link) or 'unknown'})",
        )
    if match[1].decode() != domain.id:
        raise fail(
            errno.EXDEV,
            operation,
            f"fd {fd}",
            "start both processes with the same DMABUF_DOMAIN (one user: the same directory), or send the private domain along",
            what=f"the buffer belongs to domain {match[1].decode()}, this process uses {domain.id}",
        )
    return Identity(dev, ino, size, bytes.fromhex(match[2].decode()))
