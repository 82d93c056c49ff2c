"""The numbers and structures of ioctls (include/uapi/asm-generic/ioctl.h).

A number has the ioctl's own number in bits 0–7, a letter in 8–15, the size of the argument in 16–29, and the direction in 30–31. x86-64 and
arm64 have the same numbers and layouts, little-endian, with structures without hidden padding.
"""

from __future__ import annotations

import errno
import struct
from typing import Final, Generic, TypeVar

from dmabuf.errors import fail

NONE: Final = 0
W: Final = 1  # the user writes, the kernel reads
R: Final = 2
WR: Final = 3

T = TypeVar("T")


def number(direction: int, letter: str, nr: int, size: int) -> int:
    """Return the number of an ioctl. Raise ValueError if a part doesn't fit into its bits."""
    if not (0 <= direction < 4 and 0 <= nr < 256 and 0 <= size < 1 << 14 and len(letter) == 1):
        raise ValueError(f"no ioctl has direction {direction}, letter {letter!r}, number {nr} and size {size}")
    return direction << 30 | size << 16 | ord(letter) << 8 | nr


def parts(ioctl: int) -> tuple[int, str, int, int]:
    """Return (direction, letter, nr, size) of a number."""
    return ioctl >> 30 & 3, chr(ioctl >> 8 & 0xFF), ioctl & 0xFF, ioctl >> 16 & 0x3FFF


class Layout(Generic[T]):
    """A C structure: a NamedTuple and its bytes."""

    def __init__(self, kind: type[T], form: str) -> None:
        self.kind, self.struct = kind, struct.Struct("=" + form)
        self.fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
        self.size = self.struct.size

    def pack(self, value: T) -> bytes:
        """Return the bytes of a value. A field that doesn't fit is EINVAL."""
        try:
            return self.struct.pack(*value)  # type: ignore[misc]
        except struct.error as e:
            raise fail(errno.EINVAL, "ioctl", self.kind.__name__, "give each field a value that its type holds", what=str(e)) from None

    def unpack(self, data: bytes | bytearray | memoryview, offset: int = 0) -> T:
        """Return the value of some bytes. Too few bytes are EINVAL."""
        try:
            return self.kind(*self.struct.unpack_from(data, offset))
        except struct.error as e:
            raise fail(errno.EINVAL, "ioctl", self.kind.__name__, f"pass {self.size} bytes", what=str(e)) from None


class Ioctl(Generic[T]):
    """One ioctl: its name in the kernel's headers, its number, and its structure."""

    def __init__(self, name: str, direction: int, letter: str, nr: int, layout: Layout[T], size: int | None = None) -> None:
        self.name, self.layout = name, layout
        self.number = number(direction, letter, nr, layout.size if size is None else size)

    def __repr__(self) -> str:
        return f"<{self.name} {self.number:#010x}>"
