"""Pictures between PyAV and arrays. A picture in an array has no padding.

The formats are FFmpeg's. ``gray`` of a video in YUV is its luma, as it is. ``yuv420p`` is one array of 3/2 of the height, as OpenCV and
PyAV have it: the luma, and below it both chroma planes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from dmabuf.errors import missing_extra
from dmabuf.pipe.kind import Kind
from dmabuf.pipe.words import refused

try:
    import av
    import numpy as np
except ImportError as e:
    raise missing_extra("video", e.name or "av") from None

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

FORMATS: Final = {
    "gray": ("uint8", 1),
    "gray16le": ("uint16", 1),
    "rgb24": ("uint8", 3),
    "bgr24": ("uint8", 3),
    "rgba": ("uint8", 4),
    "bgra": ("uint8", 4),
    "yuv420p": ("uint8", 1),
}
__all__ = ["FORMATS", "av", "check_picture", "frame_of", "kind_of", "np", "put", "rows_of", "size_of"]

_LUMA_FIRST: Final = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "nv21", "gray")
_GRAY: Final = 128


def kind_of(width: int, height: int, format: str, rate: str | None, total: int | None, what: str) -> Kind:
    """Return the kind of pictures of a format.

    Raises:
        InvalidError: The format is unknown, or has no such size (EINVAL).
    """
    if format not in FORMATS:
        raise refused(what, f"no format {format}", f"use one of: {', '.join(FORMATS)}")
    dtype, channels = FORMATS[format]
    if format == "yuv420p":
        if width % 2 or height % 2:
            raise refused(what, f"yuv420p of {width}x{height}, an odd size", "use format=gray or rgb24")
        return Kind((height * 3 // 2, width), dtype, format, rate, total)
    return Kind((height, width, channels) if channels > 1 else (height, width), dtype, format, rate, total)


def size_of(kind: Kind) -> tuple[int, int]:
    """Return the width and height of a picture."""
    return kind.shape[1], kind.shape[0] * 2 // 3 if kind.format == "yuv420p" else kind.shape[0]


def _planes(kind: Kind, array: Array) -> Iterator[Array]:
    """Yield the planes of a picture in an array, each as rows of bytes."""
    data = array.reshape(-1).view(np.uint8)
    width, height = size_of(kind)
    if kind.format != "yuv420p":
        yield data.reshape(height, -1)
        return
    at = width * height
    yield data[:at].reshape(height, width)
    for _ in range(2):
        yield data[at : at + width * height // 4].reshape(height // 2, width // 2)
        at += width * height // 4


def rows_of(plane: Any) -> Array:
    """Return a plane in a codec's memory as rows of bytes, with the padding at their end."""
    return np.frombuffer(plane, np.uint8)[: plane.line_size * plane.height].reshape(plane.height, plane.line_size)


def put(frame: Any, array: Array, kind: Kind) -> None:
    """Copy a frame of PyAV into an array, in the array's format and size."""
    width, height = size_of(kind)
    luma = kind.format == "gray" and frame.format.name in _LUMA_FIRST
    if (frame.width, frame.height) != (width, height) or not (luma or frame.format.name == kind.format):
        source = frame.format.name if luma else kind.format
        frame = frame.reformat(width=width, height=height, format=source)
    for plane, target in zip(frame.planes, _planes(kind, array), strict=False):
        target[:] = rows_of(plane)[:, : target.shape[1]]


def frame_of(array: Array, kind: Kind, *, even: bool) -> Any:
    """Return a frame of PyAV with a picture. ``even``: of an even size, without an odd last row or column, and gray as YUV."""
    width, height = size_of(kind)
    if even:
        width, height = width & ~1, height & ~1
    assert kind.format is not None
    gray = even and kind.format == "gray"
    frame = av.VideoFrame(width, height, "yuv420p" if gray else kind.format)
    sources = _planes(kind, array)
    for plane in frame.planes:
        rows, source = rows_of(plane), next(sources, None)
        if source is None:
            rows[:] = _GRAY
        else:
            used = min(source.shape[1], source.shape[1] * width // size_of(kind)[0])
            rows[: plane.height, :used] = source[: plane.height, :used]
    return frame


def check_picture(kind: Kind, what: str) -> None:
    """Raise ``InvalidError`` if such arrays are no pictures."""
    if kind.format is None:
        remedy = "give it uint8 arrays of (height, width), (height, width, 3) or (height, width, 4)"
        raise refused(what, f"frames of {kind.words} are no pictures", remedy)
