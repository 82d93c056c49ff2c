"""The drivers' sides over a kernel that is made up: whose a handle is, and when it ends. On real ones: tests/kernel/test_drivers.py."""

import ctypes
import errno
import os
import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dmabuf import Color, ImageLayout
from dmabuf.core.buffer.backing_kernel import poll_until
from dmabuf.drivers import drm
from dmabuf.drivers.camera import Camera, fourcc, letters
from dmabuf.drivers.drm import DrmNode
from dmabuf.drivers.syncobj import Syncobj
from dmabuf.uapi import call, table
from dmabuf.uapi import structures as s
from tests.support.errnos import raises_errno
from tests.support.waiting import until


class Kernel:
    """A DRM node that imports every buffer as handle 7, and a camera that has no picture. ``closed``: the handles that were ended."""

    def __init__(self) -> None:
        self.made = 0
        self.closed: list[int] = []
        self.importing: Callable[[], None] = lambda: None
        self.formats: list[s.V4l2Format] = []

    def __call__(self, fd: int, number: int, argument: bytes) -> Any:
        layout = table.BY_NUMBER[number].layout
        return layout.pack(self.answer(number, layout.unpack(argument)))

    def answer(self, number: int, value: Any) -> Any:
        if number == table.DRM_VERSION.number:
            ctypes.memmove(value.name, b"soft", 4)
            return value._replace(name_len=4)
        if number == table.PRIME_FD_TO_HANDLE.number:
            self.importing()
            return value._replace(handle=7)
        if number == table.CREATE_DUMB.number:
            self.made += 1
            return value._replace(handle=100 + self.made, pitch=256, size=4096)
        if number == table.SYNCOBJ_CREATE.number:
            return value._replace(handle=9)
        if number in (table.DRM_GEM_CLOSE.number, table.SYNCOBJ_DESTROY.number):
            self.closed.append(value.handle)
            return value
        if number == table.VIDIOC_QUERYCAP.number:
            return value._replace(driver=b"soft", card=b"soft", capabilities=0x04000001)
        if number == table.VIDIOC_G_FMT.number:
            return self.formats[-1]
        assert number == table.VIDIOC_S_FMT.number
        self.formats.append(value)
        return value


class Buffer:
    """As much of a kernel dma-buf, and of its handle, as an import asks for."""

    def kernel(self) -> object:
        return self

    def fileno(self) -> int:
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(call, "system", made)
    monkeypatch.setattr(drm, "handle_of", lambda buf: buf)
    return made


@pytest.fixture
def node(kernel: Kernel) -> Iterator[DrmNode]:
    with DrmNode(os.devnull) as opened:
        yield opened


BUF: Any = Buffer()


def test_a_handle_that_is_let_go_of_while_it_is_imported_again_stays_open(kernel: Kernel, node: DrmNode) -> None:
    first = node.import_buffer(BUF)
    kernel.importing = first.close  # as a finaliser in this thread does, between the kernel's answer and the count
    second = node.import_buffer(BUF)
    assert kernel.closed == []
    second.close()
    assert kernel.closed == [7]


def test_a_thread_that_lets_go_of_a_handle_meanwhile_waits_for_the_count(kernel: Kernel, node: DrmNode) -> None:
    first = node.import_buffer(BUF)
    other = threading.Thread(target=first.close)

    def importing() -> None:
        other.start()
        until(lambda: bool(node._ended))  # it has let go, and can't go on

    kernel.importing = importing
    second = node.import_buffer(BUF)
    other.join()
    assert kernel.closed == []
    second.close()
    assert kernel.closed == [7]


def test_a_handle_is_let_go_of_when_making_another_fails(kernel: Kernel, node: DrmNode) -> None:
    first = node.import_buffer(BUF)

    def importing() -> None:
        first.close()
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    kernel.importing = importing
    with raises_errno(errno.ENOMEM):
        node.import_buffer(BUF)
    assert kernel.closed == [7]


def test_a_fence_of_vgems_is_asked_for_of_no_other_driver(kernel: Kernel, node: DrmNode) -> None:
    with node.import_buffer(BUF) as imported, raises_errno(errno.ENOTTY) as caught:
        imported.add_fence()  # the kernel that is made up fails at a number that it does not know
    assert "a node of soft" in str(caught.value)


MAKE: dict[str, Callable[[DrmNode], Any]] = {
    "imported": lambda node: node.import_buffer(BUF),
    "dumb": lambda node: node.create_dumb(64, 16),
    "syncobj": Syncobj,
}


@pytest.mark.parametrize("kind", MAKE)
def test_a_forked_child_ends_nothing_of_its_parents(kernel: Kernel, node: DrmNode, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    parent = os.getpid()
    inherited = MAKE[kind](node)
    with monkeypatch.context() as forked:  # all that a fork changes for it
        forked.setattr(os, "getpid", lambda: parent + 1)
        inherited.close()
        assert kernel.closed == []
        with MAKE[kind](node) as own:
            number = own.handle
        assert kernel.closed == ([] if kind == "imported" else [number])  # a handle that the parent has too ends with the parent's


@pytest.mark.parametrize("timeout", [1e18, float("inf")])
def test_a_timeout_without_an_end_is_taken(kernel: Kernel, node: DrmNode, monkeypatch: pytest.MonkeyPatch, timeout: float) -> None:
    with Syncobj(node) as one:
        asked: list[s.SyncobjWaitOld] = []

        def answer(_: int, number: int, value: Any) -> Any:
            asked.append(table.SYNCOBJ_WAIT_OLD.layout.unpack(value))
            return value

        with monkeypatch.context() as patch:
            patch.setattr(call, "system", answer)
            assert one.wait(timeout=timeout) > 1e9
    assert 1 << 60 < asked[0].timeout_nsec < 1 << 63


# ---- pixel formats ----


@pytest.mark.parametrize(
    ("code", "number"),
    # V4L2_PIX_FMT_YUYV, _Y16, _Y16_BE, _XRGB555X of include/uapi/linux/videodev2.h.
    [("YUYV", 0x56595559), ("Y16 ", 0x20363159), ("Y16 -BE", 0xA0363159), ("XR15-BE", 0xB5315258)],
)
def test_a_pixel_format_is_a_number_and_letters(code: str, number: int) -> None:
    assert fourcc(code) == number
    assert letters(number) == code


@pytest.mark.parametrize("code", ["", "RGB", "RGB33", "RGB-BE", "-BE", "RGß3"])
def test_a_pixel_format_of_other_than_four_letters_is_einval(code: str) -> None:
    with raises_errno(errno.EINVAL):
        fourcc(code)


def test_a_pixel_format_that_is_no_text_is_told_by_its_bytes() -> None:
    assert letters(0x7F0041FF) == "\\xffA\x00\x7f"


def test_a_camera_in_a_big_endian_format_says_so(kernel: Kernel) -> None:
    kernel.formats.append(s.V4l2Format(1, 640, 480, fourcc("Y16 -BE"), bytesperline=1280, sizeimage=614400))
    with Camera(os.devnull) as camera:
        assert camera.picture.pixelformat == "Y16 -BE"
        assert camera.configure(320, 240, "XR15-BE").pixelformat == "XR15-BE"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            s.V4l2Format(1, 640, 480, fourcc("NV12"), 1, 768, 768 * 720, colorspace=3),
            ImageLayout.linear("NV12", 640, 480, stride=768, color=Color.from_v4l2(3)),
        ),
        (
            s.V4l2Format(1, 640, 480, fourcc("BGR3"), 4, 1920, 1 << 20, colorspace=8, quantization=2),
            ImageLayout.linear("RGB888", 640, 480, stride=1920, color=Color.from_v4l2(8, quantization=2, rgb=True)),
        ),
        (s.V4l2Format(1, 640, 480, fourcc("GREY"), 1, 640, 640 * 480), ImageLayout.linear("R8", 640, 480, stride=640)),
        (s.V4l2Format(1, 640, 480, fourcc("MJPG"), 1, 0, 1 << 20), None),
        (s.V4l2Format(1, 640, 480, fourcc("Y16 -BE"), 1, 1280, 1 << 20), None),
        (s.V4l2Format(1, 640, 480, fourcc("YUYV"), 5, 1280, 1 << 20), None),
        (s.V4l2Format(1, 640, 480, fourcc("YUYV"), 1, 1279, 1 << 20), None),
        (s.V4l2Format(1, 640, 480, fourcc("YUYV"), 1, 1280, 1280 * 480 - 1), None),
        (s.V4l2Format(1, 0, 0, fourcc("YUYV"), 1, 1280, 1280 * 480), None),
    ],
)
def test_a_camera_says_its_layout_if_there_is_one(kernel: Kernel, told: s.V4l2Format, expected: ImageLayout | None) -> None:
    kernel.formats.append(told)
    with Camera(os.devnull) as camera:
        assert camera.picture.layout == expected


# ---- waiting for the kernel ----


@pytest.mark.parametrize("end", [-1, 0, 1])
def test_a_descriptor_that_somebody_else_closed_ends_a_wait_with_ebadf(end: int) -> None:
    fd = os.eventfd(0)
    os.close(fd)
    with raises_errno(errno.EBADF) as caught:
        poll_until(fd, select.POLLIN, end, "a buffer")
    assert "closed by somebody else" in str(caught.value)


def test_what_is_wrong_with_a_descriptor_ends_a_wait() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert poll_until(writer, select.POLLIN, -1, "a pipe") == select.POLLERR
    os.close(writer)


def test_a_wait_that_is_over_before_it_begins_asks_once() -> None:
    fd = os.eventfd(0)
    assert [poll_until(fd, select.POLLIN, end, "an eventfd") for end in (0, 1)] == [0, 0]
    os.eventfd_write(fd, 1)
    assert [poll_until(fd, select.POLLIN, end, "an eventfd") for end in (-1, 0, 1)] == [select.POLLIN] * 3
    os.close(fd)
