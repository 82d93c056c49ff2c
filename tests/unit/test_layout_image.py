"""``ImageLayout``, ``Plane`` and ``Color``: values, sizes, bytes, and one refusal for each bad argument."""

from __future__ import annotations

import copy
import pickle
import re
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dmabuf
from dmabuf import Color, ImageLayout, PixelFormat, Plane
from dmabuf.errors import InvalidError
from dmabuf.layout import packing
from dmabuf.layout.color import Matrix, Primaries, Range, Transfer
from dmabuf.layout.formats import formats
from tests.support.budget import times
from tools import formats as tool

NV12, ABGR8888 = (int.from_bytes(code, "little") for code in (b"NV12", b"AB24"))
TILED = 0x0200000000000001
# 1920×1080 as a decoder gives it, 16 rows aligned, in one buffer.
LUMA, CHROMA = 2048 * 1088, 2048 * 544
PLANES = (Plane(0, 0, 2048, LUMA), Plane(0, LUMA, 2048, CHROMA))


def decoded(**changes: Any) -> ImageLayout:
    arguments: dict[str, Any] = {"fourcc": NV12, "width": 1920, "height": 1080, "memory_planes": PLANES, "coded_height": 1088}
    return ImageLayout(**arguments | changes)


def test_image_layout_is_a_value() -> None:
    one, two = decoded(), decoded()
    assert one == two
    assert hash(one) == hash(two)
    assert one != decoded(crop_x=0, coded_width=1936)
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one


def test_image_layout_is_frozen() -> None:
    with pytest.raises(AttributeError):
        decoded().width = 3  # type: ignore[misc]


def test_image_layout_coded_size_is_up_to_the_visible_end_unless_given() -> None:
    layout = decoded(crop_x=4, crop_y=2, coded_height=0)
    assert (layout.coded_width, layout.coded_height) == (1924, 1082)


def test_image_layout_sizes_count_each_buffer() -> None:
    assert decoded().sizes == (LUMA + CHROMA,)
    apart = decoded(memory_planes=(Plane(1, 64, 2048, LUMA), Plane(0, 0, 2048, CHROMA)))
    assert apart.sizes == (CHROMA, 64 + LUMA)


def test_image_layout_check_takes_buffers_that_are_large_enough() -> None:
    decoded().check(LUMA + CHROMA)
    decoded().check([LUMA + CHROMA + 1])


@pytest.mark.parametrize(("sizes", "says"), [(LUMA + CHROMA - 1, "of buffer 0"), ([], "1 buffers, not 0"), ([1 << 30, 1 << 30], "not 2")])
def test_image_layout_check_is_einval_when_buffers_do_not_fit(sizes: Any, says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        decoded().check(sizes)


def test_image_layout_accepts_integers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    assert decoded(width=numpy.int64(1920)) == decoded()
    assert type(decoded(width=numpy.int64(1920)).width) is int


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fourcc": 0}, "fourcc is 0"),
        ({"fourcc": 1 << 32}, "fourcc is"),
        ({"modifier": -1}, "modifier is -1"),
        ({"modifier": 1 << 64}, "modifier is"),
        ({"width": 0}, "width is 0"),
        ({"height": -3}, "height is -3"),
        ({"width": 1 << 31}, "width is"),
        ({"crop_x": -1}, "crop_x is -1"),
        ({"crop_y": 9, "coded_height": 1088}, "crop_y . height is 1089, and coded_height is 1088"),
        ({"coded_width": 1919}, "coded_width is 1919"),
        ({"coded_height": -1}, "coded_height is -1"),
        ({"crop_x": (1 << 31) - 2, "coded_width": 0}, "coded_width is"),
        ({"memory_planes": ()}, "0 planes"),
        ({"memory_planes": PLANES * 3}, "6 planes"),
        ({"memory_planes": (PLANES[0], Plane(2, 0, 2048, CHROMA))}, "buffers 0, 2"),
    ],
)
def test_image_layout_bad_argument_is_einval(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        decoded(**changes)


@pytest.mark.parametrize(
    "changes", [{"width": 1.5}, {"fourcc": "NV12"}, {"color": (1, 1, 1, 1)}, {"memory_planes": ((0, 0, 2048, LUMA),)}, {"memory_planes": 1}]
)
def test_image_layout_argument_of_another_type_is_typeerror(changes: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        decoded(**changes)


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((4, 0, 1, 1), "buffer is 4"),
        ((-1, 0, 1, 1), "buffer is -1"),
        ((0, -1, 1, 1), "offset is -1"),
        ((0, 0, 0, 1), "stride is 0"),
        ((0, 0, 1 << 32, 1), "stride is"),
        ((0, 0, 1, 0), "size is 0"),
        ((0, (1 << 63) - 1, 1, 1), "is above"),
    ],
)
def test_plane_bad_argument_is_einval(numbers: tuple[int, int, int, int], says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        Plane(*numbers)


def test_color_is_unknown_unless_given() -> None:
    color = Color()
    assert (color.primaries, color.transfer, color.matrix, color.range) == (2, 2, 2, 0)
    assert decoded().color == color


def test_color_becomes_members_of_the_enumerations() -> None:
    assert Color(9, 16, 9, 1) == Color(Primaries.BT2020, Transfer.PQ, Matrix.BT2020, Range.LIMITED)  # type: ignore[arg-type]
    assert repr(Color(9).primaries).startswith("<Primaries.BT2020")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["primaries", "transfer", "matrix", "range"])
def test_color_that_has_no_name_is_einval(name: str) -> None:
    with pytest.raises(InvalidError, match=f"{name} is 77"):
        Color(**{name: 77})


@pytest.mark.parametrize(("kind", "theirs"), [(Primaries, "ColorPrimaries"), (Transfer, "ColorTrc")])
def test_color_values_are_those_of_ffmpeg(kind: type[Any], theirs: str) -> None:
    members = getattr(pytest.importorskip("av.video.reformatter"), theirs).__members__
    common = members.keys() & kind.__members__.keys()
    assert len(common) >= 10
    assert {name: int(members[name]) for name in common} == {name: int(kind[name]) for name in common}
    assert int(members["UNSPECIFIED"]) == kind.UNKNOWN


def test_color_range_values_are_those_of_ffmpeg() -> None:
    theirs = pytest.importorskip("av.video.reformatter").ColorRange
    assert (theirs.UNSPECIFIED, theirs.MPEG, theirs.JPEG) == (Range.UNKNOWN, Range.LIMITED, Range.FULL)


def test_image_layout_bytes_stay_as_they_are() -> None:
    color = Color(Primaries.BT709, Transfer.SRGB, Matrix.BT709, Range.FULL)
    packed = decoded(modifier=TILED, color=color).pack()
    assert packed == b"DL\x01\x01" + struct.pack("<HH", 104, 0) + struct.pack(
        "<4sIQIIIIIIBBBBI", b"NV12", 0, TILED, 1920, 1080, 1920, 1088, 0, 0, 1, 13, 1, 2, 2
    ) + struct.pack("<IIQQIIQQ", 0, 2048, 0, LUMA, 0, 2048, LUMA, CHROMA)
    assert ImageLayout.unpack(packed) == decoded(modifier=TILED, color=color)


numbers = st.integers(1, (1 << 31) - 1)
planes = st.builds(Plane, st.just(0), st.integers(0, 1 << 40), st.integers(1, (1 << 32) - 1), st.integers(1, 1 << 40))
colors = st.builds(Color, *(st.sampled_from(kind) for kind in (Primaries, Transfer, Matrix, Range)))
layouts = st.builds(
    ImageLayout,
    st.integers(1, (1 << 32) - 1).filter(lambda code: code not in (NV12, ABGR8888)),
    numbers,
    numbers,
    st.lists(planes, min_size=1, max_size=4).map(tuple),
    modifier=st.integers(1, (1 << 64) - 1),
    color=colors,
)


@settings(max_examples=times(quick=60, full=500), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(layouts)
def test_image_layout_survives_packing(layout: ImageLayout) -> None:
    packed = layout.pack()
    assert len(packed) <= packing.MOST
    assert packing.kind_of(packed) is packing.Kind.IMAGE
    assert ImageLayout.unpack(packed) == layout


def test_image_layout_with_most_planes_fits() -> None:
    layout = decoded(memory_planes=tuple(Plane(n, 0, 64, 64) for n in range(4)), modifier=TILED)
    assert len(layout.pack()) <= packing.MOST == 256


def test_names_of_the_face_are_the_classes() -> None:
    assert (dmabuf.ImageLayout, dmabuf.Plane, dmabuf.Color) == (ImageLayout, Plane, Color)


# ---- linear pictures of known formats ----


@pytest.mark.parametrize(
    ("name", "size", "options", "planes"),
    [
        ("XRGB8888", (1920, 1080), {}, [(0, 0, 7680, 7680 * 1080)]),
        ("RGB888", (100, 3), {}, [(0, 0, 320, 960)]),
        ("RGB888", (100, 3), {"align": 1}, [(0, 0, 300, 900)]),
        ("NV12", (1920, 1080), {}, [(0, 0, 1920, 1920 * 1080), (0, 1920 * 1080, 1920, 1920 * 540)]),
        ("NV12", (1920, 1080), {"coded_height": 1088}, [(0, 0, 1920, 1920 * 1088), (0, 1920 * 1088, 1920, 1920 * 544)]),
        ("NV12", (5, 3), {"align": 1}, [(0, 0, 6, 18), (0, 18, 6, 12)]),
        ("NV12", (64, 4), {"apart": True}, [(0, 0, 64, 256), (1, 0, 64, 128)]),
        ("NV12", (64, 4), {"offset": 16}, [(0, 16, 64, 256), (0, 272, 64, 128)]),
        ("NV24", (64, 4), {}, [(0, 0, 64, 256), (0, 256, 128, 512)]),
        ("YUV420", (130, 4), {}, [(0, 0, 256, 1024), (0, 1024, 128, 256), (0, 1280, 128, 256)]),
        ("YUV420", (130, 4), {"stride": 132}, [(0, 0, 132, 528), (0, 528, 66, 132), (0, 660, 66, 132)]),
        ("YUV420", (130, 4), {"stride": [192, 128, 65]}, [(0, 0, 192, 768), (0, 768, 128, 256), (0, 1024, 65, 130)]),
        ("YUYV", (5, 2), {"align": 1}, [(0, 0, 12, 24)]),
        ("P010", (100, 2), {}, [(0, 0, 256, 512), (0, 512, 256, 256)]),
        ("NV15", (8, 2), {"align": 1}, [(0, 0, 10, 20), (0, 20, 10, 10)]),
        ("YUV410", (9, 9), {"align": 1}, [(0, 0, 12, 108), (0, 108, 3, 9), (0, 117, 3, 9)]),
    ],
)
def test_linear_puts_planes_behind_each_other(
    name: str, size: tuple[int, int], options: dict[str, Any], planes: list[tuple[int, int, int, int]]
) -> None:
    layout = ImageLayout.linear(name, *size, **options)
    assert layout.memory_planes == tuple(Plane(*numbers) for numbers in planes)
    assert layout.format.name == name
    assert layout.is_linear
    assert ImageLayout.unpack(layout.pack()) == layout
    assert layout == ImageLayout.linear(layout.format, *size, **options) == ImageLayout.linear(layout.fourcc, *size, **options)


@pytest.mark.parametrize("one", [pytest.param(one, id=one.name) for one in formats()])
def test_linear_makes_every_format_of_the_table(one: PixelFormat) -> None:
    layout = ImageLayout.linear(one, 66, 34)
    assert all(plane.stride % 64 == 0 for plane in layout.memory_planes)
    assert ImageLayout.unpack(layout.pack()) == layout
    tight = ImageLayout.linear(one, 48, 16, align=1)
    assert sum(tight.sizes) == sum(part.row_bytes(48) * part.rows(16) for part in one.planes)


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (("NV12", 0, 4), {}, "width is 0"),
        (("NV12", 4, 0), {}, "height is 0"),
        (("NV12", 64, 4), {"stride": 63}, "a row of plane 0 has 64 bytes, and its stride is 63"),
        (("NV12", 64, 4), {"stride": (64, 62)}, "a row of plane 1 has 64 bytes, and its stride is 62"),
        (("NV12", 64, 4), {"stride": (64,)}, "2 planes, and there are 1 strides"),
        (("NV12", 64, 4), {"stride": 0}, "stride is 0"),
        (("NV12", 64, 4), {"stride": (64, 0)}, "stride is 0"),
        (("NV12", 64, 4), {"align": 0}, "align is 0"),
        (("NV12", 64, 4), {"offset": -1}, "offset is -1"),
        (("NV12", 64, 4), {"crop_x": 1, "coded_width": 64}, "coded_width is 64"),
        (("XRGB8888", 1 << 30, 4), {}, "stride is"),
    ],
)
def test_linear_bad_argument_is_einval(arguments: tuple[Any, ...], options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        ImageLayout.linear(*arguments, **options)


def test_linear_of_an_unknown_format_is_lookuperror() -> None:
    with pytest.raises(LookupError, match="DRM format 'BGR24'"):
        ImageLayout.linear("BGR24", 64, 4)


@pytest.mark.parametrize(
    ("planes", "says"),
    [
        (PLANES[:1], "NV12 has 2 planes, not 1"),
        ((Plane(0, 0, 1919, LUMA), PLANES[1]), "its stride is 1919"),
        ((PLANES[0], Plane(0, LUMA, 2048, 2048 * 543 + 1919)), "plane 1 has"),
    ],
)
def test_image_layout_whose_rows_do_not_fit_is_einval(planes: tuple[Plane, ...], says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        decoded(memory_planes=planes)
    assert decoded(memory_planes=planes, modifier=TILED).memory_planes == planes


def test_image_layout_last_row_may_be_without_padding() -> None:
    decoded(memory_planes=(Plane(0, 0, 2048, 2048 * 1087 + 1920), PLANES[1]))


def test_image_layout_of_an_unknown_fourcc_has_no_format() -> None:
    layout = decoded(fourcc=0x1234)
    assert ImageLayout.unpack(layout.pack()) == layout
    with pytest.raises(LookupError, match="0x1234"):
        _ = layout.format


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (ImageLayout.linear("NV12", 64, 4), "NV12 64×4"),
        (ImageLayout.linear("NV12", 64, 4, apart=True), "NV12 64×4, in 2 buffers"),
        (ImageLayout(0x34325258, 64, 4, PLANES[:1], modifier=TILED), "XRGB8888 64×4, modifier 0x200000000000001"),
        (ImageLayout(int.from_bytes(b"ABCD", "little"), 64, 4, PLANES[:1]), "ABCD 64×4"),
    ],
)
def test_image_layout_text_is_short(layout: ImageLayout, text: str) -> None:
    assert str(layout) == text


# ---- V4L2's colors ----


def in_header(name: str) -> int:
    path = tool.header("videodev2.h", fetch=False)
    if path is None:
        pytest.skip("no videodev2.h here (Debian: linux-libc-dev)")
    found = re.search(rf"\b{name}\s*=\s*(\d+)", path.read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("SMPTE170M", (Primaries.SMPTE170M, Transfer.BT709, Matrix.SMPTE170M, Range.LIMITED)),
        ("REC709", (Primaries.BT709, Transfer.BT709, Matrix.BT709, Range.LIMITED)),
        ("SRGB", (Primaries.BT709, Transfer.SRGB, Matrix.SMPTE170M, Range.LIMITED)),
        ("JPEG", (Primaries.BT709, Transfer.SRGB, Matrix.SMPTE170M, Range.FULL)),
        ("BT2020", (Primaries.BT2020, Transfer.BT709, Matrix.BT2020, Range.LIMITED)),
        ("SMPTE240M", (Primaries.SMPTE240M, Transfer.SMPTE240M, Matrix.SMPTE240M, Range.LIMITED)),
        ("DCI_P3", (Primaries.SMPTE431, Transfer.UNKNOWN, Matrix.BT709, Range.LIMITED)),
        ("RAW", (Primaries.UNKNOWN, Transfer.LINEAR, Matrix.SMPTE170M, Range.LIMITED)),
        ("DEFAULT", (Primaries.UNKNOWN, Transfer.UNKNOWN, Matrix.UNKNOWN, Range.UNKNOWN)),
    ],
)
def test_color_of_v4l2_follows_from_its_color_space(space: str, expected: tuple[Any, ...]) -> None:
    assert Color.from_v4l2(in_header(f"V4L2_COLORSPACE_{space}")) == Color(*expected)


def test_color_of_v4l2_is_what_the_driver_says_beside_it() -> None:
    names = ("COLORSPACE_BT2020", "XFER_FUNC_SMPTE2084", "YCBCR_ENC_709", "QUANTIZATION_FULL_RANGE")
    numbers = [in_header(f"V4L2_{name}") for name in names]
    assert Color.from_v4l2(*numbers) == Color(Primaries.BT2020, Transfer.PQ, Matrix.BT709, Range.FULL)
    assert Color.from_v4l2(numbers[0], rgb=True) == Color(Primaries.BT2020, Transfer.BT709, Matrix.RGB, Range.FULL)


def test_color_of_v4l2_that_has_no_name_is_unknown() -> None:
    assert Color.from_v4l2(99, 99, 99, 99) == Color()
