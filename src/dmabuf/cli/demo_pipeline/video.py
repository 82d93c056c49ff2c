"""The work on a video: decode, detect edges, count brightness, encode. Nothing here uses fences or processes.

A frame in memory is a page of header and then three planes without padding, YUV 4:2:0 (luma height x width, two chroma planes of half of
each, rounded up); a filtered frame is the header and one luma plane.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dmabuf._native import View
from dmabuf.cli.demo_pipeline.ring import HEADER_BYTES
from dmabuf.errors import missing_extra

try:
    import av
    import numpy as np
except ImportError as e:
    raise missing_extra("demo", e.name or "av") from None

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Plane = NDArray[np.uint8]

_BAND: Final = 32  # rows at a time: the intermediate results stay in the cache
_CODECS: Final = (("libx264", {"preset": "ultrafast", "crf": "30"}), ("mpeg4", {"qscale": "5"}))
_MAX_RATE: Final = 65535  # MPEG-4 part 2 stores the time base in 16 bits
GREY: Final = 128


class VideoError(Exception):
    """The file can't be used. The text says why."""


@dataclass(frozen=True)
class Clip:
    """A video file. ``frames``: how many it says it has, None if it doesn't say; ``rate``: frames per second."""

    path: Path
    width: int
    height: int
    rate: Fraction
    frames: int | None

    @property
    def pixels(self) -> int:
        """Bytes of a luma plane."""
        return self.width * self.height

    @property
    def frame_bytes(self) -> int:
        """Bytes of the three planes."""
        return self.pixels + 2 * (-(-self.width // 2)) * (-(-self.height // 2))


def probe(path: Path) -> Clip:
    """Return what a file says of itself and the size of its first frame. Raise :class:`VideoError` if it can't be decoded."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        try:
            first = next(container.decode(stream), None)
        except av.FFmpegError as e:
            raise VideoError(f"{path}: its first frame can't be decoded: {e.strerror}") from None
        if first is None:
            raise VideoError(f"{path}: its video stream has no frames")
        if first.width < 2 or first.height < 2:
            raise VideoError(f"{path}: a video of {first.width} x {first.height} pixels can't be encoded; take one of 2 x 2 or more")
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        count = stream.frames or None
        if count is None and stream.duration and stream.time_base:
            count = max(1, int(stream.duration * stream.time_base * rate))
        return Clip(path, first.width, first.height, rate, count)


def _opened(path: Path) -> Any:
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as e:
        raise VideoError(f"{path}: it is not a video that FFmpeg can open: {e.strerror}") from None
    if not container.streams.video:
        kinds = ", ".join(sorted({str(s.type) for s in container.streams})) or "none"
        container.close()
        raise VideoError(f"{path}: it has no video stream (streams: {kinds})")
    return container


def decoded(clip: Clip, limit: int | None) -> Iterator[av.VideoFrame]:
    """Yield the frames of a clip as YUV 4:2:0, all in the size of the first. Raise :class:`VideoError` if one can't be decoded."""
    with _opened(clip.path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            for frame in islice(container.decode(stream), limit):
                yield frame.reformat(width=clip.width, height=clip.height, format="yuv420p")
        except av.FFmpegError as e:
            raise VideoError(f"{clip.path}: decoding stopped: {e.strerror}") from None


def luma(view: View | memoryview | bytearray, clip: Clip) -> Plane:
    """Return the luma plane in a buffer's view, an array on the same memory, which must be gone before the access ends."""
    return np.frombuffer(memoryview(view), np.uint8, clip.pixels, HEADER_BYTES).reshape(clip.height, clip.width)


def _rows(plane: Any) -> Plane:
    """Return a plane in a codec's memory, with the padding at the end of its rows."""
    return np.frombuffer(plane, np.uint8)[: plane.line_size * plane.height].reshape(plane.height, plane.line_size)


def put_frame(frame: av.VideoFrame, view: View | memoryview | bytearray, clip: Clip, rows: int | None = None) -> None:
    """Copy a frame from the decoder's memory into a buffer. ``rows``: copy only so many of the luma plane."""
    at = HEADER_BYTES
    for plane in frame.planes:
        source = _rows(plane)
        target = np.frombuffer(memoryview(view), np.uint8, plane.width * plane.height, at).reshape(plane.height, plane.width)
        if rows is not None:
            target[:rows] = source[:rows, : plane.width]
            return
        target[:] = source[:, : plane.width]
        at += plane.width * plane.height


def edges(source: Plane, target: Plane, rows: int | None = None) -> None:
    """Compute Sobel's edges: |horizontal| + |vertical| gradient, at most 255, 0 at the border. ``rows``: stop after about so many."""
    height, width = source.shape
    target[0] = target[-1] = 0
    target[:, 0] = target[:, -1] = 0
    if width < 3:
        return
    for top in range(1, min(height - 1, rows or height), _BAND):
        bottom = min(top + _BAND, height - 1)
        a = source[top - 1 : bottom + 1].astype(np.int16)
        smooth = a[:-2] + a[2:]
        smooth += a[1:-1] << 1
        across = np.abs(smooth[:, 2:] - smooth[:, :-2])
        step = a[2:] - a[:-2]
        down = step[:, :-2] + step[:, 2:]
        down += step[:, 1:-1] << 1
        across += np.abs(down, out=down)
        np.minimum(across, 255, out=across)
        target[top:bottom, 1:-1] = across


def histogram(source: Plane) -> bytes:
    """Return how many pixels have each of the 256 brightnesses, as 256 little-endian 64-bit numbers."""
    total = np.zeros(256, np.int64)
    for top in range(0, source.shape[0], _BAND):
        total += np.bincount(source[top : top + _BAND].ravel(), minlength=256)
    return total.astype("<i8").tobytes()


class Encoder:
    """A file of filtered frames, at the clip's rate, without sound.

    Raises:
        VideoError: There is no such format.
        av.FFmpegError: FFmpeg can't write the file.
    """

    def __init__(self, path: Path, clip: Clip) -> None:
        self.clip = clip
        try:
            self._container = av.open(str(path), "w")
        except (ValueError, av.FFmpegError) as e:
            raise VideoError(f"FFmpeg can't write it ({e}); choose an ending as .mp4 or .mkv") from None
        codec = ""
        try:
            codec, options = self._codec(path)
            rate = clip.rate if clip.rate.numerator <= _MAX_RATE else clip.rate.limit_denominator(1) or Fraction(25)
            stream: Any = self._container.add_stream(codec, rate=rate, options=options)
            # 4:2:0 needs even sizes, so an odd last row or column is cut off.
            stream.width, stream.height, stream.pix_fmt = clip.width & ~1, clip.height & ~1, "yuv420p"
            stream.codec_context.open()
        except av.FFmpegError as e:
            self._container.close()
            raise VideoError(f"{codec} can't encode this video ({e.strerror}); choose an ending as .mp4 or .mkv") from None
        except BaseException:
            self._container.close()
            raise
        self._stream, self.codec, self._n = stream, codec, 0

    def _codec(self, path: Path) -> tuple[str, dict[str, str]]:
        for codec, options in _CODECS:
            if codec in av.codecs_available and codec in self._container.supported_codecs:
                return codec, dict(options)
        if (codec := self._container.default_video_codec) not in ("", "none"):
            return codec, {}
        raise VideoError(f"a {path.suffix} file can't contain a video; choose an ending as .mp4 or .mkv")

    def put(self, source: Plane) -> None:
        """Copy a luma plane into the encoder's memory and encode it, with gray chroma."""
        frame = av.VideoFrame(self._stream.width, self._stream.height, "yuv420p")
        for i, plane in enumerate(frame.planes):
            target = _rows(plane)
            if i:
                target[:] = GREY
            else:
                target[:, : plane.width] = source[: plane.height, : plane.width]
        frame.pts = self._n
        self._n += 1
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write the rest and the index, so that the file is playable."""
        try:
            if self._n:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()


class Digests:
    """The digests by which the two runs are compared: SHA-256 of all filtered frames, and of all histograms."""

    def __init__(self) -> None:
        self.edges, self.histograms = hashlib.sha256(), hashlib.sha256()

    @staticmethod
    def joined(edges: bytes, histograms: bytes) -> str:
        """Return one checksum of both."""
        return hashlib.sha256(edges + histograms).hexdigest()


def check(clip: Clip, limit: int | None, output: Path, digests: Digests) -> Iterator[None]:
    """Do the same work in one process, in private memory. Yield after each frame."""
    memory, result = bytearray(HEADER_BYTES + clip.frame_bytes), bytearray(HEADER_BYTES + clip.pixels)
    encoder = Encoder(output, clip)
    try:
        for frame in decoded(clip, limit):
            put_frame(frame, memory, clip)
            digests.histograms.update(histogram(luma(memory, clip)))
            edges(luma(memory, clip), luma(result, clip))
            digests.edges.update(luma(result, clip).data)
            encoder.put(luma(result, clip))
            yield
    finally:
        encoder.close()
