"""A spill heap, and ten times as many buffers as fit into it."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmabuf import DmaBuf, Domain, SpillHeap
from dmabuf.core.export.exported import EXPORTS
from dmabuf.heap.spill_buffer import SpillBuffer
from tests.support.spilling import ROOM, SIZE, fill
from tests.support.waiting import until


@pytest.fixture
def heap(tmp_path: Path) -> Iterator[SpillHeap]:
    with SpillHeap(budget=ROOM * SIZE, directory=tmp_path, memory_timeout=60) as made:
        yield made
    gc.collect()  # a traceback's frames may still have a mapping
    # The last holder may have been another process, or a thread of ours releases what the collector found.
    until(lambda: not any(isinstance(found.exporter, SpillBuffer) for found in list(EXPORTS.of(Domain.default()).buffers.values())))


@pytest.fixture
def bufs(heap: SpillHeap) -> Iterator[list[DmaBuf]]:
    """Ten times as much as fits, each full of its number."""
    made = [heap.allocate(SIZE) for _ in range(10 * ROOM)]
    for i, buf in enumerate(made):
        fill(buf, i)
    yield made
    for buf in made:
        buf.close()
