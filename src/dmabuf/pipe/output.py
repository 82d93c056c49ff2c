"""``Output``: a stage's end of the stream into which it puts frames. It is made when the first frame's shape is known."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from dmabuf.errors import DmaBufTimeout
from dmabuf.pipe.board import Counters
from dmabuf.pipe.kind import Kind
from dmabuf.pipe.line import WAIT_S, Line
from dmabuf.pipe.plan import Spec
from dmabuf.pipe.words import refused
from dmabuf.stream.stream import META_MOST, Stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from dmabuf._native import Frame, FrameMaking

    Array = np.ndarray[Any, np.dtype[Any]]


class Head:
    """What travels with a frame: its ``number`` since the source, from 1; ``order``: its place among the frames of a stage with workers;
    ``born_ns``: when the source had it (CLOCK_MONOTONIC); ``meta``: the values of stages, by their names; ``ino``: the buffer that it was
    written into.
    """

    __slots__ = ("born_ns", "ino", "meta", "number", "order")

    def __init__(self, number: int, order: int, born_ns: int, meta: dict[str, Any], ino: int = 0) -> None:
        self.number, self.order, self.born_ns, self.meta, self.ino = number, order, born_ns, meta, ino

    def packed(self, ino: int) -> bytes:
        """Return it as a frame's metadata."""
        data = json.dumps([self.number, self.order, self.born_ns, ino, self.meta], separators=(",", ":")).encode()
        if len(data) > META_MOST:
            what = f"its values have {len(data)} bytes as JSON"
            raise refused(f"frame {self.number}", what, f"return less than {META_MOST} bytes of values")
        return data

    @classmethod
    def of(cls, data: bytes) -> Head:
        """Return what a frame's metadata says."""
        number, order, born_ns, ino, meta = json.loads(data)
        return cls(number, order, born_ns, meta, ino)


class Output:
    """The stream of a stage's process. ``kind``: what its frames are, None before the first."""

    def __init__(self, line: Line, spec: Spec, counters: Counters) -> None:
        self.kind: Kind | None = None
        self._line, self._spec, self._counters = line, spec, counters
        self._stream: Stream | None = None
        self._inos: tuple[int, ...] = ()

    def go_on_in(self, stream: Stream, kind: Kind) -> None:
        """Have a stream: a new one, or that of the process before."""
        self._stream, self.kind = stream, kind
        self._inos = tuple(os.fstat(buf.fileno()).st_ino for buf in stream.bufs)

    def open(self, kind: Kind) -> None:
        """Have a stream for frames of a kind. All who read it have their places when this returns."""
        if self.kind is not None:
            if (kind.shape, kind.dtype) != (self.kind.shape, self.kind.dtype):
                what = f"its frames were {self.kind.words}, and now one is {kind.words}"
                raise refused(self._spec.target, what, "make frames of one shape and type")
            self._wait_for_readers()
            return
        spec = self._spec
        assert spec.buffers is not None
        stream = Stream.create(
            shape=kind.shape,
            dtype=kind.dtype,
            buffers=spec.buffers,
            when_full="drop" if spec.when_full == "drop" else "wait",
            meta_bytes=META_MOST,
        )
        self.go_on_in(stream, kind)
        self._line.tell("stream", stream, kind=kind.to_json())
        self._wait_for_readers()

    def _wait_for_readers(self) -> None:
        while not self._line.going:
            self._line.look(None)

    @contextmanager
    def _made(self) -> Iterator[Frame]:
        """Yield a frame to write. It is published at the end of the block, and discarded if that raises."""
        assert self._stream is not None
        making = self._stream.produce(WAIT_S)
        frame = making.attempt()
        if frame is None:
            frame = self._waited(making)
        try:
            yield frame
        except BaseException:
            making.__exit__(*sys.exc_info())
            raise
        making.__exit__(None, None, None)

    def _waited(self, making: FrameMaking) -> Frame:
        """Return the frame once there is a buffer for it."""
        began, frame = time.monotonic_ns(), None
        while frame is None:
            try:
                frame = making.__enter__()
            except DmaBufTimeout:
                self._line.look()  # whether the parent is there at all
        self._counters["blocks"] += 1
        self._counters["block_ns"] += time.monotonic_ns() - began
        return frame

    def put(self, head: Head, fill: Callable[[Array], bool], *, dies: bool = False) -> bool:
        """Make a frame, which ``fill`` writes; it returns False for none. ``dies``: kill this process before it is published."""
        with self._made() as frame:
            array = frame.array()
            goes_on = fill(array)
            del array
            if dies:
                die()
            if goes_on:
                frame.meta = head.packed(self._inos[frame.slot])
            else:
                frame.discard()
        return goes_on

    def close(self) -> None:
        """End producing."""
        if self._stream is not None:
            self._stream.close()


def die() -> None:
    """End this process as ``kill -9`` does, for ``kill_at=``."""
    os.kill(os.getpid(), signal.SIGKILL)


__all__: Final = ["Head", "Output", "die"]
