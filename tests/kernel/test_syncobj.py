"""Sync objects on a driver that has them: virtio_gpu's, for which QEMU has a device (semantics 5.14)."""

import errno
import math
import os
import select
import socket
from collections.abc import Iterator

import pytest

from dmabuf.drivers.drm import DrmNode
from dmabuf.drivers.sw_sync import SwSyncTimeline
from dmabuf.drivers.syncobj import Syncobj
from dmabuf.uapi import drm, sync_file
from dmabuf.uapi import syncobj as uapi
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.waiting import Background

DRIVER = "virtio_gpu"


@pytest.fixture
def node() -> Iterator[DrmNode]:
    try:
        opened = DrmNode.of(DRIVER)
    except OSError:
        pytest.skip(f"no driver of this kernel has sync objects ({DRIVER}): KERNEL=debian or full")
    with opened:
        yield opened


@pytest.fixture
def timeline(node: DrmNode) -> Iterator[Syncobj]:
    with Syncobj(node) as made:
        yield made


def test_the_driver_says_that_it_has_them(node: DrmNode) -> None:
    assert [drm.capability(node.fileno(), one) for one in (drm.CAP_SYNCOBJ, drm.CAP_SYNCOBJ_TIMELINE)] == [1, 1]


def test_an_object_begins_empty_or_signalled(node: DrmNode) -> None:
    with Syncobj(node) as empty, Syncobj(node, signaled=True) as full:
        assert full.wait(timeout=0) > 0
        assert full.wait() == math.inf
        with raises_errno(errno.EINVAL):
            empty.wait(timeout=0)
        assert empty.wait(timeout=0, submit=True) == 0.0
        with raises_errno(errno.EINVAL):
            empty.export_sync_file()


def test_a_binary_object_is_signalled_and_reset(timeline: Syncobj) -> None:
    timeline.signal()
    assert timeline.wait(timeout=0) > 0
    timeline.reset()
    assert timeline.wait(timeout=0, submit=True) == 0.0


def test_a_point_is_signalled_asked_for_and_awaited(timeline: Syncobj) -> None:
    assert timeline.point() == 0
    timeline.signal(7)
    assert (timeline.point(), timeline.point(submitted=True)) == (7, 7)
    assert timeline.wait(5) == math.inf
    assert 0 < timeline.wait(7, timeout=60) <= 60
    assert timeline.wait(8, timeout=0, submit=True) == 0.0
    assert timeline.wait(8, timeout=0.01, submit=True) == 0.0
    with raises_errno(errno.EINVAL):
        timeline.wait(8, timeout=0)


@pytest.mark.parametrize("timeout", [None, math.inf, 1e18, 3600.0])
def test_a_waiter_sleeps_until_the_point(timeline: Syncobj, timeout: float | None) -> None:
    with Background(lambda: timeline.wait(2, timeout, submit=True)) as job:
        job.until_blocked()
        timeline.signal(1)
        job.until_blocked()
        assert not job.done
        timeline.signal(2)
        assert job.result() > 0


def test_a_fence_is_transferred(node: DrmNode, timeline: Syncobj) -> None:
    with Syncobj(node, signaled=True) as binary, Syncobj(node) as empty:
        binary.transfer(0, timeline, 3)
        assert timeline.point() == 3
        timeline.transfer(3, empty)
        assert empty.wait(timeout=0) > 0
        with Syncobj(node) as nothing, raises_errno(errno.EINVAL):
            nothing.transfer(0, timeline, 4)


def test_several_are_asked_for_at_once(node: DrmNode) -> None:
    with Syncobj(node) as one, Syncobj(node, signaled=True) as other:
        handles = [one.handle, other.handle]
        assert uapi.wait(node.fileno(), handles, 0, uapi.WAIT_FOR_SUBMIT) == 1
        with raises_errno(errno.ETIME):
            uapi.wait(node.fileno(), handles, 0, uapi.WAIT_FOR_SUBMIT | uapi.WAIT_ALL)
        uapi.timeline_signal(node.fileno(), handles, [3, 4])
        assert uapi.query(node.fileno(), handles) == [3, 4]
        assert uapi.timeline_wait(node.fileno(), handles, [3, 4], 0, uapi.WAIT_ALL) in (0, 1)


def test_a_sync_file_of_the_kernel_goes_in_and_out(node: DrmNode, timeline: Syncobj) -> None:
    with Syncobj(node, signaled=True) as full, full.export_sync_file() as out:
        assert sync_file.file_info(out.number).status == 1
        timeline.import_sync_file(out.number)
    assert timeline.wait(timeout=0) > 0


def test_a_pending_fence_is_awaited_through_the_object(node: DrmNode, timeline: Syncobj, kernel_timeline: SwSyncTimeline) -> None:
    with kernel_timeline.fence(1) as fence, Syncobj(node) as binary:
        binary.import_sync_file(fence.number)
        binary.transfer(0, timeline, 1)
        assert (timeline.point(), timeline.point(submitted=True)) == (0, 1)
        assert timeline.wait(1, timeout=0) == 0.0
        with binary.export_sync_file() as again, Background(lambda: timeline.wait(1)) as job:
            job.until_blocked()
            assert sync_file.file_info(again.number).status == 0
            kernel_timeline.increment()
            assert job.result() == math.inf
            assert sync_file.file_info(again.number).status == 1
        assert timeline.point() == 1


def test_vgems_fence_on_a_buffer_is_awaited_through_the_object(timeline: Syncobj) -> None:
    with DrmNode.of("vgem") as vgem, vgem.create_dumb(64, 64) as dumb, dumb.export() as buf:
        fence = dumb.add_fence(write=True)
        with buf.export_sync_file() as done:
            timeline.import_sync_file(done.fileno())
        fence.signal()
        assert timeline.wait() == math.inf


def test_an_eventfd_is_written_to_when_the_point_is_signalled(timeline: Syncobj) -> None:
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        timeline.on_eventfd(event, 2)
        timeline.signal(1)
        assert not select.select([event], [], [], 0)[0]
        timeline.signal(2)
        assert select.select([event], [], [])[0] == [event]
        assert os.eventfd_read(event) == 1
    finally:
        os.close(event)


def _signals(parent: Parent) -> float:
    """In another process: opens the node, waits for point 1 of the object that comes, and signals point 2."""
    _, (fd,), _, _ = socket.recv_fds(parent.sock, 1, 1)
    try:
        with DrmNode.of(DRIVER) as node, Syncobj.from_fd(node, fd) as timeline:
            left = timeline.wait(1, submit=True)
            timeline.signal(2)
            return left
    finally:
        os.close(fd)


def test_an_object_is_shared_with_another_process(child: Spawn, timeline: Syncobj) -> None:
    other = child(_signals)
    with timeline.export() as out:
        socket.send_fds(other.sock, [b"x"], [out.number])
    timeline.signal(1)
    assert timeline.wait(2, submit=True) == math.inf
    assert other.result() == math.inf


def test_what_is_no_sync_object_is_einval(node: DrmNode, timeline: Syncobj) -> None:
    with open(os.devnull, "rb") as other:
        with raises_errno(errno.EINVAL):
            Syncobj.from_fd(node, other.fileno())
        with raises_errno(errno.EINVAL):
            timeline.import_sync_file(other.fileno())


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda node: uapi.destroy(node, 9999), errno.EINVAL),
        (lambda node: uapi.handle_to_fd(node, 9999), errno.EINVAL),
        (lambda node: uapi.wait(node, [9999], 0), errno.ENOENT),
        (lambda node: uapi.signal(node, [9999]), errno.ENOENT),
        (lambda node: uapi.reset(node, [9999]), errno.ENOENT),
        (lambda node: uapi.reset(node, []), errno.EINVAL),
        (lambda node: uapi.timeline_signal(node, [9999], [1]), errno.ENOENT),
        (lambda node: uapi.query(node, [9999]), errno.ENOENT),
        (lambda node: uapi.transfer(node, (9999, 0), (9998, 0)), errno.ENOENT),
        (lambda node: uapi.on_eventfd(node, 9999, 0, 0), errno.ENOENT),
    ],
    ids=["destroy", "export", "wait", "signal", "reset", "reset none", "signal point", "query", "transfer", "eventfd"],
)
def test_a_handle_that_is_none(node: DrmNode, call: "object", number: int) -> None:
    with raises_errno(number):
        call(node.fileno())  # type: ignore[operator]


def test_closing_an_object_ends_its_handle_and_not_the_object(node: DrmNode, timeline: Syncobj) -> None:
    with timeline.export() as out:
        with Syncobj.from_fd(node, out.number) as again:
            assert again.handle != timeline.handle
            again.signal(5)
            handle = again.handle
        with raises_errno(errno.ENOENT):
            uapi.query(node.fileno(), [handle])
    assert timeline.point() == 5
