"""``Attached``: a buffer attached to a device of this library, with its mapped table and the jobs that use it.

It keeps its own handle of the buffer until ``detach()``, as a driver does. The table is mapped under the reservation lock when the first
job is submitted, and stays until ``detach()``. When a dynamic exporter moves the memory, the next submission maps again. Earlier jobs keep
the old addresses, which stay valid because the exporter waits for their fences (semantics 4.11). The old table is unmapped when the last of
these jobs has ended.

The thread that ends a job must not take a reservation lock, because the holder of the lock may be waiting for the next job's fence. So the
device's *janitor*, a thread that signals no fence, unmaps tables.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import operator
import select
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from dmabuf._native import finish
from dmabuf.core.attach.attachment import tables_of
from dmabuf.core.attach.importer import Importer
from dmabuf.core.base.usage import Direction, checked_direction
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.memory.device import Device
from dmabuf.core.memory.scatterlist import DmaEntry, SgTable
from dmabuf.core.sync.kernel_fences import fence_of
from dmabuf.devices.janitor import Janitor
from dmabuf.domain.guards import finished
from dmabuf.errors import fail


class Job(Protocol):
    """What an attached buffer needs of a job that uses it."""

    @property
    def fence(self) -> DmaFence:
        """The fence that ends with the job; there from when the job is queued."""


class Range(NamedTuple):
    """``length`` bytes from ``offset`` of an attached buffer; made by :meth:`Attached.range`."""

    attached: Attached
    offset: int
    length: int

    def range(self, offset: int = 0, length: int | None = None) -> Range:
        """Return a part of this range.

        Raises:
            InvalidError: The part is empty, or not within this range (EINVAL).
        """
        offset = operator.index(offset)
        length = self.length - offset if length is None else operator.index(length)
        if not 0 <= offset < offset + length <= self.length:
            raise fail(
                errno.EINVAL,
                "range",
                self.attached,
                f"stay within 0 to {self.length}, with at least one byte",
                what=f"bytes {offset} to {offset + length} are not inside of its {self.length}",
            )
        return Range(self.attached, self.offset + offset, length)


@dataclass(frozen=True)
class AttachedStatistics:
    """The state of an attached buffer. ``jobs``: that have not ended; ``maps``: tables made so far; ``moves``: notified so far."""

    size: int
    dynamic: bool
    mapped: bool
    jobs: int
    maps: int
    moves: int


class _Table:
    """A mapped table, and the uses that jobs make of it."""

    __slots__ = ("entries", "sgt", "starts", "users")

    def __init__(self, sgt: SgTable) -> None:
        self.sgt = sgt
        self.entries = sgt.dma_entries
        self.starts = [0, *itertools.accumulate(entry.length for entry in self.entries)]
        self.users: set[_Use] = set()

    def addresses(self, offset: int, length: int) -> list[DmaEntry]:
        """Return the DMA addresses of a range of the buffer."""
        pieces = []
        i = bisect.bisect_right(self.starts, offset) - 1
        while length > 0:
            inside = offset - self.starts[i]
            n = min(length, self.entries[i].length - inside)
            pieces.append(DmaEntry(self.entries[i].address + inside, n))
            offset, length, i = offset + n, length - n, i + 1
        return pieces


class _Use:
    """One use of a table by a job."""

    __slots__ = ("table",)

    def __init__(self, table: _Table) -> None:
        self.table = table


class _Moves(Importer):
    """The importer that makes the attachment dynamic."""

    __slots__ = ("_attached",)

    def __init__(self, attached: Attached) -> None:
        self._attached = attached

    def move_notify(self, attachment: object) -> None:
        self._attached._moved()


class Attached:
    """A buffer attached to a device, made by the device's ``attach()``. A ``with`` block detaches it at the end.

    ``buf``: its own handle of the buffer. ``direction``: the direction of its tables. ``device`` and ``janitor`` belong to the device that
    attached it, and ``forget`` is called once it is detached.
    """

    def __init__(
        self,
        buf: DmaBuf,
        device: Device,
        janitor: Janitor,
        direction: int,
        dynamic: bool | None,
        *,
        forget: Callable[[Attached], object],
    ) -> None:
        self.direction = checked_direction(direction, "attach", buf)
        if self.direction is Direction.NONE:
            remedy = "pass TO_DEVICE, FROM_DEVICE or BIDIRECTIONAL"
            raise fail(errno.EINVAL, "attach", buf, remedy, what="Direction.NONE is not a direction of a mapping")
        self.device, self.janitor, self._forget = device, janitor, forget
        self._counts = threading.RLock()  # re-entrant, because a finalizer or a signal handler may come in the middle
        self._table: _Table | None = None
        self._stale = False
        self._old: list[_Table] = []  # of the memory before a move; under the reservation lock
        self._jobs: dict[Job, None] = {}
        self._maps = self._moves = 0
        self._leaving = self._gone = False  # no job may be submitted any more; it is detached
        self.buf = buf.get_dma_buf()
        try:
            behind = handle_of(buf).shared.ensure_backing()
            behind.check_reachable("attach")  # of an exporter in another process, what it can do is known from here on
            self.dynamic = behind.dynamic if dynamic is None else dynamic
            self.resv = self.buf.resv
            self.size = self.buf.size
            self._kernel = handle_of(self.buf).kernel()
            self._attachment = self.buf.attach(device, _Moves(self) if self.dynamic else None)
        except BaseException:
            self.buf.close()
            raise

    def __repr__(self) -> str:
        state = "detached" if self._gone else "dynamic" if self.dynamic else "static"
        return f"<dmabuf Attached {self.device.name} on {handle_of(self.buf).shared} {state}>"

    def range(self, offset: int = 0, length: int | None = None) -> Range:
        """Return a range of ``length`` bytes from ``offset``, with None the rest of the buffer.

        Raises:
            InvalidError: The range is empty, or not within the buffer (EINVAL).
        """
        return Range(self, 0, self.size).range(offset, length)

    # ---- for submission ----

    def prepare(self) -> None:
        """Map a table.

        The caller holds no lock, because the map of a static importer waits for KERNEL fences, under this buffer's lock only.
        """
        if self._table is None:
            with self.resv.locked():
                self._current()

    def _current(self) -> _Table:
        """Return the table of the memory's present place. The lock is held."""
        if self._leaving:
            raise fail(errno.EINVAL, "submit", self, "attach the buffer again", what="it was detached")
        table = self._table
        if table is None or self._stale:
            fresh = None
            sgt = self._attachment.map(self.direction)
            try:
                fresh = _Table(sgt)
                self._maps += 1
            finally:
                if fresh is None:
                    self._attachment.unmap(sgt, self.direction)
                else:
                    self._table, self._stale = fresh, False
            if table is not None:
                self._old.append(table)
                self.janitor.later(self.sweep)
            table = fresh
        return table

    def enter(self, job: Job, offset: int, length: int, taken: Callable[[object], object]) -> list[DmaEntry]:
        """Count a job's use of a range. The lock is held. Return the addresses of the range.

        ``taken`` gets the token for :meth:`leave`, before the use is counted.

        Raises:
            InvalidError: The device is detached (EINVAL).
            DmaBufError: The memory can't be mapped, see ``map``.
        """
        table = self._current()
        use = _Use(table)
        taken(use)
        with self._counts:
            table.users.add(use)
            self._jobs[job] = None
        return table.addresses(offset, length)

    def _moved(self) -> None:
        """Map again at the next submission, because the memory is about to move."""
        self._stale = True
        self._moves += 1
        self.janitor.later(self.sweep)

    # ---- a kernel dma-buf ----

    def kernels_fence(self, write: bool) -> DmaFence | None:
        """Return what such an access waits for in the kernel as a fence of this process, None if there is nothing, or no such fence."""
        if self._kernel is None or self._kernel.ready(self.buf, select.POLLOUT if write else select.POLLIN):
            return None
        try:
            with self._kernel.export_sync_file(self.buf, write) as sync_file:
                return fence_of(sync_file.number, self.buf.domain)
        except OSError as e:
            if e.errno != errno.ENOTTY:  # before Linux 6.0, where the bracket waits instead
                raise
            return None

    @contextlib.contextmanager
    def bracket(self, write: bool) -> Iterator[None]:
        """Bracket the work of a job. For the kernel, a device of this library is the CPU."""
        if self._kernel is None:
            yield
            return
        way = Direction.BIDIRECTIONAL if write else Direction.FROM_DEVICE
        self._kernel.begin(self.buf, way)
        try:
            yield
        finally:
            self._kernel.end(self.buf, way)

    # ---- for the thread that ends a job: it takes no lock that others hold for long ----

    def leave(self, job: Job, token: object) -> None:
        """Uncount a use by a job. Doing so twice has no effect."""
        assert isinstance(token, _Use)
        table = token.table
        with self._counts:
            table.users.discard(token)
            self._jobs.pop(job, None)
        if not table.users and (table is not self._table or self._stale):
            self.janitor.later(self.sweep)

    # ---- for the janitor, and detach ----

    def sweep(self) -> None:
        """Unmap the tables of memory that has moved."""
        with self.resv.locked():
            if self._gone:
                return
            if self._stale and self._table is not None:
                self._old.append(self._table)
                self._table, self._stale = None, False
            for table in [table for table in self._old if not table.users]:
                self._old.remove(table)
                self._attachment.unmap(table.sgt, self.direction)

    def detach(self, *, wait: bool = True) -> None:
        """Detach the buffer. Calling it twice has no effect. The caller doesn't hold the reservation lock.

        Args:
            wait: Whether to wait for the jobs that use it. With False they fault, and their fences are signaled with -EFAULT.

        Raises:
            DeadlockError: The caller holds the lock (EDEADLK, and a ``ContractWarning``).
        """
        if self._gone:
            return
        with self.resv.locked():
            self._leaving = True
        if wait:
            for job in list(self._jobs):
                job.fence.wait()
        # If an op of the exporter or a signal handler raises, the rest is done all the same.
        failed: list[Exception] = []
        mine = False
        try:
            with self.resv.locked():
                mine = self._go()
                if not mine:
                    return
                finish(self._unmap_all, failed)
                finish(self._unmap_all, failed)  # what a signal handler interrupted the first time
        finally:
            if mine:
                finish(self._end)
        if failed:
            raise failed[0]

    def _go(self) -> bool:
        """Mark it as detached. Return False if it was already."""
        was, self._gone = self._gone, True
        return not was

    def _unmap_all(self, failed: list[Exception]) -> None:
        """Unmap every table that is mapped. The lock is held."""
        for sgt, way in tables_of(self._attachment):
            try:
                self._attachment.unmap(sgt, way)
            except Exception as e:
                failed.append(e)
        self._old, self._table = [], None

    def _end(self) -> None:
        """Detach, and forget the buffer. Doing so twice has no effect."""
        try:
            if self._attachment.attached:
                self._attachment.detach()
        finally:
            try:
                self.buf.close()
            finally:
                self._forget(self)

    def __enter__(self) -> Attached:
        return self

    @finished
    def __exit__(self, *_: object) -> None:
        self.detach()

    def statistics(self) -> AttachedStatistics:
        """Return the counters at this moment."""
        return AttachedStatistics(self.size, self.dynamic, self._table is not None, len(self._jobs), self._maps, self._moves)
