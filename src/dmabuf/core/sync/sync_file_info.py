"""What a sync file says of itself: names, states and snapshots (semantics 5.10)."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from dmabuf.core.fence.fence import DmaFence, wrap
from dmabuf.domain.domain import Domain
from dmabuf.domain.sync_files import Leaf
from dmabuf.errors import fail

NAME_BYTES = 31  # of a char[32] with its NUL (semantics 5.1)


@dataclass(frozen=True)
class SyncFenceInfo:
    """One fence of a sync file (struct sync_fence_info).

    ``obj_name``: the timeline's name. ``timestamp_ns``: CLOCK_MONOTONIC, 0 while the fence is pending.
    """

    obj_name: str
    driver_name: str
    status: int
    flags: int
    timestamp_ns: int


@dataclass(frozen=True)
class SyncFileInfo:
    """What FILE_INFO says. ``status``: 1 signaled, 0 pending, or the errno of the first fence that failed."""

    name: str
    status: int
    flags: int
    num_fences: int
    fences: tuple[SyncFenceInfo, ...]


@dataclass(frozen=True)
class SyncFileStatistics:
    """A snapshot of a sync file. ``descriptor``: whether it was asked for. ``kernel``: whether it is a kernel sync_file."""

    name: str
    status: int
    fences: int
    pending: int
    descriptor: bool
    kernel: bool


def fence_info(leaf: DmaFence) -> SyncFenceInfo:
    """Return what FILE_INFO says of a fence of this library."""
    status = leaf.status  # before the timestamp, which comes with it
    return SyncFenceInfo(_cut(leaf.timeline_name), _cut(leaf.driver_name), status, 0, leaf.timestamp)


def _cut(text: str) -> str:
    return os.fsdecode(os.fsencode(text)[:NAME_BYTES])


def name_of(fence: DmaFence) -> bytes:
    """Return the name of a sync file that got none: ``driver-timeline<context>-<seqno>``."""
    seqno = fence.seqno - (1 << 64) if fence.seqno >= 1 << 63 else fence.seqno
    return os.fsencode(f"{fence.driver_name}-{fence.timeline_name}{fence.context}-{seqno}")[:NAME_BYTES]


def cut_name(name: str | bytes | None) -> bytes:
    """Return the bytes of a name that a caller gave, cut to 31. Raises InvalidError for a NUL."""
    raw = b"" if name is None else os.fsencode(name)
    if b"\0" in raw:
        raise fail(errno.EINVAL, "name", "a sync file", "use a name without a NUL", what="the name has a NUL")
    return raw[:NAME_BYTES]


def leaf_of(fence: DmaFence) -> Leaf:
    """Return what the record of a sync file says of one of its fences."""
    names = os.fsencode(fence.driver_name), os.fsencode(fence.timeline_name)
    return Leaf(fence.handle, fence.context, fence.seqno, fence.timeline_index, fence.status, fence.timestamp, *names)


def fence_of(domain: Domain, leaf: Leaf) -> DmaFence:
    """Return the fence that a record names."""
    past = leaf.context, leaf.seqno, leaf.timeline, leaf.status, leaf.timestamp
    return wrap(domain, leaf.handle, past, (os.fsdecode(leaf.driver), os.fsdecode(leaf.name)))
