"""The ioctls of a dma-buf's descriptor, and its fdinfo (semantics 5.2–5.7). ``of``: the object in the message of an error."""

from __future__ import annotations

import errno
import os
from typing import Final, NamedTuple

from dmabuf.uapi import call
from dmabuf.uapi import table as t
from dmabuf.uapi.call import OwnedFd, told
from dmabuf.uapi.structures import Sync, SyncFileOf

MAGIC: Final = 0x444D4142  # DMA_BUF_MAGIC, what fstatfs(2) says of a dma-buf (include/uapi/linux/magic.h)
READ, WRITE, RW, START, END = 1, 2, 3, 0, 4
NAME_BYTES: Final = 32  # DMA_BUF_NAME_LEN, with its NUL

_NO_SYNC_FILE: dict[int, call.Remedy] = {errno.ENOTTY: ("the kernel can't do this", "use Linux 6.0 or newer, with CONFIG_SYNC_FILE")}


def sync(fd: int, flags: int, *, interruptible: bool = False, of: object = None, noted: call.Noted | None = None) -> None:
    """Begin or end a CPU access: START waits for the kernel's fences, END for nothing (DMA_BUF_IOCTL_SYNC, semantics 5.3).

    EINTR and EAGAIN restart the call, EINTR only if not ``interruptible``. ``noted``: what calls the system call, and notes it.

    Raises:
        InvalidError: There are flags beyond READ, WRITE and END, or neither READ nor WRITE, or the exporter says so (EINVAL).
    """
    try:
        call.perform(fd, t.DMA_BUF_SYNC, Sync(flags), interruptible=interruptible, noted=noted)
    except OSError as e:
        raise told(
            e, "sync", of or f"fd {fd}", {errno.EINVAL: ("bad flags", "pass READ 1, WRITE 2 or RW 3, plus END 4 for the end")}
        ) from None


def set_name(fd: int, name: bytes, *, of: object = None) -> None:
    """Name a dma-buf (DMA_BUF_SET_NAME, semantics 5.4).

    Raises:
        InvalidError: The name has more than 31 bytes, or a NUL, which would end it (EINVAL).
        NoMemoryError: The kernel has no memory (ENOMEM).
    """
    try:
        if b"\0" in name or len(name) >= NAME_BYTES:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        call.perform_raw(fd, t.DMA_BUF_SET_NAME_B.number, name + b"\0")
    except OSError as e:
        raise told(
            e, "name", of or f"fd {fd}", {errno.EINVAL: ("bad name", f"use at most {NAME_BYTES - 1} bytes, without a NUL")}
        ) from None


def export_sync_file(fd: int, flags: int, *, of: object = None) -> OwnedFd:
    """Return a sync_file of the fences that a reader (READ) or writer (WRITE, RW) would wait for now (semantics 5.5).

    Raises:
        InvalidError: The flags are 0 or beyond RW (EINVAL).
        NoMemoryError: The kernel has no memory (ENOMEM).
        DmaBufError: The kernel has no such ioctl (ENOTTY), or no descriptor is free (EMFILE).
    """
    try:
        return call.obtain(fd, t.DMA_BUF_EXPORT_SYNC_FILE, SyncFileOf(flags), "fd")
    except OSError as e:
        raise told(e, "export_sync_file", of or f"fd {fd}", _NO_SYNC_FILE) from None


def import_sync_file(fd: int, flags: int, sync_file: int, *, of: object = None) -> None:
    """Add a sync_file's fences, as a writer's with WRITE, else as a reader's (semantics 5.5).

    Raises:
        InvalidError: The flags are 0 or beyond RW, or it is not a sync_file (EINVAL).
        NoMemoryError: The kernel has no memory (ENOMEM).
        DmaBufError: The kernel has no such ioctl (ENOTTY).
    """
    try:
        call.perform(fd, t.DMA_BUF_IMPORT_SYNC_FILE, SyncFileOf(flags, sync_file))
    except OSError as e:
        what = "not a sync_file of the kernel, or bad flags"
        remedies = _NO_SYNC_FILE | {errno.EINVAL: (what, "pass a sync_file of the kernel, with READ or WRITE")}
        raise told(e, "import_sync_file", of or f"fd {fd}", remedies) from None


class FdInfo(NamedTuple):
    """The fdinfo of a dma-buf in /proc. ``references``: without the one of this reading; ``name``: None if never set."""

    size: int
    references: int
    exp_name: bytes
    name: bytes | None
    text: bytes


def fdinfo(fd: int, *, process: str = "self") -> FdInfo:
    """Read the fdinfo of a descriptor.

    Raises:
        InvalidError: It is not a dma-buf (EINVAL).
        OSError: /proc says so; a closed descriptor is ENOENT.
    """
    with open(f"/proc/{process}/fdinfo/{fd}", "rb", buffering=0) as f:
        text = f.read()
    return parse_fdinfo(text)


def parse_fdinfo(text: bytes) -> FdInfo:
    """Parse the kernel's text (semantics 5.7). The name comes last and may contain any byte, also a line feed. Other text is EINVAL."""
    head, separator, rest = text.partition(b"\nexp_name:\t")
    fields = dict(line.split(b":\t", 1) for line in head.split(b"\n") if b":\t" in line)
    exp_name, _, tail = rest.partition(b"\n")
    if not separator or b"size" not in fields or b"count" not in fields:
        raise told(OSError(errno.EINVAL, ""), "fdinfo", "descriptor", {errno.EINVAL: ("not a dma-buf", "pass the descriptor of a dma-buf")})
    name = tail.removeprefix(b"name:\t").removesuffix(b"\n") if tail.startswith(b"name:\t") else None
    return FdInfo(int(fields[b"size"]), int(fields[b"count"]), exp_name, name, text)
