"""Bytes that travel in a sealed memfd, because they are too many for a message.

The receiver believes nothing: what a peer sends in place of such a memfd may be a pipe, whose read never ends, a device, a file of any
length that costs its sender nothing, or one that changes while it is read. So it must be a memfd with every seal, which is a regular file
in memory whose bytes and size never change, not longer than allowed, and with memory for all of its bytes.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

from dmabuf._native import OwnedFd, probe_fd

SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 8  # F_SEAL_WRITE, linux/fcntl.h
_F_ADD_SEALS: Final = 1033
_PIECE: Final = 1 << 20


def sealed(name: str, data: bytes) -> OwnedFd:
    """Return a sealed memfd with these bytes. It fails with a plain OSError (EMFILE, ENOMEM)."""
    memory = next(map(OwnedFd, map(os.memfd_create, (name,), (os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING,))))
    try:
        done = 0
        while done < len(data):
            done += memory.pwrite(memoryview(data)[done:], done)
        fcntl.fcntl(memory.number, _F_ADD_SEALS, SEALS)
    except BaseException:
        memory.close()
        raise
    return memory


def content(memory: OwnedFd, least: int, most: int) -> bytes:
    """Return the bytes of a sealed memfd that a peer sent.

    Raises:
        ValueError: It is not one, or has fewer or more bytes than allowed; in words that continue "the memory".
    """
    _, _, size, seals, _, _ = probe_fd(memory.fileno())
    if seals < 0 or seals & SEALS != SEALS:
        raise ValueError("is not a sealed memfd")
    if not least <= size <= most:
        raise ValueError(f"has {size} bytes")
    if os.fstat(memory.fileno()).st_blocks * 512 < size:
        raise ValueError("has holes")
    data, done = bytearray(size), 0
    while done < size:
        got = memory.pread(memoryview(data)[done : done + _PIECE], done)
        if not got:
            raise ValueError("is shorter than it was")
        done += got
    return bytes(data)
