"""Spilled buffers under devices that work later: a DMA engine and a disk, with and without news of moves."""

import os
import random
import zlib
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, SpillHeap
from dmabuf.core.attach.attachment import moving
from dmabuf.errors import NoMemoryError
from tests.support.children import Parent, Spawn
from tests.support.spilling import ROOM, SIZE, give, given, holds, number_in, pattern, resident


@pytest.mark.parametrize("news", [False, True], ids=["pinned while mapped", "told of moves"])
@pytest.mark.parametrize("keep", [False, True], ids=["attached for a job", "attached for all"])
def test_an_engine_copies_among_more_than_fits_and_every_byte_arrives(heap: SpillHeap, bufs: list[DmaBuf], news: bool, keep: bool) -> None:
    if keep and not news:
        bufs = bufs[:ROOM]  # what is attached for all jobs is pinned as it is mapped
    rng = random.Random(7)
    with moving(news), dmabuf.sim.Engine("dma0") as engine:
        queue = engine.queue()
        targets = [engine.attach(buf) for buf in bufs] if keep else bufs
        content = list(range(len(bufs)))
        for _ in range(150):
            source, target = rng.sample(range(len(bufs)), 2)
            queue.copy(targets[source], targets[target]).wait()
            content[target] = content[source]
            i = rng.randrange(len(bufs))
            assert holds(bufs[i], content[i])
            assert sum(map(resident, bufs)) <= heap.budget
        sums = [queue.checksum(target) for target in targets[: ROOM // 2]]
        assert [job.wait() for job in sums] == [zlib.crc32(pattern(what, SIZE)) for what in content[: ROOM // 2]]
        engine.close()
    assert all(holds(buf, what) for buf, what in zip(bufs, content, strict=True))
    assert heap.statistics().pinned == 0


def copy_and_look(queue: Any, bufs: list[DmaBuf], rng: random.Random) -> None:
    """Copy a random buffer into another, and look at one. Who waits for memory with locks held may be in a circle, which ENOMEM ends."""
    for tries in range(3):
        try:
            queue.copy(*rng.sample(bufs, 2)).wait()
            with rng.choice(bufs).read() as view:
                assert number_in(view) < len(bufs)
        except NoMemoryError:
            if tries == 2:
                raise
        else:
            return


def copies(parent: Parent, news: bool, rounds: int) -> int:
    """Copy random buffers into others by an engine of this process, and look at some."""
    bufs = given(parent)
    rng = random.Random(11)
    with moving(news), dmabuf.sim.Engine("dma1") as engine:
        queue = engine.queue()
        for _ in range(rounds):
            copy_and_look(queue, bufs, rng)
        engine.close()
    return rounds


@pytest.mark.parametrize("news", [False, True], ids=["pinned while mapped", "told of moves"])
def test_engines_of_two_processes_copy_among_more_than_fits(heap: SpillHeap, bufs: list[DmaBuf], child: Spawn, news: bool) -> None:
    """Whatever is copied where, every buffer is always full of one of the numbers."""
    other = child(copies, news, 100)
    give(other, bufs)
    rng = random.Random(5)
    with moving(news), dmabuf.sim.Engine("dma0") as engine:
        queue = engine.queue()
        for _ in range(100):
            copy_and_look(queue, bufs, rng)
            assert heap.statistics().resident <= heap.budget
        assert other.result() == 100
        engine.close()
    for buf in bufs:
        with buf.read() as view:
            assert number_in(view) < len(bufs)
    assert heap.statistics().pinned == 0


@pytest.mark.parametrize("news", [False, True], ids=["pinned while mapped", "told of moves"])
def test_a_disk_reads_into_buffers_that_were_away_and_writes_from_them(
    heap: SpillHeap, bufs: list[DmaBuf], tmp_path: Path, news: bool
) -> None:
    (tmp_path / "in").write_bytes(pattern(900, SIZE))
    with moving(news), dmabuf.DiskDevice() as disk:
        for buf in (bufs[0], bufs[1]):
            assert disk.submit_read(buf, tmp_path / "in").wait() == SIZE
        for i, buf in enumerate(bufs[2:], 2):
            assert holds(buf, i)
        assert disk.submit_write(bufs[0], tmp_path / "out").wait() == SIZE
    assert (tmp_path / "out").read_bytes() == pattern(900, SIZE)
    assert holds(bufs[1], 900)
    assert os.fstat(bufs[1].fileno()).st_size == SIZE
