"""What the tests of spill heaps do at their end."""

from pathlib import Path

import pytest

from dmabuf import SpillHeap
from tests.support.spilling import SIZE, no_buffer_is_left


def test_teardown_names_a_buffer_that_a_traceback_keeps(tmp_path: Path) -> None:
    with SpillHeap(budget=SIZE, directory=tmp_path) as heap:
        kept = [heap.allocate(SIZE)]
        with pytest.raises(AssertionError, match=r"waited for 0\.1 s in vain; left: \[<spill buffer ino \d+ "):
            no_buffer_is_left(0.1)
        kept.pop().close()
    no_buffer_is_left()
