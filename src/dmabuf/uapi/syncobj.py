"""DRM sync objects, binary and timeline (semantics 5.14). ``node``: a descriptor of a DRM node whose driver has them."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dmabuf.errors import DmaBufError
from dmabuf.uapi import call
from dmabuf.uapi import table as t
from dmabuf.uapi.call import OwnedFd, told
from dmabuf.uapi.layout import Ioctl
from dmabuf.uapi.structures import (
    SyncobjArray,
    SyncobjCreate,
    SyncobjEventfd,
    SyncobjHandle,
    SyncobjTimelineArray,
    SyncobjTimelineWaitOld,
    SyncobjTransfer,
    SyncobjWaitOld,
)

CREATE_SIGNALED: Final = 1
WAIT_ALL, WAIT_FOR_SUBMIT, WAIT_AVAILABLE = 1, 2, 4
QUERY_LAST_SUBMITTED: Final = 1
SYNC_FILE: Final = 1  # of HANDLE_TO_FD and FD_TO_HANDLE: a sync_file instead of the object

_REMEDIES: Final[dict[int, call.Remedy]] = {
    errno.EOPNOTSUPP: ("the driver of this node has no sync objects", "open the node of a GPU"),
    errno.ENOENT: ("no such handle on this descriptor of the node", "use the descriptor that made the handle"),
    errno.ENOTTY: ("not a DRM node, or the kernel is too old", "open a node in /dev/dri"),
}


def _told(error: OSError, operation: str, obj: object, remedies: Mapping[int, call.Remedy] | None = None) -> DmaBufError:
    return told(error, f"syncobj {operation}", obj, {**_REMEDIES, **(remedies or {})})


def _do(node: int, ioctl: Ioctl[Any], value: Any, operation: str, obj: object, remedies: Mapping[int, call.Remedy] | None = None) -> Any:
    try:
        return call.perform(node, ioctl, value)
    except OSError as e:
        raise _told(e, operation, obj, remedies) from None


def _u32s(values: Sequence[int]) -> array[int]:
    return array("I", values)


def _u64s(values: Sequence[int]) -> array[int]:
    return array("Q", values)


def create(node: int, *, signaled: bool = False) -> int:
    """Make an object and return its handle.

    Raises:
        NoMemoryError: The kernel has no memory (ENOMEM).
        DmaBufError: The driver has no sync objects (EOPNOTSUPP).
    """
    found: SyncobjCreate = _do(node, t.SYNCOBJ_CREATE, SyncobjCreate(0, CREATE_SIGNALED if signaled else 0), "create", f"fd {node}")
    return found.handle


def destroy(node: int, handle: int) -> None:
    """Close a handle. A handle that doesn't exist is EINVAL."""
    _do(node, t.SYNCOBJ_DESTROY, SyncobjCreate(handle), "destroy", f"handle {handle}")


def handle_to_fd(node: int, handle: int, *, sync_file: bool = False) -> OwnedFd:
    """Return the object as a descriptor, or a sync_file of the fence in it.

    Raises:
        InvalidError: There is no such handle, or no fence in the object (EINVAL).
        DmaBufError: No descriptor is free (EMFILE).
    """
    try:
        return call.obtain(node, t.SYNCOBJ_HANDLE_TO_FD, SyncobjHandle(handle, SYNC_FILE if sync_file else 0), "fd")
    except OSError as e:
        remedies = {errno.EINVAL: ("no such handle, or it has no fence yet", "put a fence in first")}
        raise _told(e, "export", f"handle {handle}", remedies) from None


def fd_to_handle(node: int, fd: int) -> int:
    """Return a new handle for the object behind a descriptor. A descriptor of something else is EINVAL."""
    found: SyncobjHandle = _do(node, t.SYNCOBJ_FD_TO_HANDLE, SyncobjHandle(0, 0, fd), "import", f"fd {fd}")
    return found.handle


def import_sync_file(node: int, handle: int, fd: int) -> None:
    """Put the fence of a sync_file into an object.

    Raises:
        NotFoundError: There is no such handle (ENOENT).
        InvalidError: ``fd`` is not a sync_file (EINVAL).
    """
    _do(node, t.SYNCOBJ_FD_TO_HANDLE, SyncobjHandle(handle, SYNC_FILE, fd), "import", f"handle {handle}")


def wait(node: int, handles: Sequence[int], until_ns: int, flags: int = 0) -> int:
    """Wait until one of the objects (WAIT_ALL: all) is signaled, and return which. ``until_ns``: CLOCK_MONOTONIC, 0 doesn't wait.

    Raises:
        DmaBufTimeout: It isn't signaled in time (ETIME).
        InvalidError: One of them has no fence, without WAIT_FOR_SUBMIT (EINVAL).
        NotFoundError: There is no such handle (ENOENT).
    """
    raw = _u32s(handles)
    asked = SyncobjWaitOld(raw.buffer_info()[0], until_ns, len(raw), flags)  # the older size, which every kernel takes
    found: SyncobjWaitOld = _do(node, t.SYNCOBJ_WAIT_OLD, asked, "wait", f"handles {list(handles)}")
    return found.first_signaled


def timeline_wait(node: int, handles: Sequence[int], points: Sequence[int], until_ns: int, flags: int = 0) -> int:
    """Do as `wait` for a point of each. A driver without timelines is EOPNOTSUPP."""
    raw, at = _u32s(handles), _u64s(points)
    asked = SyncobjTimelineWaitOld(raw.buffer_info()[0], at.buffer_info()[0], until_ns, len(raw), flags)
    found: SyncobjTimelineWaitOld = _do(node, t.SYNCOBJ_TIMELINE_WAIT_OLD, asked, "wait", f"handles {list(handles)}")
    return found.first_signaled


def reset(node: int, handles: Sequence[int]) -> None:
    """Take the fences out.

    Raises:
        NotFoundError: There is no such handle (ENOENT).
        InvalidError: No handle is given (EINVAL).
    """
    raw = _u32s(handles)
    _do(node, t.SYNCOBJ_RESET, SyncobjArray(raw.buffer_info()[0], len(raw)), "reset", f"handles {list(handles)}")


def signal(node: int, handles: Sequence[int]) -> None:
    """Put signaled fences in. It fails as `reset` does."""
    raw = _u32s(handles)
    _do(node, t.SYNCOBJ_SIGNAL, SyncobjArray(raw.buffer_info()[0], len(raw)), "signal", f"handles {list(handles)}")


def timeline_signal(node: int, handles: Sequence[int], points: Sequence[int]) -> None:
    """Signal a point of each. It fails as `reset` does. A driver without timelines is EOPNOTSUPP."""
    raw, at = _u32s(handles), _u64s(points)
    asked = SyncobjTimelineArray(raw.buffer_info()[0], at.buffer_info()[0], len(raw))
    _do(node, t.SYNCOBJ_TIMELINE_SIGNAL, asked, "signal", f"handles {list(handles)}")


def query(node: int, handles: Sequence[int], *, submitted: bool = False) -> list[int]:
    """Return the last signaled point of each, or the last that has a fence.

    Raises:
        NotFoundError: There is no such handle (ENOENT).
        DmaBufError: The driver has no timelines (EOPNOTSUPP).
    """
    raw, at = _u32s(handles), _u64s([0] * len(handles))
    asked = SyncobjTimelineArray(raw.buffer_info()[0], at.buffer_info()[0], len(raw), QUERY_LAST_SUBMITTED if submitted else 0)
    _do(node, t.SYNCOBJ_QUERY, asked, "query", f"handles {list(handles)}")
    return at.tolist()


def transfer(node: int, source: tuple[int, int], target: tuple[int, int], flags: int = 0) -> None:
    """Copy the fence of (handle, point) to another (handle, point). A binary object has point 0.

    Raises:
        NotFoundError: There is no such handle (ENOENT).
        InvalidError: There is no fence to copy (EINVAL).
    """
    asked = SyncobjTransfer(source[0], target[0], source[1], target[1], flags)
    _do(node, t.SYNCOBJ_TRANSFER, asked, "transfer", f"handles {source[0]}, {target[0]}")


def on_eventfd(node: int, handle: int, point: int, eventfd: int, flags: int = 0) -> None:
    """Have the kernel write to an eventfd when the point is signaled (WAIT_AVAILABLE: has a fence).

    Raises:
        NotFoundError: There is no such handle (ENOENT).
        DmaBufError: The kernel is older than v6.6 (ENOTTY).
    """
    _do(node, t.SYNCOBJ_EVENTFD, SyncobjEventfd(handle, flags, point, eventfd), "eventfd", f"handle {handle}")
