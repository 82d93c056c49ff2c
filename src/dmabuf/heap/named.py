"""``open_or_allocate``: one buffer for a name, whichever of several processes comes first."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from dmabuf.core.buffer.handle import PAGE
from dmabuf.core.buffer.identity import checked_name
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.domain.domain import Domain
from dmabuf.domain.place import name_lock
from dmabuf.errors import NotFoundError, fail, needing_descriptors
from dmabuf.heap import budget, recommended
from dmabuf.heap.wanted import wanted
from dmabuf.layout.stored import Layout
from dmabuf.sharing import opening


def open_or_allocate(
    name: str | bytes,
    size: int | None = None,
    *,
    layout: Layout | None = None,
    shape: Sequence[int] | int | None = None,
    dtype: Any = None,
    heap: str | None = None,
    domain: Domain | None = None,
) -> DmaBuf:
    """Return a new handle of the buffer with this name, which is allocated if there is none.

    Processes that come at once get the same buffer. A buffer exists as long as a process has it open. If the process that made it is killed
    and no other has it, the next one makes a new buffer. A name that :func:`allocate` gave, or that was set later, counts too.

    Args:
        name: The name, at most 31 bytes.
        size: As in :func:`allocate`.
        layout: As in :func:`allocate`.
        shape: As in :func:`allocate`.
        dtype: As in :func:`allocate`.
        heap: Where a new buffer is allocated, as in :func:`allocate`.
        domain: The domain; None means the user's default domain.

    Raises:
        ExistsError: The buffer with this name has another size, or another layout than the one given (EEXIST).
        NotUniqueError: Several buffers have this name (ENOTUNIQ).
        NoDeviceError: The buffer is only in flight in a socket, or only mapped, or its process can't be reached (ENODEV).
        DmaBufTimeout: A process that is stopped has been allocating the buffer for 30 s (ETIMEDOUT).
        DmaBufError: As :func:`allocate` and :func:`open`.
    """
    operation = "open_or_allocate"
    raw = checked_name(name, operation)
    if layout is not None or shape is not None or dtype is not None:
        size, layout = wanted(size, layout, shape, dtype)
    need = -(-budget.whole(size, f"{operation}: size") // PAGE) * PAGE  # type: ignore[arg-type]  # what isn't a number is refused there
    domain = domain or Domain.default()
    domain.join()
    with needing_descriptors(operation, f"name {os.fsdecode(raw)!r}"), name_lock(domain.shm.fd, raw):
        try:
            found = opening.open(raw, domain=domain)
        except NotFoundError:
            return recommended.allocate(size, layout=layout, heap=heap, name=raw, domain=domain)
    if found.size == need and layout in (None, found.layout):
        return found
    with found:
        what = f"the buffer has {found.size} bytes, and {need} were asked for" if found.size != need else "the buffer has another layout"
        raise fail(errno.EEXIST, operation, found, "open it with dmabuf.open(), or choose another name", what=what)
