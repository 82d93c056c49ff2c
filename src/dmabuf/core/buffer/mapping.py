"""The bytes of a buffer for the CPU: bare mappings, counted vmaps, and lseek (semantics 2.17, 2.18, 5.2).

Each function is the verb of its name on ``DmaBuf``, which documents it.
"""

from __future__ import annotations

import errno
import operator
import os

from dmabuf._native import Mapping, map_same
from dmabuf.core.buffer.handle import PAGE, Handle
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.errors import fail


def mmap(handle: Handle, offset: int, length: int | None, writable: bool) -> Mapping:
    """Return the bare mapping."""
    if handle.fd < 0 or handle.known_resv is not None:
        handle.check_unlocked("mmap")
    size, shared = handle.size, handle.shared
    if length is None and offset == 0 and shared.backing is None and size >= PAGE and size % PAGE == 0:
        try:  # all of plain memory, as nearly always: what map_range() does, in two calls less
            return map_same(handle.fd, size, 0, writable, False, shared.dev, shared.ino)
        except OSError as e:
            raise handle.not_mapped(e, "mmap", size) from None
    return map_range(handle, "mmap", offset, length, writable)


def dma_mmap(handle: Handle, offset: int, length: int) -> Mapping:
    """Return the mapping that an importer gets which redirects its own mmap here."""
    handle.check_unlocked("dma_mmap")
    if offset + length > 1 << 64:
        what = "the range ends past 2**64"
        raise fail(errno.EOVERFLOW, "dma_mmap", handle, "use an offset and a length whose sum fits in 64 bits", what=what)
    return map_range(handle, "dma_mmap", offset, length, True)


def map_range(handle: Handle, operation: str, offset: int, length: int | None, writable: bool) -> Mapping:
    """Return a mapping of whole pages; ``length``: None for the rest. The handle is open, and no lock is checked."""
    offset = _whole(operation, "offset", offset)
    length = None if length is None else _whole(operation, "length", length)
    if offset < 0 and offset % PAGE == 0:
        raise fail(errno.EOVERFLOW, operation, handle, "use an offset that is not negative", what=f"the offset is {offset}")
    room = handle.size // PAGE * PAGE
    end = room if length is None else offset + length
    if offset % PAGE or end <= offset or end > room:
        remedy = f"choose 0 <= offset < offset + length <= {room}, with an offset that is a multiple of {PAGE}"
        what = (
            f"bytes {offset} to {end} are not within the {room} that can be mapped"
            if offset % PAGE == 0
            else f"offset {offset} is not aligned"
        )
        raise fail(errno.EINVAL, operation, handle, remedy, what=what)
    backing = handle.shared.backing
    if backing is not None:
        return backing.mmap(handle.face(), operation, offset, end - offset, writable)
    return handle.map_file(operation, offset, end - offset, writable)


def _whole(operation: str, what: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{operation}: {what} is a number of bytes, an int, not {type(value).__name__}") from None


def lseek(handle: Handle, offset: int, whence: int) -> int:
    """Answer as the kernel's lseek on a dma-buf."""
    handle.check("lseek")
    kernel = handle.kernel()
    if kernel is not None:
        return kernel.lseek(handle, offset, whence)
    if offset == 0 and whence == os.SEEK_END:
        return handle.size
    if offset == 0 and whence == os.SEEK_SET:
        return 0
    raise fail(errno.EINVAL, "lseek", handle, "use (0, SEEK_SET) or (0, SEEK_END)", what="unsupported offset or whence")


def vmap(handle: Handle, into: IosysMap | None) -> IosysMap:
    """Count a vmap; the lock is held."""
    if into is not None:
        into.clear()
    handle.check_locked("vmap")
    return _vmap(handle, into)


def vmap_unlocked(handle: Handle, into: IosysMap | None) -> IosysMap:
    """Count a vmap, and take the lock for it."""
    if into is not None:
        into.clear()
    handle.check_unlocked("vmap_unlocked")
    made: list[IosysMap] = []
    try:
        with handle.resv.locked():
            made.append(_vmap(handle, into))
    except BaseException:
        while made:  # a signal handler raised when the lock was free again
            vunmap_unlocked(handle, made.pop())
        raise
    return made[0]


def _vmap(handle: Handle, into: IosysMap | None) -> IosysMap:
    made = handle.shared.ensure_backing().vmap(handle.face())
    if into is None:
        return made
    into.assign(made)
    return into


def vunmap(handle: Handle, map: IosysMap) -> None:
    """Uncount a vmap; the lock is held."""
    handle.check_locked("vunmap")
    handle.shared.ensure_backing().vunmap(handle.face(), map)


def vunmap_unlocked(handle: Handle, map: IosysMap) -> None:
    """Uncount a vmap, and take the lock for it."""
    handle.check_unlocked("vunmap_unlocked")
    with handle.resv.locked():
        handle.shared.ensure_backing().vunmap(handle.face(), map)
