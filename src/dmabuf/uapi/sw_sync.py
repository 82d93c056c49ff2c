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
    errno.ENOENT: "it needs a kernel with CONFIG_SW_SYNC, and debugfs: mount -t debugfs debugfs /sys/kernel/debug",
    errno.EACCES: "debugfs is root's",
}


def open_timeline(path: str = PATH) -> OwnedFd:
    """A new timeline at 0; its close ends what is pending with ENOENT. Errors: ENOENT the kernel has none; EACCES; EMFILE."""
    return call.open_node(path, "sw_sync", _OPEN)


def create_fence(timeline: int, value: int, *, of: object = None) -> OwnedFd:
    """A sync_file that is signalled when the timeline reaches ``value`` (32 bits, compared as signed).

    Errors: ENOTTY no timeline; EMFILE.
    """
    try:
        return call.obtain(timeline, t.SW_SYNC_CREATE_FENCE, SwSyncFence(value), "fence")
    except OSError as e:
        raise told(e, "create_fence", of or f"fd {timeline}", {errno.ENOTTY: "it is no sw_sync timeline"}) from None


def increment(timeline: int, by: int = 1, *, of: object = None) -> None:
    """Move the timeline on. Errors: ENOTTY no timeline."""
    try:
        call.perform(timeline, t.SW_SYNC_INC, Pointer(by))
    except OSError as e:
        raise told(e, "increment", of or f"fd {timeline}", {errno.ENOTTY: "it is no sw_sync timeline"}) from None


def get_deadline(timeline: int, sync_file: int, *, of: object = None) -> int:
    """The earliest deadline that a fence of it was given, in ns. Errors: ENOENT none; EINVAL no fence of sw_sync; ENOTTY before v6.8."""
    try:
        return call.perform(timeline, t.SW_SYNC_GET_DEADLINE, SwSyncDeadline(0, 0, sync_file)).deadline_ns
    except OSError as e:
        remedies = {
            errno.ENOENT: "none was set",
            errno.EINVAL: "pass a sync_file with one fence of sw_sync",
            errno.ENOTTY: "it needs Linux 6.8",
        }
        raise told(e, "get_deadline", of or f"fd {timeline}", remedies) from None
