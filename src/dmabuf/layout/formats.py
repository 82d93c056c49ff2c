"""``PixelFormat``: what one pixel format is, and what others call it.

The kernel's display drivers, its cameras (V4L2), GStreamer, FFmpeg, OpenCV and ROS have different names for the same bytes, and sometimes
the same name for different ones. The names of DRM read from the highest bit of a little-endian number down, and those of most others along
memory: DRM's ``RGB888`` is B, G, R in memory, which V4L2 calls ``BGR3`` and OpenCV ``BGR``. The table (``format_table.py``) is made from
the kernel's headers, and ``docs/formats.md`` shows it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Final, Self

from dmabuf.layout.format_table import ROWS

BIG_ENDIAN: Final = 1 << 31  # DRM_FORMAT_BIG_ENDIAN
_V4L2_PREFIX: Final = "V4L2_PIX_FMT_"
_DRM_PREFIX: Final = "DRM_FORMAT_"


@dataclass(frozen=True, slots=True)
class Component:
    """One number of a pixel, or of a block of pixels: its name, its lowest bit, and how many bits it has.

    ``name``: ``R``, ``G``, ``B``, ``A``, ``Y``, ``Cb``, ``Cr``; ``Y1`` is of the second pixel of a block.
    """

    name: str
    shift: int
    bits: int


@dataclass(frozen=True, slots=True)
class PlaneFormat:
    """The pixels of one plane.

    ``across``, ``down``: how many pixels of the picture one sample stands for, in each direction. ``block``: how many samples are packed
    together, in ``block_bytes`` bytes. ``dtype``, ``channels``: the little-endian numbers that an array has for each pixel: ``u1``, ``u2``,
    ``u4`` or ``f2``, and how many.
    ``components``: where each number is in a block, read as one little-endian number.
    """

    across: int
    down: int
    block: int
    block_bytes: int
    dtype: str
    channels: int
    components: tuple[Component, ...]

    @property
    def itemsize(self) -> int:
        """The bytes of one number of an array."""
        return int(self.dtype[-1])

    @property
    def cell(self) -> int:
        """How many samples one element of an array has: more than one if they are packed across its numbers."""
        return self.itemsize * self.channels * self.block // self.block_bytes

    def samples(self, width: int) -> int:
        """Return how many samples a row of that many pixels has."""
        return -(-width // self.across)

    def rows(self, height: int) -> int:
        """Return how many rows of samples a picture of that many rows has."""
        return -(-height // self.down)

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a row of that many pixels, without padding."""
        return -(-self.samples(width) // self.block) * self.block_bytes


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """One pixel format of the table.

    ``name``: as in ``drm_fourcc.h``, without the prefix. ``fourcc``: its code there. ``planes``: the planes, in their order. The properties
    ``v4l2``, ``gstreamer``, ``ffmpeg``, ``opencv`` and ``ros`` are its names elsewhere; they raise LookupError where it has none.
    """

    name: str
    fourcc: int
    planes: tuple[PlaneFormat, ...]
    names: Mapping[str, tuple[str, ...]] = field(repr=False, compare=False)  # the first is what it is called, the others are accepted too

    @classmethod
    def of(cls, given: PixelFormat | str | int) -> PixelFormat:
        """Return a format from its DRM name (``"NV12"``, ``"DRM_FORMAT_NV12"``) or its DRM fourcc.

        Raises:
            LookupError: The table doesn't have it.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            return _found(by_name(), given.removeprefix(_DRM_PREFIX), "DRM format", given, _elsewhere(given))
        return _found(_by_fourcc(), operator.index(given), "DRM fourcc", text_of(operator.index(given)))  # type: ignore[arg-type]

    @classmethod
    def from_v4l2(cls, given: str | int) -> PixelFormat:
        """Return the format of a ``v4l2_pix_format``: its number, its four characters, or its name with the prefix ``V4L2_PIX_FMT_``.

        The formats for several buffers, as ``V4L2_PIX_FMT_NV12M``, are the same pixels as those for one.

        Raises:
            LookupError: It is not in the table: compressed, tiled, a raw image sensor's, or unknown.
        """
        key = given if isinstance(given, str) else text_of(operator.index(given))
        if not key.startswith(_V4L2_PREFIX):
            key = key.ljust(4)  # "Y16 " is often written without its space
        return _found(_by("v4l2"), key, "V4L2 format", key)

    @classmethod
    def from_gstreamer(cls, given: str) -> PixelFormat:
        """Return the format of a ``video/x-raw`` caps' ``format``. Raises LookupError if the table doesn't have it."""
        return _found(_by("gstreamer"), given, "GStreamer format", given)

    @classmethod
    def from_ffmpeg(cls, given: str) -> PixelFormat:
        """Return the format of an FFmpeg ``pix_fmt``, as PyAV has in ``frame.format.name``. Raises LookupError if the table lacks it.

        ``yuvj420p`` and its like are ``yuv420p`` with :attr:`dmabuf.Color.range` ``FULL``.
        """
        return _found(_by("ffmpeg"), given, "FFmpeg format", given)

    @classmethod
    def from_opencv(cls, given: str) -> PixelFormat:
        """Return the format that OpenCV's color conversions call so: ``"BGR"`` as in ``COLOR_BGR2GRAY``, ``"NV12"`` as in
        ``COLOR_YUV2BGR_NV12``. Raises LookupError if the table doesn't have it.
        """
        return _found(_by("opencv"), given, "OpenCV format", given)

    @classmethod
    def from_ros(cls, given: str) -> PixelFormat:
        """Return the format of a ``sensor_msgs/Image``'s ``encoding``. Raises LookupError if the table doesn't have it."""
        return _found(_by("ros"), given, "ROS encoding", given)

    @property
    def v4l2(self) -> str:
        """The four characters of the V4L2 format. Raises LookupError where there is none."""
        return self._named("v4l2", "V4L2")

    @property
    def v4l2_fourcc(self) -> int:
        """The number of the V4L2 format. Raises LookupError where there is none."""
        return int.from_bytes(self.v4l2.encode("ascii"), "little")

    @property
    def gstreamer(self) -> str:
        """The ``format`` of GStreamer's ``video/x-raw`` caps. Raises LookupError where there is none."""
        return self._named("gstreamer", "GStreamer")

    @property
    def ffmpeg(self) -> str:
        """FFmpeg's and PyAV's ``pix_fmt``. Raises LookupError where there is none."""
        return self._named("ffmpeg", "FFmpeg")

    @property
    def opencv(self) -> str:
        """The name in OpenCV's color conversions. Raises LookupError where there is none."""
        return self._named("opencv", "OpenCV")

    @property
    def ros(self) -> str:
        """The ``encoding`` of ROS's ``sensor_msgs/Image``. Raises LookupError where there is none."""
        return self._named("ros", "ROS")

    def _named(self, system: str, title: str) -> str:
        names = self.names.get(system)
        if not names:
            raise LookupError(f"look up: DRM format {self.name}: {title} has no name for it; convert the picture, or pass its bytes")
        return names[0]

    def __hash__(self) -> int:
        return hash(self.fourcc)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return PixelFormat.of, (self.name,)

    @classmethod
    def from_row(cls, row: str) -> Self:
        """Return the format that a row of the table describes."""
        name, code, planes, *names = row.split("|")
        listed = dict(zip(SYSTEMS, (tuple(part.split(",")) if part else () for part in names), strict=True))
        return cls(name, int.from_bytes(code.encode("ascii"), "little"), tuple(map(_plane, planes.split(";"))), listed)


SYSTEMS: Final = ("v4l2", "gstreamer", "ffmpeg", "opencv", "ros")


def formats() -> tuple[PixelFormat, ...]:
    """Return every format of the table, in the order of the kernel's header."""
    return tuple(by_name().values())


def text_of(fourcc: int) -> str:
    """Return a fourcc as its characters, or as a number if it has none."""
    text = (fourcc & ~BIG_ENDIAN).to_bytes(8, "little").rstrip(b"\0") if fourcc >= 0 else b""
    if len(text) != 4 or not (text.isascii() and text.decode("ascii").isprintable()):
        return hex(fourcc)
    return text.decode("ascii") + ("-BE" if fourcc & BIG_ENDIAN else "")


def _plane(text: str) -> PlaneFormat:
    across, down, block, size, dtype, channels, components = text.split(" ")
    parts = (part.split(":") for part in components.split(","))
    return PlaneFormat(
        int(across),
        int(down),
        int(block),
        int(size),
        dtype,
        int(channels),
        tuple(Component(name, int(shift), int(bits)) for name, shift, bits in parts),
    )


def _found(
    table: Mapping[str, PixelFormat] | Mapping[int, PixelFormat], key: str | int, what: str, shown: str, remedy: str = ""
) -> PixelFormat:
    try:
        return table[key]  # type: ignore[index]
    except KeyError:
        remedy = remedy or "docs/formats.md lists those it has"
        raise LookupError(f"look up: {what} {shown!r}: the table has no such format; {remedy}") from None


def _elsewhere(name: str) -> str:
    """Return what to call if a name that was given as DRM's is another system's. A user who has FFmpeg's name may not know DRM's."""
    calls = [f"PixelFormat.from_{system}({name!r})" for system in SYSTEMS if name in _by(system)]
    return f"if it is the name of another system, pass {' or '.join(calls)}" if calls else ""


@cache
def by_name() -> dict[str, PixelFormat]:
    """Return the table by the names of DRM."""
    return {made.name: made for made in map(PixelFormat.from_row, ROWS)}


@cache
def _by_fourcc() -> dict[int, PixelFormat]:
    return {made.fourcc: made for made in by_name().values()}


@cache
def _by(system: str) -> dict[str, PixelFormat]:
    return {name: made for made in by_name().values() for name in made.names[system]}


def known(fourcc: int) -> PixelFormat | None:
    """Return the format of a DRM fourcc, or None if the table doesn't have it."""
    return _by_fourcc().get(fourcc)
