"""The table of pixel formats: it is what the headers say, and what others make of a picture with their names for a format."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest

import dmabuf
from dmabuf import PixelFormat
from dmabuf.layout.formats import SYSTEMS, formats
from tools import formats as tool

FINDERS = {
    "v4l2": PixelFormat.from_v4l2,
    "gstreamer": PixelFormat.from_gstreamer,
    "ffmpeg": PixelFormat.from_ffmpeg,
    "opencv": PixelFormat.from_opencv,
    "ros": PixelFormat.from_ros,
}
ALL = [pytest.param(one, id=one.name) for one in formats()]


def with_names(system: str) -> list[Any]:
    return [pytest.param(one, id=one.name) for one in formats() if one.names[system]]


def test_table_and_page_are_what_the_headers_say() -> None:
    made = tool.made(fetch=False)
    if made is None:
        pytest.skip("no drm_fourcc.h here (Debian: libdrm-dev); python -m tools.formats --check fetches it")
    assert tool.TABLE.read_text(encoding="utf-8") == made[0], "run python -m tools.formats"
    assert tool.PAGE.read_text(encoding="utf-8") == made[1], "run python -m tools.formats"


def test_table_has_the_formats_that_programs_meet() -> None:
    assert len(formats()) >= 60
    assert {"NV12", "P010", "YUV420", "YUYV", "RGB888", "XRGB8888", "R8"} <= {one.name for one in formats()}


@pytest.mark.parametrize(
    ("name", "v4l2", "gstreamer", "ffmpeg", "opencv", "ros"),
    [
        ("RGB888", "BGR3", "BGR", "bgr24", "BGR", "bgr8"),
        ("BGR888", "RGB3", "RGB", "rgb24", "RGB", "rgb8"),
        ("ARGB8888", "AR24", "BGRA", "bgra", "BGRA", "bgra8"),
        ("YUYV", "YUYV", "YUY2", "yuyv422", "YUY2", "yuv422_yuy2"),
        ("R8", "GREY", "GRAY8", "gray", "GRAY", "mono8"),
        ("NV21", "NV21", "NV21", "nv21", "NV21", "nv21"),
    ],
)
def test_format_has_its_names_elsewhere(name: str, v4l2: str, gstreamer: str, ffmpeg: str, opencv: str, ros: str) -> None:
    one = PixelFormat.of(name)
    assert (one.v4l2, one.gstreamer, one.ffmpeg, one.opencv, one.ros) == (v4l2, gstreamer, ffmpeg, opencv, ros)


@pytest.mark.parametrize("system", SYSTEMS)
def test_format_is_found_by_each_of_its_names(system: str) -> None:
    names = [(name, one) for one in formats() for name in one.names[system]]
    assert len({name for name, _ in names}) == len(names), "a name stands for two formats"
    for name, one in names:
        assert FINDERS[system](name) is one
    for one in formats():
        if one.names[system]:
            assert FINDERS[system](getattr(one, system)) is one


@pytest.mark.parametrize("one", ALL)
def test_format_is_found_by_its_drm_name_and_code(one: PixelFormat) -> None:
    assert PixelFormat.of(one) is PixelFormat.of(one.name) is PixelFormat.of(f"DRM_FORMAT_{one.name}") is PixelFormat.of(one.fourcc) is one
    assert pickle.loads(pickle.dumps(one)) is one
    assert hash(one) == hash(PixelFormat.of(one.name))


@pytest.mark.parametrize("one", with_names("v4l2"))
def test_format_is_found_by_the_number_of_v4l2(one: PixelFormat) -> None:
    assert PixelFormat.from_v4l2(one.v4l2_fourcc) is one


def test_v4l2_name_is_found_without_its_space() -> None:
    assert PixelFormat.from_v4l2("Y16") is PixelFormat.from_v4l2("Y16 ") is PixelFormat.of("R16")


@pytest.mark.parametrize(("one", "missing"), [(one, system) for one in formats() for system in SYSTEMS if not one.names[system]])
def test_format_without_a_name_is_lookuperror_that_names_it(one: PixelFormat, missing: str) -> None:
    with pytest.raises(LookupError, match=f"DRM format {one.name}: .* has no name"):
        getattr(one, missing)


@pytest.mark.parametrize(
    ("find", "given", "says"),
    [
        (PixelFormat.of, "BGR3", "DRM format 'BGR3'"),
        (PixelFormat.of, 0x33524742, "DRM fourcc 'BGR3'"),
        (PixelFormat.of, 0, "DRM fourcc '0x0'"),
        (PixelFormat.of, -1, "DRM fourcc '-0x1'"),
        (PixelFormat.of, PixelFormat.of("XRGB8888").fourcc | 1 << 31, "'XR24-BE'"),
        (PixelFormat.from_v4l2, "MJPG", "V4L2 format 'MJPG'"),
        (PixelFormat.from_v4l2, 0x47504A4D, "V4L2 format 'MJPG'"),
        (PixelFormat.from_v4l2, "AYUV", "V4L2 format 'AYUV'"),  # DRM's AYUV has the bytes of V4L2's VUYA
        (PixelFormat.from_v4l2, "V4L2_PIX_FMT_H264", "H264"),
        (PixelFormat.from_gstreamer, "rgb", "GStreamer format 'rgb'"),
        (PixelFormat.from_ffmpeg, "nv12le", "FFmpeg format 'nv12le'"),
        (PixelFormat.from_opencv, "HSV", "OpenCV format 'HSV'"),
        (PixelFormat.from_ros, "bayer_rggb8", "ROS encoding 'bayer_rggb8'"),
    ],
)
def test_name_that_is_not_in_the_table_is_lookuperror(find: Any, given: Any, says: str) -> None:
    with pytest.raises(LookupError, match=re.escape(says)):
        find(given)


@pytest.mark.parametrize(
    ("given", "system"), [("GREY", "v4l2"), ("GRAY8", "gstreamer"), ("gray", "ffmpeg"), ("GRAY", "opencv"), ("mono8", "ros")]
)
def test_name_of_another_system_is_lookuperror_that_says_what_to_call(given: str, system: str) -> None:
    with pytest.raises(LookupError, match=re.escape(f"if it is the name of another system, pass PixelFormat.from_{system}({given!r})")):
        PixelFormat.of(given)


@pytest.mark.parametrize("given", [None, 1.5, b"NV12"])
def test_format_of_another_type_is_typeerror(given: Any) -> None:
    with pytest.raises(TypeError):
        PixelFormat.of(given)


def test_name_of_the_face_is_the_class() -> None:
    assert dmabuf.PixelFormat is PixelFormat


# ---- what the headers say ----


def cameras() -> dict[str, tool.Define]:
    path = tool.header("videodev2.h", fetch=False)
    if path is None:
        pytest.skip("no videodev2.h here (Debian: linux-libc-dev)")
    return tool.defines(path.read_text(encoding="utf-8"))


def shape(one: PixelFormat) -> list[tuple[str, int]]:
    """The components of the first plane and the gaps between them, from bit 0."""
    found, at = [], 0
    plane = one.planes[0]
    for part in plane.components:
        if part.shift > at:
            found.append(("X", part.shift - at))
        found.append((part.name, part.bits))
        at = part.shift + part.bits
    return [*found, ("X", plane.block_bytes * 8 - at)] if at < plane.block_bytes * 8 else found


@pytest.mark.parametrize("one", [one for one in formats() if one.names["v4l2"] and one.name[0] in "RXBA" and len(one.planes) == 1])
def test_v4l2_name_has_the_order_that_its_header_says(one: PixelFormat) -> None:
    """``24 BGR-8-8-8``: bytes along memory; ``16 XRGB-1-5-5-5`` and ``16 xxxxrrrr ggggbbbb``: bits from the highest down."""
    checked = 0
    for name in (name.removeprefix("V4L2_PIX_FMT_") for name in one.names["v4l2"] if name.startswith("V4L2_PIX_FMT_")):
        comment = cameras()[name].comment
        parts = shape(one)
        if match := re.match(r"(?:24|32)\s+([A-Z]+)-([\d-]+)$", comment):
            letters = "".join({"Cb": "U", "Cr": "V"}.get(part, part) for part, _ in parts)
            if len(letters) == len(match[1]):  # the old names, as RGB32, leave out what has no meaning
                assert letters == match[1]
                checked += 1
            else:
                assert letters.replace("X", "") == match[1]
        elif match := re.match(r"(?:8|16)\s+([A-Z]+)-([\d-]+)$", comment):
            assert [int(bits) for bits in match[2].split("-")] == [bits for part, bits in reversed(parts) if part in match[1]]
            assert match[1] in "".join(part for part, _ in reversed(parts))
            checked += 1
        elif match := re.match(r"16\s+([a-z]{8}) ([a-z]{8})$", comment):
            assert (match[1] + match[2]).upper() == "".join(part * bits for part, bits in reversed(parts))
            checked += 1
    assert checked or one.planes[0].components[0].name == "R" or one.name == "XYUV8888"


@pytest.mark.parametrize(
    ("comment", "block", "says"),
    [("[31:0] R:G:B 8:8:8 little endian", "", "doesn't fill"), ("", "nothing", "no planes"), ("[7:0] R:G", "", None)],
)
def test_tool_refuses_a_comment_that_contradicts_itself(comment: str, block: str, says: str | None) -> None:
    define = tool.Define("ODD", "ODD ", comment, block)
    if says is None:
        assert tool.planes(define) == "1 1 1 1 u1 1 G:0:4,R:4:4"
        return
    with pytest.raises(ValueError, match=says):
        tool.planes(define)
