"""Memory of one process for another: the descriptor and the range behind a mapping.

A mapping knows the inode and the offset of its memory, but not a descriptor. To pass the memory on, this process must still have a
descriptor of that inode open, and it searches all its descriptors for one. Memory that isn't a mapping of a file (a ``bytearray``, an
anonymous mapping), or of which every descriptor is closed, can't be shown to another process: EOPNOTSUPP.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dmabuf._native import Mapping, OwnedFd, buffer_address, dup_same, probe_fd
from dmabuf.domain.limits import listed
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.messages import THERE, no_room

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_O_PATH: Final = 0o10000000  # include/uapi/asm-generic/fcntl.h
_F_ADD_SEALS: Final = 1033  # linux/fcntl.h
_MOST_HINTS: Final = 1024
_hints: dict[tuple[int, int], int] = {}  # (st_dev, st_ino) -> the descriptor found last


class Range(NamedTuple):
    """Bytes of a file."""

    fd: OwnedFd
    offset: int
    length: int
    writable: bool


def range_of(memory: ReadableBuffer, operation: str, obj: object) -> Range:
    """Return the file range behind some memory.

    Raises:
        DmaBufError: The memory is not in a file that another process can map, see the module (EOPNOTSUPP), or no descriptor is free
            (EMFILE).
    """
    mapping, start, length = _mapping(memory)
    if mapping is None or mapping.closed:
        raise _hidden(operation, obj, "it is not a mapping of a file")
    found = _descriptor(mapping.dev, mapping.ino, mapping.writable)
    if found is None:
        raise _hidden(operation, obj, "this process has closed every descriptor of it")
    with contextlib.suppress(OSError):  # not sealable, which the next line finds
        fcntl.fcntl(found.number, _F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    if not keeps_size(found.number):
        found.close()
        raise _hidden(operation, obj, "its file can be truncated, which would end every process that maps it")
    return Range(found, mapping.offset + start, length, mapping.writable)


def shown(fd: int, offset: int, length: int, writable: bool) -> tuple[Mapping, memoryview]:
    """Map a range in the other process. Return the mapping, and the range in it. The caller keeps ``fd``.

    Raises:
        DmaBufError: The memory could go away while it is mapped (EOPNOTSUPP), or can't be mapped.
    """
    lead = offset % PAGE
    mapping = mapped(fd, length + lead, offset - lead, writable)
    return mapping, memoryview(mapping)[lead:]


def mapped(fd: int, length: int, offset: int, writable: bool, on_close: Callable[[], object] | None = None) -> Mapping:
    """Map memory that an exporter's process sent.

    Raises:
        DmaBufError: The memory could go away while it is mapped (EOPNOTSUPP).
        InvalidError, NotPermittedError: It can't be mapped as the message says (EINVAL, EACCES and the like).
    """
    if not keeps_size(fd):
        what = "the exporter's memory is in a file that can be truncated"
        raise fail(errno.EOPNOTSUPP, "mmap", f"fd {fd}", "export memory of dmabuf.allocate(), or of a memfd that can be sealed", what=what)
    try:
        return Mapping(fd, length, offset=offset, writable=writable, on_close=on_close)
    except (OSError, OverflowError) as e:
        number = e.errno if isinstance(e, OSError) and e.errno else errno.EINVAL
        what = "the exporter's memory can't be mapped as its process says"
        raise fail(number, "mmap", f"fd {fd}", "update dmabuf in the exporter's process", what=what) from None


def keeps_size(fd: int) -> bool:
    """Return True if the memory of a descriptor can't be truncated: a memfd that is sealed so, or no regular file, as a dma-buf."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return True
    seals = probe_fd(fd)[3]
    return seals >= 0 and bool(seals & fcntl.F_SEAL_SHRINK)


def _hidden(operation: str, obj: object, why: str) -> DmaBufError:
    return fail(
        errno.EOPNOTSUPP,
        operation,
        obj,
        "return mappings of a dmabuf.allocate() buffer, or of a memfd that can be sealed, and keep its descriptor open",
        what=f"the exporter's memory can't be shown to another process: {why}",
    )


def _mapping(memory: ReadableBuffer) -> tuple[Mapping | None, int, int]:
    """Return (mapping, first byte, length) of memory that is a mapping, or a contiguous view of one."""
    if isinstance(memory, Mapping):
        return memory, 0, 0 if memory.closed else memory.size
    view = memoryview(memory)
    base: Any = view.obj
    for _ in range(8):  # an array of a memoryview of a view of a mapping
        if isinstance(base, Mapping) or base is None:
            break
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if not isinstance(base, Mapping) or base.closed or not view.contiguous or not view.nbytes:
        return None, 0, 0
    start = buffer_address(memory) - base.address
    if not 0 <= start <= base.size - view.nbytes:
        return None, 0, 0
    return base, start, view.nbytes


def _descriptor(dev: int, ino: int, writable: bool) -> OwnedFd | None:
    """Return a duplicate of a descriptor of that inode, open for writing if need be; None if there is none."""
    hint = _hints.get((dev, ino))
    if hint is not None and (found := _try(hint, dev, ino, writable)) is not None:
        return found
    try:
        names = listed("show memory", "/proc/self/fd")
    except DmaBufError:
        raise
    except OSError as e:
        raise no_room("show memory", f"inode {ino}", THERE, e.errno or errno.EMFILE) from None
    for name in names:
        try:
            st = os.stat(f"/proc/self/fd/{name}")
        except OSError:
            continue  # it was closed meanwhile
        if (st.st_dev, st.st_ino) == (dev, ino) and (found := _try(int(name), dev, ino, writable)) is not None:
            if len(_hints) >= _MOST_HINTS:
                _hints.clear()
            _hints[dev, ino] = int(name)
            return found
    return None


def _try(number: int, dev: int, ino: int, writable: bool) -> OwnedFd | None:
    """Duplicate a number if it is such a descriptor. The duplicate is checked, because another thread may reuse the number meanwhile."""
    try:
        found = next(map(OwnedFd, map(dup_same, (number,), (dev,), (ino,), (True,))))
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            raise no_room("show memory", f"inode {ino}", THERE, e.errno) from None
        return None
    flags = fcntl.fcntl(found.number, fcntl.F_GETFL)
    if not flags & _O_PATH and (not writable or flags & os.O_ACCMODE == os.O_RDWR):
        return found
    found.close()
    return None
