"""Buffers of a spill heap whose every byte says whose and how new it is."""

import os

from dmabuf import DmaBuf

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
