"""The kernel's dma-heaps: ``dma_heap:<name>`` is ``/dev/dma_heap/<name>`` (semantics 5.8).

For buffers that go to a driver. They are zeroed and have whole pages. ``system`` takes any pages, a CMA heap (``reserved``,
``default_cma_region``, …) takes one contiguous range. The kernel itself refuses no size that is only too large, but kills processes. So a
request is compared with the limits of this machine and cgroup first, as in the memfd heap, although no cgroup counts these pages.

The steps are: the dma-buf, its name, its reference lock, its record. A process that dies in between leaves nothing, or a record that no
process references, which the next sweep frees.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from dmabuf.core.buffer.identity import HEAPS
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.get import from_fd
from dmabuf.domain.domain import Domain
from dmabuf.heap import budget, devices, memfd
from dmabuf.uapi import call, dma_buf
from dmabuf.uapi import heap as uapi

PREFIX: Final = "dma_heap:"
DIRECTORY: Final = Path(HEAPS)
GIVES: Final = "kernel dma-bufs of pages"
REMEDY: Final = "use a kernel with CONFIG_DMABUF_HEAPS_SYSTEM"


def names(directory: Path = DIRECTORY) -> list[str]:
    """Return the names of the heaps, ``system`` first."""
    try:
        found = sorted(entry.name for entry in directory.iterdir())
    except OSError:
        return []
    return sorted(found, key=lambda name: name != "system")


def node(name: str) -> devices.Node:
    """Return the device of a heap."""
    return devices.examine(DIRECTORY / name, GIVES, REMEDY)


def unavailable(name: str) -> str | None:
    """Return why a heap can't be used here, None if it can."""
    return devices.why_not(node(name))


def allocate(heap: str, size: int, *, name: str | bytes | None = None, domain: Domain | None = None) -> DmaBuf:
    """Return a new zeroed buffer of ``size`` bytes, rounded up to pages, from the heap of that name. See :func:`dmabuf.allocate`."""
    size, raw, domain = memfd.asked(size, name, domain)
    with call.open_node(str(DIRECTORY / heap), "allocate", {errno.ENOENT: REMEDY, errno.EACCES: node(heap).remedy}) as device:
        with budget.claim(size):
            fd = uapi.allocate(device.number, size)
        if raw is not None:
            dma_buf.set_name(fd.number, raw)
        return from_fd(fd, domain)
