"""``Kind``: what the frames between two stages are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from dmabuf.layout.tensor import TensorLayout

_GUESSED: Final = {("uint8", None): "gray", ("uint8", 3): "rgb24", ("uint8", 4): "rgba", ("uint16", None): "gray16le"}


@dataclass(frozen=True)
class Kind:
    """The shape and type of a frame's array.

    ``format``: what FFmpeg calls the picture, None for an array that is none. ``rate``: frames per second of the source, as a fraction.
    ``total``: how many frames it says it has.
    """

    shape: tuple[int, ...]
    dtype: str
    format: str | None = None
    rate: str | None = None
    total: int | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of a frame."""
        return TensorLayout(self.dtype, self.shape).sizes[0]

    @property
    def words(self) -> str:
        """The shape and type, for people."""
        return f"{'x'.join(map(str, self.shape))} {self.dtype}"

    def changed(self, shape: tuple[int, ...], dtype: str) -> Kind:
        """Return the kind of what a stage makes of such frames. The format stays with the shape, and is guessed for another one."""
        if (shape, dtype) == (self.shape, self.dtype):
            return self
        return replace(self, shape=shape, dtype=dtype, format=guessed(shape, dtype))

    def to_json(self) -> dict[str, Any]:
        """Return it for a message."""
        return asdict(self)

    @classmethod
    def of_json(cls, given: dict[str, Any]) -> Kind:
        """Return the kind that a message says."""
        return cls(**given | {"shape": tuple(given["shape"])})


def guessed(shape: tuple[int, ...], dtype: str) -> str | None:
    """Return the format of a picture with such an array: gray, rgb24, rgba or gray16le; None if there is none."""
    if len(shape) not in (2, 3):
        return None
    return _GUESSED.get((dtype, shape[2] if len(shape) == 3 else None))
