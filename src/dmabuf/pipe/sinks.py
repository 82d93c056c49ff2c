"""Sinks: where the frames of a pipeline go.

A sink has ``begin(kind)``, called once before the first frame, ``put(array, meta)``, and ``close()``, which completes what it wrote.
"""

from __future__ import annotations

import contextlib
import os
import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from dmabuf.pipe.kind import Kind
from dmabuf.pipe.plan import Spec, number
from dmabuf.pipe.sources import rate_of
from dmabuf.pipe.words import refused

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_CODECS: Final = (("libx264", {"preset": "ultrafast", "crf": "30"}), ("mpeg4", {"qscale": "5"}))
_MAX_RATE: Final = 65535  # MPEG-4 part 2 stores the time base in 16 bits
_IMAGE_CODECS: Final = {
    ".png": ("png", "rgb24"),
    ".jpg": ("mjpeg", "yuvj420p"),
    ".jpeg": ("mjpeg", "yuvj420p"),
    ".bmp": ("bmp", "bgr24"),
    ".tif": ("tiff", "rgb24"),
    ".tiff": ("tiff", "rgb24"),
}
_GRAY_AS_IT_IS: Final = (".png", ".tif", ".tiff")
_CHOOSE: Final = "choose an ending as .mp4 or .mkv"


class Head(Protocol):
    """What a sink may know of a frame beside its array."""

    number: int
    born_ns: int
    meta: dict[str, Any]


class Sink(Protocol):
    """Where frames go. ``copies``: whether it copies each frame into memory of its own."""

    copies: bool

    def begin(self, kind: Kind) -> None:
        """Prepare for frames of a kind."""

    def put(self, array: Array, head: Head) -> None:
        """Take a frame."""

    def close(self) -> None:
        """Complete what was written."""


def opened(spec: Spec) -> Sink:
    """Return the sink of a stage.

    Raises:
        InvalidError: It can't be used (EINVAL).
        ExtraMissingError: What it needs is not installed.
    """
    made: Sink = _KINDS[spec.kind](spec)
    return made


class Null:
    """Takes frames, and does nothing with them."""

    copies = False

    def __init__(self, spec: Spec) -> None:
        pass

    def begin(self, kind: Kind) -> None:
        pass

    def put(self, array: Array, head: Head) -> None:
        pass

    def close(self) -> None:
        pass


class Show:
    """Prints a line of numbers once a second, or with each frame (``every=0``)."""

    copies = False

    def __init__(self, spec: Spec) -> None:
        text = spec.own.get("every", "1")
        try:
            self._every_ns = int(float(text) * 1e9)
        except ValueError:
            self._every_ns = -1
        if self._every_ns < 0:
            raise refused(f"show every={text}", "it is not a number of seconds", "write every=SECONDS; 0 shows each frame")
        self._last_ns = self._last_frames = self._frames = 0

    def begin(self, kind: Kind) -> None:
        self._what = kind.words

    def put(self, array: Array, head: Head) -> None:
        self._frames += 1
        now = time.monotonic_ns()
        if self._last_ns and now - self._last_ns < self._every_ns:
            return
        rate = f", {(self._frames - self._last_frames) / (now - self._last_ns) * 1e9:.1f} frames/s" if self._last_ns else ""
        values = "".join(f", {key} {value}" for key, value in head.meta.items())
        late = (now - head.born_ns) / 1e6
        mean = f"mean {array.mean():.2f}, from {array.min()} to {array.max()}"
        print(f"frame {head.number}{rate}: {self._what}, {late:.1f} ms old, {mean}{values}", flush=True)
        self._last_ns, self._last_frames = now, self._frames

    def close(self) -> None:
        pass


class RawFile:
    """Writes the bytes of frames one after the other."""

    copies = True

    def __init__(self, spec: Spec) -> None:
        assert spec.part is not None
        self._file = open(spec.part, "wb")

    def begin(self, kind: Kind) -> None:
        pass

    def put(self, array: Array, head: Head) -> None:
        self._file.write(array.data)

    def close(self) -> None:
        self._file.close()


class Images:
    """Writes each frame into a file of its own, which gets its name when it is complete."""

    copies = True

    def __init__(self, spec: Spec) -> None:
        from dmabuf.pipe import pictures

        self._pictures, self._target = pictures, Path(spec.target)
        self._codec, self._format = _IMAGE_CODECS[self._target.suffix.lower()]
        text = spec.own.get("start", "1")
        self._first = number(text, f"{spec.target} start={text}", low=0)
        self._part = self._target.with_name(f".{os.getpid()}.part{self._target.suffix}")
        if not os.access(self._target.parent, os.W_OK | os.X_OK):
            raise refused(spec.target, "no files can be made there", "name a directory that you may write")

    def begin(self, kind: Kind) -> None:
        self._pictures.check_picture(kind, str(self._target))
        if kind.format == "gray" and self._target.suffix.lower() in _GRAY_AS_IT_IS:
            self._format = "gray"
        self._kind = kind
        codec: Any = self._pictures.av.CodecContext.create(self._codec, "w")
        codec.width, codec.height = self._pictures.size_of(kind)
        codec.pix_fmt, codec.time_base = self._format, Fraction(1, 25)
        self._context = codec

    def put(self, array: Array, head: Head) -> None:
        frame = self._pictures.frame_of(array, self._kind, even=False)
        if frame.format.name != self._format:
            frame = frame.reformat(format=self._format)
        frame.pts = head.number
        data = b"".join(map(bytes, self._context.encode(frame)))
        self._part.write_bytes(data)
        self._part.replace(self._target.with_name(self._target.name % (head.number - 1 + self._first)))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)


class VideoFile:
    """A video without sound, at the rate of the source, or ``rate=``. It is of an even size: an odd last row or column is cut off."""

    copies = True

    def __init__(self, spec: Spec) -> None:
        from dmabuf.pipe import pictures

        assert spec.part is not None
        self._pictures, self._spec, self._rate, self._n = pictures, spec, rate_of(spec), 0
        self._stream: Any = None
        av = pictures.av
        try:
            self._container: Any = av.open(spec.part, "w")
        except (ValueError, av.FFmpegError) as e:
            raise refused(spec.target, f"FFmpeg can't write it ({e})", _CHOOSE) from None
        try:
            self.codec, self._options = self._chosen_codec()
        except BaseException:
            self._container.close()
            raise

    def _chosen_codec(self) -> tuple[str, dict[str, str]]:
        av = self._pictures.av
        asked = self._spec.own.get("codec")
        if asked is not None:
            if asked not in av.codecs_available:
                raise refused(f"{self._spec.target} codec={asked}", "FFmpeg has no such codec", "use one as libx264, mpeg4 or ffv1")
            return asked, {}
        for codec, options in _CODECS:
            if codec in av.codecs_available and codec in self._container.supported_codecs:
                return codec, dict(options)
        if (codec := self._container.default_video_codec) not in ("", "none"):
            return codec, {}
        raise refused(self._spec.target, f"a {Path(self._spec.target).suffix} file can't contain a video", _CHOOSE)

    def begin(self, kind: Kind) -> None:
        target, av = self._spec.target, self._pictures.av
        self._pictures.check_picture(kind, target)
        width, height = self._pictures.size_of(kind)
        if width < 2 or height < 2:
            raise refused(target, f"a video of {width} x {height} pixels can't be encoded", "give it pictures of 2 x 2 or more")
        rate = Fraction(self._rate or kind.rate or 25)
        if rate.numerator > _MAX_RATE:
            rate = rate.limit_denominator(1) or Fraction(25)
        try:
            stream = self._container.add_stream(self.codec, rate=rate, options=self._options)
            stream.width, stream.height, stream.pix_fmt = width & ~1, height & ~1, "yuv420p"
            stream.codec_context.open()
        except av.FFmpegError as e:
            raise refused(target, f"{self.codec} can't encode this video ({e.strerror})", _CHOOSE) from None
        self._stream, self._kind = stream, kind

    def put(self, array: Array, head: Head) -> None:
        frame = self._pictures.frame_of(array, self._kind, even=True)
        if frame.format.name != "yuv420p":
            frame = frame.reformat(format="yuv420p")
        frame.pts = self._n
        self._n += 1
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        try:
            if self._n:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()


_KINDS: Final[dict[str, Any]] = {"null": Null, "show": Show, "raw": RawFile, "images": Images, "video": VideoFile}
