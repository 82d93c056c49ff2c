"""``SpillHeap`` and the heap ``spill``: buffers that together need more memory than they are given.

A spill heap has a *budget*: at most so many bytes of its buffers are in memory at any moment. The other buffers are in a file
(`spill_file`). A process that uses a buffer brings it back, and the buffer that was used longest ago goes out in its place. Its fd, inode
and size stay. To its users it is a buffer like any other. To the framework it is a dynamic exporter (`core.contract`), whose memory is the
buffer's own memfd (`core.buffer.residency`).

*What stays in memory.* A buffer inside of an access (``read``, ``write``, ``begin_cpu_access`` until ``end_cpu_access``); a buffer with a
pending fence; a *pinned* buffer. These pin: a bare mapping until no process maps it, a vmap, a device that is attached without an importer,
and ``pin``; with ``MOVE_NOTIFY`` off a mapping made through an importer too.

*Room.* A caller that needs memory moves other buffers out until there is enough. It waits for buffers in use (accesses, fences, mappings,
devices) ``memory_timeout`` seconds at most, and then gets ENOMEM; at once if only the caller's own accesses keep them, because waiting
can't help. Every wait for memory is therefore bounded: processes that each use one buffer and want another don't block each other for ever,
and no cycle is left for EDEADLK to find. The timeout of ``read`` or ``write`` bounds the wait for fences, not the wait for memory.

A buffer that has not changed since it came in goes out without being written. One that was never used takes no memory and no disk traffic.

In a forked child a heap of the parent allocates nothing (EPERM); the heap ``spill`` starts again there.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from typing import Final

from dmabuf.core.buffer.handle import PAGE, handle_of
from dmabuf.core.contract import checked_ops
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.export.export import make
from dmabuf.domain.domain import Domain
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.guards import finished
from dmabuf.domain.limits import file_too_large
from dmabuf.domain.weak_objects import WeakObjects
from dmabuf.errors import fail
from dmabuf.heap import budget
from dmabuf.heap.budget import whole
from dmabuf.heap.memfd import asked
from dmabuf.heap.spill_buffer import Residency, SpillBuffer
from dmabuf.heap.spill_file import SpillFile, default_directory
from dmabuf.heap.spill_moves import ResidentSet

NAME: Final = "spill"
MEMORY_TIMEOUT: Final = 2.0  #: seconds that memory in use is waited for
SHARE: Final = 4  #: without DMABUF_SPILL_BUDGET a heap gets this fraction of the memory that the machine's limits leave


@dataclass(frozen=True)
class SpillStatistics:
    """The state of a heap in bytes, except ``buffers`` and the two counts of moves.

    ``resident``: in memory, never above ``budget``. ``spilled``: not in memory. ``pinned``: resident, but not movable now because of
    mappings, vmaps, devices or accesses. ``written`` and ``read``: to and from the file.
    """

    budget: int
    buffers: int
    resident: int
    spilled: int
    pinned: int
    moves_out: int
    moves_in: int
    written: int
    read: int


class SpillHeap:
    """A heap that keeps part of its buffers in a file.

    Args:
        budget: The most bytes in memory, rounded down to pages. None means ``$DMABUF_SPILL_BUDGET`` (``512M``, ``2G``), else a quarter of
            the memory that the limits of the machine and the cgroup leave now.
        directory: The directory of the file. None means ``$DMABUF_SPILL_DIRECTORY``, else the first usual place that is on a disk.
        memory_timeout: Seconds that a caller waits for memory in use.

    Raises:
        InvalidError: The budget is less than a page, or the timeout is negative or infinite (EINVAL).
        NoDeviceError: There is no directory on a disk (ENODEV).
        DmaBufError: No file can be made in the directory (ENOENT, EACCES, …).
    """

    def __init__(
        self, *, budget: int | None = None, directory: str | os.PathLike[str] | None = None, memory_timeout: float = MEMORY_TIMEOUT
    ) -> None:
        given = default_budget() if budget is None else whole(budget, "SpillHeap: budget")
        if given < PAGE:
            raise fail(errno.EINVAL, "spill", f"budget={given}", f"pass at least {PAGE} bytes", what="the budget is less than a page")
        if not 0 <= memory_timeout < float("inf"):
            raise fail(errno.EINVAL, "spill", f"memory_timeout={memory_timeout}", "pass 0 or more seconds", what="not a finite time")
        self.budget, self.memory_timeout = given // PAGE * PAGE, memory_timeout
        self._file = SpillFile(default_directory() if directory is None else directory)
        self._resident_set = ResidentSet(self.budget, memory_timeout, self._file)
        self._pid = os.getpid()
        _HEAPS.add(self)

    def __repr__(self) -> str:
        return f"<dmabuf.SpillHeap budget {self.budget} in {self.directory}{' closed' if self.closed else ''}>"

    @property
    def directory(self) -> str:
        """The directory of the file."""
        return self._file.directory

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._resident_set.closed

    def allocate(self, size: int, *, name: str | bytes | None = None, domain: Domain | None = None) -> DmaBuf:
        """Return a new zeroed buffer. It takes memory from its first use on, and its room in the file is reserved now.

        Args:
            size: The number of bytes, rounded up to pages.
            name: A label of at most 31 bytes.
            domain: The domain; None means the user's default domain.

        Raises:
            InvalidError: The size is below 1, or the name is bad (EINVAL).
            NoMemoryError: The size is larger than the budget (ENOMEM).
            NoSpaceError: The file system or the domain is full (ENOSPC).
            ClosedError: The heap is closed (EBADF).
            NotPermittedError: This is a forked child (EPERM).
            DmaBufError: The file system can't hold it (EDQUOT, EFBIG), or no descriptor is left (EMFILE).
        """
        if os.getpid() != self._pid:
            raise fail(errno.EPERM, "allocate", self, "make a heap in this process", what="it is the heap of this process's parent")
        if self.closed:
            raise fail(errno.EBADF, "allocate", self, "make another heap", what="the heap is closed")
        size, raw, domain = asked(size, name, domain)
        if size > self.budget:
            raise fail(
                errno.ENOMEM,
                "allocate",
                f"{size} bytes",
                "raise the budget (DMABUF_SPILL_BUDGET), or ask for less",
                what=f"a buffer in use is in memory as a whole, and the heap's budget is {self.budget} bytes",
            )
        try:
            at = self._file.take(size)
        except OSError as e:
            if e.errno == errno.EFBIG:
                raise file_too_large("allocate", f"the spill file in {self.directory}", e.errno, "use another file system") from None
            remedy = "free space there, or name another directory (DMABUF_SPILL_DIRECTORY)"
            what = f"no room in the spill file in {self.directory}: {os.strerror(e.errno or errno.EIO)}"
            raise fail(e.errno or errno.EIO, "allocate", f"{size} bytes", remedy, what=what) from None
        made = SpillBuffer(self._resident_set, size, at)
        self._resident_set.add(made)
        try:
            buf = make(made, checked_ops(made, False), size, NAME.encode(), None, os.O_RDWR, False, None, raw, domain, made.prepare)
            made.ino, made.resv, made.shared = buf.ino, buf.resv, handle_of(buf).shared
        except BaseException:
            self._resident_set.released(made)
            raise
        return buf

    def statistics(self) -> SpillStatistics:
        """Return the heap's state at this moment."""
        residents = self._resident_set
        with residents.lock:
            total, within = (sum(b.size for b in some) for some in (residents.buffers, residents.order))
            pinned = sum(b.size for b in residents.order if b.residency is Residency.IN_MEMORY and (b.uses or residents.pinned(b)))
            return SpillStatistics(
                self.budget,
                len(residents.buffers),
                residents.resident,
                total - within,
                pinned,
                residents.moves_out,
                residents.moves_in,
                residents.written,
                residents.read,
            )

    def close(self) -> None:
        """Allocate nothing from now on. The buffers stay, and so does the file. In a forked child, and when called twice: no effect."""
        if os.getpid() != self._pid:
            return
        self._resident_set.close()

    def __enter__(self) -> SpillHeap:
        return self

    @finished
    def __exit__(self, *_: object) -> None:
        self.close()

    def _forked(self) -> None:
        self._resident_set.forked()


_HEAPS: WeakObjects[SpillHeap] = WeakObjects()
_default: SpillHeap | None = None
_making = fork_lock()
_SIZE: Final = re.compile(r"\s*(\d+)\s*([KMGT]?)(?:i?B)?\s*\Z", re.IGNORECASE)


def default_budget() -> int:
    """Return the budget of a heap that is given none. A ``DMABUF_SPILL_BUDGET`` that is not a size is EINVAL."""
    given = os.environ.get("DMABUF_SPILL_BUDGET")
    if not given:
        return budget.left() // SHARE
    match = _SIZE.match(given)
    if match is None:
        remedy = "set a number of bytes, with an optional K, M, G or T"
        raise fail(errno.EINVAL, "spill", f"DMABUF_SPILL_BUDGET={given}", remedy, what="not a size")
    return int(match[1]) << (0, 10, 20, 30, 40)["KMGT".find(match[2].upper()) + 1 if match[2] else 0]


def default() -> SpillHeap:
    """Return the heap ``spill`` of this process, made at first use as :class:`SpillHeap` makes it, with its errors."""
    global _default
    with _making:
        if _default is None:
            _default = SpillHeap()
        return _default


def allocate(size: int, *, name: str | bytes | None = None, domain: Domain | None = None) -> DmaBuf:
    """Return a new buffer of the process's heap. It fails as :class:`SpillHeap` and :meth:`SpillHeap.allocate` do."""
    return default().allocate(size, name=name, domain=domain)


def unavailable() -> str | None:
    """Return why this heap can't be used here, None if it can."""
    try:
        if _default is None:
            default_budget()
            default_directory()
    except OSError as e:
        return str(e)
    return None


def _after_fork() -> None:
    global _default
    _default = None
    for heap in list(_HEAPS):
        heap._forked()


os.register_at_fork(after_in_child=_after_fork)
