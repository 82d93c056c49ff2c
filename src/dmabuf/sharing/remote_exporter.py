"""``RemoteExporter``: an exporter whose ops are calls to the process of the real one, and the memory that comes with the answers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Final, Protocol

from dmabuf._native import Mapping, OwnedFd
from dmabuf.core.attach.attachment import DmaBufAttachment, tables_of
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer import residency
from dmabuf.core.buffer.shared import SharedBuffer
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.export.exporter import Exporter
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import DmaEntry, SgEntry, SgTable, mapping_of
from dmabuf.domain.forks import fork_lock
from dmabuf.sharing import memory
from dmabuf.sharing.messages import Body, close_all, flag, nonsense, number
from dmabuf.sharing.server import serve

_MOST: Final = (1 << 63) - 1
_revoking = fork_lock()  # a table is unmapped once, by its importer or by the exporter


class Calls(Protocol):
    """The calls about one buffer to its exporter's process (see `remote_backing.RemoteBacking`)."""

    in_file: bool
    record: SharedBuffer

    def call(self, kind: str, buf: DmaBuf | None = None, body: Body | None = None, *, operation: str = "") -> tuple[Body, list[OwnedFd]]:
        """Call without the reservation lock."""

    def call_locked(self, kind: str, buf: DmaBuf, body: Body | None = None) -> tuple[Body, list[OwnedFd]]:
        """Call with the reservation lock, which the caller holds."""

    def give_back(self, kind: str, buf: DmaBuf, body: Body, *, locked: bool) -> None:
        """Make a call that has no errors."""

    def count_mapping(self, mapping: int) -> None:
        """A mapping of this process exists from now on."""

    def unmapped(self, mapping: int) -> None:
        """It is closed."""


class RemoteExporter(Exporter):
    """An exporter whose ops are calls to the process of the real one."""

    __slots__ = ("attached", "calls", "tables")

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.attached: dict[int, DmaBufAttachment] = {}  # by the number that the exporter's process gave
        self.tables: dict[int, tuple[SgTable, int, Mapping | None]] = {}  # by id()

    # ---- attachments ----

    def attach(self, attachment: DmaBufAttachment) -> None:
        dev = attachment.dev
        if attachment.importer is not None:
            serve(attachment.dmabuf.domain)  # for notifications of moves
        answer, _ = self.calls.call(
            "attach",
            attachment.dmabuf,
            {
                "device": dev.name,
                "dma_mask": dev.dma_mask,
                "max_segment": dev.max_segment,
                "dynamic": attachment.is_dynamic,
                "peer2peer": attachment.peer2peer,
            },
        )
        attachment.peer2peer = attachment.peer2peer and flag(answer, "peer2peer")
        self.attached[number(answer, "attachment")] = attachment

    def _number(self, attachment: DmaBufAttachment) -> int:
        return next(n for n, one in self.attached.items() if one is attachment)

    def detach(self, attachment: DmaBufAttachment) -> None:
        n = self._number(attachment)
        del self.attached[n]
        self.calls.give_back("detach", attachment.dmabuf, {"attachment": n}, locked=False)

    def pin(self, attachment: DmaBufAttachment) -> None:
        self.calls.call_locked("pin", attachment.dmabuf, {"attachment": self._number(attachment)})

    def unpin(self, attachment: DmaBufAttachment) -> None:
        self.calls.give_back("unpin", attachment.dmabuf, {"attachment": self._number(attachment)}, locked=True)

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
        about = {"attachment": self._number(attachment), "direction": int(direction)}
        answer, fds = self.calls.call_locked("map", attachment.dmabuf, about)
        if "table" not in answer:
            return None
        n = number(answer, "table")
        try:
            made, mapping = _table(answer, fds)
            if mapping is not None:
                attachment.dev.map_sgtable(made, direction)
        except BaseException:
            self.calls.give_back("unmap", attachment.dmabuf, {"table": n}, locked=True)
            raise
        finally:
            close_all(fds)
        self.tables[id(made)] = made, n, mapping
        return made

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        _, n, mapping = self.tables[id(sgt)]
        if mapping is not None:
            self._unmap_for_device(attachment, sgt, direction)
        del self.tables[id(sgt)]
        self.calls.give_back("unmap", attachment.dmabuf, {"table": n}, locked=True)

    def _unmap_for_device(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        """Unmap a table for the device, unless the exporter has revoked it meanwhile."""
        with _revoking:
            if mapping_of(sgt) is not None:
                attachment.dev.unmap_sgtable(sgt, direction)

    def revoke(self, attachment: DmaBufAttachment) -> None:
        """Make tables that the importer kept fault, because the memory has moved. No lock is held, as its holder may wait for the move."""
        for sgt, direction in tables_of(attachment):
            if (kept := self.tables.get(id(sgt))) is not None and kept[2] is not None:
                self._unmap_for_device(attachment, sgt, direction)

    # ---- CPU access ----

    def begin_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.begin(buf, direction, 0)

    def end_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.end(buf, direction, 0)

    def begin(self, buf: DmaBuf, direction: Direction, block: int) -> None:
        """Begin an access there. ``block``: the fence of the block that it is for, whose end may be asked for more than once; else 0."""
        self.calls.call("begin", buf, {"direction": int(direction), "block": block}, operation="begin_cpu_access")

    def end(self, buf: DmaBuf, direction: Direction, block: int) -> None:
        """End it."""
        self.calls.call("end", buf, {"direction": int(direction), "block": block}, operation="end_cpu_access")

    def mmap(self, buf: DmaBuf, offset: int, length: int) -> Mapping:
        calls = self.calls
        answer, fds = calls.call("mmap", buf, {"offset": offset, "length": length})
        n = number(answer, "mapping")
        try:
            calls.count_mapping(n)
            return memory.mapped(
                _first(fds),
                number(answer, "length", _MOST),
                number(answer, "offset", _MOST),
                flag(answer, "writable"),
                partial(calls.unmapped, n),
            )
        except BaseException:
            calls.unmapped(n)
            raise
        finally:
            close_all(fds)

    def vmap(self, buf: DmaBuf) -> IosysMap:
        answer, fds = self.calls.call_locked("vmap", buf)
        try:
            if self.calls.in_file:  # a view that outlives the vmap keeps the memory in its place
                fd = buf.fileno()
                inode = self.calls.record.dev, self.calls.record.ino
                return IosysMap.init_vaddr(memoryview(residency.mapping(fd, inode, "vmap", buf, 0, buf.size, residency.may_write(fd))))
            _, view = memory.shown(_first(fds), number(answer, "offset", _MOST), number(answer, "length", _MOST), flag(answer, "writable"))
            return IosysMap.init_vaddr_iomem(view) if flag(answer, "iomem") else IosysMap.init_vaddr(view)
        except BaseException:
            self.calls.give_back("vunmap", buf, {}, locked=True)
            raise
        finally:
            close_all(fds)

    def vunmap(self, buf: DmaBuf, map: IosysMap) -> None:
        self.calls.give_back("vunmap", buf, {}, locked=True)

    def release(self, buf: DmaBuf) -> None:
        """Do nothing: the exporter's process calls the real op."""


def _first(fds: list[OwnedFd]) -> int:
    if not fds:
        raise nonsense("no memory came with it")
    return fds[0].number


def _table(answer: Body, fds: list[OwnedFd]) -> tuple[SgTable, Mapping | None]:
    """Return the table in an answer, and a mapping of its memory, None if the exporter filled in its DMA side or it has none."""
    cpu = [SgEntry(page, offset, length) for page, offset, length in _threes(answer, "cpu")]
    dma = [DmaEntry(address, length) for address, length, _ in _threes(answer, "dma")]
    if dma or not fds:
        return SgTable(cpu, dma, None), None
    mapping, view = memory.shown(fds[0].number, number(answer, "offset", _MOST), number(answer, "length", _MOST), flag(answer, "writable"))
    return SgTable(cpu, (), view), mapping


def _threes(answer: Body, name: str) -> Iterable[tuple[int, int, int]]:
    """Return flat numbers in threes. Anything else is EBADMSG."""
    flat = answer.get(name, [])
    if not isinstance(flat, list) or len(flat) % 3 or any(type(n) is not int or not 0 <= n < 1 << 64 for n in flat):
        raise nonsense(f"{name!r} is not a table")
    walk = iter(flat)
    return zip(walk, walk, walk, strict=True)
