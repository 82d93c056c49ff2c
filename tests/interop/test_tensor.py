"""``view.tensor()``: all arguments, and each bad one."""

from __future__ import annotations

import builtins
import gc
from collections.abc import Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, Usage, View
from tests.support.views import BYTES, SIZE, filled, written


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def buf() -> Iterator[DmaBuf]:
    with filled() as made:
        yield made


@pytest.fixture
def view(buf: DmaBuf) -> Iterator[View]:
    with written(buf) as made:
        yield made


def test_tensor_is_the_memory_as_bytes(torch: Any, view: View) -> None:
    made = view.tensor()
    assert (made.dtype, tuple(made.shape)) == (torch.uint8, (SIZE,))
    assert bytes(made.numpy()) == BYTES
    made[3] = 99
    assert view[3] == 99
    view[4] = 98
    assert made[4] == 98


@pytest.mark.parametrize("name", ["float32", "int64", "float16", "bool", "complex64", "bfloat16"])
def test_tensor_has_the_dtype(torch: Any, view: View, name: str) -> None:
    kind = getattr(torch, name)
    made = view.tensor(kind)
    assert made.dtype is kind
    assert made.numel() == SIZE // kind.itemsize


@pytest.mark.parametrize(("shape", "expected"), [
    ((4, 8), (4, 8)), ([2, 3], (2, 3)), (7, (7,)), ((), ()), ((0,), (0,)), ((-1, 16), (64, 16)), ((4, 0), (4, 0)), (-1, (1024,)),
], ids=str)  # fmt: skip
def test_tensor_has_the_shape(torch: Any, view: View, shape: Any, expected: tuple[int, ...]) -> None:
    assert tuple(view.tensor(torch.float32, shape).shape) == expected


def test_tensor_begins_at_the_offset(torch: Any, view: View) -> None:
    assert view.tensor(None, (3,), 5).tolist() == list(BYTES[5:8])
    assert bytes(view.tensor(torch.int16, (2,), offset=6).numpy().tobytes()) == BYTES[6:10]
    assert view.tensor(torch.float32, offset=SIZE).numel() == 0
    assert view.tensor(torch.int64, offset=SIZE - 8).numel() == 1


def test_tensor_has_the_strides_in_bytes(torch: Any, view: View) -> None:
    made = view.tensor(torch.uint8, (4, 4), 2, (64, 2))
    assert made.stride() == (64, 2)
    assert made[1, 3] == BYTES[2 + 64 + 6]
    assert view.tensor(torch.int32, (5,), 0, 16).stride() == (4,)
    assert view.tensor(torch.int32, (3, 3), 0, (0, 4)).stride() == (0, 1)


def test_tensor_of_a_slice_is_of_its_bytes(torch: Any, view: View) -> None:
    assert view[10:20].tensor().tolist() == list(BYTES[10:20])
    assert view[::3].tensor().tolist() == list(BYTES[::3])


def test_copy_has_memory_of_its_own(torch: Any, buf: DmaBuf) -> None:
    with buf.read() as view:
        made = view.tensor(torch.int32, (4, 4), 16, copy=True)
        assert made.numpy().tobytes() == BYTES[16:80]
        made[0, 0] = 0
        assert view == BYTES
    assert buf.resv.fences(Usage.BOOKKEEP) == []
    assert made[0, 0] == 0


def test_tensor_of_a_read_view_is_refused_without_copy(torch: Any, buf: DmaBuf) -> None:
    with buf.read() as view, pytest.raises(BufferError, match="copy=True"):
        view.tensor()


@pytest.mark.parametrize(("arguments", "error", "text"), [
    (("f4",), TypeError, "torch.dtype"), ((None, (SIZE + 1,)), ValueError, "beyond"), ((None, (-2,)), ValueError, "negative"),
    ((None, (-1, -1)), ValueError, "negative"), ((None, (1,), SIZE + 1), ValueError, "offset"),
    ((None, (1,), -1), ValueError, "offset"),
    ((None, (2, 2), 0, (1,)), ValueError, "strides"), ((None, (2,), 0, (-1,)), ValueError, "positive"),
    ((None, (SIZE,), 1), ValueError, "beyond"), ((None, (3,), 0, (SIZE // 2,)), ValueError, "beyond"),
    ((None, "ab"), (TypeError, ValueError), None),
    ((None, (1.5,)), TypeError, None), ((None, (1,), "x"), TypeError, None), ((None, (1,), 0, "x"), (TypeError, ValueError), None),
    ((None, (1 << 62, 1 << 62)), ValueError, "beyond"), ((None, (-1, 2), 0, (2, 1)), ValueError, "negative"),
], ids=str)  # fmt: skip
def test_bad_argument_makes_no_tensor(torch: Any, buf: DmaBuf, arguments: tuple[Any, ...], error: Any, text: str | None) -> None:
    with buf.write() as view, pytest.raises(error, match=text):
        view.tensor(*arguments)
    gc.collect()
    assert buf.resv.fences(Usage.BOOKKEEP) == []


def test_stride_that_is_no_whole_item_is_a_valueerror(torch: Any, view: View) -> None:
    with pytest.raises(ValueError, match="multiples"):
        view.tensor(torch.int32, (2,), 0, (6,))


def test_tensor_after_the_block_is_a_valueerror(torch: Any, buf: DmaBuf) -> None:
    with buf.write() as view:
        pass
    with pytest.raises(ValueError, match="released"):
        view.tensor()


def test_tensor_that_is_kept_is_a_private_copy(torch: Any, buf: DmaBuf) -> None:
    with pytest.warns(dmabuf.KeptWarning, match="something outlived"), buf.write() as view:  # noqa: PT031
        made = view.tensor(torch.int32, (4,))
        made[0] = 77
    with buf.write(timeout=0) as view:
        assert view[0] == 77
        view[0] = 78
    assert made[0] == 77


def test_without_torch_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, view: View) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "torch":
            raise ImportError(name)
        return real(name, *rest)

    import importlib

    monkeypatch.setattr(importlib, "import_module", lambda name: without(name))
    with pytest.raises(ImportError, match=r"dmabuf\[torch\]|torch"):
        view.tensor()
