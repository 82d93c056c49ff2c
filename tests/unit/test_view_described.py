"""Arrays of a view as the buffer's layout says, without arguments."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from dmabuf import ImageLayout, TensorLayout
from tests.support.errnos import raises_errno

np = pytest.importorskip("numpy")


def test_a_tensor_has_its_type_and_shape() -> None:
    with dmabuf.allocate(shape=(4, 3), dtype="float32") as buf:
        with buf.write() as view:
            view.array()[:] = np.arange(12).reshape(4, 3)
        with buf.read() as view:
            array = view.array()
            assert (array.dtype, array.shape, array.flags.writeable) == (np.float32, (4, 3), False)
            assert bytes(view[:48]) == np.arange(12, dtype="<f4").tobytes()
            del array


def test_an_offset_and_strides_are_the_layouts() -> None:
    layout = TensorLayout("uint16", (3, 2), strides=(8, 2), offset=16)
    with dmabuf.allocate(layout=layout) as buf, buf.write() as view:
        view.array()[:] = [[1, 2], [3, 4], [5, 6]]
        assert view[16:40].cast("H").tolist() == [1, 2, 0, 0, 3, 4, 0, 0, 5, 6, 0, 0]


def test_a_part_of_the_view_is_bytes() -> None:
    with dmabuf.allocate(shape=(4, 3), dtype="float32") as buf, buf.read() as view:
        assert view[4:].array().dtype == np.uint8
    with dmabuf.allocate(shape=8, dtype="int64") as buf, buf.export_range(8, 16).read() as view:
        assert (view.array().dtype, view.array().shape) == (np.uint8, (16,))


def test_a_layout_that_comes_later_counts() -> None:
    with dmabuf.allocate(4096) as buf:
        with buf.write() as view:
            assert view.array().shape == (buf.size,)
        buf.describe(TensorLayout("int32", (5,)))
        with buf.read() as view:
            assert (view.array().dtype, view.array().shape) == (np.int32, (5,))


def test_arguments_count_more_than_the_layout() -> None:
    with dmabuf.allocate(shape=(4, 3), dtype="float32") as buf, buf.read() as view:
        assert view.array("u1").shape == (buf.size,)
        assert view.array(shape=(7,)).dtype == np.uint8


def test_a_picture_has_its_planes() -> None:
    layout = ImageLayout.linear("NV12", 64, 48)
    with dmabuf.allocate(layout=layout) as buf:
        with buf.write() as view:
            for plane, value in zip(view.planes(), (16, 128), strict=True):
                plane[:] = value
            del plane
        with buf.read() as view:
            assert [plane.shape for plane in view.planes()] == [(48, 64), (24, 32, 2)]
            assert [int(plane.max()) for plane in view.planes()] == [16, 128]


def test_a_picture_of_one_plane_is_an_array() -> None:
    with dmabuf.allocate(layout=ImageLayout.linear("XRGB8888", 10, 4)) as buf, buf.read() as view:
        assert view.array().shape == view.planes()[0].shape == (4, 10, 4)


def no_layout(view: Any) -> None:
    with raises_errno(errno.ENODATA, dmabuf.DmaBufError):
        view.planes()


def several_planes(view: Any) -> None:
    with pytest.raises(ValueError, match=r"array: .* its picture has 2 planes here: use view.planes\(\)"):
        view.array()


def a_part(view: Any) -> None:
    with pytest.raises(ValueError, match="planes: this is a part of the view"):
        view[1:].planes()


def arguments(view: Any) -> None:
    with pytest.raises(TypeError):
        view.planes(1)


@pytest.mark.parametrize(("layout", "refuses"), [
    (TensorLayout("uint8", (16,)), no_layout),
    (ImageLayout.linear("NV12", 64, 48), several_planes),
    (ImageLayout.linear("NV12", 64, 48), a_part),
    (ImageLayout.linear("NV12", 64, 48), arguments),
])  # fmt: skip
def test_what_does_not_fit_is_refused(layout: ImageLayout | TensorLayout, refuses: Callable[[Any], None]) -> None:
    with dmabuf.allocate(layout=layout) as buf, buf.read() as view:
        refuses(view)


def test_a_type_that_numpy_does_not_have_is_a_lookuperror() -> None:
    with dmabuf.allocate(shape=4, dtype="bfloat16") as buf, buf.read() as view:
        with pytest.raises(LookupError, match="numpy has no bfloat16"):
            view.array()
        assert view.array("<u2").size == buf.size // 2
