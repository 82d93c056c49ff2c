"""Fences, containers and reservation objects in plain Python: what the framework promises, from semantics 3 and 4, without any of its code.

A status is 0 (pending), 1 (signalled) or a negative errno. Timelines signal in order, as the kernel's contract wants. A container's error
may depend on which of several members another process was told of first, so a container says which endings it may have.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

KERNEL, WRITE, READ, BOOKKEEP = range(4)


@dataclass(eq=False)
class Fence:
    """A plain fence of one timeline."""

    key: int
    timeline: Timeline
    seqno: int
    status: int = 0

    @property
    def owner(self) -> int:
        return self.timeline.owner

    @property
    def context(self) -> object:
        return self.timeline

    @property
    def done(self) -> bool:
        return self.status != 0

    @property
    def endings(self) -> frozenset[int]:
        return frozenset({self.status})

    @property
    def leaves(self) -> list[Fence]:
        return [self]


@dataclass(eq=False)
class Timeline:
    key: int
    owner: int
    fences: list[Fence] = field(default_factory=list)

    @property
    def pending(self) -> list[Fence]:
        return [fence for fence in self.fences if not fence.done]

    def end(self, error: int) -> None:
        for fence in self.pending:
            fence.status = error


@dataclass(eq=False)
class Array:
    """All of its members, or with ``any`` the first one that ends. Belongs to one process; nothing is watched until it is enabled."""

    key: int
    owner: int
    members: list[Fence]
    any: bool
    enabled: bool = False
    endings: frozenset[int] = frozenset({0})
    came: bool = False  # from another process, which sent what it knew

    @property
    def done(self) -> bool:
        return 0 not in self.endings

    @property
    def leaves(self) -> list[Fence]:
        return self.members

    def look(self) -> None:
        """After members may have ended."""
        if self.done or not self.enabled:
            return
        ended = [member.status for member in self.members if member.done]
        failed = frozenset(status for status in ended if status < 0)
        if self.any and ended:
            # Several may have ended together: who is told of first counts. A member of which one is told early may be one without error.
            self.endings = failed | ({1} if 1 in ended else frozenset())
        elif not self.any and len(ended) == len(self.members):
            self.endings = failed or frozenset({1})
        if self.done and self.came:
            self.endings |= {1}


@dataclass(eq=False)
class Chain:
    """A point: its fence and all before it. A chain ends without an error; it needs no enabling to be seen as done."""

    key: int
    owner: int
    prev: Chain | Fence | None
    fence: Fence | Array
    seqno: int

    @property
    def done(self) -> bool:
        here: Chain | Fence | None = self
        while isinstance(here, Chain):
            if not here.fence.done:
                return False
            here = here.prev
        return here is None or here.done

    @property
    def endings(self) -> frozenset[int]:
        return frozenset({int(self.done)})

    @property
    def leaves(self) -> list[Fence]:
        found: list[Fence] = []
        here: Chain | Fence | None = self
        while isinstance(here, Chain):
            found += here.fence.leaves
            here = here.prev
        return found + ([here] if here is not None else [])

    def look(self) -> None:
        """Nothing is kept."""


Any_ = Fence | Array | Chain


class Resv:
    """A reservation object: the slots of semantics 4.4."""

    def __init__(self) -> None:
        self.slots: list[tuple[Fence, int]] = []

    def add(self, fence: Fence, usage: int) -> None:
        for at, (old, had) in enumerate(self.slots):
            same = old.context is fence.context and had >= usage and (old is fence or fence.seqno > old.seqno)
            if same or old.done:
                self.slots[at] = fence, usage
                return
        self.slots.append((fence, usage))

    def replace(self, timeline: Timeline, fence: Fence, usage: int) -> None:
        self.slots = [(fence, usage) if old.context is timeline else (old, had) for old, had in self.slots]

    def pending(self, usage: int) -> list[tuple[Fence, int]]:
        return [(fence, had) for fence, had in self.slots if had <= usage and not fence.done]


@dataclass(eq=False)
class File:
    """A sync_file: what it waits for was fixed when it was made, and needs nobody but the owners of those fences."""

    key: int
    places: set[int]
    leaves: list[Fence]
    any: bool = False

    @property
    def done(self) -> bool:
        return (any if self.any and self.leaves else all)(leaf.done for leaf in self.leaves)


def merged(fences: list[Fence]) -> list[Fence]:
    """The pending leaves of a merge. Same-context fences end in order, so the latest stands for all."""
    found: dict[object, Fence] = {}
    for fence in fences:
        if not fence.done and (fence.context not in found or found[fence.context].seqno < fence.seqno):
            found[fence.context] = fence
    return list(found.values())


DEAD = -errno.EOWNERDEAD
CLOSED = -errno.ENOENT
DROPPED = -errno.EDEADLK
