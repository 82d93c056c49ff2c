"""The devices that make dma-bufs: ``/dev/dma_heap/<name>`` and ``/dev/udmabuf`` (semantics 5.8, 5.9)."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from dmabuf.uapi import call
from dmabuf.uapi import table as t
from dmabuf.uapi.call import OwnedFd, told
from dmabuf.uapi.structures import HeapAllocation, UdmabufCreate, UdmabufCreateList, UdmabufItem

UDMABUF_CLOEXEC: Final = 1


def allocate(heap: int, length: int, *, fd_flags: int = os.O_RDWR, of: object = None) -> OwnedFd:
    """Allocate zeroed memory from a dma-heap, with the length rounded up to pages, close-on-exec (DMA_HEAP_IOCTL_ALLOC).

    Raises:
        InvalidError: The length is 0, or there are flags beyond the access mode (EINVAL).
        NoMemoryError: The heap has no memory (ENOMEM).
        DmaBufError: No descriptor is free (EMFILE).
    """
    try:
        # The kernel wants 0 in the field in which it returns the new descriptor.
        return call.obtain(heap, t.DMA_HEAP_ALLOC, HeapAllocation(length, fd_flags=fd_flags | os.O_CLOEXEC), "fd")
    except OSError as e:
        raise told(
            e, "allocate", of or f"{length} bytes", {errno.EINVAL: ("bad size or flags", "ask for 1 to 2**64 - 4096 bytes")}
        ) from None


_UDMABUF: Final = {
    errno.EINVAL: (
        "a bad range, bad seals, or more than /sys/module/udmabuf/parameters allows",
        "pass whole pages inside of a memfd with F_SEAL_SHRINK and without F_SEAL_WRITE",
    ),
    errno.EBADFD: ("not a memfd", "pass memfds"),
}


def create(device: int, memfd: int, offset: int, size: int, *, flags: int = UDMABUF_CLOEXEC, of: object = None) -> OwnedFd:
    """Make a dma-buf of a range of a memfd (UDMABUF_CREATE).

    Raises:
        InvalidError: The range is bad, the seals are missing, or a limit is passed (EINVAL).
        NoMemoryError: The kernel has no memory (ENOMEM).
        DmaBufError: It is not a memfd (EBADFD), or no descriptor is free (EMFILE).
    """
    try:
        argument = bytearray(t.UDMABUF_CREATE.layout.pack(UdmabufCreate(memfd, flags, offset, size)))
        return call.obtain_result(device, t.UDMABUF_CREATE.number, argument)
    except OSError as e:
        raise told(e, "allocate", of or f"{size} bytes of memfd {memfd}", _UDMABUF) from None


def create_list(device: int, items: Sequence[tuple[int, int, int]], *, flags: int = UDMABUF_CLOEXEC, of: object = None) -> OwnedFd:
    """Make one dma-buf of several ranges (memfd, offset, size) (UDMABUF_CREATE_LIST). It fails as `create` does."""
    try:
        argument = bytearray(t.UDMABUF_CREATE_LIST.layout.pack(UdmabufCreateList(flags, len(items))))
        for memfd, offset, size in items:
            argument += t.UDMABUF_ITEM.pack(UdmabufItem(memfd, 0, offset, size))
        return call.obtain_result(device, t.UDMABUF_CREATE_LIST.number, argument)
    except OSError as e:
        raise told(e, "allocate", of or f"{len(items)} ranges", _UDMABUF) from None
