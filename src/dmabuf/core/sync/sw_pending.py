"""The pending fences of a software timeline: a list in its shared file, and what one process knows of it.

The list is appended to, and compacted now and then. A process reads what was appended since it looked last, and keeps the fences ordered by
their values. So making and signaling N fences takes time in proportion to N (and its logarithm), in however many processes.

The lock of the file is held for everything here.
"""

from __future__ import annotations

import errno
import heapq
import struct
from typing import Final

from dmabuf._native import Shm, step
from dmabuf.domain.shared_file import SharedFile
from dmabuf.errors import fail

UINT_MAX: Final = 0xFFFFFFFF
MAX_PENDING: Final = 1 << 20
U32: Final = struct.Struct("=I")
HEAD_BYTES: Final = 64
VALUE, _COUNT, _EPOCH = 8, 24, 48  # offsets
_ENTRY: Final = struct.Struct("=QQ")  # handle, value; entries don't cross pages
_COMPACTED: Final = 64  # entries from which on the list is compacted


def ahead(value: int, of: int) -> int:
    """Return how far a value is ahead of another, as a signed 32-bit number."""
    return (value - of + 0x80000000 & UINT_MAX) - 0x80000000


class PendingFences:
    """What this process knows of the list in a file."""

    def __init__(self, file: SharedFile) -> None:
        self._file = file
        self._epoch = -1  # of the list, when it was read; -1 while what is known of it changes: after an interruption it is read again
        self._removed = -1  # the epoch of the list from which due() has removed some
        self._read = 0  # entries
        self._value = self.count()  # of the timeline, when it was read
        self._position = self._value  # the same, without wrapping: what orders the fences doesn't change with the count
        self._ordered: list[tuple[int, int, int]] = []  # a heap of (position, value, handle); some may be signaled
        self._by_value: dict[int, int] = {}
        self._next_look = _COMPACTED  # entries at which to see whether compacting is worth it

    def count(self) -> int:
        """Return the count of the timeline."""
        return self._number(VALUE)

    def _number(self, offset: int) -> int:
        raw = self._file.read(offset, 4)
        if len(raw) < 4:
            raise fail(errno.EUCLEAN, "look up", "a SwSync", "make a new one", what="another program wrote to its descriptor")
        return int(U32.unpack(raw)[0])

    def _used(self) -> int:
        return min(self._number(_COUNT), MAX_PENDING)

    def _entries(self, first: int, count: int) -> list[tuple[int, int]]:
        raw = self._file.read(HEAD_BYTES + first * _ENTRY.size, count * _ENTRY.size)
        found = _ENTRY.iter_unpack(raw[: len(raw) // _ENTRY.size * _ENTRY.size])
        return [(handle, value & UINT_MAX) for handle, value in found]  # another program may have written more than a count has bits

    def all(self, shm: Shm) -> list[tuple[int, int]]:
        """Return (handle, value) of the fences that are pending now, in the order of the list."""
        return [(handle, value) for handle, value in self._entries(0, self._used()) if handle and shm.fence_pending(handle)]

    def _update(self, shm: Shm) -> None:
        value, used, epoch = self.count(), self._used(), self._number(_EPOCH)
        known, self._epoch = self._epoch, -1
        self._position += value - self._value & UINT_MAX
        self._value = value
        if epoch != known or used < self._read:
            self._read = 0
            self._ordered.clear()
            self._by_value.clear()
        for handle, at in self._entries(self._read, used - self._read):
            if handle and shm.fence_pending(handle):
                heapq.heappush(self._ordered, (self._position + ahead(at, value), at, handle))
                self._by_value[at] = handle
        self._read, self._epoch = used, epoch

    def at(self, shm: Shm, value: int) -> int:
        """Return the handle of a fence of this value that is pending, 0: there is none."""
        self._update(shm)
        handle = self._by_value.get(value, 0)
        if handle and not shm.fence_pending(handle):
            del self._by_value[value]
            return 0
        return handle

    def due(self, shm: Shm, n: int) -> list[tuple[int, int, int]]:
        """Remove those that are due when the count is n more, and return (how far ahead, value, handle), the earliest first.

        The caller signals them and then calls :meth:`settle`. If it is interrupted before, the list is read again.
        """
        self._update(shm)
        self._removed, self._epoch = self._epoch, -1
        found = []
        while self._ordered and self._ordered[0][0] <= self._position + n:
            position, value, handle = heapq.heappop(self._ordered)
            if self._by_value.get(value) == handle:
                del self._by_value[value]
            if shm.fence_pending(handle):
                found.append((position - self._position, value, handle))
        return found

    def settle(self) -> None:
        """Those that :meth:`due` returned last are signaled."""
        self._epoch = self._removed

    def append(self, shm: Shm, handle: int, value: int) -> None:
        """Append a pending fence to the list, which is compacted first if half of its fences are signaled.

        Raises:
            NoSpaceError: Too many are pending (ENOSPC).
        """
        used = self._used()
        if used >= self._next_look or used >= MAX_PENDING:
            used = self._compact(shm, used)
        if used >= MAX_PENDING:
            raise fail(errno.ENOSPC, "create_fence", "a SwSync", "signal some first", what=f"{MAX_PENDING} fences are pending")
        self._file.write(HEAD_BYTES + used * _ENTRY.size, _ENTRY.pack(handle, value))
        step("sw_entered")  # past the end, so not on the list yet; the fence is signaled when this process dies
        self._file.write(_COUNT, U32.pack(used + 1))

    def _compact(self, shm: Shm, used: int) -> int:
        pending = self.all(shm)
        if len(pending) <= used // 2:
            # First, so that the others read all of the list again, whatever of the rest is done. Then from the front: if this process dies
            # partway, every pending fence is still at its old place or at its new one.
            self._file.write(_EPOCH, U32.pack(self._number(_EPOCH) + 1 & UINT_MAX))
            self._file.write(HEAD_BYTES, b"".join(_ENTRY.pack(*entry) for entry in pending))
            step("sw_compacted")
            self._file.write(_COUNT, U32.pack(len(pending)))
            used = len(pending)
        self._next_look = max(_COMPACTED, 2 * len(pending))
        return used
