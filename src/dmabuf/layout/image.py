"""``ImageLayout``: which pixels the bytes of one buffer, or of several, are.

A picture has a pixel format, given by its DRM fourcc (``drm_fourcc.h``), and a modifier, which says how the pixels are arranged; 0 is
linear, rows of pixels one after the other. Its memory planes say where the bytes are: in which buffer, at which offset, with how many bytes
from one row to the next. A decoder's picture may have more columns and rows than anybody should see: ``coded_width`` and ``coded_height``
count all, and ``width``, ``height``, ``crop_x`` and ``crop_y`` are the visible part.

A layout is a value: frozen, equal to others with the same fields, and it survives pickling and :meth:`~ImageLayout.pack`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Final

from dmabuf.layout import checks, packing
from dmabuf.layout.color import Color

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
