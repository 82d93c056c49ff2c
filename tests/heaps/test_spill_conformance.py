"""What the conformance suite asks of plain buffers, asked of a spill heap's: to its users it is a buffer like any other."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmabuf import DmaBuf, SpillHeap
from tests.conformance import test_access, test_access_kept, test_cpu_access, test_file_operations
from tests.conformance.conftest import SIZE, dev, other_tl, tl
from tests.support.spilling import no_buffer_is_left

__all__ = ["dev", "other_tl", "tl"]  # fixtures of that suite

for suite in (test_access, test_access_kept, test_cpu_access, test_file_operations):
    for name, asked in vars(suite).items():
        # Those with other processes have their like in test_spill_processes.
        if name.startswith("test_") and "child" not in inspect.signature(asked).parameters:
            globals()[name] = asked


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[SpillHeap]:
    with SpillHeap(budget=2 * SIZE, directory=tmp_path) as made:
        yield made
    no_buffer_is_left()


@pytest.fixture
def buf(crowded: SpillHeap) -> Iterator[DmaBuf]:
    """One that was used and is away."""
    with crowded.allocate(SIZE) as made:
        with made.write() as view:
            view[:] = bytes(SIZE)
        with crowded.allocate(2 * SIZE) as other, other.read():
            pass
        yield made


@pytest.fixture
def other_buf(crowded: SpillHeap) -> Iterator[DmaBuf]:
    with crowded.allocate(SIZE) as made:
        yield made
