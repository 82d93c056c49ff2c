"""``Camera``: V4L2 capture into kernel dma-bufs (VIDIOC_EXPBUF; videodev2.h).

While the driver fills a buffer, this process is inside a ``write()`` of it. A reader in another process therefore waits for the frame, and
the buffer goes back to the driver only after its readers have ended. V4L2 itself has no fences for that.

    with Camera("/dev/video0") as camera:
        camera.configure(640, 360, "RGB3")
        camera.start(4)
        with camera.frame() as frame:       # waits for a frame; the end of the block gives it back to the driver
            dmabuf.send(sock, frame.buf)

One thread uses a camera at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from dataclasses import dataclass
from typing import Self

from dmabuf._native import Access
from dmabuf.core.access.range import BufferRange
from dmabuf.core.base.clock import monotonic_deadline
from dmabuf.core.base.closing import Closing
from dmabuf.core.buffer.backing_kernel import poll_until
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.get import from_fd
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import finished
from dmabuf.errors import InvalidError, fail
from dmabuf.layout.color import Color
from dmabuf.layout.formats import PixelFormat
from dmabuf.layout.image import ImageLayout
from dmabuf.uapi import call
from dmabuf.uapi import v4l2 as uapi
from dmabuf.uapi.structures import V4l2Buffer, V4l2Format

_BIG_ENDIAN = 1 << 31  # v4l2_fourcc_be, include/uapi/linux/videodev2.h
_FIELDS_APART = (5, 6)  # V4L2_FIELD_SEQ_TB and SEQ_BT: one field behind the other


def fourcc(code: str) -> int:
    """Return the number of a pixel format. ``-BE`` at the end means the big-endian variant.

    Raises:
        InvalidError: The code doesn't have four letters (EINVAL).
    """
    four = code.removesuffix("-BE")
    if len(four) != 4 or not four.isascii():
        remedy = "pass four letters, such as 'YUYV' or 'RGB3', with an optional -BE for big-endian"
        raise fail(errno.EINVAL, "format", repr(code), remedy, what="not a pixel format")
    return int.from_bytes(four.encode(), "little") | (_BIG_ENDIAN if four != code else 0)


def letters(number: int) -> str:
    """Return the letters of a pixel format's number, as :func:`fourcc` takes them."""
    raw = (number & ~_BIG_ENDIAN).to_bytes(4, "little")
    return raw.decode("ascii", "backslashreplace") + ("-BE" if number & _BIG_ENDIAN else "")


@dataclass(frozen=True)
class Picture:
    """The format of frames. ``pixelformat``: four letters. ``pitch``: bytes from line to line. ``size``: bytes of a frame. ``layout``: the
    same as a layout, which the buffers have in every process; None if the format has no DRM code, or its fields are apart.
    """

    width: int
    height: int
    pixelformat: str
    pitch: int
    size: int
    layout: ImageLayout | None = None


def _layout_of(told: V4l2Format) -> ImageLayout | None:
    try:
        shape = PixelFormat.from_v4l2(told.pixelformat)
    except LookupError:
        return None
    if told.field in _FIELDS_APART:
        return None
    rgb = any(part.name == "G" for part in shape.planes[0].components)
    color = Color.from_v4l2(told.colorspace, told.xfer_func, told.ycbcr_enc, told.quantization, rgb=rgb)
    try:
        layout = ImageLayout.linear(shape, told.width, told.height, stride=told.bytesperline, color=color)
    except InvalidError:  # the driver's numbers don't fit together
        return None
    return layout if layout.sizes[0] <= told.sizeimage else None


class Frame:
    """A filled buffer. :meth:`done`, or the end of a ``with`` block, gives it back to the driver.

    ``timestamp_ns``: CLOCK_MONOTONIC if the driver says so. ``used``: the bytes of the picture. ``broken``: whether the driver marks it as
    broken.
    """

    def __init__(self, camera: Camera, told: V4l2Buffer, buf: DmaBuf) -> None:
        self.camera, self.buf, self.index, self.sequence, self.used = camera, buf, told.which, told.sequence, told.bytesused
        self.timestamp_ns = told.tv_sec * 1_000_000_000 + told.tv_usec * 1000
        self.broken = bool(told.flags & uapi.FLAG_ERROR)
        self._held = True

    @property
    def picture(self) -> BufferRange:
        """The part of the buffer that the driver filled."""
        return self.buf.export_range(0, self.used or self.buf.size)

    def done(self, timeout: float | None = None) -> None:
        """Give the buffer back to the driver after its readers have ended. Calling it twice has no effect.

        Raises:
            DmaBufTimeout: The readers did not end in time (ETIMEDOUT). The frame stays with this process.
        """
        if self._held and self.camera._streaming and not self.buf.closed:  # closed: it is of an earlier start
            self.camera._queue(self.index, timeout)
        self._held = False

    def __enter__(self) -> Self:
        return self

    @finished
    def __exit__(self, *_: object) -> None:
        self.done()


class Camera(Closing):
    """An open camera. ``card`` and ``driver``: its names. ``domain``: the domain of its buffers.

    Raises:
        NotFoundError, NotPermittedError, BusyError: The node can't be opened (ENOENT, EACCES, EBUSY).
        DmaBufError: It is not a V4L2 device (ENOTTY).
        NoDeviceError: It doesn't capture single-planar video by streaming (ENODEV).
    """

    def __init__(self, path: str = "/dev/video0", *, domain: Domain | None = None) -> None:
        remedies = {
            errno.ENOENT: "load its driver, or: modprobe vivid",
            errno.EACCES: "join the group of the node: `dmabuf doctor` names it",
        }
        self.path, self.domain, self._pid = path, domain or Domain.default(), os.getpid()
        self._fd = call.open_node(path, "open", remedies)
        told = uapi.query_capability(self._fd.number)
        self.driver, self.card = (raw.partition(b"\0")[0].decode(errors="replace") for raw in (told.driver, told.card))
        able = told.device_caps if told.capabilities & uapi.CAP_DEVICE_CAPS else told.capabilities
        if not (able & uapi.CAP_VIDEO_CAPTURE and able & uapi.CAP_STREAMING):
            self._fd.close()
            raise fail(errno.ENODEV, "open", path, "open the node that captures", what="it doesn't capture video by streaming")
        self.buffers: list[DmaBuf] = []
        self._accesses: dict[int, Access] = {}
        self._streaming = self._requested = False

    def fileno(self) -> int:
        """Return the descriptor, which the camera keeps. It is readable when there is a frame.

        Raises:
            ClosedError: The object is closed (EBADF).
        """
        if self._fd.number < 0:
            raise fail(errno.EBADF, "fileno", f"camera {self.path}", "open it again", what="the camera is closed")
        return self._fd.fileno()

    def _check(self, operation: str) -> int:
        return self.fileno()

    @property
    def picture(self) -> Picture:
        """The present format of frames."""
        told = uapi.get_format(self.fileno())
        return Picture(told.width, told.height, letters(told.pixelformat), told.bytesperline, told.sizeimage, _layout_of(told))

    def configure(self, width: int, height: int, pixelformat: str) -> Picture:
        """Ask for a format. Return the nearest one that the driver has.

        Raises:
            BusyError: The camera was started (EBUSY).
            InvalidError: The driver refuses the format (EINVAL).
        """
        fd = self.fileno()
        uapi.set_format(fd, uapi.with_picture(uapi.get_format(fd), width, height, fourcc(pixelformat)))
        return self.picture

    def start(self, count: int = 4, *, name: str | None = None) -> list[DmaBuf]:
        """Have the driver make and fill buffers. The camera owns them and closes them.

        Args:
            count: How many to ask for.
            name: If given, their names are name-0, name-1, ….

        Raises:
            BusyError: The camera was started, or another process streams from it (EBUSY).
            DmaBufError: There is no memory, or no descriptor is left (ENOMEM, EMFILE).
        """
        fd = self.fileno()
        if self.buffers:
            raise fail(errno.EBUSY, "start", f"camera {self.path}", "stop it first", what="it is started already")
        layout = self.picture.layout
        try:
            self._requested = True
            for index in range(uapi.request_buffers(fd, count)):
                buf = from_fd(uapi.export_buffer(fd, index), self.domain)
                self.buffers.append(buf)
                if layout is not None and layout.sizes[0] <= buf.size:
                    buf.describe(layout)
                if name is not None:
                    buf.name = f"{name}-{index}"
                self._queue(index, None)
            uapi.stream(fd, True)
            self._streaming = True
        except BaseException:
            self.stop()
            raise
        return self.buffers

    def _queue(self, index: int, timeout: float | None) -> None:
        """Give a buffer to the driver, inside a ``write()`` of this process."""
        access = self.buffers[index].write(timeout)
        access.__enter__()
        try:
            uapi.queue(self.fileno(), V4l2Buffer(index, uapi.CAPTURE, memory=uapi.MMAP))
        except BaseException:
            access.__exit__(None, None, None)
            raise
        self._accesses[index] = access

    def frame(self, timeout: float | None = None) -> Frame:
        """Wait for the next frame and return it.

        Args:
            timeout: Seconds to wait; None waits forever.

        Raises:
            DmaBufTimeout: No frame came in time (ETIMEDOUT).
            InvalidError: The camera was not started (EINVAL).
            DmaBufError: The driver lost the frame (EIO).
        """
        fd, until = self.fileno(), monotonic_deadline(timeout, "frame", f"camera {self.path}")
        if not self._streaming:
            raise fail(errno.EINVAL, "frame", f"camera {self.path}", "start it first", what="it was not started")
        if not poll_until(fd, select.POLLIN, until, f"camera {self.path}"):
            what = f"no frame came in {timeout} s: the driver has none to fill, or no signal"
            raise fail(errno.ETIMEDOUT, "frame", f"camera {self.path}", "give frames back with done()", what=what)
        told = uapi.dequeue(fd)
        self._accesses.pop(told.which).__exit__(None, None, None)
        return Frame(self, told, self.buffers[told.which])

    def stop(self) -> None:
        """Take the buffers back from the driver and close them. Calling it twice has no effect.

        A process that has a handle of a buffer keeps its memory. In a forked child nothing is stopped, because the camera is the parent's.
        """
        fd = self._fd.number if os.getpid() == self._pid else -1
        streaming, self._streaming = self._streaming, False
        requested, self._requested = self._requested, False
        try:
            if streaming and fd >= 0:
                uapi.stream(fd, False)
        finally:
            self._let_go()
        if requested and fd >= 0:
            # Without this the driver would refuse another format. A driver that can't free buffers in use (before v4.20) refuses later.
            with contextlib.suppress(OSError):
                uapi.request_buffers(fd, 0)

    def _let_go(self) -> None:
        while self._accesses:
            self._accesses.popitem()[1].__exit__(None, None, None)
        while self.buffers:
            self.buffers.pop().close()

    def close(self) -> None:
        """Stop the camera and close it. Closing twice has no effect."""
        try:
            self.stop()
        finally:
            self._fd.close()
