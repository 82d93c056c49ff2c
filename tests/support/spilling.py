"""Buffers of a spill heap whose every byte says whose and how new it is."""

import gc
import os

import dmabuf
from dmabuf import DmaBuf, Domain
from dmabuf.core.export.exported import EXPORTS
from dmabuf.heap.spill_buffer import SpillBuffer
from tests.support.children import Child, Parent
from tests.support.waiting import until

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 4 * PAGE
ROOM = 4  # buffers of that size fit into the budget of the tests' heap


def resident(buf: DmaBuf) -> int:
    """Bytes of memory that the buffer's memfd has, as the kernel counts them."""
    return os.fstat(buf.fileno()).st_blocks * 512


def is_here(buf: DmaBuf) -> bool:
    """Is it in memory?"""
    assert resident(buf) in (0, buf.size), "half in memory outside of a move"
    return resident(buf) > 0


def fill(buf: DmaBuf, what: int) -> None:
    """Write the buffer full of one number."""
    with buf.write() as view:
        view[:] = pattern(what, len(view))


def pattern(what: int, size: int) -> bytes:
    """Bytes in which no page is like another, nor like one of another number; never zeros."""
    pages = ((what * 1_000_003 + page + 1).to_bytes(8, "little") for page in range(size // PAGE))
    return b"".join(word * (PAGE // 8) for word in pages)


def holds(buf: DmaBuf, what: int) -> bool:
    """Has the buffer what :func:`fill` wrote?"""
    with buf.read() as view:
        return bytes(view) == pattern(what, len(view))


def use(bufs: list[DmaBuf]) -> None:
    """Look into each, in order."""
    for buf in bufs:
        with buf.read():
            pass


def number_in(view: memoryview) -> int:
    """The number that a buffer is full of; AssertionError if any byte of it is of another, or zero."""
    found = (int.from_bytes(view[:8], "little") - 1) // 1_000_003
    assert bytes(view) == pattern(found, len(view)), "bytes of two writes, or of none"
    return found


def exported() -> list[SpillBuffer]:
    """The buffers of spill heaps that this process still has, or somebody has of it."""
    found = list(EXPORTS.of(Domain.default()).buffers.values())
    return [entry.exporter for entry in found if isinstance(entry.exporter, SpillBuffer)]


def no_buffer_is_left(limit_s: float = 20) -> None:
    """Until the buffers of all spill heaps are gone; AssertionError if the limit passes: the traceback of a failed test keeps some."""
    gc.collect()  # a traceback's frames may still have a mapping
    # The last holder may have been another process, or a thread of ours releases what the collector found.
    until(lambda: not exported(), left=exported, limit_s=limit_s)


def given(parent: Parent) -> list[DmaBuf]:
    """The buffers that the test sends, four to a message."""
    return [buf for _ in range(parent.recv()) for buf in dmabuf.recv(parent.sock)]


def give(other: Child, bufs: list[DmaBuf]) -> None:
    parts = [bufs[at : at + 4] for at in range(0, len(bufs), 4)]
    other.send(len(parts))
    for part in parts:
        dmabuf.send(other.sock, *part)
