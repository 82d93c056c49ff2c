"""``SpillHeap`` and the heap ``spill``: buffers that together need more than the memory they are given.

A spill heap has a *budget*: at no moment more of its buffers' bytes than that are in memory. The others are in a file (`spill_file`). A
buffer is brought back when it is used, by whoever uses it, and another, the one that was used longest ago, goes in its place; its fd, inode
and size stay. To its users it is a buffer like any other; to the framework a dynamic exporter (`core.contract`), whose memory is the
buffer's own memfd (`core.residence`).

*What stays.* In memory, and not chosen: a buffer inside of an access (``read``, ``write``, ``begin_cpu_access`` until ``end_cpu_access``);
one with a pending fence; one that is *pinned*: by a bare mapping until nobody maps it, by a vmap, by a device that is attached without an
importer or has mapped it with one (with ``MOVE_NOTIFY`` only ``pin`` does), by ``pin``.

*Room.* Who needs memory moves others out until there is enough. What others keep (accesses, fences, mappings, devices) is waited for,
``patience`` seconds at most, then ENOMEM; at once if the caller's own accesses keep it all, because waiting can't help. So memory is never
waited for without an end: who holds one buffer and wants another can't block others for ever, and there is no circle for EDEADLK to find. A
timeout given to ``read`` or ``write`` ends the wait for fences, not that for memory.

A buffer that nobody changed since it came in is dropped without being written; one that was never used takes no memory and no disk traffic.

In a forked child a heap of its parent allocates nothing (EPERM); the heap ``spill`` begins anew there.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import weakref
from dataclasses import dataclass
from typing import Final

from dmabuf.core.buffer.backing import checked_ops, make
from dmabuf.core.dma_buf import PAGE, DmaBuf
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail
from dmabuf.heap import budget
from dmabuf.heap.budget import whole
from dmabuf.heap.memfd import asked
from dmabuf.heap.spill_file import SpillFile, default_directory
from dmabuf.heap.spill_moves import Place, Residents, Spilled

NAME: Final = "spill"
PATIENCE: Final = 2.0  #: seconds that memory in use is waited for
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
    ``patience``: seconds that memory in use is waited for.

    Errors: EINVAL a budget below a page, or a patience below 0; ENODEV no directory; what making a file there answers (ENOENT, EACCES, …).
    """

    def __init__(self, *, budget: int | None = None, directory: str | os.PathLike[str] | None = None, patience: float = PATIENCE) -> None:
        given = default_budget() if budget is None else whole(budget, "SpillHeap: budget")
        if given < PAGE:
            raise fail(errno.EINVAL, "spill", f"a budget of {given} bytes", f"give it at least a page ({PAGE} bytes)")
        if not 0 <= patience < float("inf"):
            raise fail(errno.EINVAL, "spill", f"a patience of {patience} s", "0 or more seconds; memory is not waited for without an end")
        self.budget, self.patience = given // PAGE * PAGE, patience
        self._file = SpillFile(default_directory() if directory is None else directory)
        self._residents = Residents(self.budget, patience, self._file)
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
        return self._residents.closed

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
        made = Spilled(self._residents, size, at)
        self._residents.add(made)
        try:
            buf = make(made, checked_ops(made, False), size, NAME.encode(), None, os.O_RDWR, False, None, raw, domain, made.prepare)
            made.ino, made.resv = buf.ino, buf.resv
        except BaseException:
            self._residents.released(made)
            raise
        return buf

    def statistics(self) -> SpillStatistics:
        """A snapshot for programs."""
        among = self._residents
        with among.changed:
            total, within = (sum(b.size for b in some) for some in (among.buffers, among.order))
            pinned = sum(b.size for b in among.order if b.place is Place.HERE and (b.uses or among.pinned(b)))
            return SpillStatistics(
                self.budget,
                len(among.buffers),
                among.resident,
                total - within,
                pinned,
                among.moves_out,
                among.moves_in,
                among.written,
                among.read,
            )

    def close(self) -> None:
        """Allocate nothing from now on. The buffers live on, and the file with them. Again, or in a forked child: nothing."""
        if os.getpid() != self._pid:
            return
        self._residents.close()

    def __enter__(self) -> SpillHeap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forked(self) -> None:
        self._residents.forked()


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
