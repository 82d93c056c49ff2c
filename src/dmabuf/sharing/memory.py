"""Memory of one process shown to another: the descriptor and the range behind a mapping.

A mapping remembers the inode and the offset that it shows, not a descriptor. To hand the memory on, this process must still have a
descriptor of that inode open: one is looked for, by inode, among all that it has. Memory that is of no file (a ``bytearray``, an anonymous
mapping), or whose descriptors are all closed, can't be shown: EOPNOTSUPP.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dmabuf._native import Mapping, buffer_address
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.messages import THERE, no_room

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_O_PATH: Final = 0o10000000  # include/uapi/asm-generic/fcntl.h
_MOST_HINTS: Final = 1024
_hints: dict[tuple[int, int], int] = {}  # (st_dev, st_ino) -> the descriptor that it was found behind last


class Range(NamedTuple):
    """Bytes of a file. ``fd``: owned by who holds the range."""

    fd: int
    offset: int
    length: int
    writable: bool


def range_of(memory: ReadableBuffer, operation: str, obj: object) -> Range:
    """The file range behind some memory. Errors: EOPNOTSUPP see the module; EMFILE."""
    mapping, start, length = _mapping(memory)
    if mapping is None or mapping.closed:
        raise _hidden(operation, obj, "it is no mapping of a file")
    found = _descriptor(mapping.dev, mapping.ino, mapping.writable)
    if found < 0:
        raise _hidden(operation, obj, "this process has closed every descriptor of it")
    return Range(found, mapping.offset + start, length, mapping.writable)


def shown(fd: int, offset: int, length: int, writable: bool) -> tuple[Mapping, memoryview]:
    """The other side: a mapping of the range, and the range in it. The fd stays the caller's. Errors: those of ``Mapping``."""
    lead = offset % PAGE
    mapping = Mapping(fd, length + lead, offset=offset - lead, writable=writable)
    return mapping, memoryview(mapping)[lead:]


def _hidden(operation: str, obj: object, why: str) -> DmaBufError:
    return fail(
        errno.EOPNOTSUPP,
        operation,
        obj,
        "give out mappings of a dmabuf.allocate() buffer that stays open, or of a file that does",
        what=f"the exporter's memory can't be shown to another process: {why}",
    )


def _mapping(memory: ReadableBuffer) -> tuple[Mapping | None, int, int]:
    """(mapping, first byte, length) of memory that is a mapping, or a contiguous view of one."""
    if isinstance(memory, Mapping):
        return memory, 0, 0 if memory.closed else memory.size
    view = memoryview(memory)
    base: Any = view.obj
    for _ in range(8):  # an array of a view of a window of a mapping
        if isinstance(base, Mapping) or base is None:
            break
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if not isinstance(base, Mapping) or base.closed or not view.contiguous or not view.nbytes:
        return None, 0, 0
    start = buffer_address(memory) - base.address
    if not 0 <= start <= base.size - view.nbytes:
        return None, 0, 0
    return base, start, view.nbytes


def _descriptor(dev: int, ino: int, writable: bool) -> int:
    """A duplicate of a descriptor of that inode, open for writing if need be; -1: there is none."""
    hint = _hints.get((dev, ino))
    if hint is not None and (found := _try(hint, dev, ino, writable)) >= 0:
        return found
    try:
        names = os.listdir("/proc/self/fd")
    except OSError as e:
        raise no_room("show memory", f"inode {ino}", THERE, e.errno or errno.EMFILE) from None
    for name in names:
        try:
            st = os.stat(f"/proc/self/fd/{name}")
        except OSError:
            continue  # closed meanwhile
        if (st.st_dev, st.st_ino) == (dev, ino) and (found := _try(int(name), dev, ino, writable)) >= 0:
            if len(_hints) >= _MOST_HINTS:
                _hints.clear()
            _hints[dev, ino] = int(name)
            return found
    return -1


def _try(number: int, dev: int, ino: int, writable: bool) -> int:
    """The duplicate is looked at, not the number: another thread may close and reuse that meanwhile."""
    try:
        fd = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 0)
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            raise no_room("show memory", f"inode {ino}", THERE, e.errno) from None
        return -1
    st, flags = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL)
    if (st.st_dev, st.st_ino) == (dev, ino) and not flags & _O_PATH and (not writable or flags & os.O_ACCMODE == os.O_RDWR):
        return fd
    os.close(fd)
    return -1
