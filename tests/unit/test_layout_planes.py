"""Planes and tensors as arrays: the bytes where they are, for each kind of format, and a refusal for what can't be shown."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import dmabuf
from dmabuf import ImageLayout, PixelFormat, Plane, TensorLayout
from dmabuf.errors import InvalidError
from dmabuf.layout.formats import formats

np = pytest.importorskip("numpy")


def memory(layout: ImageLayout | TensorLayout) -> bytearray:
    """Bytes whose values say where they are."""
    return bytearray(i * 7 % 251 for i in range(layout.sizes[0]))


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def test_planes_of_nv12_are_luma_and_pairs_of_chroma() -> None:
    layout = ImageLayout.linear("NV12", 6, 4, stride=8)
    data = memory(layout)
    luma, chroma = layout.planes(data)
    assert (luma.shape, luma.strides, luma.dtype) == ((4, 6), (8, 1), np.uint8)
    assert (chroma.shape, chroma.strides) == ((2, 3, 2), (8, 2, 1))
    assert luma[2, 5] == data[2 * 8 + 5]
    assert list(chroma[1, 2]) == [data[32 + 8 + 4], data[32 + 8 + 5]]


def test_planes_are_the_memory_and_not_a_copy() -> None:
    layout = ImageLayout.linear("NV12", 6, 4, stride=8)
    data = bytearray(layout.sizes[0])
    luma, chroma = layout.planes(data)
    luma[3, 0] = 5
    chroma[0, 1] = (6, 7)
    assert (data[24], data[32 + 2], data[32 + 3]) == (5, 6, 7)


def test_planes_of_a_read_only_view_are_read_only() -> None:
    layout = ImageLayout.linear("R8", 6, 4)
    (plane,) = layout.planes(bytes(layout.sizes[0]))
    with pytest.raises(ValueError, match="read-only"):
        plane[0, 0] = 1


@pytest.mark.parametrize(
    ("name", "shapes", "dtype"),
    [
        ("YUV420", [(4, 6), (2, 3), (2, 3)], "u1"),
        ("YUV444", [(4, 6)] * 3, "u1"),
        ("P010", [(4, 6), (2, 3, 2)], "u2"),
        ("NV16", [(4, 6), (4, 3, 2)], "u1"),
        ("YUYV", [(4, 6, 2)], "u1"),
        ("UYVY", [(4, 6, 2)], "u1"),
        ("Y210", [(4, 6, 2)], "u2"),
        ("RGB888", [(4, 6, 3)], "u1"),
        ("XRGB8888", [(4, 6, 4)], "u1"),
        ("RGB565", [(4, 6)], "u2"),
        ("XRGB2101010", [(4, 6)], "u4"),
        ("ABGR16161616F", [(4, 6, 4)], "f2"),
        ("R10", [(4, 6)], "u2"),
        ("NV15", [(4, 2, 5), (2, 2, 5)], "u1"),
        ("P030", [(4, 2), (2, 1, 2)], "u4"),
    ],
)
def test_planes_have_the_shape_of_their_format(name: str, shapes: list[tuple[int, ...]], dtype: str) -> None:
    layout = ImageLayout.linear(name, 6, 4)
    made = layout.planes(memory(layout))
    assert [plane.shape for plane in made] == shapes
    assert {plane.dtype for plane in made} == {np.dtype(f"<{dtype}")}


@pytest.mark.parametrize("one", [pytest.param(one, id=one.name) for one in formats()])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (12, 4)])
def test_planes_of_every_format_stay_within_memory(one: PixelFormat, size: tuple[int, int]) -> None:
    layout = ImageLayout.linear(one, *size, align=1)
    data = memory(layout)
    base = address(np.frombuffer(data, np.uint8))
    for plane, where in zip(layout.planes(data), layout.memory_planes, strict=True):
        assert address(plane) == base + where.offset
        assert address(plane) + (plane.shape[0] - 1) * plane.strides[0] + plane.shape[1] * plane.strides[1] <= base + where.end


def test_planes_show_the_visible_part() -> None:
    layout = ImageLayout.linear("NV12", 4, 2, stride=16, coded_width=16, coded_height=8, crop_x=2, crop_y=4)
    data = memory(layout)
    luma, chroma = layout.planes(data)
    assert (luma.shape, chroma.shape) == ((2, 4), (1, 2, 2))
    assert luma[0, 0] == data[4 * 16 + 2]
    assert chroma[0, 0, 0] == data[8 * 16 + 2 * 16 + 2]


def test_planes_of_several_buffers() -> None:
    layout = ImageLayout.linear("NV12", 6, 4, apart=True)
    one, two = (bytearray(size) for size in layout.sizes)
    luma, chroma = layout.planes([one, two])
    luma[0, 0], chroma[0, 0, 1] = 3, 4
    assert (one[0], two[1]) == (3, 4)
    assert layout.planes((one, two))[0][0, 0] == 3


def test_planes_of_odd_yuyv_have_the_last_pixel() -> None:
    layout = ImageLayout.linear("YUYV", 5, 1, align=1)
    (pixels,) = layout.planes(bytearray(range(12)))
    assert pixels[0, 4].tolist() == [8, 9]


def test_rgb888_is_what_opencv_calls_bgr() -> None:
    layout = ImageLayout.linear(PixelFormat.from_opencv("BGR"), 1, 1, align=1)
    pixel = layout.planes(bytearray(b"\x0b\x16\x21"))[0][0, 0]
    assert pixel.tolist() == [0x0B, 0x16, 0x21]
    assert {part.name: pixel[part.shift // 8] for part in layout.format.planes[0].components} == {"B": 0x0B, "G": 0x16, "R": 0x21}


def test_planes_in_a_block_of_a_buffer() -> None:
    layout = ImageLayout.linear("NV12", 6, 4)
    with dmabuf.allocate(layout.sizes[0]) as buf:
        with buf.write() as view:
            layout.planes(view)[1][:] = 9
        with buf.read() as view:
            assert layout.planes(view)[1].min() == 9
            assert not layout.planes(view)[0].any()


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (ImageLayout.linear("NV12", 4, 2, crop_x=1), r"begins at \(1, 0\), in the middle of 2×2"),
        (ImageLayout.linear("NV12", 4, 2, crop_y=3), r"begins at \(0, 3\)"),
        (ImageLayout.linear("YUYV", 4, 2, crop_x=1), "2×1"),
        (ImageLayout(PixelFormat.of("NV12").fourcc, 4, 2, (Plane(0, 0, 64, 64),), modifier=1 << 56 | 1), "modifier 0x100000000000001"),
    ],
)
def test_planes_that_cannot_be_shown_are_einval(layout: ImageLayout, says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        layout.planes(memory(layout))


def test_planes_of_an_unknown_format_are_lookuperror() -> None:
    with pytest.raises(LookupError, match="0x1234"):
        ImageLayout(0x1234, 4, 2, (Plane(0, 0, 64, 64),)).planes(bytearray(64))


@pytest.mark.parametrize(
    ("views", "says"), [(bytearray(191), "needs 384 bytes"), ([bytearray(384), bytearray(384)], "not 2"), ([], "not 0")]
)
def test_planes_of_views_that_do_not_fit_are_einval(views: Any, says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        ImageLayout.linear("NV12", 6, 4).planes(views)


def test_planes_of_a_view_with_gaps_are_einval() -> None:
    with pytest.raises(InvalidError, match="one behind the other"):
        ImageLayout.linear("NV12", 6, 4).planes(memoryview(bytearray(1024))[::2])


def test_planes_of_a_view_of_other_numbers_are_by_bytes() -> None:
    layout = ImageLayout.linear("NV12", 6, 4)
    data = memory(layout)
    assert (layout.planes(memoryview(data).cast("I"))[0] == layout.planes(data)[0]).all()


def test_planes_of_something_without_bytes_are_typeerror() -> None:
    with pytest.raises(TypeError):
        ImageLayout.linear("NV12", 6, 4).planes(5)


# ---- tensors ----


def test_tensor_is_an_array_over_the_memory() -> None:
    layout = TensorLayout("float32", (2, 3), (16, 4), 8)
    data = bytearray(layout.sizes[0])
    array = layout.array(data)
    array[1, 2] = 1.5
    assert (array.shape, array.strides, array.dtype) == ((2, 3), (16, 4), np.float32)
    assert np.frombuffer(data, np.float32)[-1] == 1.5


@pytest.mark.parametrize("layout", [TensorLayout("int16", ()), TensorLayout("int16", (0, 4)), TensorLayout("bool", (3,), (0,))])
def test_tensor_of_an_odd_shape_is_an_array(layout: TensorLayout) -> None:
    assert layout.array(bytearray(layout.sizes[0])).shape == layout.shape


def test_tensor_of_a_view_that_is_too_small_is_einval() -> None:
    with pytest.raises(InvalidError, match="needs 24 bytes"):
        TensorLayout("float32", (2, 3)).array(bytearray(23))


def test_tensor_of_a_type_that_numpy_lacks_is_lookuperror() -> None:
    with pytest.raises(LookupError, match="numpy has no float8_e5m2"):
        TensorLayout("float8_e5m2", (2, 3)).array(bytearray(6))


# ---- what FFmpeg makes ----


def decoded(name: str) -> tuple[Any, ImageLayout]:
    """A frame of PyAV, and the layout of its planes, each in a buffer of its own."""
    av = pytest.importorskip("av")
    noise = np.random.default_rng(1).integers(0, 255, (34, 66, 3), "u1")
    frame = av.VideoFrame.from_ndarray(noise, "rgb24").reformat(format=name)
    where = tuple(Plane(index, 0, plane.line_size, plane.buffer_size) for index, plane in enumerate(frame.planes))
    return frame, ImageLayout(PixelFormat.from_ffmpeg(name).fourcc, frame.width, frame.height, where)


@pytest.mark.parametrize("name", ["rgb24", "bgr24", "rgba", "bgra", "gray", "yuv420p", "yuv422p", "yuv444p", "nv12", "yuyv422", "gray16le"])
def test_planes_are_what_pyav_shows(name: str) -> None:
    frame, layout = decoded(name)
    shown = layout.planes([bytes(plane) for plane in frame.planes])
    theirs = frame.to_ndarray()
    if name == "yuv444p" and theirs.shape[0] != 3:
        theirs = np.moveaxis(theirs, -1, 0)
    assert np.concatenate([plane.reshape(-1) for plane in shown]).tobytes() == np.ascontiguousarray(theirs).tobytes()


def test_planes_without_numpy_name_the_extra() -> None:
    code = """
import sys
sys.modules["numpy"] = None
from dmabuf import ImageLayout
from dmabuf.errors import ExtraMissingError
layout = ImageLayout.linear("NV12", 4, 4)
assert layout.specs()[1].shape == (2, 2, 2)
try:
    layout.planes(bytes(layout.sizes[0]))
except ExtraMissingError as error:
    assert error.extra == "numpy", error
    assert "dmabuf[numpy]" in str(error)
else:
    raise AssertionError
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
