"""How numbers become colors: the code points of ITU-T H.273, which FFmpeg and PyAV use too. ``UNKNOWN`` is a value like the others."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from dmabuf.layout.checks import invalid


class Primaries(IntEnum):
    """The colors that red, green and blue are."""

    BT709 = 1  # sRGB too
    UNKNOWN = 2
    BT470M = 4
    BT470BG = 5  # BT.601 with 625 lines
    SMPTE170M = 6  # BT.601 with 525 lines
    SMPTE240M = 7
    FILM = 8
    BT2020 = 9
    SMPTE428 = 10  # XYZ
    SMPTE431 = 11  # DCI-P3
    SMPTE432 = 12  # Display P3
    EBU3213 = 22


class Transfer(IntEnum):
    """How a number becomes light."""

    BT709 = 1
    UNKNOWN = 2
    GAMMA22 = 4
    GAMMA28 = 5
    SMPTE170M = 6
    SMPTE240M = 7
    LINEAR = 8
    LOG = 9
    LOG_SQRT = 10
    IEC61966_2_4 = 11
    BT1361 = 12
    SRGB = 13
    BT2020_10 = 14
    BT2020_12 = 15
    PQ = 16  # SMPTE ST 2084
    SMPTE428 = 17
    HLG = 18  # ARIB STD-B67


class Matrix(IntEnum):
    """How red, green and blue become luma and chroma."""

    RGB = 0  # there is no luma
    BT709 = 1
    UNKNOWN = 2
    FCC = 4
    BT470BG = 5  # BT.601
    SMPTE170M = 6  # BT.601
    SMPTE240M = 7
    YCGCO = 8
    BT2020 = 9
    BT2020_CONSTANT = 10
    SMPTE2085 = 11
    CHROMA_DERIVED = 12
    CHROMA_DERIVED_CONSTANT = 13
    ICTCP = 14


class Range(IntEnum):
    """Which numbers are black and white. The values are FFmpeg's."""

    UNKNOWN = 0
    LIMITED = 1  # 16 to 235 of 8 bits, "MPEG"
    FULL = 2  # 0 to 255 of 8 bits, "JPEG"


_FIELDS: Final = (("primaries", Primaries), ("transfer", Transfer), ("matrix", Matrix), ("range", Range))


@dataclass(frozen=True, slots=True)
class Color:
    """The color of a picture. Each part may be unknown, and is unless it is given.

    Raises:
        InvalidError: A value that its enumeration doesn't have (EINVAL).
    """

    primaries: Primaries = Primaries.UNKNOWN
    transfer: Transfer = Transfer.UNKNOWN
    matrix: Matrix = Matrix.UNKNOWN
    range: Range = Range.UNKNOWN

    def __post_init__(self) -> None:
        for name, kind in _FIELDS:
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, kind(value))
            except ValueError:
                raise invalid("color", f"{name} is {value!r}", f"pass a {kind.__name__}, or {kind.__name__}.UNKNOWN") from None
