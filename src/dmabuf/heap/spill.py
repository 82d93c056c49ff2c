"""``SpillHeap`` and the heap ``spill``: buffers that together need more memory than they are given.

A spill heap has a *budget*: at most so many bytes of its buffers are in memory at any moment. The other buffers are in a file
(`spill_file`). Whoever uses a buffer brings it back, and the buffer that was used longest ago goes out in its place. Its fd, inode and size
stay. To its users it is a buffer like any other. To the framework it is a dynamic exporter (`core.contract`), whose memory is the buffer's
own memfd (`core.buffer.residency`).

*What stays in memory.* A buffer inside of an access (``read``, ``write``, ``begin_cpu_access`` until ``end_cpu_access``); a buffer with a
pending fence; a *pinned* buffer. These pin: a bare mapping until no process maps it, a vmap, a device that is attached without an importer,
a mapping made through an importer (with ``MOVE_NOTIFY`` only ``pin`` does), and ``pin``.

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
import threading
import weakref
from dataclasses import dataclass
from typing import Final

from dmabuf.core.buffer.handle import PAGE, handle_of
from dmabuf.core.contract import checked_ops
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.export.export import make
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail
from dmabuf.heap import budget
from dmabuf.heap.budget import whole
from dmabuf.heap.memfd import asked
from dmabuf.heap.spill_buffer import Residency, SpillBuffer
from dmabuf.heap.spill_file import SpillFile, default_directory
from dmabuf.heap.spill_moves import ResidentSet

NAME: Final = "spill"
MEMORY_TIMEOUT: Final = 2.0  #: seconds that memory in use is waited for
SHARE: Final = 4  #: without DMABUF_SPILL_BUDGET: this part of the memory that the machine's limits leave


@dataclass(frozen=True)
class SpillStatistics:
    """What a heap says of itself: bytes, but ``buffers`` and the two counts of moves.

    ``resident``: in memory, never above ``budget``. ``spilled``: not in memory. ``pinned``: of the resident ones, what can't be moved now
    because of mappings, vmaps, devices, or because it is being accessed. ``written`` and ``read``: what went to the file and came from it.
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
    """A heap with a budget, see the module.

    ``budget``: bytes in memory at most, rounded down to pages; None for ``$DMABUF_SPILL_BUDGET`` (``512M``, ``2G``), else a quarter of what
    the machine's and the cgroup's limits leave now. ``directory``: where the file is made, None for `spill_file.default_directory`.
    ``memory_timeout``: seconds that memory in use is waited for.

    Errors: EINVAL a budget below a page, a negative or infinite memory_timeout; ENODEV no directory; those of making a file there (ENOENT,
    EACCES, …).
    """

    def __init__(
        self, *, budget: int | None = None, directory: str | os.PathLike[str] | None = None, memory_timeout: float = MEMORY_TIMEOUT
    ) -> None:
        given = default_budget() if budget is None else whole(budget, "SpillHeap: budget")
        if given < PAGE:
            raise fail(errno.EINVAL, "spill", f"a budget of {given} bytes", f"give it at least a page ({PAGE} bytes)")
        if not 0 <= memory_timeout < float("inf"):
            raise fail(
                errno.EINVAL,
                "spill",
                f"memory_timeout={memory_timeout}",
                "pass 0 or more seconds; every wait for memory is bounded",
                what="not a number of seconds",
            )
        self.budget, self.memory_timeout = given // PAGE * PAGE, memory_timeout
        self._file = SpillFile(default_directory() if directory is None else directory)
        self._resident_set = ResidentSet(self.budget, memory_timeout, self._file)
        self._pid = os.getpid()
        _HEAPS.add(self)

    def __repr__(self) -> str:
        return f"<dmabuf.SpillHeap budget {self.budget} in {self.directory}{' closed' if self.closed else ''}>"

    @property
    def directory(self) -> str:
        """Where the file is."""
        return self._file.directory

    @property
    def closed(self) -> bool:
        """Was ``close()`` called?"""
        return self._resident_set.closed

    def allocate(self, size: int, *, name: str | bytes | None = None, domain: Domain | None = None) -> DmaBuf:
        """A new zeroed buffer of ``size`` bytes, rounded up to pages, which takes memory from its first use on.

        Its room in the file is reserved now. ``name``: at most 31 bytes. ``domain``: None for this user's.

        Errors: EINVAL a size below 1, or a bad name; ENOMEM larger than the budget; ENOSPC, EDQUOT, EFBIG the file system can't hold it;
        EBADF the heap is closed; EPERM in a forked child; EMFILE; ENOSPC the domain is full.
        """
        if os.getpid() != self._pid:
            raise fail(
                errno.EPERM, "allocate", self, "make a heap in this process", what="it is the heap of the process that forked this one"
            )
        if self.closed:
            raise fail(errno.EBADF, "allocate", self, "make another heap", what="the heap is closed")
        size, raw, domain = asked(size, name, domain)
        if size > self.budget:
            raise fail(
                errno.ENOMEM,
                "allocate",
                f"{size} bytes",
                "give the heap a larger budget (DMABUF_SPILL_BUDGET), or ask for less",
                what=f"a buffer is in memory whole when it is used, and the heap's budget is {self.budget} bytes",
            )
        try:
            at = self._file.take(size)
        except OSError as e:
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
        """A snapshot for programs."""
        residents = self._resident_set
        with residents.changed:
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
        """Allocate nothing from now on. The buffers live on, and the file with them. Again, or in a forked child: nothing."""
        if os.getpid() != self._pid:
            return
        self._resident_set.close()

    def __enter__(self) -> SpillHeap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forked(self) -> None:
        self._resident_set.forked()


_HEAPS: weakref.WeakSet[SpillHeap] = weakref.WeakSet()
_default: SpillHeap | None = None
_making = threading.Lock()
_SIZE: Final = re.compile(r"\s*(\d+)\s*([KMGT]?)(?:i?B)?\s*\Z", re.IGNORECASE)


def default_budget() -> int:
    """Bytes in memory for a heap that is given no budget. Errors: EINVAL what ``DMABUF_SPILL_BUDGET`` says is no size."""
    given = os.environ.get("DMABUF_SPILL_BUDGET")
    if not given:
        return budget.left() // SHARE
    match = _SIZE.match(given)
    if match is None:
        raise fail(errno.EINVAL, "spill", f"DMABUF_SPILL_BUDGET={given}", "give bytes, or a number with K, M, G or T", what="no size")
    return int(match[1]) << (0, 10, 20, 30, 40)["KMGT".find(match[2].upper()) + 1 if match[2] else 0]


def default() -> SpillHeap:
    """The heap ``spill`` of this process, made at first use. Errors: as :class:`SpillHeap`."""
    global _default
    with _making:
        if _default is None:
            _default = SpillHeap()
        return _default


def allocate(size: int, *, name: str | bytes | None = None, domain: Domain | None = None) -> DmaBuf:
    """A new buffer of the process's heap. Errors: as :meth:`SpillHeap.allocate` and :class:`SpillHeap`."""
    return default().allocate(size, name=name, domain=domain)


def unavailable() -> str | None:
    """Why this heap can't be used here, None when it can."""
    try:
        if _default is None:
            default_budget()
            default_directory()
    except OSError as e:
        return str(e)
    return None


def _after_fork() -> None:
    global _default, _making
    _default, _making = None, threading.Lock()
    for heap in list(_HEAPS):
        heap._forked()


os.register_at_fork(after_in_child=_after_fork)
