"""``Device``: who uses buffers by DMA address: its limits, its IOMMU, and what is mapped for it right now.

A device is software that plays hardware: it reads and writes memory by DMA address alone (:meth:`Device.read`, :meth:`Device.write`,
and :meth:`Device.views` for I/O without a copy), and any address that no mapping covers at that moment, or that is mapped for the other
direction, *faults*: EFAULT, and nothing of that access was done. So a program that unmaps too early, or keeps an address over a move, is
found out.

With the IOMMU (the default) a mapping's pages lie side by side in an address range of the device, below ``dma_mask``, which begins with a
page never mapped and is not used again soon. Without one, a DMA address is where this process sees the memory: a mask smaller than that
address space then refuses (EIO), as the kernel's direct mapping does.

*Who may call what.* An exporter's ``map`` calls :meth:`Device.map_sgtable`, its ``unmap`` :meth:`Device.unmap_sgtable`. No lock of ours is
needed; a device has its own. The memory of a mapping can't go away before it is unmapped, and ``unmap_sgtable`` waits for an access that
is under way, as hardware does before it forgets an address.
"""

from __future__ import annotations

import bisect
import errno
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmabuf._native import buffer_address
from dmabuf.core.base.usage import Direction, checked_direction
from dmabuf.core.memory.scatterlist import (
    MAX_SEGMENT,
    PAGE,
    DmaEntry,
    IovaRange,
    SgTable,
    TableMapping,
    checked_segment,
    cpu_side,
    mapping_of,
    pieces_of,
    set_mapping,
)
from dmabuf.errors import ContractError, fail

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ALL_ADDRESSES = (1 << 64) - 1
_READS = (Direction.BIDIRECTIONAL, Direction.TO_DEVICE)
_WRITES = (Direction.BIDIRECTIONAL, Direction.FROM_DEVICE)
_WAYS = {Direction.TO_DEVICE: _READS, Direction.FROM_DEVICE: _WRITES, Direction.BIDIRECTIONAL: (Direction.BIDIRECTIONAL,)}


_ALL: weakref.WeakSet[Device] = weakref.WeakSet()


@dataclass(frozen=True)
class DeviceStatistics:
    """What a device says of itself. ``mapped``: bytes that it can reach now; ``windows``: pieces; ``faults``: accesses refused so far."""

    name: str
    mapped: int
    windows: int
    faults: int


class Device:
    """A device that buffers are attached for.

    ``name``: shown in listings. ``dma_mask``: the highest address it can use, 2**n - 1. ``max_segment``: the longest entry that it takes,
    in bytes. ``iommu``: whether it has one.

    Errors: EINVAL an empty name, a mask that is none; ``ContractWarning`` and EINVAL a ``max_segment`` below a page.
    """

    def __init__(self, name: str, *, dma_mask: int = ALL_ADDRESSES, max_segment: int = MAX_SEGMENT, iommu: bool = True) -> None:
        if not name or "\0" in name:
            raise fail(errno.EINVAL, "device", repr(name), "give the device a name")
        if dma_mask & (dma_mask + 1) or not 2 * PAGE <= dma_mask <= ALL_ADDRESSES:
            raise fail(errno.EINVAL, "device", name, "dma_mask is 2**n - 1, n at most 64", what=f"no DMA mask: {dma_mask:#x}")
        self.name, self.dma_mask, self.iommu = name, dma_mask, iommu
        self.max_segment = checked_segment(max_segment, "device", 3)
        self._lock = threading.Lock()
        self._calm = threading.Condition(self._lock)
        self._users: dict[int, list[int]] = {}  # serial of a window -> threads inside of views() of it
        self._ranges: list[IovaRange] = []
        self._next = PAGE  # address 0 is never given: it is what a forgotten field holds
        self._serial = 0
        self._faults = 0
        _ALL.add(self)

    def __repr__(self) -> str:
        return f"<dmabuf.Device {self.name}>"

    # ---- mapping, for exporters ----

    def map_sgtable(self, sgt: SgTable, direction: int) -> SgTable:
        """Make a table's memory reachable and fill its DMA side (dma_map_sgtable). Returns the table.

        Errors, with nothing mapped: EINVAL no direction or NONE, an entry longer than ``max_segment``, a table without memory or mapped
        already; EACCES a direction that writes, and read-only memory; ENOMEM no addresses left below ``dma_mask``; EIO (without IOMMU)
        memory above ``dma_mask``.
        """
        way = checked_direction(direction, "map_sgtable", self)
        if way is Direction.NONE:
            raise fail(errno.EINVAL, "map_sgtable", self, "a mapping has a direction")
        if mapping_of(sgt) is not None:
            raise fail(errno.EINVAL, "map_sgtable", sgt, "unmap it first", what="the table is mapped already")
        views = pieces_of(sgt)
        if not views:
            raise fail(errno.EINVAL, "map_sgtable", sgt, "its exporter fills the DMA side (from_dma)", what="the table has no CPU side")
        for view in views:
            if len(view) > self.max_segment:
                raise fail(
                    errno.EINVAL, "map_sgtable", self, f"build the table with max_segment={self.max_segment}", what="a segment too long"
                )
            if way in _WRITES and view.readonly:
                raise fail(
                    errno.EACCES, "map_sgtable", self, "map TO_DEVICE, or memory that may be written", what="the memory is read-only"
                )
        with self._lock:
            starts = self._place(sgt, views) if self.iommu else self._direct(views)
            made = []
            for start, view in zip(starts, views, strict=True):
                self._serial += 1
                made.append(IovaRange(start, start + len(view), self._serial, view, way))
            for iova in made:
                bisect.insort(self._ranges, iova)
        set_mapping(sgt, TableMapping(self, made, way), self._merged(starts, views))
        return sgt

    def unmap_sgtable(self, sgt: SgTable, direction: int) -> None:
        """Take the addresses back; from now on they fault. Waits for what is inside of :meth:`views` of them.

        Errors: ``ContractError`` not mapped by this device, or the other direction, or this thread is inside of such views itself.
        """
        mapping = mapping_of(sgt)
        if mapping is None or mapping.device is not self:
            raise ContractError(f"unmap_sgtable: {sgt!r} is not mapped by {self!r}")
        _, made, way = mapping
        if way != direction:
            raise ContractError(f"unmap_sgtable: {sgt!r} was mapped {way.name}: unmap it with the same direction")
        try:
            with self._calm:
                if any(threading.get_ident() in self._users.get(iova.serial, ()) for iova in made):
                    raise ContractError(f"unmap_sgtable: {sgt!r}: this thread is inside of views() of it, which it would wait for")
                for iova in made:
                    del self._ranges[bisect.bisect_left(self._ranges, iova)]
                set_mapping(sgt, None, ())
                self._calm.wait_for(lambda: not any(iova.serial in self._users for iova in made))
        finally:
            if mapping_of(sgt) is None:  # also when a signal handler ended the wait: no new access begins, and what is shown stays memory
                for iova in made:
                    iova.view.release()

    def _place(self, sgt: SgTable, views: list[memoryview]) -> list[int]:
        """Addresses for the pieces, side by side by whole pages; the lock is held."""
        offsets, total = [], 0
        for (_, offset, length), _ in zip(cpu_side(sgt), views, strict=True):
            offsets.append(total + offset)
            total += -(-(offset + length) // PAGE) * PAGE
        base = self._next
        i = bisect.bisect_right(self._ranges, base, key=lambda iova: iova.start)
        before = self._ranges[i - 1].end + PAGE if i else 0
        after = self._ranges[i].start - PAGE if i < len(self._ranges) else self.dma_mask + 1
        if before > base or base + total > min(after, self.dma_mask + 1):
            base = self._gap(total)
        self._next = base + total + PAGE  # a page between: what runs over the end faults
        return [base + offset for offset in offsets]

    def _gap(self, total: int) -> int:
        """The addresses are through once: the lowest gap that is long enough."""
        base = PAGE
        for iova in self._ranges:
            if iova.start - base >= total + PAGE:
                break
            base = max(base, -(-iova.end // PAGE) * PAGE + PAGE)
        if base + total - 1 > self.dma_mask:
            raise fail(errno.ENOMEM, "map_sgtable", self, "unmap something, or give it a larger dma_mask", what="no DMA addresses left")
        return base

    def _direct(self, views: list[memoryview]) -> list[int]:
        starts = [buffer_address(view) for view in views]
        for start, view in zip(starts, views, strict=True):
            if start + len(view) - 1 > self.dma_mask:
                raise fail(errno.EIO, "map_sgtable", self, "give the device an IOMMU", what="memory above its dma_mask")
        return starts

    def _merged(self, starts: list[int], views: list[memoryview]) -> tuple[DmaEntry, ...]:
        merged: list[list[int]] = []
        for start, view in zip(starts, views, strict=True):
            if merged and sum(merged[-1]) == start and start % PAGE == 0 and merged[-1][1] + len(view) <= self.max_segment:
                merged[-1][1] += len(view)
            else:
                merged.append([start, len(view)])
        return tuple(DmaEntry(start, length) for start, length in merged)

    # ---- access by address, for what plays the hardware ----

    def read(self, address: int, length: int) -> bytes:
        """What the device sees at a DMA address. Errors: EFAULT some of it is not mapped now for reading by the device; EINVAL a
        negative length.
        """
        if length < 0:
            raise fail(errno.EINVAL, "read", self, "a length is not negative")
        with self._lock:
            return b"".join(piece for _, piece in self._pieces("read", address, length, _READS))

    def write(self, address: int, data: ReadableBuffer) -> None:
        """Store bytes at a DMA address. Errors: EFAULT some of it is not mapped now for writing by the device; nothing was stored."""
        source = memoryview(data).cast("B")
        with self._lock:
            at = 0
            for _, piece in self._pieces("write", address, len(source), _WRITES):
                piece[:] = source[at : at + len(piece)]
                at += len(piece)

    @contextmanager
    def views(self, address: int, length: int, direction: int) -> Iterator[list[memoryview]]:
        """``with dev.views(address, length, Direction.FROM_DEVICE) as pieces``: the bytes behind a DMA address, in order, for the block.

        For I/O that must not copy. TO_DEVICE: the device reads, and the pieces are read-only; FROM_DEVICE: it writes; BIDIRECTIONAL:
        both. While the block is open an unmap of what it shows waits, so leave it soon, and keep no piece. Errors: EINVAL no direction,
        or NONE; EFAULT as :meth:`read` and :meth:`write`.
        """
        way = checked_direction(direction, "views", self)
        if way is Direction.NONE:
            raise fail(errno.EINVAL, "views", self, "an access has a direction")
        me = threading.get_ident()
        with self._lock:
            found = self._pieces("views", address, length, _WAYS[way])
            for iova, _ in found:
                self._users.setdefault(iova.serial, []).append(me)
        pieces = [piece.toreadonly() if way is Direction.TO_DEVICE else piece for _, piece in found]
        try:
            yield pieces
        finally:
            try:
                for piece in pieces:
                    piece.release()
            finally:
                with self._calm:
                    for iova, _ in found:
                        inside = self._users.get(iova.serial, [])
                        if me in inside:  # not in a child that was forked inside of the block
                            inside.remove(me)
                        if not inside:
                            self._users.pop(iova.serial, None)
                    self._calm.notify_all()

    def _pieces(self, operation: str, address: int, length: int, ways: tuple[Direction, ...]) -> list[tuple[IovaRange, memoryview]]:
        found = []
        while length > 0:
            iova = self._find(address, ways)
            if iova is None:
                self._faults += 1
                raise fail(
                    errno.EFAULT,
                    operation,
                    self,
                    "map the buffer for this direction, and use its addresses before unmap only",
                    what=f"DMA fault: {address:#x} is not mapped",
                )
            n = min(length, iova.end - address)
            found.append((iova, iova.view[address - iova.start : address - iova.start + n]))
            address, length = address + n, length - n
        return found

    def _find(self, address: int, ways: tuple[Direction, ...]) -> IovaRange | None:
        if self.iommu:
            i = bisect.bisect_right(self._ranges, address, key=lambda iova: iova.start) - 1
            near = self._ranges[i : i + 1] if i >= 0 else []
        else:
            near = self._ranges  # one address may be mapped several times
        return next((w for w in near if w.start <= address < w.end and w.direction in ways), None)

    def statistics(self) -> DeviceStatistics:
        """A snapshot for programs."""
        with self._lock:
            return DeviceStatistics(self.name, sum(w.end - w.start for w in self._ranges), len(self._ranges), self._faults)


def _forked() -> None:
    """The threads that held a lock, or were inside of an access, are not in the child."""
    for device in list(_ALL):
        device._lock = threading.Lock()
        device._calm = threading.Condition(device._lock)
        device._users = {}


os.register_at_fork(after_in_child=_forked)
