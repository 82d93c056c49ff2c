"""The state of a ``TimelineSemaphore`` as a value: which fences stand at which points, what a change makes of it, and its bytes.

This module doesn't touch shared memory. The semaphore loads the bytes under its lock, and stores the new ones in one step.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from dmabuf.errors import fail

_HEAD: Final = struct.Struct("=IIQQ")  # kind of content, nodes, reached, submitted
_NODE: Final = struct.Struct("=QI")  # point, leaves
_LEAF: Final = struct.Struct("=QQQI")  # handle, context, seqno, timeline_index
EMPTY, BINARY, TIMELINE = range(3)
MAX_POINT: Final = 0xFFFFFFFFFFFFFFFF


class Leaf(NamedTuple):
    """A plain fence, neither an array nor a chain."""

    handle: int
    context: int
    seqno: int
    timeline: int


class Node(NamedTuple):
    """A point and the fences that were put there."""

    point: int
    leaves: list[Leaf]


class State(NamedTuple):
    """``nodes``: those with something pending, oldest first; points of 0 are what stood there before the timeline began again.

    ``reached``: the point before the first node of the timeline. ``head``: the last that was submitted.
    """

    kind: int
    reached: int
    head: int
    nodes: list[Node]


def without_signaled(pending: Callable[[int], bool], kind: int, reached: int, head: int, nodes: list[Node]) -> State:
    """Return the state without what is signaled. ``pending`` says whether the fence of a handle is pending."""
    left = [Node(node.point, [leaf for leaf in node.leaves if pending(leaf.handle)]) for node in nodes]
    while left and not left[0].leaves:
        reached = max(reached, left.pop(0).point)
    if kind == TIMELINE and not left:
        reached = head
    return State(kind, reached, head, left)


def leaves_at(state: State, point: int) -> list[Leaf] | None:
    """Return the pending fences that a point stands for, None if it is not submitted yet (dma_fence_chain_find_seqno)."""
    if state.kind == EMPTY or point > (state.head if state.kind == TIMELINE else 0):
        return None
    found: list[Leaf] = []
    if point and point <= state.reached and not any(node.point == 0 for node in state.nodes):
        return found
    for node in state.nodes:
        found += node.leaves
        if point and node.point >= point:
            break
    return found


def added(state: State, point: int, leaves: list[Leaf]) -> State:
    """Return the state with these fences put at a point (drm_syncobj_replace_fence, drm_syncobj_add_point)."""
    if point == 0:
        return State(BINARY, 0, 0, [Node(0, leaves)])
    if state.kind == TIMELINE and point > state.head:
        return State(TIMELINE, state.reached, point, [*state.nodes, Node(point, leaves)])
    # A new chain, after everything that was there. A number that doesn't rise is raised.
    before = [leaf for node in state.nodes for leaf in node.leaves]
    number = max(point, state.head) if state.kind == TIMELINE else point
    return State(TIMELINE, 0, number, [*([Node(0, before)] if before else []), Node(number, leaves)])


def packed(state: State) -> bytes:
    """Return its bytes, for :func:`unpacked`."""
    parts = [_HEAD.pack(state.kind, len(state.nodes), state.reached, state.head)]
    for node in state.nodes:
        parts.append(_NODE.pack(node.point, len(node.leaves)))
        parts += [_LEAF.pack(*leaf) for leaf in node.leaves]
    return b"".join(parts)


def unpacked(data: bytes) -> tuple[int, int, int, list[Node]]:
    """Return what :func:`without_signaled` takes besides ``pending``. Nonsense raises struct.error or IndexError."""
    kind, count, reached, head = _HEAD.unpack_from(data)
    at, nodes = _HEAD.size, []
    if kind not in (EMPTY, BINARY, TIMELINE) or count > len(data):
        raise IndexError(kind)
    for _ in range(count):
        point, leaves = _NODE.unpack_from(data, at)
        at += _NODE.size
        if at + leaves * _LEAF.size > len(data):
            raise IndexError(leaves)
        nodes.append(Node(point, [Leaf(*found) for found in _LEAF.iter_unpack(data[at : at + leaves * _LEAF.size])]))
        at += leaves * _LEAF.size
    return kind, reached, head, nodes


def checked_point(point: int, operation: str) -> None:
    """Raise InvalidError if a point is out of range (EINVAL)."""
    if not 0 <= point <= MAX_POINT:
        raise fail(errno.EINVAL, operation, f"point {point}", f"pass 0 to {MAX_POINT}", what="the point is out of range")


def nonsense() -> OSError:
    """Return the error of a file that holds no state."""
    return fail(errno.EUCLEAN, "look up", "a semaphore", "make a new one", what="another program wrote to its descriptor")
