"""Buffers that are the kernel's own dma-bufs, in a guest with a real kernel; and what the library calls the kernel for them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf.drivers.drm import DrmNode
from dmabuf.uapi import call, dma_buf, sw_sync, table

needs_sw_sync = pytest.mark.skipif(not Path(sw_sync.PATH).exists(), reason="this kernel has no sw_sync: KERNEL=uml or full")
SIZE = 16384
HOMES = {"udmabuf": b"udmabuf", "dma_heap:system": b"system", "imported": b"drm"}


def made(home: str, size: int = SIZE) -> dmabuf.DmaBuf:
    """A buffer of that home."""
    if home != "imported":
        return dmabuf.allocate(size, heap=home)
    with DrmNode.of("vgem") as node, node.create_dumb(size // 4, 1) as dumb:
        return dumb.export()


def add_fence(buf: dmabuf.DmaBuf, fence: int, *, write: bool) -> None:
    """Put a kernel's sync_file on the buffer, as a driver does."""
    dma_buf.import_sync_file(buf.fileno(), dma_buf.WRITE if write else dma_buf.READ, fence)


class Boom(Exception):
    """Raised in a block."""


class Brackets:
    """Every DMA_BUF_IOCTL_SYNC that succeeded. ``opened``: START without END so far, by flags; an END too many is an AssertionError."""

    def __init__(self) -> None:
        self.flags: list[int] = []

    @property
    def opened(self) -> list[int]:
        left: list[int] = []
        for flags in self.flags:
            if flags & dma_buf.END:
                left.remove(flags & ~dma_buf.END)
            else:
                left.append(flags)
        return left


@contextlib.contextmanager
def brackets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Brackets]:
    """Watch the brackets of the block."""
    seen, system = Brackets(), call.system

    def watched(fd: int, number: int, argument: Any) -> Any:
        answer = system(fd, number, argument)
        if number == table.DMA_BUF_SYNC.number:
            seen.flags.append(table.DMA_BUF_SYNC.layout.unpack(argument).flags)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(call, "system", watched)
        yield seen
