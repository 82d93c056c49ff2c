"""Attaching a hundred thousand times leaves nothing behind: no memory, descriptor, mapping, or slot of the domain (semantics 8, F50)."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import Device, Direction, DmaBuf, DmaBufAttachment, Exporter, Importer, SgTable, Usage
from dmabuf.core.attach.attachment import moving
from tests.support.budget import times
from tests.support.drivers import PAGE, Mover

ROUNDS, ROUNDS_MAPPED = 100_000, times(quick=5_000, full=20_000)
SIZE = 4 * PAGE
# Objects that come and go with caches, the collector's own and other threads: far below one for each round.
NOISE_BLOCKS = 500
NOISE_BYTES = 1 << 20  # what malloc may take from the system once; 100,000 times the smallest block are 3.2 MB


class Quiet(Exporter):
    """A static exporter that writes nothing down, so that what grows is not its own."""

    def __init__(self, memory: DmaBuf) -> None:
        self.whole = memory.mmap()

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable:
        sgt = SgTable.from_ranges([(0, self.whole.size)], max_segment=attachment.dev.max_segment, memory=self.whole)
        return attachment.dev.map_sgtable(sgt, direction)

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        attachment.dev.unmap_sgtable(sgt, direction)

    def release(self, buf: DmaBuf) -> None:
        """Nothing of its own."""


class QuietMover(Quiet):
    """The same, dynamic. ``pins``: how many there are."""

    pins = 0

    def pin(self, attachment: DmaBufAttachment) -> None:
        self.pins += 1

    def unpin(self, attachment: DmaBufAttachment) -> None:
        self.pins -= 1


def held(buf: DmaBuf, dev: Device) -> Any:
    """What must be the same afterwards, exactly."""
    gc.collect()
    shm = buf.domain.shm
    maps = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if " rw-s " in line or "memfd:" in line]
    return (
        buf.statistics(),
        buf.resv.statistics(),
        (dev.statistics().mapped, dev.statistics().windows),
        len(os.listdir("/proc/self/fd")),
        sorted(maps),
        shm.chunks_of(shm.life),
        sorted(shm.rec_list()),
    )


def resident() -> int:
    """Bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def repeat(rounds: int, buf: DmaBuf, dev: Device, once: Callable[[], None]) -> None:
    """The assertion of every test here."""
    for _ in range(2000):
        once()
    before, blocks, size = held(buf, dev), sys.getallocatedblocks(), resident()
    for _ in range(rounds):
        once()
    assert held(buf, dev) == before
    assert sys.getallocatedblocks() - blocks < NOISE_BLOCKS
    assert resident() - size < NOISE_BYTES


def test_attaching_a_hundred_thousand_times_leaves_nothing(buf: DmaBuf, dev: Device) -> None:
    repeat(ROUNDS, buf, dev, lambda: buf.attach(dev).detach())


@pytest.fixture(params=["plain", "static", "dynamic", "dynamic, cached", "move notify"])
def kind(request: pytest.FixtureRequest, buf: DmaBuf) -> Iterator[tuple[DmaBuf, Importer | None]]:
    """A buffer and an importer for each line of the mapping matrix (semantics 2.13a)."""
    if request.param == "plain":
        yield buf, None
        return
    exporter = Quiet(buf) if request.param == "static" else QuietMover(buf)
    importer = None if request.param in ("static", "dynamic, cached") else Mover()
    with moving(request.param == "move notify"), dmabuf.export(exporter, SIZE) as made:
        yield made, importer
    assert getattr(exporter, "pins", 0) == 0
    exporter.whole.close()


def test_mapping_each_time_leaves_nothing_either(kind: tuple[DmaBuf, Importer | None], dev: Device) -> None:
    buf, importer = kind

    def once() -> None:
        attachment = buf.attach(dev, importer)
        with attachment.mapped(Direction.TO_DEVICE):
            pass
        attachment.detach()

    repeat(ROUNDS_MAPPED, buf, dev, once)


def test_attachments_that_fail_leave_nothing(buf: DmaBuf, dev: Device) -> None:
    class Refuses(Quiet):
        def attach(self, attachment: DmaBufAttachment) -> None:
            raise OSError(16, "busy")

    exporter = Refuses(buf)
    with dmabuf.export(exporter, SIZE) as made:

        def once() -> None:
            with pytest.raises(OSError, match="busy"):
                made.attach(dev)

        repeat(ROUNDS_MAPPED, made, dev, once)
    exporter.whole.close()
    assert not buf.resv.fences(Usage.BOOKKEEP)
