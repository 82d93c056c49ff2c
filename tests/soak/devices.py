"""An exporter, as a driver in another process is one."""

from __future__ import annotations

import dmabuf
from dmabuf import Direction, DmaBuf, DmaBufAttachment, SgTable
from dmabuf._native import Mapping


class Vram(dmabuf.Exporter):
    """Memory of its own, behind a static exporter with a CPU mapping."""

    def __init__(self, size: int) -> None:
        self.memory = dmabuf.allocate(size, name="vram")  # which no worker opens
        self.bytes = self.memory.mmap()

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
        table = SgTable.from_ranges([(0, len(self.bytes))], max_segment=attachment.dev.max_segment, memory=self.bytes)
        attachment.dev.map_sgtable(table, direction)
        return table

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        attachment.dev.unmap_sgtable(sgt, direction)

    def release(self, buf: DmaBuf) -> None:
        self.bytes.close()
        self.memory.close()

    def mmap(self, buf: DmaBuf, offset: int, length: int) -> Mapping:
        return self.memory.mmap(offset, length)

    def begin_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        pass
