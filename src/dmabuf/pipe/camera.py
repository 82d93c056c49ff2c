"""``CameraSource``: frames of a V4L2 camera, copied out of the driver's buffers, so that a slow stage never keeps the camera waiting."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from dmabuf.drivers.camera import Camera, Frame
from dmabuf.errors import DmaBufTimeout
from dmabuf.pipe import pictures
from dmabuf.pipe.line import WAIT_S
from dmabuf.pipe.plan import Spec
from dmabuf.pipe.words import refused

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

# V4L2's names of formats, and FFmpeg's.
_PACKED: Final = {"RGB3": "rgb24", "BGR3": "bgr24", "GREY": "gray", "YUYV": "yuyv422", "UYVY": "uyvy422"}
_COMPRESSED: Final = {"MJPG": "mjpeg", "JPEG": "mjpeg"}
_DRIVER_BUFFERS: Final = 4


class CameraSource:
    """A camera, in its present format, or as ``size=`` and ``pixelformat=`` ask."""

    def __init__(self, spec: Spec, size: tuple[int, int] | None, limit: int | None) -> None:
        self._limit, self._camera = limit, Camera(spec.target)
        try:
            picture = self._camera.picture
            asked = spec.own.get("pixelformat", picture.pixelformat)
            if size is not None or asked != picture.pixelformat:
                picture = self._camera.configure(*(size or (picture.width, picture.height)), asked)
            self._picture, name = picture, picture.pixelformat
            if name not in _PACKED and name not in _COMPRESSED:
                known = ", ".join((*_PACKED, *_COMPRESSED))
                raise refused(f"camera:{spec.target}", f"its frames are {name}", f"ask for another format: pixelformat= one of {known}")
            self._packed = _PACKED.get(name)
            self._decoder: Any = None
            if self._packed is None:
                self._decoder = pictures.av.CodecContext.create(_COMPRESSED[name], "r")
                self._decoder.thread_count = 1  # more would each keep a frame back
            own = self._packed if self._packed in pictures.FORMATS else "rgb24"
            self.kind = pictures.kind_of(
                picture.width, picture.height, spec.own.get("format", own or "rgb24"), None, limit, f"camera:{spec.target}"
            )
        except BaseException:
            self._camera.close()
            raise

    def items(self, skip: int) -> Iterator[Any]:
        """Yield frames of the driver, and None where none came for a while."""
        self._camera.start(_DRIVER_BUFFERS)
        left = itertools.count() if self._limit is None else iter(range(max(0, self._limit - skip)))
        for _ in left:
            frame = None
            while frame is None:
                try:
                    frame = self._camera.frame(WAIT_S)
                except DmaBufTimeout:
                    yield None
            with frame:
                if frame.broken:
                    continue
                if self._decoder is None:
                    yield frame
                else:
                    yield from self._decoded(frame)

    def _decoded(self, frame: Frame) -> Iterator[Any]:
        """Yield the picture of a compressed frame; none if it is broken."""
        with frame.buf.read() as view:
            data = bytes(view[: frame.used])
        with contextlib.suppress(pictures.av.FFmpegError):
            yield from self._decoder.decode(pictures.av.Packet(data))

    def put(self, item: Any, array: Array) -> None:
        """Copy a frame out of the driver's buffer, or out of the decoder's."""
        if self._decoder is not None:
            pictures.put(item, array, self.kind)
            return
        picture = self._picture
        with item.buf.read() as view:
            data = pictures.np.frombuffer(memoryview(view), pictures.np.uint8)
            rows = data[: picture.pitch * picture.height].reshape(picture.height, picture.pitch)
            self._copy(rows, array)
            del rows, data

    def _copy(self, rows: Array, array: Array) -> None:
        assert self._packed is not None
        if self._packed == self.kind.format:
            target = array.reshape(-1).view(pictures.np.uint8).reshape(self._picture.height, -1)
            target[:] = rows[:, : target.shape[1]]
            return
        frame = pictures.av.VideoFrame(self._picture.width, self._picture.height, self._packed)
        plane = frame.planes[0]
        target = pictures.rows_of(plane)
        width = min(rows.shape[1], plane.line_size)
        target[:, :width] = rows[:, :width]
        pictures.put(frame, array, self.kind)

    def close(self) -> None:
        """Stop the camera."""
        self._camera.close()
