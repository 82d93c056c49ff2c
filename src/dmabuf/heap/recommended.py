"""Which heap is the default, and why: the only file that decides.

``memfd``: it works on every Linux, without root and without devices, its buffers can be reopened through /proc, their memory is promised
and accounted to the cgroup of who allocates. ``spill`` is for those who need more of them than they have memory for: every access asks the
process that allocated, and may wait for a disk. A kernel heap is for those who hand the buffer to a driver, and they know its name.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from dmabuf.core.dma_buf import DmaBuf
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail
from dmabuf.heap import devices, dma_heap, memfd, spill, udmabuf


@dataclass(frozen=True)
class Heap:
    """One heap. ``unavailable``: why it can't be used here, None when it can."""

    name: str
    unavailable: str | None
    about: str


class _Known(NamedTuple):
    """How to use a heap, and whether one can."""

    allocate: Callable[..., DmaBuf]
    unavailable: Callable[[], str | None]
    about: str
    node: Callable[[], devices.Node] | None = None  # the device, of a heap that has one


def _known() -> dict[str, _Known]:
    """Every heap by name, the recommended one first; those that drivers want come last."""
    found = {
        memfd.NAME: _Known(memfd.allocate, memfd.unavailable, "plain shared memory, no kernel support needed"),
        spill.NAME: _Known(
            spill.allocate, spill.unavailable, "memory with a budget: what doesn't fit waits in a file (DMABUF_SPILL_BUDGET)"
        ),
        udmabuf.NAME: _Known(udmabuf.allocate, udmabuf.unavailable, _udmabuf_about(), lambda: udmabuf.node(udmabuf.DEVICE)),
    }
    for name in dma_heap.names() or ["system"]:
        about = "kernel dma-bufs of pages" if name == "system" else "kernel dma-bufs of contiguous memory, or what its driver gives"
        found[dma_heap.PREFIX + name] = _Known(
            partial(dma_heap.allocate, name), partial(dma_heap.unavailable, name), about, partial(dma_heap.node, name)
        )
    return found


def _udmabuf_about() -> str:
    most = udmabuf.limits().size
    return "kernel dma-bufs out of memfds" + ("" if most is None else f", at most {most // udmabuf.MIB} MiB each")


def heaps() -> list[Heap]:
    """Every heap, the recommended one first."""
    return [Heap(name, known.unavailable(), known.about) for name, known in _known().items()]


def allocate(size: int, *, heap: str | None = None, name: str | bytes | None = None, domain: Domain | None = None) -> DmaBuf:
    """A new buffer of at least ``size`` bytes: zeroed, rounded up to whole pages, its memory promised.

    ``heap``: one of :func:`dmabuf.heaps`, None for the recommended one. ``name``: at most 31 bytes. ``domain``: None for this user's.

    Errors: EINVAL a size below 1 or a bad name; ENOMEM the limits of this machine or cgroup don't allow it; ENOSPC the domain is full;
    ENODEV no such heap, or it can't be used here; EACCES its device is not for this user; EMFILE no descriptor left.
    """
    if heap is None or heap == memfd.NAME:  # always usable: where it is not, nothing of this package is
        return memfd.allocate(size, name=name, domain=domain)
    known = _known()
    found = known.get(heap)
    if found is None:
        raise fail(errno.ENODEV, "allocate", f"heap {heap!r}", f"heaps of this machine: {', '.join(known)}")
    if why := found.unavailable():
        number = errno.EACCES if found.node is not None and found.node().denied else errno.ENODEV
        raise fail(number, "allocate", f"heap {heap!r}", why, what="it can't be used here")
    return found.allocate(size, name=name, domain=domain)
