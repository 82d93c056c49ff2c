"""The ioctls of a sync_file: one fence, or several merged, as a descriptor (semantics 5.10)."""

from __future__ import annotations

import errno
from array import array
from typing import NamedTuple

from dmabuf.uapi import call
from dmabuf.uapi import table as t
from dmabuf.uapi.call import OwnedFd, told
from dmabuf.uapi.structures import FenceInfo, FileInfo, Merge, SetDeadline

NAME_BYTES = 32  # with its NUL


class Info(NamedTuple):
    """``status``: 1 all signalled, 0 pending, else the first error; ``fences``: each leaf."""

    name: bytes
    status: int
    fences: list[FenceInfo]


def text(raw: bytes) -> bytes:
    """What a char array says."""
    return raw.partition(b"\0")[0]


def merge(fd: int, other: int, name: bytes = b"", *, of: object = None) -> OwnedFd:
    """A new sync_file of the pending fences of both; its name is cut to 31 bytes.

    Errors: ENOENT ``other`` is no sync_file; ENOTTY ``fd`` is none; EMFILE; ENOMEM.
    """
    try:
        return call.obtain(fd, t.SYNC_MERGE, Merge(name[: NAME_BYTES - 1], other), "fence")
    except OSError as e:
        remedies = {errno.ENOENT: f"fd {other} is no sync_file of the kernel's", errno.ENOTTY: "it is no sync_file of the kernel's"}
        raise told(e, "merge", of or f"fd {fd}", remedies) from None


def file_info(fd: int, *, of: object = None) -> Info:
    """Name, status and fences. Errors: ENOTTY no sync_file; ENOMEM."""
    try:
        head = call.perform(fd, t.SYNC_FILE_INFO, FileInfo())
        # Leaves only become fewer, as links of a chain are collected.
        room = array("B", bytes(max(1, head.num_fences) * t.FENCE_INFO.size))
        asked = FileInfo(num_fences=max(1, head.num_fences), sync_fence_info=room.buffer_info()[0])
        found = call.perform(fd, t.SYNC_FILE_INFO, asked)
    except OSError as e:
        raise told(e, "file_info", of or f"fd {fd}", {errno.ENOTTY: "it is no sync_file of the kernel's"}) from None
    raw = [t.FENCE_INFO.unpack(memoryview(room), i * t.FENCE_INFO.size) for i in range(found.num_fences)]
    fences = [one._replace(obj_name=text(one.obj_name), driver_name=text(one.driver_name)) for one in raw]
    return Info(text(found.name), found.status, fences)


def set_deadline(fd: int, deadline_ns: int, *, of: object = None) -> None:
    """Tell the fences by when they are wanted, CLOCK_MONOTONIC nanoseconds. Errors: ENOTTY before v6.8, or no sync_file."""
    try:
        call.perform(fd, t.SYNC_SET_DEADLINE, SetDeadline(deadline_ns))
    except OSError as e:
        raise told(e, "set_deadline", of or f"fd {fd}", {errno.ENOTTY: "it needs Linux 6.8 or newer, and a sync_file"}) from None
