"""Whether the memory of buffers is left out of core dumps, in each of the ways to have it in memory.

In a module of its own: a fresh interpreter that imported a test's module would import pytest, which takes ten times the CPU of its start.
"""

from __future__ import annotations

import re

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


WAYS = [of_a_block, of_a_mapping, of_what_outlived_a_block]
