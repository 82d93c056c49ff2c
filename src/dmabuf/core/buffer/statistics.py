"""What a handle says of itself."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dmabuf.core.buffer.handle import Handle


@dataclass(frozen=True)
class BufferStatistics:
    """A snapshot of a handle. ``mapped``: the handle keeps a mapping for its accesses; ``accesses``: open blocks of this handle.

    Kernel: dma_buf.attachments as attachments, dma_buf.vmapping_counter as vmaps.
    """

    size: int
    ino: int
    home: str
    accesses: int
    mapped: bool
    vmaps: int
    poll_fds: int
    attachments: int


def statistics(handle: Handle) -> BufferStatistics:
    """Return a snapshot of a handle, open or closed."""
    backing = handle.shared.any_backing()
    return BufferStatistics(
        handle.size,
        handle.shared.ino,
        os.fsdecode(handle.shared.home),
        handle.accesses,
        handle.view is not None,
        backing.vmaps if backing else 0,
        len(handle.polls or ()),
        len(backing.attachments) if backing else 0,
    )
