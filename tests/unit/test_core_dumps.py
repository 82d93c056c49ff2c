"""The memory of buffers is left out of core dumps (madvise(2), MADV_DONTDUMP), unless the process was started otherwise."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import dmabuf
from dmabuf.core.buffer.handle import handle_of

SIZE = 1 << 16


def flags_at(address: int) -> set[str]:
    """Return the VmFlags of the mapping that begins there, as proc(5) names them."""
    with open("/proc/self/smaps") as file:
        text = file.read()
    found = re.search(rf"^{address:08x}-.*?^VmFlags: ([a-z ]*)$", text, re.M | re.S)
    assert found is not None
    return set(found.group(1).split())


def of_a_block() -> int:
    with dmabuf.allocate(SIZE) as buf, buf.read():
        mapping = handle_of(buf).view
        assert mapping is not None
        return "dd" in flags_at(mapping.address)


def of_a_mapping() -> int:
    with dmabuf.allocate(SIZE) as buf, buf.mmap() as mapping:
        return "dd" in flags_at(mapping.address)


def of_what_outlived_a_block() -> int:
    with dmabuf.allocate(SIZE) as buf:
        with buf.read() as view:
            kept = memoryview(view)
        address = handle_of(buf).view.address  # type: ignore[union-attr]  # and no name of it: what others know isn't taken away
        with buf.write(timeout=0):
            pass
        left_out = "dd" in flags_at(address)
        kept.release()
        return left_out


@pytest.mark.parametrize("of", [of_a_block, of_a_mapping, of_what_outlived_a_block])
def test_memory_is_left_out(of: object) -> None:
    assert callable(of)
    assert of()


@pytest.mark.parametrize("of", [of_a_block, of_a_mapping, of_what_outlived_a_block])
@pytest.mark.parametrize(("given", "left_out"), [("1", False), ("0", True), ("", True)])
def test_a_process_can_be_started_with_memory_in_its_dumps(of: object, given: str, left_out: bool) -> None:
    name = getattr(of, "__name__", "")
    code = f"import sys\nfrom tests.unit import test_core_dumps\nsys.exit(test_core_dumps.{name}())"
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "DMABUF_CORE_DUMPS": given}, check=False)
    assert ended.returncode == left_out
