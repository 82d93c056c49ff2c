"""``Device``: what uses buffers by DMA address, with its limits, its IOMMU, and what is mapped for it now.

A device is software that plays hardware. It reads and writes memory by DMA address alone (:meth:`Device.read`, :meth:`Device.write`, and
:meth:`Device.views` for I/O without a copy). An address that no mapping covers at that moment, or that is mapped for the other direction,
*faults*: EFAULT, and nothing of that access is done. So a program that unmaps too early, or keeps an address over a move, gets an error.

With the IOMMU (the default) the pages of a mapping lie side by side in a range of the device's addresses, below ``dma_mask``. The range
comes after a page that is never mapped, and is not reused soon. Without an IOMMU a DMA address is where this process sees the memory. A
mask smaller than that address space then refuses (EIO), as the kernel's direct mapping does.

*Who may call what.* An exporter's ``map`` calls :meth:`Device.map_sgtable`, and its ``unmap`` calls :meth:`Device.unmap_sgtable`. The
caller needs no lock, because a device has its own. The memory of a mapping can't go away before it is unmapped, and ``unmap_sgtable`` waits
for an access that is under way, as hardware does before it forgets an address.
"""

from __future__ import annotations

import bisect
import errno
import os
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmabuf._native import Bracket, buffer_address, finish
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
from dmabuf.domain.weak_objects import WeakObjects
from dmabuf.errors import ContractError, fail

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ALL_ADDRESSES = (1 << 64) - 1
_READS = (Direction.BIDIRECTIONAL, Direction.TO_DEVICE)
_WRITES = (Direction.BIDIRECTIONAL, Direction.FROM_DEVICE)
_WAYS = {Direction.TO_DEVICE: _READS, Direction.FROM_DEVICE: _WRITES, Direction.BIDIRECTIONAL: (Direction.BIDIRECTIONAL,)}


_ALL: WeakObjects[Device] = WeakObjects()


class _Fault(Exception):
    """An address that isn't mapped."""

    def __init__(self, address: int) -> None:
        super().__init__(address)
        self.address = address


@dataclass(frozen=True)
class DeviceStatistics:
    """A snapshot of a device. ``mapped``: bytes that it reaches now; ``windows``: their pieces; ``faults``: refused accesses so far."""

    name: str
    mapped: int
    windows: int
    faults: int


class Device:
    """A device that buffers are attached for.

    Args:
        name: What listings show.
        dma_mask: The highest address that it can use, 2**n - 1.
        max_segment: The longest entry that it takes, in bytes.
        iommu: Whether it has one.

    Raises:
        InvalidError: The name is empty or has a NUL, the mask is not 2**n - 1, or, with a ``ContractWarning``, ``max_segment`` is below a
            page (EINVAL).
    """

    def __init__(self, name: str, *, dma_mask: int = ALL_ADDRESSES, max_segment: int = MAX_SEGMENT, iommu: bool = True) -> None:
        if not isinstance(name, str):
            raise TypeError(f"device: a name is a str, not {type(name).__name__}")
        if not name or "\0" in name:
            raise fail(errno.EINVAL, "device", repr(name), "use a name without a NUL", what="the name is empty or has a NUL")
        if dma_mask & (dma_mask + 1) or not 2 * PAGE <= dma_mask <= ALL_ADDRESSES:
            raise fail(errno.EINVAL, "device", name, "pass 2**n - 1, with n at most 64", what=f"not a DMA mask: {dma_mask:#x}")
        self.name, self.dma_mask, self.iommu = name, dma_mask, iommu
        self.max_segment = checked_segment(max_segment, "device", 3)
        self._lock = threading.RLock()  # re-entrant, because a finalizer or a signal handler may come in the middle
        self._calm = threading.Condition(self._lock)
        self._users: dict[int, list[_Views]] = {}  # by the serial of a range: the blocks of views() of it
        self._ranges: list[IovaRange] = []
        self._next = PAGE  # address 0 is never given, because an unset field holds it
        self._serial = 0
        self._faults = 0
        _ALL.add(self)

    def __repr__(self) -> str:
        return f"<dmabuf.Device {self.name}>"

    # ---- mapping, for exporters ----

    def map_sgtable(self, sgt: SgTable, direction: int) -> SgTable:
        """Make the memory of a table reachable, and fill its DMA side (dma_map_sgtable).

        Args:
            sgt: The table.
            direction: A :class:`~dmabuf.Direction`, except NONE.

        Returns:
            The table.

        Raises:
            InvalidError: The direction is NONE or not a direction; an entry is longer than ``max_segment``; the table has no memory, or is
                already mapped (EINVAL). Nothing is mapped after this or any other error.
            NotPermittedError: The device would write, and the memory is read-only (EACCES).
            NoMemoryError: No addresses are left below ``dma_mask`` (ENOMEM).
            DmaBufError: There is no IOMMU, and the memory is above ``dma_mask`` (EIO).
        """
        way = checked_direction(direction, "map_sgtable", self)
        if way is Direction.NONE:
            raise fail(errno.EINVAL, "map_sgtable", self, "pass TO_DEVICE, FROM_DEVICE or BIDIRECTIONAL", what="the direction is NONE")
        if mapping_of(sgt) is not None:
            raise fail(errno.EINVAL, "map_sgtable", sgt, "unmap it first", what="the table is already mapped")
        views = pieces_of(sgt)
        if not views:
            raise fail(errno.EINVAL, "map_sgtable", sgt, "let its exporter fill the DMA side (from_dma)", what="the table has no CPU side")
        for view in views:
            if len(view) > self.max_segment:
                raise fail(
                    errno.EINVAL,
                    "map_sgtable",
                    self,
                    f"build the table with max_segment={self.max_segment}",
                    what=f"an entry has {len(view)} bytes",
                )
            if way in _WRITES and view.readonly:
                raise fail(
                    errno.EACCES, "map_sgtable", self, "map TO_DEVICE, or memory that may be written", what="the memory is read-only"
                )
        made: list[IovaRange] = []
        try:
            with self._lock:
                starts = self._place(sgt, views) if self.iommu else self._direct(views)
                for start, view in zip(starts, views, strict=True):
                    self._serial += 1
                    made.append(IovaRange(start, start + len(view), self._serial, view, way))
                for iova in made:
                    bisect.insort(self._ranges, iova)
            set_mapping(sgt, TableMapping(self, made, way), self._merged(starts, views))
        except BaseException:
            self._take_back(sgt, made)
            raise
        return sgt

    def _take_back(self, sgt: SgTable, made: list[IovaRange]) -> None:
        """Undo a mapping that a signal handler interrupted, and that nobody knows of."""
        serials = {iova.serial for iova in made}
        with self._lock:
            self._ranges = [iova for iova in self._ranges if iova.serial not in serials]
        set_mapping(sgt, None, ())
        _release_unless_mapped(sgt, made)

    def unmap_sgtable(self, sgt: SgTable, direction: int) -> None:
        """Take the addresses back: from now on they fault. Waits for threads inside :meth:`views` of them.

        Raises:
            ContractError: The device hasn't mapped the table, or for another direction, or this thread is inside such views itself.
        """
        mapping = mapping_of(sgt)
        if mapping is None or mapping.device is not self:
            raise ContractError(f"unmap_sgtable: {sgt!r}: {self!r} hasn't mapped it; unmap it for the device that mapped it")
        _, made, way = mapping
        if way != direction:
            raise ContractError(f"unmap_sgtable: {sgt!r}: it was mapped {way.name}; unmap it with the same direction")
        try:
            with self._lock:  # not _calm, whose __enter__ is in Python: a signal handler that raised at its end would leave the lock held
                me = threading.get_ident()
                if any(user.thread == me for iova in made for user in self._users.get(iova.serial, ())):
                    raise ContractError(
                        f"unmap_sgtable: {sgt!r}: this thread is inside views() of it, which it would wait for; leave that block first"
                    )
                self._forget(made)
                set_mapping(sgt, None, ())
                self._calm.wait_for(lambda: not any(iova.serial in self._users for iova in made))
        finally:
            finish(_release_unless_mapped, sgt, made)  # also when a signal handler ended the wait: no access begins

    def _forget(self, made: list[IovaRange]) -> None:
        for iova in made:
            at = bisect.bisect_left(self._ranges, iova)
            if self._ranges[at : at + 1] == [iova]:  # else a signal handler interrupted this call before, after this step
                del self._ranges[at]

    def _place(self, sgt: SgTable, views: list[memoryview]) -> list[int]:
        """Return addresses for the pieces, side by side by whole pages. The lock is held."""
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
        self._next = base + total + PAGE  # a page between, so that an access past the end faults
        return [base + offset for offset in offsets]

    def _gap(self, total: int) -> int:
        """Return the lowest gap that is long enough, when all addresses were given out once."""
        base = PAGE
        for iova in self._ranges:
            if iova.start - base >= total + PAGE:
                break
            base = max(base, -(-iova.end // PAGE) * PAGE + PAGE)
        if base + total - 1 > self.dma_mask:
            raise fail(errno.ENOMEM, "map_sgtable", self, "unmap something, or give it a larger dma_mask", what="no DMA addresses are left")
        return base

    def _direct(self, views: list[memoryview]) -> list[int]:
        starts = [buffer_address(view) for view in views]
        for start, view in zip(starts, views, strict=True):
            if start + len(view) - 1 > self.dma_mask:
                raise fail(errno.EIO, "map_sgtable", self, "give the device an IOMMU", what="the memory is above its dma_mask")
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
        """Return the bytes that the device sees at a DMA address.

        Raises:
            DmaBufError: Some of it is not mapped now for reading by the device (EFAULT).
            InvalidError: The length is negative (EINVAL).
        """
        if length < 0:
            raise fail(errno.EINVAL, "read", self, "pass 0 or more bytes", what=f"the length {length} is negative")
        try:
            with self._lock:
                return b"".join(piece for _, piece in self._pieces(address, length, _READS))
        except _Fault as e:
            raise self._faulted("read", e) from None

    def write(self, address: int, data: ReadableBuffer) -> None:
        """Store bytes at a DMA address.

        Raises:
            DmaBufError: Some of it is not mapped now for writing by the device (EFAULT). Nothing is stored.
        """
        source = memoryview(data).cast("B")
        try:
            with self._lock:
                at = 0
                for _, piece in self._pieces(address, len(source), _WRITES):
                    piece[:] = source[at : at + len(piece)]
                    at += len(piece)
        except _Fault as e:
            raise self._faulted("write", e) from None

    def views(self, address: int, length: int, direction: int) -> AbstractContextManager[list[memoryview]]:
        """Give a ``with`` block the bytes behind a DMA address, in order, for I/O that must not copy.

        An unmap of the memory waits until the block is left, so leave it soon, and keep no piece.

        Args:
            address: The first DMA address.
            length: In bytes.
            direction: TO_DEVICE if the device reads, and the pieces are read-only; FROM_DEVICE if it writes; or BIDIRECTIONAL.

        Raises:
            InvalidError: The direction is NONE or not a direction (EINVAL).
            DmaBufError: As :meth:`read` and :meth:`write` (EFAULT).
        """
        way = checked_direction(direction, "views", self)
        if way is Direction.NONE:
            raise fail(errno.EINVAL, "views", self, "pass TO_DEVICE, FROM_DEVICE or BIDIRECTIONAL", what="the direction is NONE")
        return _Views(self, address, length, way)

    def _faulted(self, operation: str, fault: _Fault) -> OSError:
        """Return the error of an address that isn't mapped. The lock is free, since the error has the device's ``repr`` in it."""
        remedy = "map the buffer for this direction, and use its addresses only before unmap"
        return fail(errno.EFAULT, operation, self, remedy, what=f"DMA fault: {fault.address:#x} is not mapped")

    def _pieces(self, address: int, length: int, ways: tuple[Direction, ...]) -> list[tuple[IovaRange, memoryview]]:
        found = []
        while length > 0:
            iova = self._find(address, ways)
            if iova is None:
                self._faults += 1
                raise _Fault(address)
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
        """Return a snapshot for programs."""
        with self._lock:
            return DeviceStatistics(self.name, sum(w.end - w.start for w in self._ranges), len(self._ranges), self._faults)


def _release_unless_mapped(sgt: SgTable, made: list[IovaRange]) -> None:
    """Release the views of a table's pieces. A view in use stays valid."""
    if mapping_of(sgt) is None:
        for iova in made:
            iova.view.release()


class _Views(Bracket):
    """The block of ``views``. Each entry of ``Device._users`` is one such object, so that leaving twice does no harm."""

    __slots__ = ("_address", "_device", "_length", "_pieces", "_serials", "_way", "thread")

    def __init__(self, device: Device, address: int, length: int, way: Direction) -> None:
        self._device, self._address, self._length, self._way = device, address, length, way
        self._pieces: list[memoryview] = []
        self._serials: list[int] = []
        self.thread = 0

    def enter(self) -> list[memoryview]:
        """Find the bytes, and keep them mapped."""
        device, way = self._device, self._way
        self.thread = threading.get_ident()
        try:
            with device._lock:
                found = device._pieces(self._address, self._length, _WAYS[way])
                self._serials = [iova.serial for iova, _ in found]
                for serial in self._serials:
                    device._users.setdefault(serial, []).append(self)
                self._pieces = [piece.toreadonly() if way is Direction.TO_DEVICE else piece for _, piece in found]
        except _Fault as e:
            raise device._faulted("views", e) from None
        return list(self._pieces)

    def leave(self) -> None:
        """Release the pieces, and let the memory be unmapped."""
        device = self._device
        try:
            for piece in self._pieces:
                piece.release()
        finally:
            with device._lock:
                for serial in self._serials:
                    inside = [user for user in device._users.get(serial, ()) if user is not self]  # a forked child has none
                    if inside:
                        device._users[serial] = inside
                    else:
                        device._users.pop(serial, None)
                device._calm.notify_all()


def _forked() -> None:
    """Free the locks: the threads that held one, or were inside an access, are not in the child."""
    for device in list(_ALL):
        device._lock = threading.RLock()
        device._calm = threading.Condition(device._lock)
        device._users = {}


os.register_at_fork(after_in_child=_forked)
