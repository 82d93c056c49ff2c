"""A spill heap, and ten times as many buffers as fit into it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dmabuf import DmaBuf, SpillHeap
from tests.support.spilling import ROOM, SIZE, fill, no_buffer_is_left


@pytest.fixture
def heap(tmp_path: Path) -> Iterator[SpillHeap]:
    with SpillHeap(budget=ROOM * SIZE, directory=tmp_path, memory_timeout=60) as made:
        yield made
    no_buffer_is_left()


@pytest.fixture
def bufs(heap: SpillHeap) -> Iterator[list[DmaBuf]]:
    """Ten times as much as fits, each full of its number."""
    made = [heap.allocate(SIZE) for _ in range(10 * ROOM)]
    for i, buf in enumerate(made):
        fill(buf, i)
    yield made
    for buf in made:
        buf.close()
