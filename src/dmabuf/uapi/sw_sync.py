"""The kernel's software timeline for tests: ``sync/sw_sync`` in debugfs (semantics 5.11)."""

from __future__ import annotations

import errno
from typing import Final

from dmabuf.uapi import call
from dmabuf.uapi import table as t
from dmabuf.uapi.call import OwnedFd, told
from dmabuf.uapi.structures import Pointer, SwSyncDeadline, SwSyncFence

PATH: Final = "/sys/kernel/debug/sync/sw_sync"

_OPEN: Final = {
    errno.ENOENT: "use a kernel with CONFIG_SW_SYNC, and run: mount -t debugfs debugfs /sys/kernel/debug",
    errno.EACCES: "run as root, to whom debugfs belongs",
}
_NO_TIMELINE: Final = {errno.ENOTTY: ("not a sw_sync timeline", "pass the descriptor of one")}


def open_timeline(path: str = PATH) -> OwnedFd:
    """Return a new timeline at 0. Its close signals pending fences with ENOENT.

    Raises:
        NotFoundError: The kernel has no sw_sync (ENOENT).
        NotPermittedError: The user may not open it (EACCES).
        DmaBufError: No descriptor is free (EMFILE).
    """
    return call.open_node(path, "sw_sync", _OPEN)


def create_fence(timeline: int, value: int, *, of: object = None) -> OwnedFd:
    """Return a sync_file that is signaled when the timeline reaches ``value`` (32 bits, compared as signed).

    Raises:
        DmaBufError: ``timeline`` is not a timeline (ENOTTY), or no descriptor is free (EMFILE).
    """
    try:
        return call.obtain(timeline, t.SW_SYNC_CREATE_FENCE, SwSyncFence(value), "fence")
    except OSError as e:
        raise told(e, "create_fence", of or f"fd {timeline}", _NO_TIMELINE) from None


def increment(timeline: int, by: int = 1, *, of: object = None) -> None:
    """Increment the timeline. A descriptor that is not a timeline is ENOTTY."""
    try:
        call.perform(timeline, t.SW_SYNC_INC, Pointer(by))
    except OSError as e:
        raise told(e, "increment", of or f"fd {timeline}", _NO_TIMELINE) from None


def get_deadline(timeline: int, sync_file: int, *, of: object = None) -> int:
    """Return the earliest deadline of the fences of a sync_file, in ns.

    Raises:
        NotFoundError: They have no deadline (ENOENT).
        InvalidError: One of them is not a fence of sw_sync (EINVAL).
        DmaBufError: The kernel is older than v6.8 (ENOTTY).
    """
    try:
        return call.perform(timeline, t.SW_SYNC_GET_DEADLINE, SwSyncDeadline(0, 0, sync_file)).deadline_ns
    except OSError as e:
        remedies = {
            errno.ENOENT: ("no deadline was set", "set one first"),
            errno.EINVAL: ("not a fence of sw_sync", "pass a sync_file with one fence of sw_sync"),
            errno.ENOTTY: ("the kernel can't do this", "use Linux 6.8 or newer"),
        }
        raise told(e, "get_deadline", of or f"fd {timeline}", remedies) from None
