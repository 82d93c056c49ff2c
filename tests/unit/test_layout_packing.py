"""Bytes that claim to be a layout: each field that lies is refused, with the reason."""

from __future__ import annotations

import struct

import pytest

from dmabuf import ImageLayout, Plane, TensorLayout
from dmabuf.errors import InvalidError
from dmabuf.layout import packing
from dmabuf.layout.stored import unpack

IMAGE = ImageLayout(0x1234, 4, 3, (Plane(0, 0, 16, 48), Plane(1, 8, 4, 12)), crop_x=2, coded_width=8)
TENSOR = TensorLayout("float32", (2, 3), (16, 4), 8)


def changed(data: bytes, at: int, form: str, value: int) -> bytes:
    made = bytearray(data)
    struct.pack_into("<" + form, made, at, value)
    return bytes(made)


@pytest.mark.parametrize("layout", [IMAGE, TENSOR])
def test_unpack_returns_the_kind_that_was_packed(layout: ImageLayout | TensorLayout) -> None:
    assert unpack(layout.pack()) == layout
    assert unpack(bytearray(layout.pack())) == layout
    assert unpack(memoryview(layout.pack())) == layout  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes"),
        (b"DL\x01\x01", "4 bytes"),
        (IMAGE.pack() + bytes(257), "8 to 256"),
        (b"XL" + IMAGE.pack()[2:], "don't begin"),
        (changed(IMAGE.pack(), 6, "H", 1), "don't begin"),
        (changed(IMAGE.pack(), 2, "B", 2), "version 2, and this library reads version 1"),
        (changed(TENSOR.pack(), 2, "B", 0), "version 0"),
        (changed(IMAGE.pack(), 3, "B", 3), "no layout of kind 3"),
        (IMAGE.pack()[:-1], "the header says"),
        (IMAGE.pack() + b"\0", "the header says"),
        (packing.packed(packing.Kind.IMAGE, 1, bytes(47)), "end too early for a picture"),
        (packing.packed(packing.Kind.TENSOR, 1, bytes(15)), "end too early for a tensor"),
        (packing.packed(packing.Kind.IMAGE, 1, IMAGE.pack()[8:-24]), "number of planes"),
        (packing.packed(packing.Kind.TENSOR, 1, TENSOR.pack()[8:-16]), "number of dimensions"),
        (changed(IMAGE.pack(), 8, "I", 0), "fourcc is 0"),
        (changed(IMAGE.pack(), 12, "I", 1), "number of planes"),
        (changed(IMAGE.pack(), 24, "I", 0), "width is 0"),
        (changed(IMAGE.pack(), 24, "I", 1 << 31), "width is"),
        (changed(IMAGE.pack(), 32, "I", 0), "coded size is zero"),
        (changed(IMAGE.pack(), 32, "I", 5), "coded_width is 5"),
        (changed(IMAGE.pack(), 40, "I", 7), "coded_width is 8"),
        (changed(IMAGE.pack(), 48, "B", 3), "primaries is 3"),
        (changed(IMAGE.pack(), 51, "B", 3), "range is 3"),
        (changed(IMAGE.pack(), 52, "I", 5), "number of planes"),
        (changed(IMAGE.pack(), 52, "I", 1), "number of planes"),
        (changed(IMAGE.pack(), 56, "I", 2), "buffers 1, 2"),
        (changed(IMAGE.pack(), 60, "I", 0), "stride is 0"),
        (changed(IMAGE.pack(), 64, "Q", 1 << 63), "offset is"),
        (changed(IMAGE.pack(), 72, "Q", 0), "size is 0"),
        (changed(TENSOR.pack(), 8, "B", 200), "no type number 200"),
        (changed(TENSOR.pack(), 9, "B", 255), "number of dimensions"),
        (changed(TENSOR.pack(), 10, "H", 1), "number of dimensions"),
        (changed(TENSOR.pack(), 12, "I", 1), "number of dimensions"),
        (changed(TENSOR.pack(), 16, "Q", 1 << 63), "offset is"),
        (changed(TENSOR.pack(), 24, "Q", 1 << 63), "shape is"),
        (changed(changed(TENSOR.pack(), 32, "Q", 1 << 62), 24, "Q", 1 << 40), "last byte"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unpack_of_bytes_that_lie_is_einval(data: bytes, says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        unpack(data)


def test_unpack_of_another_kind_is_einval() -> None:
    with pytest.raises(InvalidError, match="a tensor, not a picture"):
        ImageLayout.unpack(TENSOR.pack())
    with pytest.raises(InvalidError, match="a picture, not a tensor"):
        TensorLayout.unpack(IMAGE.pack())
