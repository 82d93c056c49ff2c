"""``Attached``: a buffer that a device of ours uses: its attachment, the table mapped now, and the jobs that use it.

It keeps a reference of its own to the buffer until ``detach()``, as a driver does. The table is made, under the reservation lock, when the
first job is submitted and stays until ``detach()``. When a dynamic exporter moves the memory, the next submission maps anew; jobs
submitted before keep the old addresses, which stay valid because the exporter waits for their fences (spec 4.11), and the old table is
unmapped when the last of them has ended.

Who ends a job must not take a reservation lock: its holder may wait for the next job's fence. So tables are given back by the device's
*janitor*, a thread that signals nothing.
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

from dmabuf.core.base.usage import Direction, checked_direction
from dmabuf.core.buffer.backing import backing_of
from dmabuf.core.contract import Importer
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.memory.device import Device
from dmabuf.core.memory.scatterlist import DmaEntry, SgTable
from dmabuf.core.sync.kernel_fences import fence_of
from dmabuf.devices.janitor import Janitor
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
        """A part of it. Errors: EINVAL not within it, or empty."""
        offset = operator.index(offset)
        length = self.length - offset if length is None else operator.index(length)
        if not 0 <= offset < offset + length <= self.length:
            raise fail(
                errno.EINVAL,
                "range",
                self.attached,
                f"0 <= offset < offset + length <= {self.length}",
                what=f"{length} bytes from {offset} are outside of it, or none",
            )
        return Range(self.attached, self.offset + offset, length)


@dataclass(frozen=True)
class AttachedStatistics:
    """What an attached buffer says of itself. ``jobs``: submitted and not ended; ``maps``: tables made so far; ``moves``: heard of."""

    size: int
    dynamic: bool
    mapped: bool
    jobs: int
    maps: int
    moves: int


class _Table:
    """One mapping and who uses it."""

    __slots__ = ("entries", "sgt", "starts", "users")

    def __init__(self, sgt: SgTable) -> None:
        self.sgt = sgt
        self.entries = sgt.dma_entries
        self.starts = [0, *itertools.accumulate(entry.length for entry in self.entries)]
        self.users = 0

    def addresses(self, offset: int, length: int) -> list[DmaEntry]:
        """The pieces of a range of the buffer, as the device addresses them."""
        pieces = []
        i = bisect.bisect_right(self.starts, offset) - 1
        while length > 0:
            inside = offset - self.starts[i]
            n = min(length, self.entries[i].length - inside)
            pieces.append(DmaEntry(self.entries[i].address + inside, n))
            offset, length, i = offset + n, length - n, i + 1
        return pieces


class _Moves(Importer):
    """What makes the attachment dynamic."""

    __slots__ = ("_attached",)

    def __init__(self, attached: Attached) -> None:
        self._attached = attached

    def move_notify(self, attachment: object) -> None:
        self._attached._moved()


class Attached:
    """A buffer attached to a device of ours; made by its ``attach()``. ``with`` detaches at the end.

    ``buf``: a handle of its own. ``direction``: which way its tables are mapped. ``device``, ``janitor``: of the device that attached it.
    ``forget``: called once it is detached. Errors of :meth:`range`: EINVAL outside of the buffer,
    or empty.
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
            raise fail(errno.EINVAL, "attach", buf, "a mapping has a direction")
        self.device, self.janitor, self._forget = device, janitor, forget
        self.buf = buf.get_dma_buf()
        try:
            behind = backing_of(buf._record)
            behind.here("attach")  # of an exporter in another process, what it can do is known from here on
            self.dynamic = behind.dynamic if dynamic is None else dynamic
            self.resv = self.buf.resv
            self.size, self._ino = self.buf.size, self.buf.ino
            self._attachment = self.buf.attach(device, _Moves(self) if self.dynamic else None)
        except BaseException:
            self.buf.close()
            raise
        self._kernel = self.buf._kernel()
        self._counts = threading.Lock()
        self._table: _Table | None = None
        self._stale = False
        self._old: list[_Table] = []  # shown the place before a move; under the reservation lock
        self._jobs: dict[Job, None] = {}
        self._maps = self._moves = 0
        self._leaving = self._gone = False  # no job may come any more; detached

    def __repr__(self) -> str:
        state = "detached" if self._gone else "dynamic" if self.dynamic else "static"
        return f"<dmabuf Attached {self.device.name} on ino {self._ino} {state}>"

    def range(self, offset: int = 0, length: int | None = None) -> Range:
        """``length`` bytes from ``offset``; None: the rest of the buffer. Errors: EINVAL not within the buffer, or empty."""
        return Range(self, 0, self.size).range(offset, length)

    # ---- for submission ----

    def prepare(self) -> None:
        """Have it mapped. No lock is held: a static importer's map waits for KERNEL fences, with this one's lock and no other."""
        if self._table is None:
            with self.resv.locked():
                self._current()

    def _current(self) -> _Table:
        """The table that shows where the memory is; the lock is held."""
        if self._leaving:
            raise fail(errno.EINVAL, "submit", self, "attach the buffer again", what="it was detached")
        table = self._table
        if table is None or self._stale:
            fresh = _Table(self._attachment.map(self.direction))
            self._maps += 1
            if table is not None:
                self._old.append(table)
                self.janitor.later(self.sweep)
            table = self._table = fresh
            self._stale = False
        return table

    def enter(self, job: Job, offset: int, length: int) -> tuple[object, list[DmaEntry]]:
        """Count a job in: a token for :meth:`leave`, and the addresses of a range; the lock is held.

        Errors: those of ``map``; EINVAL detached.
        """
        table = self._current()
        with self._counts:
            table.users += 1
            self._jobs[job] = None
        return table, table.addresses(offset, length)

    def _moved(self) -> None:
        """The memory is about to move."""
        self._stale = True
        self._moves += 1
        self.janitor.later(self.sweep)

    # ---- a real dma-buf ----

    def kernels_fence(self, write: bool) -> DmaFence | None:
        """What such an access has to wait for in the kernel, as a fence of this process; None: nothing, or not to be had as one."""
        if self._kernel is None or self._kernel.ready(self.buf, select.POLLOUT if write else select.POLLIN):
            return None
        try:
            with self._kernel.export_sync_file(self.buf, write) as sync_file:
                return fence_of(sync_file.number, self.buf.domain)
        except OSError as e:
            if e.errno != errno.ENOTTY:  # before Linux 6.0: then the bracket waits
                raise
            return None

    @contextlib.contextmanager
    def bracket(self, write: bool) -> Iterator[None]:
        """While a job works. To the kernel, a device of ours is the CPU."""
        if self._kernel is None:
            yield
            return
        way = Direction.BIDIRECTIONAL if write else Direction.FROM_DEVICE
        self._kernel.begin(self.buf, way)
        try:
            yield
        finally:
            self._kernel.end(self.buf, way)

    # ---- for whoever ends a job: no lock is taken that others hold for long ----

    def leave(self, job: Job, token: object) -> None:
        """Count a job out again."""
        assert isinstance(token, _Table)
        with self._counts:
            token.users -= 1
            self._jobs.pop(job, None)
        if not token.users and (token is not self._table or self._stale):
            self.janitor.later(self.sweep)

    # ---- for the janitor, and detach ----

    def sweep(self) -> None:
        """Give back the tables of places that the memory has left."""
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
        """End it; again: nothing. The reservation lock is not held.

        ``wait``: for the jobs that use it. False unplugs it under them: they fault, and their fences end with -EFAULT. Errors:
        ``ContractWarning`` and EDEADLK with the lock held.
        """
        if self._gone:
            return
        with self.resv.locked():
            self._leaving = True
        if wait:
            for job in list(self._jobs):
                job.fence.wait()
        with contextlib.ExitStack() as rest:  # whatever the exporter's ops raise, all of it is done
            with self.resv.locked():
                if self._go():
                    return
                rest.callback(self._forget, self)
                rest.callback(self.buf.close)
                rest.callback(self._attachment.detach)
                with contextlib.ExitStack() as tables:
                    for table in (*self._old, *([self._table] if self._table is not None else [])):
                        tables.callback(self._attachment.unmap, table.sgt, self.direction)
                    self._old, self._table = [], None

    def _go(self) -> bool:
        """It is gone from now on; was it already?"""
        was, self._gone = self._gone, True
        return was

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def statistics(self) -> AttachedStatistics:
        """A snapshot for programs."""
        return AttachedStatistics(self.size, self.dynamic, self._table is not None, len(self._jobs), self._maps, self._moves)
