"""Exporters and importers for tests, which write down what is asked of them."""

import os
from collections.abc import Callable
from typing import Any

import dmabuf
from dmabuf import Direction, DmaBuf, DmaBufAttachment, Domain, Exporter, Importer, IosysMap, SgTable
from dmabuf.core.export.exported import EXPORTS
from tests.support.waiting import until

PAGE = os.sysconf("SC_PAGE_SIZE")
BIDIR, TO, FROM = Direction.BIDIRECTIONAL, Direction.TO_DEVICE, Direction.FROM_DEVICE


class Bare(Exporter):
    """The three mandatory ops over memory of its own; ``calls`` is what was asked, in order."""

    def __init__(self, size: int = 4 * PAGE) -> None:
        self.memory = dmabuf.allocate(max(size, 1))
        self.whole = self.memory.mmap()
        self.calls: list[Any] = []
        self.fails: dict[str, int | BaseException] = {}  # op -> errno, or what to raise
        self.during: dict[str, Callable[..., object]] = {}  # op -> what to run in it
        self.tables: list[SgTable] = []  # mapped now
        self.locked: dict[str, bool] = {}  # op -> was the lock held

    def close(self) -> None:
        """What a driver frees when it goes: after its buffers."""
        live = EXPORTS.of(Domain.default()).buffers
        until(lambda: all(exported.exporter is not self for exported in list(live.values())))
        self.fails.clear()  # the traceback of an exception holds the buffer of the caller that it was raised to
        del self.whole  # maps and views of a failed test's traceback may still show it
        self.memory.close()

    def said(self, op: str, who: Any, *more: Any) -> None:
        buf = who.dmabuf if isinstance(who, DmaBufAttachment) else who
        self.locked[op] = op != "release" and buf.resv.held_here()
        self.calls.append((op, *more) if more else op)
        if op in self.during:
            self.during[op](who)
        wrong = self.fails.get(op)
        if isinstance(wrong, BaseException):
            raise wrong
        if wrong:
            raise OSError(wrong, os.strerror(wrong))

    def count(self, op: str) -> int:
        return sum(call == op or (isinstance(call, tuple) and call[0] == op) for call in self.calls)

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
        self.said("map", attachment, direction)
        sgt = SgTable.from_ranges([(0, self.whole.size)], max_segment=attachment.dev.max_segment, memory=self.whole)
        attachment.dev.map_sgtable(sgt, direction)
        self.tables.append(sgt)
        return sgt

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        self.said("unmap", attachment, direction)
        self.tables.remove(sgt)
        attachment.dev.unmap_sgtable(sgt, direction)

    def release(self, buf: DmaBuf) -> None:
        self.said("release", buf)


class Static(Bare):
    """Every op but pin and unpin."""

    def attach(self, attachment: DmaBufAttachment) -> None:
        self.said("attach", attachment)

    def detach(self, attachment: DmaBufAttachment) -> None:
        self.said("detach", attachment)

    def begin_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.said("begin", buf, direction)

    def end_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.said("end", buf, direction)

    def mmap(self, buf: DmaBuf, offset: int, length: int) -> Any:
        self.said("mmap", buf, offset, length)
        return self.memory.mmap(offset, max(length, 1))

    def vmap(self, buf: DmaBuf) -> IosysMap:
        self.said("vmap", buf)
        return IosysMap.init_vaddr(self.whole)

    def vunmap(self, buf: DmaBuf, map: IosysMap) -> None:
        self.said("vunmap", buf)


class Dynamic(Static):
    """Every op."""

    def pin(self, attachment: DmaBufAttachment) -> None:
        self.said("pin", attachment)

    def unpin(self, attachment: DmaBufAttachment) -> None:
        self.said("unpin", attachment)

    @property
    def pins(self) -> int:
        return self.count("pin") - self.count("unpin")


class Mover(Importer):
    """An importer that writes down the moves that it was notified of."""

    def __init__(self, allow_peer2peer: bool = False) -> None:
        self.allow_peer2peer = allow_peer2peer
        self.moved: list[DmaBufAttachment] = []
        self.locked: list[bool] = []

    def move_notify(self, attachment: DmaBufAttachment) -> None:
        self.moved.append(attachment)
        self.locked.append(attachment.dmabuf.resv.held_here())
