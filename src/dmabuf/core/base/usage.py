"""The small enumerations of the framework, with the kernel's values."""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import cast

from dmabuf.errors import fail


class Usage(IntEnum):
    """What a fence on a reservation object stands for. A query at one level includes all lower ones (semantics 4.1).

    Kernel: dma_resv_usage, DMA_RESV_USAGE_KERNEL as KERNEL, DMA_RESV_USAGE_WRITE as WRITE, DMA_RESV_USAGE_READ as READ,
    DMA_RESV_USAGE_BOOKKEEP as BOOKKEEP.
    """

    KERNEL = 0
    WRITE = 1
    READ = 2
    BOOKKEEP = 3

    @staticmethod
    def rw(write: bool) -> Usage:
        """Return the level to *query* before an access: a new writer waits for readers and writers, a new reader for writers.

        Kernel: dma_resv_usage_rw.
        """
        return Usage.READ if write else Usage.WRITE


class Direction(IntEnum):
    """The direction of data in a DMA transfer (include/linux/dma-direction.h)."""

    BIDIRECTIONAL = 0
    TO_DEVICE = 1
    FROM_DEVICE = 2
    NONE = 3


def checked_usage(usage: int, operation: str, obj: object) -> int:
    """Return a usage as a plain int. Raises InvalidError if it is not a level."""
    if isinstance(usage, Usage):
        return cast(int, usage)
    try:
        return int(Usage(usage))
    except ValueError:
        raise fail(errno.EINVAL, operation, obj, "pass Usage.KERNEL, WRITE, READ or BOOKKEEP", what=f"not a usage: {usage!r}") from None


def checked_direction(direction: int, operation: str, obj: object) -> Direction:
    """Return a direction. Raises InvalidError if it is none."""
    try:
        return Direction(direction)
    except ValueError:
        raise fail(errno.EINVAL, operation, obj, "pass a dmabuf.Direction", what=f"not a direction: {direction!r}") from None
