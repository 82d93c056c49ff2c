"""``view.array()``, DLPack, and ``np.asarray(buf)``."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, Usage, View
from tests.support.views import BYTES, SIZE, filled, written

np = pytest.importorskip("numpy")


@pytest.fixture
def buf() -> Iterator[DmaBuf]:
    with filled() as made:
        yield made
        gc.collect()
        assert made.resv.fences(Usage.BOOKKEEP) == []


@pytest.fixture
def view(buf: DmaBuf) -> Iterator[View]:
    with written(buf) as made:
        yield made


# ---- array() ----


def test_array_is_the_memory_as_bytes(view: View) -> None:
    made = view.array()
    assert type(made) is np.ndarray
    assert (made.dtype, made.shape, made.strides) == (np.uint8, (SIZE,), (1,))
    assert made.tobytes() == BYTES
    made[3] = 99
    assert view[3] == 99
    view[4] = 98
    assert made[4] == 98
    assert made.flags.writeable
    assert not made.flags.owndata


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">i4", "<f4", "f8", "c16", "?", "S5", "M8[us]", "V3", np.int64, float, np.dtype("<i2"),
                                   [("a", "<u2"), ("b", "u1")], "(2,2)<u2"], ids=str)  # fmt: skip
def test_array_has_the_dtype(view: View, dtype: Any) -> None:
    kind = np.dtype(dtype)
    n = SIZE // kind.itemsize
    made = view.array(dtype, (n,))
    expected = np.frombuffer(BYTES[: n * kind.itemsize], kind, n)
    assert made.dtype == expected.dtype
    assert made.shape == expected.shape
    assert made.tobytes() == expected.tobytes()


def test_array_takes_a_shape_that_can_be_read_once(view: View) -> None:
    assert view.array(shape=iter([2, 2])).shape == (2, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "expected"), [
    ((4, 8), (4, 8)), ([2, 3], (2, 3)), (7, (7,)), ((), ()), ((0,), (0,)), ((-1, 16), (64, 16)), ((4, 0), (4, 0)), (-1, (1024,)),
    (np.int64(5), (5,)), ((1,) * 32, (1,) * 32),
], ids=str)  # fmt: skip
def test_array_has_the_shape(view: View, shape: Any, expected: tuple[int, ...]) -> None:
    assert view.array("<f4", shape).shape == expected


def test_array_begins_at_the_offset(view: View) -> None:
    assert view.array(None, (3,), 5).tolist() == list(BYTES[5:8])
    assert view.array("<u2", (2,), offset=7).tobytes() == BYTES[7:11]
    assert view.array("<f8", (0,), SIZE).size == 0
    assert view.array("u1", (-1,), SIZE - 4).tolist() == list(BYTES[-4:])
    assert view[100:].array("u1", (2,), 3).tolist() == list(BYTES[103:105])


@pytest.mark.parametrize(("shape", "offset", "strides"), [
    ((4, 4), 2, (64, 2)), ((5,), 0, 16), ((3, 3), 0, (0, 1)), ((10,), 9, (-1,)), ((4, 3), SIZE - 1, (-64, -2)), ((2,), 0, (SIZE - 1,)),
    ((0, 5), 0, (1 << 40, 1)), ((1,), SIZE - 1, (1 << 40,)), ((3, 2), 500, (-100, 7)),
], ids=str)  # fmt: skip
def test_array_has_the_strides(view: View, shape: Any, offset: int, strides: Any) -> None:
    made = view.array("u1", shape, offset, strides)
    model = np.ndarray(shape, "u1", BYTES, offset, strides)
    assert made.strides == model.strides
    assert made.tolist() == model.tolist()


def test_array_of_a_read_view_is_read_only(buf: DmaBuf) -> None:
    with buf.read() as view:
        assert not view.array().flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view.array()[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.array().flags.writeable = True
        assert view == BYTES


@pytest.mark.parametrize(("arguments", "error", "text"), [
    (("no such",), TypeError, "not understood"), (("O",), TypeError, "objects"), (([("a", "O")],), TypeError, "objects"),
    (("S",), TypeError, "no size"), (("V0",), TypeError, "no size"), (("u1", (SIZE + 1,)), ValueError, "beyond"),
    (("u1", (-2,)), ValueError, "dimension of -2"), (("u1", (-1, -1)), ValueError, "dimension of -1"),
    (("<u4", (-1, 3)), ValueError, "whole"),
    (("u1", (-1, 0)), ValueError, "whole"), (("u1", (1,), SIZE + 1), ValueError, "offset"), (("u1", (1,), -1), ValueError, "offset"),
    (("u1", (SIZE,), 1), ValueError, "beyond"), (("u1", (2, 2), 0, (1,)), ValueError, "1 strides for 2"),
    (("u1", (2,), 0, (-1,)), ValueError, "beyond"), (("u1", (2,), 0, (SIZE,)), ValueError, "beyond"),
    (("u1", (-1, 2), 0, (2, 1)), ValueError, "whole"), (("u1", (1 << 62, 1 << 62)), ValueError, "dimension"),
    (("u1", (0, 1 << 62, 1 << 62)), ValueError, "too large"), (("u1", (1 << 62,), 0, (1 << 62,)), ValueError, "beyond"),
    (("u1", (1,) * 33), ValueError, "33 dimensions"), (("u1", (1,) * 33, 0, (1,) * 33), ValueError, "33 dimensions"),
    (("u1", "ab"), TypeError, "integer"), (("u1", (1.5,)), TypeError, "integer"), (("u1", 1.5), TypeError, "iterable"),
    (("u1", (1,), "x"), TypeError, "integer"), (("u1", (1,), 0, "x"), TypeError, "integer"), (("u1", (1 << 70,)), OverflowError, ""),
    (("u1", (1,), 1 << 70), OverflowError, ""), (("u1", (1,), 0, 1, 2), TypeError, "at most 4"),
], ids=str)  # fmt: skip
def test_bad_argument_makes_no_array(buf: DmaBuf, arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with buf.write() as view, pytest.raises(error, match=text or None):
        view.array(*arguments)


def test_array_of_a_slice_with_a_step_is_a_valueerror(view: View) -> None:
    with pytest.raises(ValueError, match="step"):
        view[::2].array()
    assert view[5:6:2].array().tolist() == [BYTES[5]]


def test_array_after_the_block_is_a_valueerror(buf: DmaBuf) -> None:
    with buf.write() as view:
        pass
    for take in (view.array, lambda: np.asarray(view), lambda: np.array(view), lambda: view.__array__()):
        with pytest.raises(ValueError, match="released"):
            take()


def test_array_method_gives_bytes_of_a_dtype_or_a_copy(view: View) -> None:
    assert view.__array__().tobytes() == BYTES
    assert view.__array__("u2").tolist() == list(BYTES)
    copy = view.__array__(copy=True)
    copy[0] = 1
    assert view[0] == BYTES[0]


def test_without_numpy_the_error_is_an_importerror(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys; sys.modules['numpy'] = None\nimport dmabuf\n"
        "with dmabuf.allocate(4096) as buf, buf.read() as view:\n"
        "    try: view.array()\n    except ImportError as e: print('ImportError')\n"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "ImportError\n"


def test_array_without_numpys_table_is_the_same(view: View) -> None:
    """Where NumPy's C table isn't found the class is called."""
    program = (
        "import importlib, numpy\n"
        "for name in ('numpy._core._multiarray_umath', 'numpy.core._multiarray_umath'):\n"
        "    try: del importlib.import_module(name)._ARRAY_API\n    except (ImportError, AttributeError): pass\n"
        "import dmabuf\n"
        "with dmabuf.allocate(4096) as buf, buf.write() as view:\n"
        "    view[:16] = bytes(range(16))\n"
        "    a = view.array('<u2', (2, 2), 14, (-8, -2))\n"
        "    print(a.tolist(), a.flags.writeable, view.array().shape, view.array('u1', (0,), 4096).shape)\n"
        "    a[0, 0] = 7\n    print(view[14])\n    del a\n"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[1] == "7"
    assert done.stdout.startswith("[[3854, 3340], [1798, 1284]] True (4096,) (0,)")


@pytest.mark.parametrize("use", [np.asarray, np.array, np.frombuffer], ids=["asarray", "array", "frombuffer"])
def test_array_of_a_buffer_is_a_typeerror(buf: DmaBuf, use: Any) -> None:
    with pytest.raises(TypeError):
        use(buf)


def test_asarray_of_a_buffer_says_where_its_memory_is(buf: DmaBuf) -> None:
    with pytest.raises(TypeError, match="block"):
        np.asarray(buf)


# ---- DLPack ----


def test_dlpack_says_that_it_is_on_the_cpu(view: View) -> None:
    assert view.__dlpack_device__() == (1, 0)


def test_from_dlpack_shares_the_memory(view: View) -> None:
    made = np.from_dlpack(view)
    assert made.tobytes() == BYTES
    made[0] = 200
    assert view[0] == 200
    assert np.from_dlpack(view[10:20]).tolist() == list(BYTES[10:20])
    assert np.from_dlpack(view[20:10:-3]).tolist() == list(BYTES[20:10:-3])
    assert np.from_dlpack(view[7:7]).size == 0


def test_from_dlpack_of_a_read_view_is_read_only(buf: DmaBuf) -> None:
    with buf.read() as view:
        assert not np.from_dlpack(view).flags.writeable


def test_from_dlpack_copies_when_asked(buf: DmaBuf) -> None:
    with buf.read() as view:
        made = np.from_dlpack(view, copy=True)
        stepped = np.from_dlpack(view[::3], copy=True)
        assert buf.resv.fences(Usage.BOOKKEEP) != []
    assert made.tobytes() == BYTES
    assert stepped.tobytes() == BYTES[::3]
    assert buf.resv.fences(Usage.BOOKKEEP) == []


def named(capsule: Any) -> bytes:
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    found: bytes = name(capsule)
    return found


@pytest.mark.parametrize(("arguments", "name"), [
    ({}, b"dltensor"), ({"max_version": None}, b"dltensor"), ({"max_version": (0, 8)}, b"dltensor"),
    ({"max_version": (1, 0)}, b"dltensor_versioned"), ({"max_version": (1, 3)}, b"dltensor_versioned"),
    ({"max_version": (2, 0)}, b"dltensor_versioned"), ({"dl_device": (1, 0)}, b"dltensor"), ({"copy": False}, b"dltensor"),
    ({"stream": None}, b"dltensor"),
], ids=str)  # fmt: skip
def test_capsule_is_of_the_version_that_the_consumer_knows(view: View, arguments: Any, name: bytes) -> None:
    assert named(view.__dlpack__(**arguments)) == name


@pytest.mark.parametrize(("arguments", "error"), [
    ({"stream": 1}, BufferError), ({"dl_device": (2, 0)}, BufferError), ({"dl_device": 1}, TypeError), ({"dl_device": ()}, IndexError),
    ({"max_version": 1}, TypeError), ({"max_version": ()}, IndexError), ({"max_version": ("x", 0)}, TypeError),
    ({"max_version": (1 << 70, 0)}, OverflowError), ({"other": 1}, TypeError),
], ids=str)  # fmt: skip
def test_bad_argument_makes_no_capsule(view: View, arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        view.__dlpack__(**arguments)


def test_read_view_is_refused_to_consumers_that_cannot_be_told(buf: DmaBuf) -> None:
    with buf.read() as view:
        for arguments in ({}, {"max_version": (0, 8)}, {"copy": False}):
            with pytest.raises(BufferError, match="copy=True"):
                view.__dlpack__(**arguments)
        assert named(view.__dlpack__(copy=True)) == b"dltensor"
        assert named(view.__dlpack__(max_version=(1, 0))) == b"dltensor_versioned"


def test_dlpack_after_the_block_is_a_valueerror(buf: DmaBuf) -> None:
    with buf.write() as view:
        pass
    with pytest.raises(ValueError, match="released"):
        view.__dlpack__()


@pytest.mark.parametrize("version", [None, (1, 0)], ids=str)
def test_dropped_capsule_keeps_nothing(buf: DmaBuf, version: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with buf.write() as view:
            view.__dlpack__(max_version=version)
            view.__dlpack__(max_version=version, copy=True)
    assert buf.resv.fences(Usage.BOOKKEEP) == []


@pytest.mark.parametrize("version", [None, (1, 0)], ids=str)
def test_kept_capsule_keeps_the_access(buf: DmaBuf, version: Any) -> None:
    with pytest.warns(dmabuf.KeptWarning), buf.write() as view:
        capsule = view.__dlpack__(max_version=version)
    assert buf.resv.fences(Usage.BOOKKEEP) == []
    with buf.write() as view:
        view[0] = 1
    del capsule


class Unversioned(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )  # fmt: skip


def taken(capsule: Any) -> tuple[Unversioned, int]:
    """What a consumer in C does: take the tensor out of the capsule. Its deleter releases the GIL here, as from a foreign thread."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer(capsule, b"dltensor")
    rename = ctypes.pythonapi.PyCapsule_SetName
    rename.argtypes = [ctypes.py_object, ctypes.c_char_p]
    rename(capsule, b"used_dltensor")
    return Unversioned.from_address(address), address


@pytest.mark.parametrize("elsewhere", [False, True], ids=["this thread", "another thread"])
def test_deleter_of_a_consumer_ends_the_access(buf: DmaBuf, elsewhere: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dmabuf.KeptWarning)
        with buf.read() as view, pytest.raises(BufferError):
            view.__dlpack__()
        with buf.write() as view:
            capsule = view.__dlpack__()
            tensor, address = taken(capsule)
            del capsule
            assert (tensor.ndim, tensor.code, tensor.bits, tensor.lanes, tensor.shape[0], tensor.strides[0]) == (1, 1, 8, 1, SIZE, 1)
            assert ctypes.string_at(tensor.data, 16) == BYTES[:16]
            thread = threading.Thread(target=tensor.deleter, args=(address,))
            if elsewhere:
                thread.start()
                thread.join()
            else:
                tensor.deleter(address)
    assert buf.resv.fences(Usage.BOOKKEEP) == []


def test_arrays_are_named_in_the_warning(buf: DmaBuf) -> None:
    with pytest.warns(dmabuf.KeptWarning, match=r"crop \(numpy.ndarray\)"), buf.write() as view:
        crop = view.array("u1", (4, 4))[1:3]
    assert crop.shape == (2, 4)
