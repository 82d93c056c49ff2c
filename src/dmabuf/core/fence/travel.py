"""How a container travels to another process: as its structure, over the same plain fences.

A plain or custom fence travels by its handle, because its slot holds all of its state. A container's slot is signaled by callbacks in the
process that made it, and would fail with that process. So a message has what an array or a chain is made of, and the receiver makes a
container of its own over the same members, with the same numbers. It works after its maker's death, as long as the members' owners live.

- An array arrives with all its members. A chain arrives with the points that were not signaled, and with what stood before them.
- A signaled container arrives signaled, with its error and time. An enabled one arrives enabled, and others stay lazy.
- Custom fences inside are enabled when they are sent, like any fence that becomes known to other processes.

The bytes are records of 40 bytes in prefix order and native byte order: a fence; an array and then its members; a chain and then its
points, oldest first, each followed by the fence that it contains. They come from a process of the same user. Nonsense raises ValueError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from dmabuf.core.fence.array import DmaFenceArray, array_as_sent
from dmabuf.core.fence.chain import DmaFenceChain, point_as_sent
from dmabuf.core.fence.fence import DmaFence, flagged, wrap
from dmabuf.core.fence.lazy import LazyFence
from dmabuf.domain.domain import Domain

# kind, flags, 0, timeline or error, (handle | count | prev_seqno), context, seqno, timestamp
_RECORD: Final = struct.Struct("=BBHiQQQQ")
_LEAF, _ARRAY, _CHAIN, _POINT = range(4)
_ANY, _ENABLED, _SIGNALED, _BEFORE = 1, 2, 4, 8
_DEEPEST: Final = 16  # containers inside of containers, which no program should make


def pack(fence: DmaFence) -> bytes | None:
    """Return the bytes to send for a container, None for a fence that travels by its handle."""
    return b"".join(_packed(fence)) if isinstance(fence, DmaFenceArray | DmaFenceChain) else None


def unpack(domain: Domain, data: bytes) -> DmaFence:
    """Make the container that :func:`pack` packed.

    Raises:
        ValueError: The bytes are nonsense.
        NoSpaceError: The domain is full (ENOSPC).
    """
    if not data or len(data) % _RECORD.size:
        raise ValueError(f"{len(data)} bytes are not a fence container")
    records = _RECORD.iter_unpack(data)
    try:
        fence = _unpacked(domain, records, len(data) // _RECORD.size, 0)
    except StopIteration:
        raise ValueError("a fence container ends too early") from None
    if next(records, None) is not None or not isinstance(fence, DmaFenceArray | DmaFenceChain):
        raise ValueError("a fence container continues after its end")
    return fence


def _packed(fence: DmaFence) -> Iterator[bytes]:
    if isinstance(fence, DmaFenceArray):
        flags = _state(fence) | (_ANY if fence.signal_on_any else 0)
        yield _RECORD.pack(_ARRAY, flags, 0, fence.error, len(fence.fences), fence.context, fence.seqno, fence.timestamp)
        for member in fence.fences:
            yield from _packed(member)
    elif isinstance(fence, DmaFenceChain):
        points = list(fence)[::-1]
        before = None if isinstance(points[0], DmaFenceChain) else points.pop(0)
        yield _RECORD.pack(_CHAIN, _BEFORE if before is not None else 0, 0, 0, len(points), 0, 0, 0)
        if before is not None:
            yield from _packed(before)
        for point in points:
            assert isinstance(point, DmaFenceChain)
            yield _RECORD.pack(_POINT, _state(point), 0, point.error, point.prev_seqno, point.context, point.seqno, point.timestamp)
            yield from _packed(point.fence)
    else:
        fence.publish()
        fence.shm.fence_share(fence.handle)  # from now on a drop of the pending fence is an error to others
        yield _RECORD.pack(_LEAF, 0, 0, fence.timeline_index, fence.handle, fence.context, fence.seqno, 0)


def _state(fence: LazyFence) -> int:
    return (_SIGNALED if flagged(fence) else 0) | (_ENABLED if fence.enabled else 0)


def _unpacked(domain: Domain, records: Iterator[tuple[int, ...]], most: int, depth: int) -> DmaFence:
    kind, flags, _, number, first, context, seqno, timestamp = next(records)
    if depth > _DEEPEST:
        raise ValueError(f"containers are nested deeper than {_DEEPEST}")
    if kind == _LEAF:
        return wrap(domain, first & 0xFFFFFFFFFFFFFFFF, (context, seqno, number & 0xFFFFFFFF))
    if kind not in (_ARRAY, _CHAIN) or not 1 <= first <= most:
        raise ValueError(f"a fence of kind {kind} with {first} parts")
    if kind == _ARRAY:
        members = [_unpacked(domain, records, most, depth + 1) for _ in range(first)]
        return _as_it_was(array_as_sent(members, bool(flags & _ANY), context, seqno), flags, number, timestamp)
    before = _unpacked(domain, records, most, depth + 1) if flags & _BEFORE else None
    for _ in range(first):
        kind, flags, _, number, prev_seqno, context, seqno, timestamp = next(records)
        if kind != _POINT:
            raise ValueError(f"a point of kind {kind}")
        inside = _unpacked(domain, records, most, depth + 1)
        before = _as_it_was(point_as_sent(before, inside, context, seqno, prev_seqno), flags, number, timestamp)
    assert before is not None
    return before


def _as_it_was(fence: LazyFence, flags: int, error: int, timestamp: int) -> LazyFence:
    if flags & _SIGNALED:
        fence.shm.fence_signal(fence.handle, error if -4095 <= error < 0 else 0, False, timestamp)
    elif flags & _ENABLED:
        fence.enable_signaling()
    return fence
