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


# V4L2's numbers (videodev2.h) -> ours; what isn't here is unknown. A default (0) follows from the color space, as the macros there say.
_COLORSPACE: Final = {
    1: (Primaries.SMPTE170M, 1, 1),
    2: (Primaries.SMPTE240M, 4, 8),
    3: (Primaries.BT709, 1, 2),
    4: (Primaries.UNKNOWN, 1, 1),
    5: (Primaries.BT470M, 1, 1),
    6: (Primaries.BT470BG, 1, 1),
    7: (Primaries.BT709, 2, 1),
    8: (Primaries.BT709, 2, 1),
    9: (Primaries.UNKNOWN, 3, 1),
    10: (Primaries.BT2020, 1, 6),
    11: (Primaries.UNKNOWN, 5, 1),
    12: (Primaries.SMPTE431, 6, 2),
}
_JPEG: Final = 7
_XFER_FUNC: Final = {1: Transfer.BT709, 2: Transfer.SRGB, 4: Transfer.SMPTE240M, 5: Transfer.LINEAR, 7: Transfer.PQ}
_YCBCR_ENC: Final = {
    1: Matrix.SMPTE170M,
    2: Matrix.BT709,
    3: Matrix.SMPTE170M,
    4: Matrix.BT709,
    5: Matrix.SMPTE170M,
    6: Matrix.BT2020,
    7: Matrix.BT2020_CONSTANT,
    8: Matrix.SMPTE240M,
}
_QUANTIZATION: Final = {1: Range.FULL, 2: Range.LIMITED}

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

    @classmethod
    def from_v4l2(cls, colorspace: int, xfer_func: int = 0, ycbcr_enc: int = 0, quantization: int = 0, *, rgb: bool = False) -> Color:
        """Return the color that the fields of a ``v4l2_pix_format`` describe. What they leave open, and what H.273 lacks, is unknown.

        Args:
            colorspace: ``V4L2_COLORSPACE_``…; 0 means that the driver doesn't say.
            xfer_func: ``V4L2_XFER_FUNC_``…; 0 means that of the color space.
            ycbcr_enc: ``V4L2_YCBCR_ENC_``…; likewise.
            quantization: ``V4L2_QUANTIZATION_``…; likewise.
            rgb: Whether the pixels are red, green and blue.
        """
        primaries, transfer, matrix = _COLORSPACE.get(colorspace, (Primaries.UNKNOWN, 0, 0))
        default = 0 if colorspace not in _COLORSPACE else 1 if rgb or colorspace == _JPEG else 2
        return cls(
            primaries,
            _XFER_FUNC.get(xfer_func or transfer, Transfer.UNKNOWN),
            Matrix.RGB if rgb else _YCBCR_ENC.get(ycbcr_enc or matrix, Matrix.UNKNOWN),
            _QUANTIZATION.get(quantization or default, Range.UNKNOWN),
        )
