"""The work of the demo: edges and brightness of gray pictures, as functions of a pipeline (docs/pipe.md), and the same in one process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from dmabuf.errors import missing_extra
from dmabuf.pipe import sinks, sources
from dmabuf.pipe.output import Head
from dmabuf.pipe.plan import Spec

try:
    import numpy as np
except ImportError as e:
    raise missing_extra("demo", e.name or "numpy") from None

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Plane = NDArray[np.uint8]

_BAND: Final = 32  # rows at a time: the intermediate results stay in the cache


def edges(frame: Plane, out: Plane) -> None:
    """Compute Sobel's edges: |horizontal| + |vertical| gradient, at most 255, 0 at the border."""
    height, width = frame.shape
    out[0] = out[-1] = 0
    out[:, 0] = out[:, -1] = 0
    if width < 3:
        return
    for top in range(1, height - 1, _BAND):
        bottom = min(top + _BAND, height - 1)
        a = frame[top - 1 : bottom + 1].astype(np.int16)
        smooth = a[:-2] + a[2:]
        smooth += a[1:-1] << 1
        across = np.abs(smooth[:, 2:] - smooth[:, :-2])
        step = a[2:] - a[:-2]
        down = step[:, :-2] + step[:, 2:]
        down += step[:, 1:-1] << 1
        across += np.abs(down, out=down)
        np.minimum(across, 255, out=across)
        out[top:bottom, 1:-1] = across


def brightness(frame: Plane) -> bytes:
    """Return how many pixels have each of the 256 brightnesses, as 256 little-endian 64-bit numbers."""
    total = np.zeros(256, np.int64)
    for top in range(0, frame.shape[0], _BAND):
        total += np.bincount(frame[top : top + _BAND].ravel(), minlength=256)
    return total.astype("<i8").tobytes()


class Histogram:
    """Counts the brightness of each frame. The result is the SHA-256 of all counts."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def __call__(self, frame: Plane) -> None:
        """Count a frame."""
        self._digest.update(brightness(frame))

    def close(self) -> str:
        """Return the digest."""
        return self._digest.hexdigest()


def joined(edges: str, histograms: str) -> str:
    """Return one checksum of both."""
    return hashlib.sha256(bytes.fromhex(edges) + bytes.fromhex(histograms)).hexdigest()


class Single:
    """The same work one step after the other in this process, in private memory, with the file of the encoder in ``part``."""

    def __init__(self, decode: Spec, encode: Spec) -> None:
        self._decode, self._encode = decode, encode
        self._edges, self._histogram = hashlib.sha256(), Histogram()

    def frames(self) -> Iterator[None]:
        """Work on all frames, one at each step."""
        source, sink = sources.opened(self._decode), sinks.opened(self._encode)
        try:
            memory: Any = np.empty(source.kind.shape, np.uint8)
            result = np.empty_like(memory)
            sink.begin(source.kind)
            for n, item in enumerate(source.items(0), 1):
                source.put(item, memory)
                self._histogram(memory)
                edges(memory, result)
                self._edges.update(result.data)
                sink.put(result, Head(n, 0, 0, {}))
                yield
        finally:
            sink.close()
            source.close()

    def checksum(self) -> str:
        """Return the checksum of both results."""
        return joined(self._edges.hexdigest(), self._histogram.close())
