"""``SpillBuffer``: one buffer of a spill heap, as its exporter, and where its content is (see `spill_moves` for how that changes)."""

from __future__ import annotations

import threading
from enum import Enum
from typing import Final, Protocol

from dmabuf._native import Mapping, OwnedFd, finish
from dmabuf.core.attach.attachment import DmaBufAttachment
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer import residency
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.buffer.shared import SharedBuffer
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.export.exporter import Exporter
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import SgTable
from dmabuf.core.resv.resv import DmaResv

_CPU_READS: Final = (Direction.FROM_DEVICE, Direction.NONE)


class Residency(Enum):
    """Where a buffer's content is."""

    IN_MEMORY = "in memory"
    MOVING_OUT = "on its way out"
    NOT_IN_MEMORY = "not in memory"
    MOVING_IN = "on its way in"


class Residents(Protocol):
    """What a buffer needs of the heap's `spill_moves.ResidentSet`."""

    @property
    def lock(self) -> threading.RLock:
        """The lock of all fields of the heap's buffers."""

    def enter(self, b: SpillBuffer, *, write: bool, pin: bool = False, locked: bool = False, counted: bool = False) -> None:
        """Count a use, or a pin, and have the buffer in memory. ``counted``: the caller has counted the use."""

    def leave(self, b: SpillBuffer, pin: bool = False) -> None:
        """Uncount it."""

    def less_used(self) -> None:
        """Note that a buffer has a use less."""

    def released(self, b: SpillBuffer) -> None:
        """The framework has released the buffer."""


class SpillBuffer(Exporter):
    """One buffer of a heap, as its exporter. All fields are under the lock of the heap's resident set."""

    __slots__ = (
        "__weakref__",
        "at",
        "dirty",
        "gone",
        "ino",
        "mover",
        "pins",
        "private",
        "residency",
        "residents",
        "resv",
        "shared",
        "size",
        "stored",
        "tables",
        "telling",
        "uses",
        "vmapped",
    )

    resv: DmaResv
    shared: SharedBuffer

    def __init__(self, residents: Residents, size: int, at: int) -> None:
        self.residents, self.size, self.at = residents, size, at
        self.private: OwnedFd  # the exporter's own description of the memfd, which the framework closes; from prepare() on
        self.ino = 0
        self.residency = Residency.NOT_IN_MEMORY
        self.mover = 0  # the thread that moves it
        self.stored = False  # whether the file has its content; if not, the content is zeros
        self.dirty = False  # whether memory may differ from that
        self.gone = False  # released
        self.telling = False  # importers are being notified of a move, with the lock held
        self.uses = self.pins = 0
        self.tables: dict[int, tuple[SgTable, DmaBufAttachment, Direction]] = {}
        self.vmapped: Mapping | None = None

    def __repr__(self) -> str:
        called = getattr(self, "shared", None) or f"buffer ino {self.ino}"  # prepare() comes first
        return f"<spill {called} {self.size} bytes {self.residency.value}>"

    def prepare(self, private: OwnedFd) -> None:
        """Keep the memfd from being mapped before it has memory."""
        self.private = private
        residency.evict(private)

    def begin_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.uses += 1  # here, since a signal handler may raise after any call, and never before the next line
        try:
            self.residents.enter(self, write=direction not in _CPU_READS, counted=True)
        except BaseException:
            self.uses -= 1
            self.residents.less_used()
            raise

    def end_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.uses -= self.uses > 0  # first of all, and without a call. The framework allows an end without a begin
        finish(self.residents.less_used)

    def attach(self, attachment: DmaBufAttachment) -> None:
        attachment.priv = handle_of(attachment.dmabuf).any_view()

    def pin(self, attachment: DmaBufAttachment) -> None:
        self.residents.enter(self, write=False, pin=True, locked=True)

    def unpin(self, attachment: DmaBufAttachment) -> None:
        self.residents.leave(self, pin=True)

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable:
        self.residents.enter(self, write=direction != Direction.TO_DEVICE, locked=True)
        try:
            memory: Mapping = attachment.priv
            sgt = SgTable.from_ranges([(0, self.size)], max_segment=attachment.dev.max_segment, memory=memory)
            attachment.dev.map_sgtable(sgt, direction)
            with self.residents.lock:
                self.tables[id(sgt)] = sgt, attachment, direction
            return sgt
        finally:
            self.residents.leave(self)

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        with self.residents.lock:
            mapped = self.tables.pop(id(sgt), None)  # None: a move has revoked it
        if mapped is not None:
            attachment.dev.unmap_sgtable(sgt, direction)  # it waits for the device's accesses, so the lock is free

    def vmap(self, buf: DmaBuf) -> IosysMap:
        self.residents.enter(self, write=True, locked=True)
        try:
            fd, inode = buf.fileno(), (self.shared.dev, self.shared.ino)
            self.vmapped = residency.mapping(fd, inode, "vmap", buf, 0, self.size, residency.may_write(fd))
        finally:
            self.residents.leave(self)
        return IosysMap.init_vaddr(memoryview(self.vmapped))

    def vunmap(self, buf: DmaBuf, map: IosysMap) -> None:
        self.vmapped = None  # it goes with the last view of it, and the memory stays until then

    def release(self, buf: DmaBuf) -> None:
        self.residents.released(self)
