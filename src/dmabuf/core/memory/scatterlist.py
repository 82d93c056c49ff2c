"""``SgTable``: the memory that a mapping covers, as the CPU and as a device see it (semantics 1.7).

A table has two sides. The exporter builds it from the *CPU side*: ``orig_nents`` entries of (page, offset, length). User space has no
physical addresses, so a *page* is a number that counts the whole pages of the table's ``memory``. For plain buffers that is the memfd (page
n begins n pages into the file), and for another exporter it is whatever the exporter passes. A device uses the *DMA side*: ``nents``
entries of (address, length), which :meth:`dmabuf.Device.map_sgtable` fills with addresses of that device, or an exporter by itself. Mapping
may merge, so ``nents <= orig_nents``.

Neighboring pages become one entry of up to ``max_segment`` bytes, rounded down to whole pages.

*Who may call what.* A table belongs to the exporter until ``map`` returns it, and then to the importer until ``unmap``. The importer uses
the DMA side alone, which iterating over a table gives. With the debug layer on, the CPU side raises ``ContractError`` in the importer's
hands.

*Errors.* EINVAL: there are no entries, or a range is empty or negative. A ``max_segment`` below one page also is a ``ContractWarning``.
"""

from __future__ import annotations

import errno
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dmabuf.core.base.usage import Direction
from dmabuf.errors import ContractError, contract_warning, fail, missing_extra

if TYPE_CHECKING:
    import numpy as np
    from _typeshed import ReadableBuffer

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
MAX_SEGMENT: Final = 0xFFFFFFFF // PAGE * PAGE  # SCATTERLIST_MAX_SEGMENT, include/linux/scatterlist.h


class SgEntry(NamedTuple):
    """One piece of memory on the CPU side. ``page`` counts whole pages of the table's memory; ``offset`` and ``length`` are bytes."""

    page: int
    offset: int
    length: int


class DmaEntry(NamedTuple):
    """One piece of memory on the DMA side, as its device addresses it."""

    address: int
    length: int


class IovaRange(NamedTuple):
    """DMA addresses, from ``start`` up to ``end``, of one piece of memory that a device has mapped."""

    start: int
    end: int
    serial: int  # orders ranges without a comparison of their bytes
    view: memoryview
    direction: Direction


class TableMapping(NamedTuple):
    """The device that has mapped a table, and the addresses."""

    device: object
    ranges: list[IovaRange]
    direction: Direction


class SgTable:
    """A scatter/gather table. Made by :meth:`from_pages`, :meth:`from_ranges` or :meth:`from_dma`."""

    __slots__ = ("__weakref__", "_cpu", "_dma", "_guard", "_mapping", "_memory")

    def __init__(self, cpu: Sequence[SgEntry], dma: Sequence[DmaEntry], memory: ReadableBuffer | None) -> None:
        if not cpu and not dma:
            raise fail(errno.EINVAL, "sg_table", "a table", "pass at least one page or range", what="it has no entries")
        self._cpu, self._dma, self._memory = tuple(cpu), tuple(dma), memory
        self._guard: str | None = None
        self._mapping: TableMapping | None = None

    @classmethod
    def from_pages(
        cls,
        pages: Iterable[int],
        *,
        offset: int = 0,
        size: int | None = None,
        max_segment: int = MAX_SEGMENT,
        memory: ReadableBuffer | None = None,
    ) -> SgTable:
        """Make a table of whole pages, by number (sg_alloc_table_from_pages_segment).

        Args:
            pages: The numbers, in order.
            offset: Bytes of the first page to leave out.
            size: Bytes in all; None for everything to the end of the last page.
            max_segment: The longest entry, in bytes.
            memory: What the pages are pages of.

        Raises:
            InvalidError: There is no page, a number is negative, ``offset`` is beyond the first page, or the pages don't hold ``size``
                (EINVAL). See also the module.
        """
        numbers = [operator.index(page) for page in pages]
        room = len(numbers) * PAGE - offset
        left = room if size is None else size
        if not numbers or min(numbers) < 0 or not 0 <= offset < PAGE or not 0 < left <= room:
            raise fail(
                errno.EINVAL,
                "sg_table",
                f"{len(numbers)} pages",
                "pass numbers of 0 or more, an offset inside the first page, and a size that the pages hold",
                what=f"no table has offset {offset} and size {size} there",
            )
        ranges = []
        for number in numbers:
            if left <= 0:
                break
            length = min(PAGE - offset, left)
            ranges.append((number * PAGE + offset, length))
            left -= length
            offset = 0
        return cls.from_ranges(ranges, max_segment=max_segment, memory=memory)

    @classmethod
    def from_ranges(
        cls, ranges: Iterable[tuple[int, int]], *, max_segment: int = MAX_SEGMENT, memory: ReadableBuffer | None = None
    ) -> SgTable:
        """Make a table of (first byte, length) ranges of the memory, in the order given.

        Args:
            ranges: The ranges.
            max_segment: The longest entry, in bytes.
            memory: What the ranges are ranges of.

        Raises:
            InvalidError: See the module (EINVAL).
        """
        limit = checked_segment(max_segment, "sg_table", 3)
        joined: list[list[int]] = []
        for start, length in ranges:
            if start < 0 or length <= 0:
                raise fail(errno.EINVAL, "sg_table", f"range ({start}, {length})", "pass 0 <= start, 0 < length", what="not a range")
            if joined and joined[-1][0] + joined[-1][1] == start:
                joined[-1][1] += length
            else:
                joined.append([start, length])
        cpu = []
        for start, length in joined:
            while length:
                piece = min(length, limit - start % PAGE)
                cpu.append(SgEntry(start // PAGE, start % PAGE, piece))
                start, length = start + piece, length - piece
        return cls(cpu, (), memory)

    @classmethod
    def from_dma(cls, entries: Iterable[tuple[int, int]]) -> SgTable:
        """Make a table of memory that no CPU sees, such as a device's own for peer-to-peer.

        Args:
            entries: (address, length) of each piece.

        Raises:
            InvalidError: See the module (EINVAL).
        """
        return cls((), _dma(entries), None)

    # ---- the DMA side ----

    def __iter__(self) -> Iterator[DmaEntry]:
        """Yield the DMA entries (for_each_sgtable_dma_sg)."""
        return iter(self._dma)

    @property
    def nents(self) -> int:
        """The number of DMA entries, 0 until the table is mapped."""
        return len(self._dma)

    @property
    def dma_entries(self) -> tuple[DmaEntry, ...]:
        """The DMA entries."""
        return self._dma

    def set_dma(self, entries: Iterable[tuple[int, int]]) -> None:
        """Fill the DMA side, for an exporter that maps by itself.

        Args:
            entries: (address, length) of each piece.

        Raises:
            InvalidError: There are none, more than CPU entries, or an empty one (EINVAL).
        """
        made = _dma(entries)
        if not made or len(made) > max(len(self._cpu), 1):
            raise fail(errno.EINVAL, "set_dma", self, f"pass 1 to {len(self._cpu)} entries", what=f"{len(made)} entries don't fit")
        self._dma = made

    def dma_array(self) -> np.ndarray[Any, Any]:
        """Return the DMA side as a structured array of (address, length), both u64. Needs numpy."""
        return _array(self._dma, [("address", "u8"), ("length", "u8")])

    # ---- the CPU side ----

    def _seen(self, what: str) -> None:
        if self._guard is not None:
            raise ContractError(f"{what}: {self!r}: {self._guard}")

    @property
    def orig_nents(self) -> int:
        """The number of CPU entries."""
        return len(self._cpu)

    @property
    def entries(self) -> tuple[SgEntry, ...]:
        """The CPU entries (for_each_sgtable_sg). ContractError when the debug layer hides them."""
        self._seen("entries")
        return self._cpu

    @property
    def memory(self) -> ReadableBuffer | None:
        """What the pages are pages of. ContractError when the debug layer hides it."""
        self._seen("memory")
        return self._memory

    def pages(self) -> Iterator[int]:
        """Yield the number of every page that the table touches, in order (for_each_sgtable_page).

        Raises:
            ContractError: The debug layer hides the CPU side.
        """
        for page, offset, length in self.entries:
            yield from range(page, page + -(-(offset + length) // PAGE))

    def view(self, index: int) -> memoryview:
        """Return the bytes of one CPU entry.

        Raises:
            ContractError: The debug layer hides the CPU side.
            InvalidError: The table has no memory, or the entry ends outside of it (EINVAL).
            IndexError: There is no such entry.
        """
        self._seen("view")
        return self._piece(index)

    def _piece(self, index: int) -> memoryview:
        if self._memory is None:
            raise fail(errno.EINVAL, "view", self, "pass memory= when the table is made", what="the table has no memory")
        page, offset, length = self._cpu[index]
        start = page * PAGE + offset
        whole = memoryview(self._memory).cast("B")
        if start + length > len(whole):
            raise fail(
                errno.EINVAL, "view", self, "build tables from pages of the memory", what=f"entry {index} ends outside of the memory"
            )
        return whole[start : start + length]

    def cpu_array(self) -> np.ndarray[Any, Any]:
        """Return the CPU side as a structured array of (page, offset, length), u64, u32 and u32. Needs numpy.

        Raises:
            ContractError: The debug layer hides the CPU side.
        """
        return _array(self.entries, [("page", "u8"), ("offset", "u4"), ("length", "u4")])

    @property
    def size(self) -> int:
        """The number of bytes in all."""
        return sum(entry.length for entry in self._cpu or self._dma)

    def __len__(self) -> int:
        return len(self._dma)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<dmabuf.SgTable {self.size} bytes, orig_nents {self.orig_nents}, nents {self.nents}>"


# ---- for the package ----


def guard(sgt: SgTable, why: str | None) -> None:
    """Hide the CPU side, with the reason to tell; None shows it again."""
    sgt._guard = why


def guarded(sgt: SgTable) -> bool:
    """Return True if the CPU side is hidden, because an importer has the table."""
    return sgt._guard is not None


def cpu_side(sgt: SgTable) -> tuple[SgEntry, ...]:
    """Return the CPU entries, hidden or not."""
    return sgt._cpu


def pieces_of(sgt: SgTable) -> list[memoryview]:
    """Return the memory of each CPU entry, hidden or not. Raises as :meth:`SgTable.view`."""
    return [sgt._piece(index) for index in range(len(sgt._cpu))]


def memory_of(sgt: SgTable) -> ReadableBuffer | None:
    """Return what the pages are pages of, hidden or not."""
    return sgt._memory


def mapping_of(sgt: SgTable) -> TableMapping | None:
    """Return the mapping of the table while a device has one, else None."""
    return sgt._mapping


def set_mapping(sgt: SgTable, mapping: TableMapping | None, dma: tuple[DmaEntry, ...]) -> None:
    """Note the mapping that a device made, and the DMA side that came of it."""
    sgt._mapping, sgt._dma = mapping, dma


def checked_segment(max_segment: int, operation: str, level: int) -> int:
    """Return a segment limit in whole pages. Raises InvalidError, with a ``ContractWarning``, below one page."""
    if max_segment < PAGE:
        contract_warning(f"{operation}: max_segment {max_segment}: it is below a page of {PAGE} bytes; pass at least a page", level)
        raise fail(errno.EINVAL, operation, f"max_segment {max_segment}", f"pass at least {PAGE}", what="it is below a page")
    return min(max_segment, MAX_SEGMENT) // PAGE * PAGE


def _dma(entries: Iterable[tuple[int, int]]) -> tuple[DmaEntry, ...]:
    made = tuple(DmaEntry(operator.index(address), operator.index(length)) for address, length in entries)
    if any(address < 0 or length <= 0 for address, length in made):
        raise fail(errno.EINVAL, "sg_table", "DMA entries", "pass 0 <= address, 0 < length", what="one is empty or negative")
    return made


def _array(entries: Sequence[tuple[int, ...]], fields: list[tuple[str, str]]) -> np.ndarray[Any, Any]:
    try:
        import numpy
    except ImportError:
        raise missing_extra("numpy", "numpy") from None
    return numpy.array([tuple(entry) for entry in entries], dtype=fields)
