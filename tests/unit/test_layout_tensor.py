"""``TensorLayout``: values, sizes, bytes, and one refusal for each bad argument."""

from __future__ import annotations

import pickle
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dmabuf
from dmabuf import TensorLayout
from dmabuf.errors import InvalidError
from dmabuf.layout import packing
from dmabuf.layout.tensor import DTYPES
from tests.support.budget import times


def test_tensor_layout_is_a_value() -> None:
    one = TensorLayout("float32", (2, 3))
    assert one == TensorLayout("float32", (2, 3), (12, 4), 0)
    assert hash(one) == hash(TensorLayout("float32", (2, 3)))
    assert one != TensorLayout("float32", (2, 3), offset=4)
    assert pickle.loads(pickle.dumps(one)) == one
    assert dmabuf.TensorLayout is TensorLayout


def test_tensor_layout_strides_are_without_gaps_unless_given() -> None:
    layout = TensorLayout("int16", (4, 3, 2))
    assert layout.strides == (12, 4, 2)
    assert layout.is_contiguous
    assert not TensorLayout("int16", (4, 3), (2, 8)).is_contiguous


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (TensorLayout("float32", (2, 3)), 24),
        (TensorLayout("float32", (2, 3), (16, 4), 8), 8 + 16 + 12),
        (TensorLayout("float64", ()), 8),
        (TensorLayout("float64", 5), 40),  # type: ignore[arg-type]
        (TensorLayout("uint8", (3, 0, 7), offset=5), 5),
        (TensorLayout("uint8", (1000, 2), (0, 1)), 2),
    ],
)
def test_tensor_layout_size_ends_with_the_last_element(layout: TensorLayout, size: int) -> None:
    assert layout.sizes == (size,)
    layout.check(size)
    layout.check([size + 1])


@pytest.mark.parametrize(("sizes", "says"), [(23, "needs 24 bytes"), ((), "not 0"), ((24, 24), "not 2")])
def test_tensor_layout_check_is_einval_when_the_buffer_does_not_fit(sizes: Any, says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        TensorLayout("float32", (2, 3)).check(sizes)


def test_tensor_layout_takes_types_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    assert TensorLayout(numpy.float32, (2,)) == TensorLayout(numpy.dtype("float32"), (numpy.int64(2),)) == TensorLayout("float32", (2,))


@pytest.mark.parametrize("name", [name for name in DTYPES if not name.startswith(("bfloat", "float8"))])
def test_tensor_layout_takes_numpys_code_of_a_type(name: str) -> None:
    numpy = pytest.importorskip("numpy")
    code = numpy.dtype(name).str
    assert code[0] in "<|"
    assert TensorLayout(code, (2,)) == TensorLayout(code[1:], (2,)) == TensorLayout("=" + code[1:], (2,)) == TensorLayout(name, (2,))


def test_tensor_layout_takes_a_type_that_prints_as_torch_does() -> None:
    class Type:
        def __str__(self) -> str:
            return "torch.bfloat16"

    assert TensorLayout(Type(), (2,)).dtype == "bfloat16"  # type: ignore[arg-type]


def test_tensor_layout_sizes_of_types_are_those_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    for name, size in DTYPES.items():
        if not name.startswith(("bfloat", "float8")):
            assert numpy.dtype(name).itemsize == size


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("float", (2,)), "'float' doesn't say how many bits"),
        (("", (2,)), "no dtype ''"),
        (("<f3", (2,)), "no dtype '<f3'"),
        ((">f4", (2,)), "'>f4' is big-endian"),
        (("uint8", (-1,)), "shape is -1"),
        (("uint8", (1 << 63,)), "shape is"),
        (("uint8", (1 << 32, 1 << 32)), "last byte"),
        (("uint8", (2, 2), (2,)), "2 dimensions and 1 strides"),
        (("uint8", (2,), (-1,)), "stride is -1"),
        (("uint8", (2,), (1 << 63,)), "stride is"),
        (("uint8", (3,), (1 << 62,)), "last byte"),
        (("uint8", (2,), None, -1), "offset is -1"),
        (("uint8", (2,), None, (1 << 63) - 1), "last byte"),
        (("uint8", (1,) * 13), "13 dimensions"),
    ],
)
def test_tensor_layout_bad_argument_is_einval(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        TensorLayout(*arguments)


def test_tensor_layout_big_endian_type_is_einval() -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(InvalidError, match="big-endian"):
        TensorLayout(numpy.dtype(">f4"), (2,))


@pytest.mark.parametrize("arguments", [("uint8", (1.5,)), ("uint8", None), ("uint8", (2,), ("a",)), ("uint8", (2,), None, "0")])
def test_tensor_layout_argument_of_another_type_is_typeerror(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        TensorLayout(*arguments)


def test_tensor_layout_bytes_stay_as_they_are() -> None:
    packed = TensorLayout("bfloat16", (2, 3), (8, 2), 64).pack()
    assert packed == b"DL\x01\x02" + struct.pack("<HHBBHIQQQQQ", 56, 0, 10, 2, 0, 0, 64, 2, 8, 3, 2)


@settings(max_examples=times(quick=60, full=500), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(list(DTYPES)),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 38)), max_size=12),
    st.integers(0, 1 << 40),
)
def test_tensor_layout_survives_packing(dtype: str, dimensions: list[tuple[int, int]], offset: int) -> None:
    layout = TensorLayout(dtype, tuple(n for n, _ in dimensions), tuple(step for _, step in dimensions), offset)
    packed = layout.pack()
    assert len(packed) <= packing.MOST
    assert packing.kind_of(packed) is packing.Kind.TENSOR
    assert TensorLayout.unpack(packed) == layout
