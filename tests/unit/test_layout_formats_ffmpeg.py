"""FFmpeg's names for pixel formats: it describes the same bits, and puts each component of a picture where the table says."""

from __future__ import annotations

import importlib.util
import re
import struct
from typing import Any

import pytest

from dmabuf import PixelFormat
from dmabuf.layout.formats import Component, PlaneFormat, formats
from tests.support.lazy import Lazy

pytestmark = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="no PyAV")
av = Lazy("av")
NAMED = [pytest.param(one, id=one.name) for one in formats() if one.names["ffmpeg"]]
SIDE = 16
LEVELS = {"R": 200, "G": 100, "B": 40, "A": 255, "Y": 180, "Cb": 90, "Cr": 60}


def described(one: PixelFormat) -> Any:
    try:
        return av.VideoFormat(one.ffmpeg, SIDE, SIDE)
    except ValueError:
        pytest.skip(f"this FFmpeg has no {one.ffmpeg}")


@pytest.mark.parametrize("one", NAMED)
def test_ffmpeg_describes_the_same_bits_and_planes(one: PixelFormat) -> None:
    theirs = described(one)
    gray = one.planes[0].components[0].name == "R" and len(one.planes[0].components) == 1
    parts = {re.sub(r"\d$", "", part.name): (part.bits, index) for index, plane in enumerate(one.planes) for part in plane.components}
    order = ["R"] if gray else ["R", "G", "B", "A"] if "R" in parts else ["Y", "Cb", "Cr", "A"]
    assert [parts[name] for name in order if name in parts] == [(part.bits, part.plane) for part in theirs.components]
    assert theirs.is_rgb == ("R" in parts and not gray)
    assert not theirs.is_big_endian
    bits = sum(plane.block_bytes * 8 / plane.block / plane.across / plane.down for plane in one.planes)
    assert theirs.padded_bits_per_pixel == bits
    chroma = one.planes[-1] if len(one.planes) > 1 else PlaneFormat(one.planes[0].block, 1, 1, 1, "u1", 1, ())
    if not theirs.is_rgb and not gray:
        assert (theirs.chroma_width(SIDE), theirs.chroma_height(SIDE)) == (chroma.samples(SIDE), chroma.rows(SIDE))


def picture(one: PixelFormat) -> Any:
    """A picture of one color, which FFmpeg has converted into the format."""
    numpy = pytest.importorskip("numpy")
    names = {part.name for part in one.planes[0].components}
    if names == {"R"}:
        source = av.VideoFrame.from_ndarray(numpy.full((SIDE, SIDE), LEVELS["R"], "u1"), "gray")
    elif "R" in names:
        source = av.VideoFrame.from_ndarray(numpy.full((SIDE, SIDE, 3), [LEVELS[name] for name in "RGB"], "u1"), "rgb24")
    else:
        source = av.VideoFrame(SIDE, SIDE, "yuv444p")
        for plane, name in zip(source.planes, ("Y", "Cb", "Cr"), strict=True):
            plane.update(bytes([LEVELS[name]]) * plane.buffer_size)
    try:
        return source.reformat(format=one.ffmpeg)
    except (ValueError, OSError):
        pytest.skip(f"this FFmpeg can't make {one.ffmpeg}")


@pytest.mark.parametrize("one", NAMED)
def test_ffmpeg_puts_each_component_where_the_table_says(one: PixelFormat) -> None:
    described(one)
    made = picture(one)
    assert len(made.planes) == len(one.planes)
    for plane, theirs in zip(one.planes, made.planes, strict=True):
        data, row = bytes(theirs), plane.row_bytes(SIDE)
        starts = [line * theirs.line_size + at for line in range(plane.rows(SIDE)) for at in range(0, row, plane.block_bytes)]
        blocks = [int.from_bytes(data[at : at + plane.block_bytes], "little") for at in starts]
        for part in plane.components:
            levels = [level(part, block, half=one.name.endswith("F")) for block in blocks]
            # FFmpeg dithers where there are few bits: on average the level is right.
            expected = LEVELS[re.sub(r"\d$", "", part.name)]
            assert sum(levels) / len(levels) == pytest.approx(expected, abs=max(3, 256 >> part.bits)), part


def level(part: Component, block: int, half: bool) -> float:
    """The value of a component, as a number of 8 bits."""
    value = (block >> part.shift) & ((1 << part.bits) - 1)
    if half:
        return float(struct.unpack("<e", struct.pack("<H", value))[0]) * 255
    whole = 256 / (1 << part.bits) if part.name[0] in "YC" else 255 / ((1 << part.bits) - 1)
    return value * whole
