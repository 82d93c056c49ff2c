"""The backing of plain memory: a memfd that every process maps for itself.

It serves the devices and vmaps of this process only. A kernel dma-buf is mapped the same way, and uses the same exporter.
"""

from __future__ import annotations

from typing import Final

from dmabuf._native import Mapping
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer.backing import Backing
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.buffer.shared import BACKINGS, SharedBuffer
from dmabuf.core.contract import Attachment, Buffer, ExporterOps, checked_ops
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import SgTable, mapping_of
from dmabuf.domain.guards import finished
from dmabuf.domain.records import Record


class FileExporter(ExporterOps[Buffer, Attachment]):
    """An exporter whose memory is the buffer's own file: static, since the file stays where it is."""

    __slots__ = ()

    def attach(self, attachment: Attachment) -> None:
        attachment.priv = handle_of(attachment.dmabuf).any_view()

    def map(self, attachment: Attachment, direction: Direction) -> SgTable:
        memory: Mapping = attachment.priv
        sgt = SgTable.from_ranges([(0, memory.size)], max_segment=attachment.dev.max_segment, memory=memory)
        return attachment.dev.map_sgtable(sgt, direction)

    @finished
    def unmap(self, attachment: Attachment, sgt: SgTable, direction: Direction) -> None:
        if mapping_of(sgt) is not None:
            attachment.dev.unmap_sgtable(sgt, direction)

    def vmap(self, buf: Buffer) -> IosysMap:
        return IosysMap.init_vaddr(memoryview(handle_of(buf).map_file("vmap", 0, buf.size, True)))

    def release(self, buf: Buffer) -> None:
        """Nothing: the kernel frees the file."""


FILE_EXPORTER: Final = FileExporter()
FILE_OPS: Final = checked_ops(FILE_EXPORTER, False)


class MemfdBacking(Backing):
    """Plain memory, which no access has to ask for."""

    in_file = True

    def __init__(self, record: Record) -> None:
        super().__init__(FILE_EXPORTER, FILE_OPS, record, False)

    def check_reachable(self, operation: str) -> None:
        """Nothing: the exporter is in every process."""

    def before_close(self, handle: object) -> None:
        """Nothing to note."""

    def after_close(self, handle: object, quiet: bool) -> None:
        """Nothing ends with a handle."""


def _make(record: SharedBuffer, fd: int) -> Backing:
    return MemfdBacking(record)


BACKINGS.register("memfd", _make)
