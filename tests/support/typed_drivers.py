"""Exporters and importers as a typed program writes them. mypy checks this file: an unused ``type: ignore`` is an error there."""

import dmabuf
from dmabuf import Device, Direction, DmaBuf, DmaBufAttachment, SgTable
from dmabuf.core.contract import Attachment, Buffer


class NamesClasses(dmabuf.Exporter):
    """Its ops name the classes that a program has."""

    def __init__(self, size: int) -> None:
        self.memory = dmabuf.allocate(size)
        self.bytes = self.memory.mmap()
        self.released: list[str | None] = []

    def attach(self, attachment: DmaBufAttachment) -> None:
        attachment.peer2peer = False

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable:
        device: Device = attachment.dev
        return device.map_sgtable(SgTable.from_ranges([(0, len(self.bytes))], memory=self.bytes), direction)

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        attachment.dev.unmap_sgtable(sgt, direction)

    def release(self, buf: DmaBuf) -> None:
        self.released.append(buf.name)
        self.bytes.close()
        self.memory.close()


class NamesProtocols(NamesClasses):
    """Ops may ask for less: what the framework promises of a buffer and of an attachment."""

    def attach(self, attachment: Attachment) -> None:
        attachment.peer2peer = False

    def release(self, buf: Buffer) -> None:
        self.released.append(buf.name)
        self.bytes.close()
        self.memory.close()


class NamesOthers(dmabuf.Exporter):
    """A type checker refuses ops that ask for something else, and ops that return something else."""

    def attach(self, attachment: DmaBuf) -> None:  # type: ignore[override]
        raise AssertionError(attachment)

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> bytes:  # type: ignore[override]
        raise AssertionError(attachment, direction)

    def release(self, buf: bytes) -> None:  # type: ignore[override]
        raise AssertionError(buf)


class Notified(dmabuf.Importer):
    """An importer that counts the moves."""

    def __init__(self) -> None:
        self.moves: list[DmaBufAttachment] = []

    def move_notify(self, attachment: DmaBufAttachment) -> None:
        self.moves.append(attachment)


class NotifiedOfOthers(dmabuf.Importer):
    """A type checker refuses this one too."""

    def move_notify(self, attachment: Device) -> None:  # type: ignore[override]
        raise AssertionError(attachment)
