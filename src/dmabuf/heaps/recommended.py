"""Which heap is the default, and why: the only file that decides.

``memfd``: it works on every Linux, without root and without devices, its buffers can be reopened through /proc, their memory is promised
and accounted to the cgroup of who allocates. ``spill`` is for those who need more of them than they have memory for: every access asks the
process that allocated, and may wait for a disk. A kernel heap is for those who hand the buffer to a driver, and they know its name.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from dmabuf.core.buffer import DmaBuf
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail
from dmabuf.heaps import memfd, spill


@dataclass(frozen=True)
class Heap:
    """One heap. ``unavailable``: why it can't be used here, None when it can."""

    name: str
    unavailable: str | None
    about: str


_HEAPS: dict[str, tuple[Callable[..., DmaBuf], Callable[[], str | None], str]] = {
    memfd.NAME: (memfd.allocate, memfd.unavailable, "plain shared memory, no kernel support needed"),
    spill.NAME: (spill.allocate, spill.unavailable, "memory with a budget: what doesn't fit waits in a file (DMABUF_SPILL_BUDGET)"),
}


def heaps() -> list[Heap]:
    """Every heap, the recommended one first."""
    return [Heap(name, unavailable(), about) for name, (_, unavailable, about) in _HEAPS.items()]


def allocate(size: int, *, heap: str | None = None, name: str | bytes | None = None, domain: Domain | None = None) -> DmaBuf:
    """A new buffer of at least ``size`` bytes: zeroed, rounded up to whole pages, its memory promised.

    ``heap``: one of :func:`dmabuf.heaps`, None for the recommended one. ``name``: at most 31 bytes. ``domain``: None for this user's.

    Errors: EINVAL a size below 1 or a bad name; ENOMEM the limits of this machine or cgroup don't allow it; ENOSPC the domain is full;
    ENODEV no such heap, or it can't be used here; EMFILE no descriptor left.
    """
    if heap is None:
        heap = next(name for name, (_, unavailable, _) in _HEAPS.items() if unavailable() is None)
    found = _HEAPS.get(heap)
    if found is None:
        raise fail(errno.ENODEV, "allocate", f"heap {heap!r}", f"heaps of this machine: {', '.join(_HEAPS)}")
    if why := found[1]():
        raise fail(errno.ENODEV, "allocate", f"heap {heap!r}", why)
    return found[0](size, name=name, domain=domain)
