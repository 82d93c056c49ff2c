"""Every call to a real kernel fails once in turn: the right errno, and no descriptor, mapping, bracket or fence lost."""

from collections.abc import Callable
from functools import partial

import pytest

from dmabuf.drivers.drm import DrmNode
from dmabuf.drivers.sw_sync import SwSyncTimeline
from dmabuf.uapi import dma_buf, sync_file
from tests.support.faults import faults
from tests.support.home_scenarios import SCENARIOS, SIZE, whole_after
from tests.support.kernel_homes import HOMES, add_fence, made, needs_sw_sync


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_whatever_call_fails_nothing_is_lost(home: str, name: str) -> None:
    ran = 0
    for fault in faults(partial(SCENARIOS[name], partial(made, home, SIZE)), whole_after):
        fault()
        ran += 1
    assert ran


def a_fence_that_is_awaited() -> None:
    """A kernel's fence that must not be lost: whatever fails, the buffer is busy until it ends."""
    with made("udmabuf", SIZE) as buf, SwSyncTimeline() as timeline, timeline.fence(1) as fence:
        try:
            add_fence(buf, fence.number, write=True)
            with dma_buf.export_sync_file(buf.fileno(), dma_buf.READ) as pending, sync_file.merge(pending.number, fence.number) as both:
                assert sync_file.file_info(both.number).status == 0
            with pytest.raises(TimeoutError), buf.read(timeout=0):
                pass
        finally:
            timeline.increment()
        with buf.read(timeout=0):
            assert sync_file.file_info(fence.number).status == 1


def prime() -> None:
    """Out of vgem and in again, with a fence of vgem's."""
    with DrmNode.of("vgem") as node, node.create_dumb(SIZE // 4, 1) as dumb, dumb.export() as buf, node.import_buffer(buf) as again:
        assert again.handle == dumb.handle
        fence = again.add_fence(write=True)
        try:
            with pytest.raises(TimeoutError), buf.read(timeout=0):
                pass
        finally:
            fence.signal()
        with buf.write(timeout=0):
            pass


@pytest.mark.parametrize("scenario", [pytest.param(a_fence_that_is_awaited, marks=needs_sw_sync), prime])
def test_whatever_call_to_a_driver_fails_nothing_is_lost(scenario: Callable[[], None]) -> None:
    for fault in faults(scenario, whole_after):
        fault()
