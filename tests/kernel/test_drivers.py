"""Drivers from Python against real ones: vgem's buffers, PRIME and fences, the kernel's software timeline, sync objects, a camera."""

import errno
import itertools
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf.drivers.camera import Camera, fourcc
from dmabuf.drivers.drm import DrmNode, GemObject
from dmabuf.drivers.sw_sync import SwSyncTimeline
from dmabuf.drivers.syncobj import Syncobj
from dmabuf.uapi import call, dma_buf, drm, sync_file, table
from dmabuf.uapi.layout import Ioctl
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.kernel_homes import made, needs_sw_sync
from tests.support.waiting import Background

CAMERA = "/dev/video0"


# ---- DRM ----


def test_a_node_is_found_by_its_driver(node: DrmNode) -> None:
    assert node.driver == "vgem"
    with DrmNode(node.path) as again:
        assert again.driver == "vgem"
    with raises_errno(errno.ENODEV) as caught:
        DrmNode.of("no such driver")
    assert "modprobe" in str(caught.value)


def test_a_dumb_buffer_has_lines_and_a_size(node: DrmNode) -> None:
    with node.create_dumb(100, 10, 24) as dumb:
        # Semantics 5.12: pitch = ceil(width * bpp / 8), size = pitch * height rounded up to pages.
        assert (dumb.pitch, dumb.size) == (300, 4096)
        with dumb.export() as buf:
            assert (buf.home, buf.exp_name, buf.size) == ("imported", "drm", 4096)


@pytest.mark.parametrize("shape", [(0, 1, 32), (1, 0, 32), (1, 1, 0)])
def test_a_dumb_buffer_of_nothing_is_einval(node: DrmNode, shape: tuple[int, int, int]) -> None:
    with raises_errno(errno.EINVAL):
        node.create_dumb(*shape)


def test_two_exports_of_an_object_are_one_buffer(node: DrmNode) -> None:
    with node.create_dumb(64, 64) as dumb, dumb.export() as one, dumb.export() as other:
        assert one == other
        with one.write() as view:
            view[:1] = b"x"
        with other.read() as view:
            assert view[0] == ord("x")


def test_a_handle_that_was_imported_twice_is_closed_once_and_last(node: DrmNode) -> None:
    with made("udmabuf") as buf:
        first, second = node.import_buffer(buf), node.import_buffer(buf)
        assert first.handle == second.handle
        first.close()
        first.close()
        with second.export() as again:
            assert again == buf
        second.close()
        with raises_errno(errno.ENOENT):
            drm.handle_to_fd(node.fileno(), second.handle)


@pytest.mark.parametrize("home", ["udmabuf", "dma_heap:system", "imported"])
def test_a_buffer_is_imported_without_a_copy(node: DrmNode, home: str) -> None:
    with made(home) as buf:
        with buf.write() as view:
            view[:5] = b"pixel"
        with node.import_buffer(buf) as imported, imported.export() as again:
            assert again == buf
            with again.read() as view:
                assert bytes(view[:5]) == b"pixel"


def test_a_driver_is_not_offered_what_is_no_dma_buf(node: DrmNode) -> None:
    with dmabuf.allocate(4096) as buf, raises_errno(errno.EINVAL) as caught:
        node.import_buffer(buf)
    assert "udmabuf" in str(caught.value)


def test_a_buffer_lives_on_without_its_node() -> None:
    with DrmNode.of("vgem") as node, node.create_dumb(64, 64) as dumb:
        buf = dumb.export()
    with buf, buf.write() as view:
        view[:1] = b"x"


@pytest.mark.parametrize("write", [True, False])
def test_a_fence_of_the_driver_is_awaited(node: DrmNode, write: bool) -> None:
    with node.create_dumb(64, 64) as dumb, dumb.export() as buf:
        fence = dumb.add_fence(write=write)

        def enter() -> None:
            with buf.write():
                pass

        with Background(enter) as job:
            job.until_blocked()
            assert not job.done
            fence.signal()
            job.result()
        with raises_errno(errno.ENOENT):
            fence.signal()


def test_a_second_writer_of_the_driver_is_ebusy(node: DrmNode) -> None:
    with node.create_dumb(64, 64) as dumb:
        fence = dumb.add_fence(write=True)
        with raises_errno(errno.EBUSY):
            dumb.add_fence(write=True)
        fence.signal()


@pytest.mark.parametrize("operation", ["export", "add_fence"])
def test_a_closed_handle_is_ebadf(node: DrmNode, operation: str) -> None:
    dumb = node.create_dumb(64, 64)
    dumb.close()
    with raises_errno(errno.EBADF):
        getattr(dumb, operation)()


def test_a_closed_node_is_ebadf() -> None:
    node = DrmNode.of("vgem")
    node.close()
    with raises_errno(errno.EBADF):
        node.create_dumb(64, 64)


def test_what_is_no_drm_node_is_enotty() -> None:
    with raises_errno(errno.ENOTTY):
        DrmNode("/dev/null")


def test_an_object_that_is_dropped_is_closed(node: DrmNode) -> None:
    dumb: GemObject = node.create_dumb(64, 64)
    handle = dumb.handle
    del dumb
    with raises_errno(errno.ENOENT):
        drm.handle_to_fd(node.fileno(), handle)


def test_what_vgem_does_not_have_says_so(node: DrmNode) -> None:
    if drm.capability(node.fileno(), drm.CAP_SYNCOBJ):  # a later vgem
        with Syncobj(node) as timeline:
            timeline.signal(3)
            assert timeline.point() == 3
    else:
        with raises_errno(errno.EOPNOTSUPP) as caught:
            Syncobj(node)
        assert "driver" in str(caught.value)


# ---- vkms, where the kernel has it ----


@pytest.fixture
def vkms() -> Iterator[DrmNode]:
    if not Path("/sys/devices/platform/vkms").exists():
        pytest.skip("this kernel has no vkms: KERNEL=full")
    with DrmNode.of("vkms") as opened:
        yield opened


def test_a_buffer_of_vkms_is_written_here_and_imported_by_vgem(vkms: DrmNode, node: DrmNode) -> None:
    with vkms.create_dumb(64, 64) as dumb, dumb.export() as buf:
        assert (buf.home, buf.exp_name, buf.size) == ("imported", "drm", 64 * 64 * 4)
        with buf.write() as view:
            view[:5] = b"pixel"
        with node.import_buffer(buf) as imported, imported.export() as again:
            assert again == buf
            with again.read() as view:
                assert bytes(view[:5]) == b"pixel"


@pytest.mark.parametrize("home", ["udmabuf", "dma_heap:system", "imported"])
def test_vkms_imports_a_buffer_without_a_copy(vkms: DrmNode, home: str) -> None:
    with made(home) as buf:
        first, second = vkms.import_buffer(buf), vkms.import_buffer(buf)
        assert first.handle == second.handle
        first.close()
        with second, second.export() as again:
            assert again == buf


def test_fence_of_another_driver_blocks_waiters_for_a_vkms_import(vkms: DrmNode, node: DrmNode) -> None:
    with vkms.create_dumb(64, 64) as dumb, dumb.export() as buf, node.import_buffer(buf) as imported:
        fence = imported.add_fence(write=True)
        assert not buf.poll(select.POLLIN)
        fence.signal()
        assert buf.poll(select.POLLIN)
        with raises_errno(errno.ENOTTY):
            dumb.add_fence()


# ---- sw_sync ----


@needs_sw_sync
def test_a_software_timeline_signals_up_to_its_value() -> None:
    with SwSyncTimeline() as timeline, timeline.fence(1) as one, timeline.fence(2) as two:
        assert [sync_file.file_info(fence.number).status for fence in (one, two)] == [0, 0]
        timeline.increment()
        assert [sync_file.file_info(fence.number).status for fence in (one, two)] == [1, 0]
        info = sync_file.file_info(two.number)
        assert [one.driver_name for one in info.fences] == [b"sw_sync"]
        assert info.name.startswith(b"sw_sync-")


@needs_sw_sync
def test_the_end_of_a_timeline_ends_its_fences_with_enoent() -> None:
    timeline = SwSyncTimeline()
    fence = timeline.fence(1)
    timeline.close()
    assert sync_file.file_info(fence.number).status == -errno.ENOENT


@needs_sw_sync
def test_a_deadline_reaches_the_timeline() -> None:
    with SwSyncTimeline() as timeline, timeline.fence(1) as fence:
        if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 8):
            with raises_errno(errno.ENOTTY):
                sync_file.set_deadline(fence.number, 2_000_000)
            return
        sync_file.set_deadline(fence.number, 2_000_000)
        sync_file.set_deadline(fence.number, 1_000_000)
        assert timeline.deadline(fence.number) == 1_000_000


@needs_sw_sync
def test_merged_fences_are_told_one_by_one() -> None:
    with SwSyncTimeline() as one, SwSyncTimeline() as other, one.fence(1) as first, other.fence(1) as second:
        with sync_file.merge(first.number, second.number, b"both") as merged:
            info = sync_file.file_info(merged.number)
            assert (info.name, info.status, len(info.fences)) == (b"both", 0, 2)
            one.increment()
            assert sorted(one.status for one in sync_file.file_info(merged.number).fences) == [0, 1]
            other.increment()
            assert sync_file.file_info(merged.number).status == 1
        with open(os.devnull, "rb") as other_file, raises_errno(errno.ENOENT):
            sync_file.merge(first.number, other_file.fileno())


@needs_sw_sync
def test_an_exported_sync_file_is_what_was_imported() -> None:
    with made("dma_heap:system") as buf, SwSyncTimeline() as timeline, timeline.fence(1) as fence:
        dma_buf.import_sync_file(buf.fileno(), dma_buf.WRITE, fence.number)
        with dma_buf.export_sync_file(buf.fileno(), dma_buf.READ) as exported:
            assert sync_file.file_info(exported.number).status == 0
            timeline.increment()
            assert sync_file.file_info(exported.number).status == 1


# ---- a camera ----

needs_camera = pytest.mark.skipif(not Path(CAMERA).exists(), reason="this kernel has no camera (vivid): KERNEL=debian or full")


def test_a_camera_that_is_not_there_says_what_would_help() -> None:
    with raises_errno(errno.ENOENT) as caught:
        Camera("/dev/video77")
    assert "vivid" in str(caught.value)


def test_what_is_no_camera_is_enotty() -> None:
    with raises_errno(errno.ENOTTY):
        Camera("/dev/null")


def test_a_pixel_format_has_four_letters() -> None:
    assert fourcc("YUYV") == 0x56595559  # V4L2_PIX_FMT_YUYV
    with raises_errno(errno.EINVAL):
        fourcc("RGB")


def _histogram(parent: Parent) -> list[int]:
    """How many bytes of each value are in the frame that comes over the socket."""
    (buf,) = dmabuf.recv(parent.sock)
    counts = [0] * 256
    with buf, buf.read() as view:
        for value in view.tobytes():
            counts[value] += 1
    return counts


@needs_camera
def test_camera_frames_reach_a_driver_and_a_process_uncopied(child: Spawn, node: DrmNode) -> None:
    with Camera(CAMERA) as camera:
        picture = camera.configure(160, 90, "RGB3")
        assert picture.pixelformat == "RGB3"
        buffers = camera.start(4, name="frame")
        assert [buf.home for buf in buffers] == ["imported"] * 4
        assert picture.layout is not None
        assert [buf.layout for buf in buffers] == [picture.layout] * 4
        assert picture.layout.format.name == "BGR888"
        inodes = {buf.ino for buf in buffers}
        with camera.frame(timeout=20) as frame:
            assert frame.buf.ino in inodes
            assert not frame.broken
            with node.import_buffer(frame.buf) as imported, imported.export() as again:
                assert again == frame.buf
            other = child(_histogram)
            dmabuf.send(other.sock, frame.buf)
            counts = other.result()
            with frame.buf.read() as view:
                raw = view.tobytes()
            assert counts == [raw.count(value) for value in range(256)]
            assert len({*raw}) > 1, "a test picture has more than one colour"
        first = frame.sequence
        with camera.frame(timeout=20) as later:
            assert later.sequence > first


@needs_camera
def test_a_stopped_camera_takes_another_picture_and_what_was_sent_lives_on() -> None:
    with Camera(CAMERA) as camera:
        camera.configure(160, 90, "RGB3")
        for wide, code in ((320, "RGB3"), (640, "Y16 -BE")):
            kept = dmabuf.get(camera.start(3)[0].fileno())
            with raises_errno(errno.EBUSY):
                camera.configure(320, 180, "YUYV")
            frame = camera.frame(timeout=60)
            camera.stop()
            frame.done()  # of an earlier start: nothing
            with kept, kept.read() as view:
                assert len(view) == kept.size
            picture = camera.configure(wide, wide * 9 // 16, code)
            assert (picture.pixelformat, picture.width) == (code, wide)
        camera.start(2)
        frame.done()
        with camera.frame(timeout=60) as later:
            assert later.used == camera.picture.size


@needs_camera
@pytest.mark.parametrize("count", [-1, 1 << 32])
def test_a_number_of_buffers_that_is_none_is_einval_and_nothing_is_kept(count: int) -> None:
    with Camera(CAMERA) as camera:
        with raises_errno(errno.EINVAL):
            camera.start(count)
        camera.start(2)


def _failing(monkeypatch: pytest.MonkeyPatch, ioctl: Ioctl[Any], at: int) -> None:
    """The call of this ioctl with that number, counted from 1, fails."""
    system, calls = call.system, itertools.count(1)

    def fails(fd: int, number: int, argument: Any) -> Any:
        if number == ioctl.number and next(calls) == at:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return system(fd, number, argument)

    monkeypatch.setattr(call, "system", fails)


@needs_camera
@pytest.mark.parametrize(
    ("ioctl", "at"),
    [(table.VIDIOC_REQBUFS, 1), (table.VIDIOC_EXPBUF, 1), (table.VIDIOC_EXPBUF, 2), (table.VIDIOC_QBUF, 2), (table.VIDIOC_STREAMON, 1)],
)
def test_a_start_that_fails_leaves_a_camera_that_can_be_started(monkeypatch: pytest.MonkeyPatch, ioctl: Ioctl[Any], at: int) -> None:
    with Camera(CAMERA) as camera:
        with monkeypatch.context() as patch:
            _failing(patch, ioctl, at)
            with raises_errno(errno.ENOMEM):
                camera.start(3)
        assert camera.buffers == []
        camera.configure(160, 90, "RGB3")
        camera.start(2)
        with camera.frame(timeout=60):
            pass


@needs_camera
def test_a_camera_that_does_not_stop_keeps_no_buffer_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with Camera(CAMERA) as camera:
        (first, *_) = list(camera.start(2))
        with monkeypatch.context() as patch:
            _failing(patch, table.VIDIOC_STREAMOFF, 1)
            with raises_errno(errno.ENOMEM):
                camera.stop()
        assert first.closed
        camera.stop()


@needs_camera
def test_a_frame_that_is_being_read_does_not_go_back_to_the_driver() -> None:
    with Camera(CAMERA) as camera:
        camera.configure(160, 90, "RGB3")
        camera.start(3)
        frame = camera.frame(timeout=20)
        with dmabuf.get(frame.buf.fileno()) as same:

            def give_back() -> None:
                with pytest.raises(TimeoutError):
                    frame.done(timeout=0.05)

            with same.read(), Background(give_back) as job:
                job.result()
