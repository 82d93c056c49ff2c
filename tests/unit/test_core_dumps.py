"""The memory of buffers is left out of core dumps (madvise(2), MADV_DONTDUMP), unless the process was started otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support.dumped import WAYS


@pytest.mark.parametrize("of", WAYS)
def test_memory_is_left_out(of: Callable[[], int]) -> None:
    assert of()


@pytest.mark.parametrize(("given", "left_out"), [("1", False), ("0", True), ("", True)])
def test_a_process_can_be_started_with_memory_in_its_dumps(given: str, left_out: bool) -> None:
    code = "from tests.support.dumped import WAYS\nprint(*(int(of()) for of in WAYS))"
    environment = {**os.environ, "DMABUF_CORE_DUMPS": given}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [str(int(left_out))] * len(WAYS)
