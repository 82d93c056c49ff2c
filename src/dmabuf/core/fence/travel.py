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

import errno
import struct
from collections.abc import Iterator
from typing import Final

from dmabuf.core.fence.array import DmaFenceArray, array_as_sent
from dmabuf.core.fence.chain import DmaFenceChain, point_as_sent
from dmabuf.core.fence.fence import DmaFence, flagged, wrap
from dmabuf.core.fence.lazy import LazyFence
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail

# kind, flags, 0, timeline or error, (handle | count | prev_seqno), context, seqno, timestamp
_RECORD: Final = struct.Struct("=BBHiQQQQ")
_LEAF, _ARRAY, _CHAIN, _POINT = range(4)
_ANY, _ENABLED, _SIGNALED, _BEFORE = 1, 2, 4, 8
MOST_BYTES: Final = (1 << 20) * _RECORD.size  # of a container; send() makes none that is longer
_DEEPEST: Final = 16  # containers inside of containers, which no program should make


def pack(fence: DmaFence) -> bytes | None:
    """Return the bytes to send for a container, None for a fence that travels by its handle.

    Raises:
        DmaBufError: Containers are nested deeper than a receiver takes (EMSGSIZE).
    """
    return b"".join(_packed(fence, 0)) if isinstance(fence, DmaFenceArray | DmaFenceChain) else None


def unpack(domain: Domain, data: bytes) -> DmaFence:
    """Make the container that :func:`pack` packed. All of the bytes are checked before the first fence is made.

    Raises:
        ValueError: The bytes are nonsense.
        NoSpaceError: The domain is full (ENOSPC).
    """
    if not data or len(data) % _RECORD.size or len(data) > MOST_BYTES:
        raise ValueError(f"{len(data)} bytes are not a fence container")
    if data[0] not in (_ARRAY, _CHAIN):
        raise ValueError(f"a fence of kind {data[0]} is not a container")
    _check(data)
    return _unpacked(domain, _RECORD.iter_unpack(data))


class _Open:
    """A container, or a point, whose parts are being read. ``parts``: that are missing; ``before``: also what stood before a chain."""

    __slots__ = ("before", "depth", "parts", "points")

    def __init__(self, parts: int, depth: int, points: bool = False, before: bool = False) -> None:
        self.parts, self.depth, self.points, self.before = parts, depth, points, before


def _check(data: bytes) -> None:
    """Raise ValueError unless the records are one container and nothing else."""
    inside = [_Open(1, 0)]
    for kind, flags, _, _, first, *_ in _RECORD.iter_unpack(data):
        while inside and not (inside[-1].parts or inside[-1].before):
            inside.pop()
        if not inside:
            raise ValueError("a fence container continues after its end")
        around = inside[-1]
        wanted = around.points and not around.before
        if wanted != (kind == _POINT):
            raise ValueError(f"a fence of kind {kind} where {'a point' if wanted else 'a fence'} must be")
        if around.before:
            around.before = False
        else:
            around.parts -= 1
        if kind == _POINT:
            inside.append(_Open(1, around.depth))
        elif kind in (_ARRAY, _CHAIN):
            if not 1 <= first <= len(data) // _RECORD.size:
                raise ValueError(f"a fence of kind {kind} with {first} parts")
            if around.depth >= _DEEPEST:
                raise ValueError(f"containers are nested deeper than {_DEEPEST}")
            inside.append(_Open(first, around.depth + 1, kind == _CHAIN, kind == _CHAIN and bool(flags & _BEFORE)))
        elif kind != _LEAF:
            raise ValueError(f"a fence of kind {kind}")
    if any(one.parts or one.before for one in inside):
        raise ValueError("a fence container ends too early")


def _packed(fence: DmaFence, depth: int) -> Iterator[bytes]:
    if depth >= _DEEPEST and isinstance(fence, DmaFenceArray | DmaFenceChain):
        remedy = "pass merge(*unwrap(fence)), which nests nothing"
        raise fail(errno.EMSGSIZE, "send", "a container of fences", remedy, what=f"it is nested deeper than {_DEEPEST}")
    if isinstance(fence, DmaFenceArray):
        flags = _state(fence) | (_ANY if fence.signal_on_any else 0)
        yield _RECORD.pack(_ARRAY, flags, 0, fence.error, len(fence.fences), fence.context, fence.seqno, fence.timestamp)
        for member in fence.fences:
            yield from _packed(member, depth + 1)
    elif isinstance(fence, DmaFenceChain):
        points = list(fence)[::-1]
        before = None if isinstance(points[0], DmaFenceChain) else points.pop(0)
        yield _RECORD.pack(_CHAIN, _BEFORE if before is not None else 0, 0, 0, len(points), 0, 0, 0)
        if before is not None:
            yield from _packed(before, depth + 1)
        for point in points:
            assert isinstance(point, DmaFenceChain)
            yield _RECORD.pack(_POINT, _state(point), 0, point.error, point.prev_seqno, point.context, point.seqno, point.timestamp)
            yield from _packed(point.fence, depth + 1)
    else:
        fence.publish()
        fence.shm.fence_share(fence.handle)  # from now on a drop of the pending fence is an error to others
        yield _RECORD.pack(_LEAF, 0, 0, fence.timeline_index, fence.handle, fence.context, fence.seqno, 0)


def _state(fence: LazyFence) -> int:
    return (_SIGNALED if flagged(fence) else 0) | (_ENABLED if fence.enabled else 0)


def _unpacked(domain: Domain, records: Iterator[tuple[int, ...]]) -> DmaFence:
    """Make the next fence of some records, which are checked."""
    kind, flags, _, number, first, context, seqno, timestamp = next(records)
    if kind == _LEAF:
        return wrap(domain, first, (context, seqno, number & 0xFFFFFFFF))
    if kind == _ARRAY:
        members = [_unpacked(domain, records) for _ in range(first)]
        return _as_it_was(array_as_sent(members, bool(flags & _ANY), context, seqno), flags, number, timestamp)
    before = _unpacked(domain, records) if flags & _BEFORE else None
    for _ in range(first):
        _, flags, _, number, prev_seqno, context, seqno, timestamp = next(records)
        inside = _unpacked(domain, records)
        before = _as_it_was(point_as_sent(before, inside, context, seqno, prev_seqno), flags, number, timestamp)
    assert before is not None
    return before


def _as_it_was(fence: LazyFence, flags: int, error: int, timestamp: int) -> LazyFence:
    if flags & _SIGNALED:
        fence.shm.fence_signal(fence.handle, error if -4095 <= error < 0 else 0, False, timestamp)
    elif flags & _ENABLED:
        fence.enable_signaling()
    return fence
