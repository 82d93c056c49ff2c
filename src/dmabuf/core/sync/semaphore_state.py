"""The state of a ``TimelineSemaphore`` as a value: which fences stand at which points, what a change makes of it, and its bytes.

This module doesn't touch shared memory. The semaphore loads the bytes under its lock, and stores the new ones in one step.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol, Self

from dmabuf.errors import fail

_HEAD: Final = struct.Struct("=IIQQ")  # kind of content, nodes, reached, submitted
_NODE: Final = struct.Struct("=QI")  # point, leaves
_LEAF: Final = struct.Struct("=QQQI")  # handle, context, seqno, timeline_index
EMPTY, BINARY, TIMELINE = range(3)
MAX_POINT: Final = 0xFFFFFFFFFFFFFFFF


class Record(Protocol):
    """The bytes of a state in a file: a new version of all of them, or some appended."""

    def version(self) -> tuple[int, int]: ...
    def load(self, start: int = 0) -> bytes: ...


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
    return b"".join([_HEAD.pack(state.kind, len(state.nodes), state.reached, state.head), *map(packed_node, state.nodes)])


def packed_node(node: Node) -> bytes:
    """Return the bytes of one more node, which can be appended to a state's if its point rises."""
    return b"".join([_NODE.pack(node.point, len(node.leaves)), *(_LEAF.pack(*leaf) for leaf in node.leaves)])


def unpacked(data: bytes) -> tuple[int, int, int, list[Node]]:
    """Return what :func:`without_signaled` takes besides ``pending``. Nonsense raises struct.error or IndexError."""
    kind, count, reached, head = _HEAD.unpack_from(data)
    if kind not in (EMPTY, BINARY, TIMELINE) or count > len(data):
        raise IndexError(kind)
    nodes = unpacked_nodes(data, _HEAD.size)
    if len(nodes) < count:
        raise IndexError(count)
    return kind, reached, max([head, *(node.point for node in nodes[count:])]), nodes


def unpacked_nodes(data: bytes, at: int = 0) -> list[Node]:
    """Return the nodes in bytes. Nonsense raises struct.error or IndexError."""
    nodes = []
    while at < len(data):
        point, leaves = _NODE.unpack_from(data, at)
        at += _NODE.size
        if at + leaves * _LEAF.size > len(data):
            raise IndexError(leaves)
        nodes.append(Node(point, [Leaf(*found) for found in _LEAF.iter_unpack(data[at : at + leaves * _LEAF.size])]))
        at += leaves * _LEAF.size
    return nodes


class View:
    """What one process has read of a state. ``nodes``: in front is one with something pending, and the others may be signaled.

    Each look reads what was appended since, and drops what is signaled from the front. So a look at one of N pending points does not take
    time in proportion to N.
    """

    def __init__(self, kind: int = EMPTY, head: int = 0) -> None:
        self.kind, self.reached, self.head = kind, head, head
        self.nodes: deque[Node] = deque()
        self._version, self._length = -1, 0

    def update(self, record: Record, pending: Callable[[int], bool]) -> Self:
        """Read what is new. Nonsense raises struct.error or IndexError."""
        version, length = record.version()
        known, self._version = self._version, -1  # until all of it is read: after an interrupted look, the next one reads all of it again
        if version != known or length < self._length:
            self._length = 0
            self.nodes.clear()
            self.kind, self.reached, self.head = EMPTY, 0, 0
            if length:
                self.kind, self.reached, self.head, found = unpacked(record.load())
                self.nodes.extend(found)
        elif length > self._length:
            for node in unpacked_nodes(record.load(self._length)):
                self.nodes.append(node)
                self.head = max(self.head, node.point)
        self._version, self._length = version, length
        self._drop_signaled(pending)
        return self

    def _drop_signaled(self, pending: Callable[[int], bool]) -> None:
        while self.nodes:
            point, leaves = self.nodes[0]
            while leaves and not pending(leaves[-1].handle):
                leaves.pop()
            if leaves:
                return
            self.reached = max(self.reached, point)
            self.nodes.popleft()
        if self.kind == TIMELINE:
            self.reached = self.head

    def first(self, point: int) -> Leaf | None:
        """Return a pending fence that a point stands for, None if it is reached. Raises LookupError if it is not submitted yet."""
        if self.kind == EMPTY or point > (self.head if self.kind == TIMELINE else 0):
            raise LookupError(point)
        if not self.nodes or (point and point <= self.reached and self.nodes[0].point):
            return None
        return self.nodes[0].leaves[-1]

    def state(self, pending: Callable[[int], bool]) -> State:
        """Return all of it, without what is signaled."""
        return without_signaled(pending, self.kind, self.reached, self.head, list(self.nodes))


def checked_point(point: int, operation: str) -> None:
    """Raise InvalidError if a point is out of range (EINVAL)."""
    if not 0 <= point <= MAX_POINT:
        raise fail(errno.EINVAL, operation, f"point {point}", f"pass 0 to {MAX_POINT}", what="the point is out of range")


def nonsense() -> OSError:
    """Return the error of a file that holds no state."""
    return fail(errno.EUCLEAN, "look up", "a semaphore", "make a new one", what="another program wrote to its descriptor")
