"""The ioctls of a sync_file: one fence, or several merged, as a descriptor (semantics 5.10)."""

from __future__ import annotations

import errno
from array import array
from typing import Final, NamedTuple

from dmabuf.uapi import call
from dmabuf.uapi import table as t
from dmabuf.uapi.call import OwnedFd, told
from dmabuf.uapi.structures import FenceInfo, FileInfo, Merge, SetDeadline

NAME_BYTES = 32  # with its NUL


_PASS: Final = "pass a sync_file of the kernel"
_NO_SYNC_FILE: Final[dict[int, call.Remedy]] = {errno.ENOTTY: ("not a sync_file of the kernel", _PASS)}


class Info(NamedTuple):
    """A sync_file. ``status``: 1 if all fences are signaled, 0 if one is pending, else the first error. ``fences``: each leaf."""

    name: bytes
    status: int
    fences: list[FenceInfo]


def text(raw: bytes) -> bytes:
    """Return the text in a char array."""
    return raw.partition(b"\0")[0]


def merge(fd: int, other: int, name: bytes = b"", *, of: object = None) -> OwnedFd:
    """Return a new sync_file of the pending fences of both. Its name is cut to 31 bytes.

    Raises:
        NotFoundError: ``other`` is not a sync_file (ENOENT).
        NoMemoryError: The kernel has no memory (ENOMEM).
        DmaBufError: ``fd`` is not a sync_file (ENOTTY), or no descriptor is free (EMFILE).
    """
    try:
        return call.obtain(fd, t.SYNC_MERGE, Merge(name[: NAME_BYTES - 1], other), "fence")
    except OSError as e:
        remedies = _NO_SYNC_FILE | {errno.ENOENT: (f"fd {other} is not a sync_file of the kernel", _PASS)}
        raise told(e, "merge", of or f"fd {fd}", remedies) from None


def file_info(fd: int, *, of: object = None) -> Info:
    """Return name, status and fences.

    Raises:
        NoMemoryError: The kernel has no memory (ENOMEM).
        DmaBufError: ``fd`` is not a sync_file (ENOTTY).
    """
    try:
        head = call.perform(fd, t.SYNC_FILE_INFO, FileInfo())
        # The number of leaves can only fall meanwhile, as links of a chain are collected.
        room = array("B", bytes(max(1, head.num_fences) * t.FENCE_INFO.size))
        asked = FileInfo(num_fences=max(1, head.num_fences), sync_fence_info=room.buffer_info()[0])
        found = call.perform(fd, t.SYNC_FILE_INFO, asked)
    except OSError as e:
        raise told(e, "file_info", of or f"fd {fd}", _NO_SYNC_FILE) from None
    raw = [t.FENCE_INFO.unpack(memoryview(room), i * t.FENCE_INFO.size) for i in range(found.num_fences)]
    fences = [FenceInfo(text(one.obj_name), text(one.driver_name), one.status, one.flags, one.timestamp_ns) for one in raw]
    return Info(text(found.name), found.status, fences)


def set_deadline(fd: int, deadline_ns: int, *, of: object = None) -> None:
    """Set a deadline of the fences, CLOCK_MONOTONIC nanoseconds. It fails with ENOTTY before v6.8, or if ``fd`` is not a sync_file."""
    try:
        call.perform(fd, t.SYNC_SET_DEADLINE, SetDeadline(deadline_ns))
    except OSError as e:
        raise told(
            e, "set_deadline", of or f"fd {fd}", {errno.ENOTTY: ("the kernel can't do this", f"use Linux 6.8 or newer, and {_PASS}")}
        ) from None
