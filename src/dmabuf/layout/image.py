"""``ImageLayout``: which pixels the bytes of one buffer, or of several, are.

A picture has a pixel format, given by its DRM fourcc (``drm_fourcc.h``), and a modifier, which says how the pixels are arranged; 0 is
linear, rows of pixels one after the other. Its memory planes say where the bytes are: in which buffer, at which offset, with how many bytes
from one row to the next. A decoder's picture may have more columns and rows than anybody should see: ``coded_width`` and ``coded_height``
count all, and ``width``, ``height``, ``crop_x`` and ``crop_y`` are the visible part.

For a linear picture of a format that :class:`~dmabuf.PixelFormat` knows, the constructor checks that the rows are within their planes.
Other formats and modifiers are carried along as they are.

A layout is a value: frozen, equal to others with the same fields, and it survives pickling and :meth:`~ImageLayout.pack`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar, Final

from dmabuf.layout import checks, packing
from dmabuf.layout.arrays import ArraySpec, Views, arrays, bytes_of
from dmabuf.layout.color import Color
from dmabuf.layout.formats import PixelFormat, known, text_of

if TYPE_CHECKING:
    import numpy as np

LINEAR: Final = 0  # DRM_FORMAT_MOD_LINEAR
MAX_PLANES: Final = 4  # of a framebuffer (drm_mode_fb_cmd2), and of V4L2's and FFmpeg's frames for the kernel
MAX_SIDE: Final = (1 << 31) - 1
_U32: Final = (1 << 32) - 1
_U64: Final = (1 << 64) - 1
# fourcc, zero, modifier, width, height, coded width and height, crop, color, how many planes
_IMAGE: Final = struct.Struct("<IIQ6I4BI")
_PLANE: Final = struct.Struct("<IIQQ")  # buffer, stride, offset, size


@dataclass(frozen=True, slots=True)
class Plane:
    """Where one memory plane of a picture is.

    ``buffer``: in which of the picture's buffers, from 0. ``offset``: its first byte. ``stride``: bytes from the start of one row to the
    start of the next. ``size``: all bytes of the plane.

    Raises:
        InvalidError: A number is out of bounds (EINVAL).
    """

    buffer: int
    offset: int
    stride: int
    size: int

    def __post_init__(self) -> None:
        end = checks.END - 1
        bounds = (("buffer", 0, MAX_PLANES - 1), ("offset", 0, end), ("stride", 1, _U32), ("size", 1, end))
        for name, least, most in bounds:
            object.__setattr__(self, name, checks.number("plane", name, getattr(self, name), least, most))
        if self.end > end:
            raise checks.invalid("plane", f"offset {self.offset} + size {self.size} is above {end}", "pass an end that fits into 63 bits")

    @property
    def end(self) -> int:
        """The offset of the first byte behind the plane."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """The layout of a picture.

    ``fourcc``: the pixel format, as in ``drm_fourcc.h``. ``width``, ``height``: what is visible, in pixels. ``memory_planes``: where the
    bytes are. ``modifier``: how they are arranged, 0 for rows. ``coded_width``, ``coded_height``: all pixels there are; 0 means up to the
    end of the visible part. ``crop_x``, ``crop_y``: the first visible pixel. ``color``: how numbers become colors.

    Raises:
        InvalidError: A number is out of bounds, the visible part is not within the coded one, or a buffer's index is left out (EINVAL).
    """

    VERSION: ClassVar[int] = 1

    fourcc: int
    width: int
    height: int
    memory_planes: tuple[Plane, ...]
    _: KW_ONLY
    modifier: int = LINEAR
    coded_width: int = 0
    coded_height: int = 0
    crop_x: int = 0
    crop_y: int = 0
    color: Color = field(default_factory=Color)

    def __post_init__(self) -> None:
        self._set("fourcc", 1, _U32)
        self._set("modifier", 0, _U64)
        for side, crop in (("width", "crop_x"), ("height", "crop_y")):
            self._set(side, 1, MAX_SIDE)
            self._set(crop, 0, MAX_SIDE - 1)
            self._set(f"coded_{side}", 0, MAX_SIDE)
            end, coded = getattr(self, crop) + getattr(self, side), getattr(self, f"coded_{side}")
            if coded == 0:
                object.__setattr__(self, f"coded_{side}", checks.number("picture", f"coded_{side}", end, 1, MAX_SIDE))
            elif end > coded:
                what = f"{crop} + {side} is {end}, and coded_{side} is {coded}"
                raise checks.invalid("picture", what, f"pass a coded_{side} of at least {end}")
        if not isinstance(self.color, Color):
            raise TypeError(f"layout: picture: color is {self.color!r}; pass a dmabuf.Color")
        self._check_planes()

        self._check_rows()

    def _set(self, name: str, least: int, most: int) -> None:
        object.__setattr__(self, name, checks.number("picture", name, getattr(self, name), least, most))

    def _check_planes(self) -> None:
        planes = tuple(self.memory_planes)
        object.__setattr__(self, "memory_planes", planes)
        if not all(isinstance(plane, Plane) for plane in planes):
            raise TypeError(f"layout: picture: memory_planes is {planes!r}; pass objects of dmabuf.Plane")
        if not 1 <= len(planes) <= MAX_PLANES:
            raise checks.invalid("picture", f"it has {len(planes)} planes", f"pass 1 to {MAX_PLANES}")
        used = {plane.buffer for plane in planes}
        if used != set(range(len(used))):
            listed = ", ".join(map(str, sorted(used)))
            raise checks.invalid("picture", f"its planes are in the buffers {listed}", "number the buffers from 0, without a gap")

    def _check_rows(self) -> None:
        shape = known(self.fourcc) if self.is_linear else None
        if shape is None:
            return
        if len(self.memory_planes) != len(shape.planes):
            what = f"{shape.name} has {len(shape.planes)} planes, not {len(self.memory_planes)}"
            raise checks.invalid("picture", what, "pass each plane, also if they are in one buffer")
        for index, (plane, part) in enumerate(zip(self.memory_planes, shape.planes, strict=True)):
            row, rows = part.row_bytes(self.coded_width), part.rows(self.coded_height)
            if plane.stride < row and rows > 1:
                what = f"a row of plane {index} has {row} bytes, and its stride is {plane.stride}"
                raise checks.invalid("picture", what, f"pass a stride of at least {row}")
            least = (rows - 1) * plane.stride + row
            if plane.size < least:
                what = f"plane {index} has {least} bytes of pixels, and its size is {plane.size}"
                raise checks.invalid("picture", what, f"pass a size of at least {least}")

    def __str__(self) -> str:
        shape = known(self.fourcc)
        text = f"{shape.name if shape else text_of(self.fourcc)} {self.width}×{self.height}"
        text += "" if self.is_linear else f", modifier {self.modifier:#x}"
        return text + (f", in {len(self.sizes)} buffers" if len(self.sizes) > 1 else "")

    @classmethod
    def linear(
        cls,
        format: PixelFormat | str | int,
        width: int,
        height: int,
        *,
        stride: int | Sequence[int] | None = None,
        align: int = 64,
        apart: bool = False,
        offset: int = 0,
        coded_width: int = 0,
        coded_height: int = 0,
        crop_x: int = 0,
        crop_y: int = 0,
        color: Color | None = None,
    ) -> ImageLayout:
        """Return the layout of a picture in rows, with its planes one behind the other.

        Args:
            format: A format, its DRM name, or its DRM fourcc. Names of others: ``PixelFormat.from_ffmpeg("bgr24")``.
            width: The visible columns.
            height: The visible rows.
            stride: The bytes from one row to the next: of the first plane, from which that of the others follows as in V4L2, or of each
                plane. None: the least multiple of ``align``.
            align: What the strides of all planes are multiples of, unless ``stride`` is given. 64 suits most devices; 1 means no padding.
            apart: Each plane in a buffer of its own, instead of all in one.
            offset: The first byte of the first plane, or of each plane if they are ``apart``.
            coded_width: All columns; 0 means up to the end of the visible ones.
            coded_height: All rows; likewise.
            crop_x: The first visible column.
            crop_y: The first visible row.
            color: How numbers become colors; None means unknown.

        Raises:
            LookupError: The format is not in the table.
            InvalidError: A number is out of bounds, or the stride is too small for a row (EINVAL).
        """
        shape = PixelFormat.of(format)
        columns = coded_width or crop_x + width
        rows = coded_height or crop_y + height
        for name, value in (("width", width), ("height", height), ("coded_width", columns), ("coded_height", rows)):
            checks.number("picture", name, value, 1, MAX_SIDE)
        planes, at = [], offset
        for index, (part, step) in enumerate(zip(shape.planes, _strides(shape, columns, stride, align), strict=True)):
            size = step * part.rows(rows)
            planes.append(Plane(index if apart else 0, at, step, size))
            at += 0 if apart else size
        crop = {"crop_x": crop_x, "crop_y": crop_y}
        coded = {"coded_width": coded_width, "coded_height": coded_height}
        return cls(shape.fourcc, width, height, tuple(planes), color=color or Color(), **crop, **coded)

    @property
    def format(self) -> PixelFormat:
        """The pixel format. Raises LookupError if the table doesn't have it."""
        return PixelFormat.of(self.fourcc)

    @property
    def is_linear(self) -> bool:
        """Whether the pixels are in rows, so that the CPU finds them."""
        return self.modifier == LINEAR

    @property
    def sizes(self) -> tuple[int, ...]:
        """The least bytes that each of the picture's buffers has to have."""
        ends: dict[int, int] = {}
        for plane in self.memory_planes:
            ends[plane.buffer] = max(ends.get(plane.buffer, 0), plane.end)
        return tuple(ends[index] for index in range(len(ends)))

    def check(self, sizes: int | Iterable[int]) -> None:
        """Return if the picture is within buffers of these sizes.

        Args:
            sizes: The bytes of each buffer, or of the only one.

        Raises:
            InvalidError: A buffer is too small, or there are more or fewer than the picture has (EINVAL).
        """
        checks.holds("picture", self.sizes, (sizes,) if isinstance(sizes, int) else tuple(sizes))

    def specs(self) -> tuple[ArraySpec, ...]:
        """Return what :meth:`planes` makes, without numpy: the visible part of each plane.

        Raises:
            LookupError: The format is not in the table.
            InvalidError: The picture is not linear, or the visible part begins in the middle of a sample (EINVAL).
        """
        if not self.is_linear:
            what = f"its pixels are arranged as the modifier {self.modifier:#x} says, not in rows"
            raise checks.invalid("picture", what, "let the device that made it convert it, or ask for a linear one")
        found = []
        for plane, part in zip(self.memory_planes, self.format.planes, strict=True):
            wide = part.across * part.block
            if self.crop_x % wide or self.crop_y % part.down:
                what = f"the visible part begins at ({self.crop_x}, {self.crop_y}), in the middle of {wide}×{part.down} pixels"
                raise checks.invalid("picture", what, "choose a crop that all planes can have")
            offset = plane.offset + self.crop_y // part.down * plane.stride + self.crop_x // wide * part.block_bytes
            shape = [part.rows(self.height), -(-part.samples(self.width) // part.cell)]
            strides = [plane.stride, part.itemsize * part.channels]
            if part.channels > 1:
                shape.append(part.channels)
                strides.append(part.itemsize)
            found.append(ArraySpec(plane.buffer, f"<{part.dtype}", tuple(shape), tuple(strides), offset))
        return tuple(found)

    def planes(self, views: Views) -> tuple[np.ndarray[Any, Any], ...]:
        """Return an array for each plane, of its visible part, over the memory as it is.

        The shape is (rows, columns), or (rows, columns, numbers of a pixel). Chroma that is subsampled has fewer rows and columns. An
        array can be written if its view can. docs/formats.md says what each format has.

        Args:
            views: The bytes of the buffer, as a ``read()`` or ``write()`` block gives them; of several buffers, a list or tuple.

        Raises:
            ExtraMissingError: numpy is not installed.
            LookupError: The format is not in the table.
            InvalidError: A view is too small, the picture is not linear, or the visible part begins in the middle of a sample (EINVAL).
        """
        specs, bare = self.specs(), bytes_of(views)
        self.check([view.nbytes for view in bare])
        return arrays(specs, bare)

    def pack(self) -> bytes:
        """Return the layout as at most 256 bytes, which :meth:`unpack` reads in any process."""
        color = self.color
        body = _IMAGE.pack(
            self.fourcc, 0, self.modifier, self.width, self.height, self.coded_width, self.coded_height, self.crop_x, self.crop_y,
            color.primaries, color.transfer, color.matrix, color.range, len(self.memory_planes),
        )  # fmt: skip
        body += b"".join(_PLANE.pack(plane.buffer, plane.stride, plane.offset, plane.size) for plane in self.memory_planes)
        return packing.packed(packing.Kind.IMAGE, self.VERSION, body)

    @classmethod
    def unpack(cls, data: bytes) -> ImageLayout:
        """Return the layout whose bytes these are. Any other bytes are refused.

        Raises:
            InvalidError: They are not the bytes of a picture's layout, or its numbers don't fit together (EINVAL).
        """
        body = packing.body_of(data, packing.Kind.IMAGE, cls.VERSION)
        if len(body) < _IMAGE.size:
            raise packing.refused("they end too early for a picture")
        fourcc, zero, modifier, width, height, coded_width, coded_height, crop_x, crop_y, *color, count = _IMAGE.unpack_from(body)
        if zero or count > MAX_PLANES or len(body) != _IMAGE.size + count * _PLANE.size:
            raise packing.refused("their length and their number of planes differ")
        if not coded_width or not coded_height:
            raise packing.refused("the coded size is zero")
        planes = [_PLANE.unpack_from(body, _IMAGE.size + index * _PLANE.size) for index in range(count)]
        return cls(
            fourcc,
            width,
            height,
            tuple(Plane(buffer, offset, stride, size) for buffer, stride, offset, size in planes),
            modifier=modifier,
            coded_width=coded_width,
            coded_height=coded_height,
            crop_x=crop_x,
            crop_y=crop_y,
            color=Color(*color),
        )


def _strides(shape: PixelFormat, columns: int, stride: int | Sequence[int] | None, align: int) -> list[int]:
    """Return the stride of each plane."""
    if isinstance(stride, Sequence):
        if len(stride) != len(shape.planes):
            what = f"{shape.name} has {len(shape.planes)} planes, and there are {len(stride)} strides"
            raise checks.invalid("picture", what, "pass one stride for each plane, or that of the first")
        return [checks.number("plane", "stride", one, 1, _U32) for one in stride]
    # The bytes that each plane has for a pixel of the picture, of those that the first one has.
    density = [Fraction(part.block_bytes, part.block * part.across) for part in shape.planes]
    ratios = [one / density[0] for one in density]
    if stride is None:
        step = checks.number("picture", "align", align, 1, 1 << 20) * lcm(*(ratio.denominator for ratio in ratios))
        least = max(Fraction(part.row_bytes(columns)) / ratio for part, ratio in zip(shape.planes, ratios, strict=True))
        first = -(-least // step) * step
    else:
        first = checks.number("plane", "stride", stride, 1, _U32)
    return [-(-first * ratio.numerator // ratio.denominator) for ratio in ratios]
