"""Sources: where the frames of a pipeline come from.

A source has the ``kind`` of its frames, and ``items(skip)``, which yields what ``put`` makes a frame of; None is a turn without a frame, at
which the stage looks whether it shall end. ``skip``: frames that a process before it has begun, which are left out.
"""

from __future__ import annotations

import glob
import inspect
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final, Protocol

from dmabuf.pipe.function import loaded
from dmabuf.pipe.kind import Kind, guessed
from dmabuf.pipe.plan import Spec, number, sized
from dmabuf.pipe.words import refused

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_RATE: Final = "25"
_DEFAULT_FORMAT: Final = "rgb24"


class Source(Protocol):
    """Where frames come from."""

    kind: Kind

    def items(self, skip: int) -> Iterator[Any]:
        """Yield what ``put`` makes a frame of."""

    def put(self, item: Any, array: Array) -> None:
        """Write a frame."""

    def close(self) -> None:
        """Give everything back."""


def opened(spec: Spec) -> Source:
    """Return the source of a stage.

    Raises:
        InvalidError: It can't be used (EINVAL).
        ExtraMissingError: What it needs is not installed.
    """
    made: Source = _KINDS[spec.kind](spec)
    return made


def _size(spec: Spec) -> tuple[int, int] | None:
    text = spec.own.get("size")
    return None if text is None else sized(text, f"{spec.target} size={text}")


def _count(spec: Spec, key: str) -> int | None:
    text = spec.own.get(key)
    return None if text is None else number(text, f"{spec.target} {key}={text}", low=1)


def rate_of(spec: Spec) -> str | None:
    """Return the option ``rate=`` of a stage as a fraction; None if it has none."""
    text = spec.own.get("rate")
    if text is None:
        return None
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise refused(f"{spec.target} rate={text}", "it is no number of frames per second", "write a number or a fraction, as 30000/1001")
    return str(rate)


def _fewer(total: int | None, limit: int | None) -> int | None:
    return limit if total is None else total if limit is None else min(total, limit)


class Video:
    """A file that FFmpeg can decode, or images with a common name, in the size of the first."""

    def __init__(self, spec: Spec) -> None:
        from dmabuf.pipe import pictures

        self._pictures = pictures
        self._spec, self._limit = spec, _count(spec, "frames")
        self.paths = [spec.target] if spec.kind == "video" or os.path.isfile(spec.target) else sorted(glob.glob(spec.target))
        if not self.paths:
            raise refused(spec.target, "there is no such file", "quote the pattern, and check it with ls")
        first, rate, total = self._first(self.paths[0])
        if spec.kind == "images":
            rate, total = rate_of(spec) or _RATE, len(self.paths)
        width, height = _size(spec) or (first.width, first.height)
        total = _fewer(total, self._limit)
        self.kind = pictures.kind_of(width, height, spec.own.get("format", _DEFAULT_FORMAT), rate, total, spec.target)

    def _container(self, path: str) -> Any:
        av = self._pictures.av
        try:
            container = av.open(path)
        except (av.FFmpegError, OSError) as e:
            raise refused(path, f"it is not a video that FFmpeg can open: {e.strerror}", "name a video or an image") from None
        if not container.streams.video:
            kinds = ", ".join(sorted({str(s.type) for s in container.streams})) or "none"
            container.close()
            raise refused(path, f"it has no video stream (streams: {kinds})", "name a video or an image")
        return container

    def _first(self, path: str) -> tuple[Any, str, int | None]:
        with self._container(path) as container:
            stream = container.streams.video[0]
            try:
                first = next(container.decode(stream), None)
            except self._pictures.av.FFmpegError as e:
                raise refused(path, f"its first frame can't be decoded: {e.strerror}", "name a whole file") from None
            if first is None:
                raise refused(path, "its video stream has no frames", "name a video with frames")
            rate = Fraction(stream.average_rate or stream.guessed_rate or _RATE)
            total = stream.frames or None
            if total is None and stream.duration and stream.time_base:
                total = max(1, int(stream.duration * stream.time_base * rate))
            return first, str(rate), total

    def items(self, skip: int) -> Iterator[Any]:
        return itertools.islice(self._decoded(), skip, self._limit)

    def _decoded(self) -> Iterator[Any]:
        for path in self.paths:
            with self._container(path) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                frames = container.decode(stream)
                try:
                    yield from frames if self._spec.kind == "video" else itertools.islice(frames, 1)
                except self._pictures.av.FFmpegError as e:
                    raise refused(path, f"decoding stopped: {e.strerror}", "name a whole file") from None

    def put(self, item: Any, array: Array) -> None:
        self._pictures.put(item, array, self.kind)

    def close(self) -> None:
        pass


class Raw:
    """A file of frames without anything between them."""

    def __init__(self, spec: Spec) -> None:
        from dmabuf.pipe import pictures

        for key in ("width", "height"):
            if key not in spec.own:
                raise refused(f"raw:{spec.target}", f"nothing says its {key}", f"write raw:{spec.target},width=W,height=H,format=rgb24")
        width, height = _count(spec, "width"), _count(spec, "height")
        assert width is not None
        assert height is not None
        self._limit = _count(spec, "frames")
        self.kind = pictures.kind_of(
            width, height, spec.own.get("format", _DEFAULT_FORMAT), rate_of(spec) or _RATE, None, f"raw:{spec.target}"
        )
        try:
            self._file = open(spec.target, "rb")
        except OSError as e:
            raise refused(f"raw:{spec.target}", str(e.strerror), "name a file that you may read") from None
        self._target = spec.target

    def items(self, skip: int) -> Iterator[Any]:
        import numpy as np

        memory = np.empty(self.kind.shape, self.kind.dtype)
        data = memory.data.cast("B")
        if skip:
            self._file.seek(skip * len(data))
        for _ in itertools.count() if self._limit is None else range(max(0, self._limit - skip)):
            got = self._file.readinto(data)
            if got == 0:
                return
            if got < len(data):
                what = f"it ends {len(data) - got} bytes before the end of a frame"
                raise refused(f"raw:{self._target}", what, f"check width, height and format: a frame has {len(data)} bytes")
            yield memory

    def put(self, item: Any, array: Array) -> None:
        array[...] = item

    def close(self) -> None:
        self._file.close()


class Test:
    """Frames that are computed: the pixel at (y, x) of frame n, from 0, is x + 2 y + 3 n, and 85 more in each further channel."""

    __test__ = False  # no test of pytest

    def __init__(self, spec: Spec) -> None:
        import numpy as np

        width, height = _size(spec) or (320, 240)
        dtypes = {"gray": ("uint8", ()), "rgb24": ("uint8", (3,)), "gray16le": ("uint16", ())}
        format = spec.own.get("format", _DEFAULT_FORMAT)
        if format not in dtypes:
            raise refused(f"test format={format}", "it has no such frames", f"use one of: {', '.join(dtypes)}")
        dtype, channels = dtypes[format]
        self._count = _count(spec, "count")
        self.kind = Kind((height, width, *channels), dtype, format, rate_of(spec) or _RATE, self._count)
        rows, columns = np.mgrid[0:height, 0:width].astype(dtype)
        self._first = rows * 2 + columns
        if channels:
            self._first = (self._first[..., None] + np.arange(3, dtype=dtype) * 85).astype(dtype)

    def items(self, skip: int) -> Iterator[Any]:
        return iter(range(skip, self._count)) if self._count is not None else itertools.count(skip)

    def put(self, item: Any, array: Array) -> None:
        import numpy as np

        np.add(self._first, np.array(item * 3 % (1 << 8 * array.itemsize), array.dtype), out=array)

    def close(self) -> None:
        pass


class Generated:
    """What a function, or a class, of the user yields: arrays of one shape and type."""

    def __init__(self, spec: Spec) -> None:
        made = loaded(spec.target, spec.own)
        found = made.object if made.is_instance else made.object(**made.options)
        if not hasattr(found, "__iter__"):
            raise refused(spec.target, "it yields no frames", "let a source be a generator function, or return an iterable of arrays")
        self._found, self._items = found, iter(found)
        first = next(self._items, None)
        if first is None:
            raise refused(spec.target, "it has no frames", "yield at least one array")
        self._items = itertools.chain((first,), self._items)
        first = _array(first, spec.target)
        self.kind = Kind(first.shape, str(first.dtype), guessed(first.shape, str(first.dtype)), getattr(found, "rate", None) or _RATE)
        self._target = spec.target

    def items(self, skip: int) -> Iterator[Any]:
        return itertools.islice(self._items, skip, None)

    def put(self, item: Any, array: Array) -> None:
        item = _array(item, self._target)
        if (item.shape, item.dtype) != (array.shape, array.dtype):
            what = f"it yielded {array.shape} {array.dtype} first, and now {item.shape} {item.dtype}"
            raise refused(self._target, what, "yield arrays of one shape and type")
        array[...] = item

    def close(self) -> None:
        if inspect.isgenerator(self._found):
            self._found.close()


def _array(item: Any, target: str) -> Array:
    import numpy as np

    if not isinstance(item, np.ndarray) or item.dtype.hasobject or not item.nbytes:
        raise refused(target, f"it yielded {type(item).__name__}, no array of numbers", "yield arrays of NumPy")
    return item


def _camera(spec: Spec) -> Source:
    from dmabuf.pipe.camera import CameraSource

    return CameraSource(spec, _size(spec), _count(spec, "frames"))


_KINDS: Final[dict[str, Any]] = {
    "video": Video,
    "images": Video,
    "raw": Raw,
    "test": Test,
    "camera": _camera,
    "function": Generated,
}

__all__ = ["Source", "opened", "rate_of"]
