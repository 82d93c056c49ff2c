"""A process that is killed while it gives a buffer a layout leaves the whole layout or none, and the next process can give one."""

from __future__ import annotations

import itertools
import os

import pytest

import dmabuf
from dmabuf import ImageLayout, TensorLayout
from dmabuf.core.buffer.handle import handle_of
from tests.support.apart import Apart
from tests.support.steps import Held

pytestmark = [pytest.mark.crash]

PICTURE = ImageLayout.linear("NV12", 64, 16)
TENSOR = TensorLayout("float32", (3, 5))


STEPS = ("chunk_allocated", "chunk_typed", "chunk_published", "layout_filled", "layout_named")


def deaths_of_describe() -> dict[str, bool]:
    """Kill a process at each step of giving a layout. Return whether the buffer has it then, by step."""
    found: dict[str, bool] = {}
    for step in STEPS:  # in this order: the first three are there until there is a chunk of layouts
        with dmabuf.allocate(PICTURE.sizes[0], name="described") as buf:
            with Held(lambda buf=buf: buf.describe(PICTURE), step) as doomed:  # type: ignore[misc]
                assert doomed.run_to(step)
                shared = handle_of(buf).shared
                seen = shared.shm.rec_layout(shared.index, shared.gen)
                doomed.kill()
            assert seen in (None, (0, PICTURE.pack())), f"half of a layout at {step}"
            found[step] = buf.layout is not None
            assert buf.layout in (None, PICTURE)
            buf.describe(PICTURE)
            assert buf.layout == PICTURE
            assert buf.domain.shm.table_audit() == (0, 0, 0, 0)
    return found


def test_describe_by_a_killed_process_is_whole_or_nothing(apart: Apart) -> None:
    assert apart(deaths_of_describe) == {step: step == "layout_named" for step in STEPS}


def found_while_allocating() -> set[str]:
    """Stop a process at each step of allocating with a layout. Return the steps at which its buffer can be found, always with it."""
    found: set[str] = set()
    shm = dmabuf.Domain.default().join()
    for nth in itertools.count(1):
        with Held(lambda: dmabuf.allocate(layout=PICTURE)) as doomed:
            step = doomed.run_to_nth(nth)
            if step is None:
                break
            for index in shm.rec_list():  # takes no lock: the process that is stopped may have the table's
                info = shm.rec_info(index)
                if info is not None and info["pid"] == doomed.pid:
                    found.add(step)
                    assert shm.rec_layout(index, info["gen"]) == (0, PICTURE.pack())
            doomed.kill()
    return found


def test_buffer_that_can_be_found_has_its_layout(apart: Apart) -> None:
    assert {"rec_live", "rec_linked"} <= apart(found_while_allocating)


def after_reset() -> list[tuple[int, bytes] | None]:
    """What the domain says of two buffers whose descriptors outlived every process of it, and of their record for the third."""
    domain = dmabuf.Domain.default()
    with dmabuf.allocate(layout=PICTURE) as one, dmabuf.allocate(layout=TENSOR) as two, dmabuf.allocate(layout=TENSOR):
        kept = one.dup(), two.dup()
    domain.leave()
    shm = domain.join()
    found = []
    for fd in kept:
        at = shm.rec_find(os.fstat(fd).st_dev, os.fstat(fd).st_ino)
        assert at is not None
        found.append(shm.rec_layout(at[0], at[1]))  # what this process knows itself doesn't count
        with dmabuf.get(fd) as buf:
            assert buf.layout in (PICTURE, TENSOR)
        os.close(fd)
    assert shm.table_audit() == (0, 0, 0, 0)
    return found


def test_layout_outlives_every_process_of_the_domain(apart: Apart) -> None:
    assert apart(after_reset) == [(0, PICTURE.pack()), (0, TENSOR.pack())]
