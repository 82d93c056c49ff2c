"""View: the bytes of a block, as a memoryview of bytes, as long as the block lasts."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dmabuf import DmaBuf, View
from tests.support.views import BYTES, SIZE, filled, written


@pytest.fixture
def buf() -> Iterator[DmaBuf]:
    with filled() as made:
        yield made


@pytest.fixture
def view(buf: DmaBuf) -> Iterator[View]:
    with written(buf) as made:
        yield made


INDICES = [0, 1, SIZE - 1, -1, -SIZE]
SLICES = [
    slice(None), slice(5, 9), slice(-3, None), slice(None, None, 2), slice(None, None, -1), slice(10, 2, -3),
    slice(7, 7), slice(SIZE, None), slice(0, 1), slice(9, 2), slice(-SIZE - 5, 3), slice(100, 101, 1000),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES)
def test_an_index_is_a_byte(view: View, index: int) -> None:
    assert view[index] == BYTES[index]
    view[index] = 200
    assert view[index] == 200


@pytest.mark.parametrize("index", [SIZE, -SIZE - 1, 1 << 70, -(1 << 70)])
def test_an_index_outside_is_an_indexerror(view: View, index: int) -> None:
    with pytest.raises(IndexError):
        view[index]
    with pytest.raises(IndexError):
        view[index] = 1


@pytest.mark.parametrize("part", SLICES, ids=str)
def test_a_slice_is_what_a_memoryview_has(view: View, part: slice) -> None:
    mine, its = view[part], memoryview(BYTES)[part]
    assert (len(mine), mine.nbytes, bytes(mine), list(mine)) == (len(its), its.nbytes, bytes(its), list(its))
    assert (mine.contiguous, mine.c_contiguous, mine.f_contiguous) == (its.contiguous, its.c_contiguous, its.f_contiguous)
    assert mine == its
    assert mine == bytes(its)
    assert mine[::-1] == its[::-1]


@pytest.mark.parametrize("part", SLICES, ids=str)
def test_a_slice_is_assigned_as_to_a_bytearray(view: View, part: slice) -> None:
    model = bytearray(BYTES)
    new = bytes(range(256)) * 16
    count = len(model[part])
    model[part] = new[:count]
    view[part] = new[:count]
    assert view == model


def test_overlapping_bytes_are_copied_as_if_at_once(view: View) -> None:
    model = bytearray(BYTES)
    model[10:100] = model[5:95]
    view[10:100] = view[5:95]
    model[::-1] = bytes(model)
    view[::-1] = view
    assert view == model


@pytest.mark.parametrize(("key", "value", "error"), [
    (0, 256, ValueError), (0, -1, ValueError), (0, 1 << 80, ValueError), (0, "x", TypeError), (0, None, TypeError), (0, 1.5, TypeError),
    ("a", 1, TypeError), (None, 1, TypeError), ((0, 1), 1, TypeError), (slice(0, 2), b"abc", ValueError), (slice(0, 2), b"", ValueError),
    (slice(0, 2), "ab", TypeError), (slice(0, 2), 3, TypeError), (slice(0, "x"), b"", TypeError), (slice(0, 4, 0), b"", ValueError),
], ids=str)  # fmt: skip
def test_a_bad_assignment_changes_nothing(view: View, key: Any, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        view[key] = value
    assert view == BYTES


def test_bytes_cannot_be_deleted(view: Any) -> None:
    with pytest.raises(TypeError, match="never changes"):
        del view[0]


@pytest.mark.parametrize("key", ["a", None, (0, 1), 1.5])
def test_a_bad_key_is_a_typeerror(view: Any, key: Any) -> None:
    with pytest.raises(TypeError):
        view[key]


def test_it_describes_itself_as_a_memoryview_does(buf: DmaBuf, view: View) -> None:
    its = memoryview(BYTES)
    for name in ("nbytes", "format", "itemsize", "ndim", "shape", "strides", "suboffsets", "contiguous", "c_contiguous", "f_contiguous"):
        assert getattr(view, name) == getattr(its, name), name
    assert not view.readonly
    assert view.obj is buf
    assert view[::2].strides == (2,)


@pytest.mark.parametrize("call", [
    lambda v: v.tobytes(), lambda v: v.tolist(), lambda v: v.hex(), lambda v: v.hex(":", 2), lambda v: v.cast("H").tolist(),
    lambda v: v.cast("B", (64, 64)).tolist(), lambda v: bytes(v), lambda v: bytearray(v), lambda v: list(v), lambda v: sum(v),
    lambda v: 7 in v, lambda v: list(reversed(v)), lambda v: v.toreadonly().tobytes(), lambda v: len(v),
    lambda v: struct.unpack_from("<Q", v, 8), lambda v: hashlib.sha256(v).digest(), lambda v: zlib.crc32(v),
    lambda v: int.from_bytes(v, "big"),
    lambda v: re.search(rb"\x07\x0e", v).span(), lambda v: b"".join([v, v]), lambda v: io.BytesIO(v).read(), lambda v: b"x" + v,
    lambda v: memoryview(v).tobytes(), lambda v: pickle.loads(pickle.dumps(bytes(v))),
], ids=range(24))  # fmt: skip
def test_what_takes_a_memoryview_takes_a_view(view: View, call: Callable[[Any], Any]) -> None:
    assert call(view) == call(memoryview(BYTES))


def test_files_and_sockets_take_it(view: View, tmp_path: Any) -> None:
    path = tmp_path / "out"
    path.write_bytes(view)
    view[:] = bytes(SIZE)
    with open(path, "rb") as file:
        assert file.readinto(view) == SIZE
    assert view == BYTES
    a, b = socket.socketpair()
    with a, b:
        a.sendall(view[:100])
        assert b.recv_into(view[200:300]) == 100
        assert view[200:300] == BYTES[:100]
    fd = os.open(path, os.O_RDWR)
    assert os.preadv(fd, [view[:10], view[20:30]], 100) == 20
    os.close(fd)
    assert view[20:30] == BYTES[110:120]


@pytest.mark.parametrize(("other", "equal"), [
    (BYTES, True), (bytearray(BYTES), True), (BYTES[:-1], False), (b"", False), (5, False), ("x", False),
])  # fmt: skip
def test_comparison(view: View, other: object, equal: bool) -> None:
    assert (view == other) is equal
    assert (view != other) is not equal


def test_it_has_no_order_and_no_hash(view: Any) -> None:
    with pytest.raises(TypeError):
        view < BYTES  # noqa: B015
    with pytest.raises(TypeError):
        hash(view)


def test_it_cannot_be_pickled(view: View) -> None:
    with pytest.raises(TypeError):
        pickle.dumps(view)


@pytest.mark.parametrize("ask", [
    lambda v: v[0], lambda v: v[0:1], lambda v: len(v), lambda v: bytes(v), lambda v: memoryview(v), lambda v: v.tobytes(),
    lambda v: v.cast("B"), lambda v: v.nbytes, lambda v: v.readonly, lambda v: v.shape,
    lambda v: v.toreadonly(), lambda v: list(v), lambda v: v.__enter__(),
    lambda v: v.array(), lambda v: v.__dlpack__(), lambda v: v.tensor(),
], ids=range(16))  # fmt: skip
@pytest.mark.parametrize("how", ["the block was left", "released", "another block was entered"])
def test_after_its_end_each_use_is_a_valueerror(buf: DmaBuf, ask: Callable[[Any], Any], how: str) -> None:
    if "array" in ask.__code__.co_names:
        pytest.importorskip("numpy")
    block = buf.write()
    with block as view:
        if how == "released":
            view.release()
            view.release()
            with pytest.raises(ValueError, match="released"):
                ask(view)
    if how == "another block was entered":
        with block, pytest.raises(ValueError, match="released"):
            ask(view)
    with pytest.raises(ValueError, match="released"):
        ask(view)
    assert view != BYTES
    assert "View" in repr(view)


def test_a_view_is_a_context_manager_that_releases_it(buf: DmaBuf) -> None:
    with buf.read() as view:
        with view[:8] as part:
            assert part == BYTES[:8]
        with pytest.raises(ValueError, match="released"):
            part[0]
        assert view == BYTES


def test_a_read_view_cannot_be_written(buf: DmaBuf) -> None:
    view: Any
    with buf.read() as view:
        assert view.readonly
        assert memoryview(view).readonly
        with pytest.raises(TypeError, match="read-only"):
            view[0] = 1
        with pytest.raises(TypeError, match="read-only"):
            view[0:2] = b"ab"
        with pytest.raises((TypeError, BufferError)):
            io.BytesIO(b"abc").readinto(view)
        with pytest.raises((TypeError, BufferError)):
            struct.pack_into("B", view, 0, 1)
        assert view == BYTES


class Leaves:
    """An index, or a value, whose method leaves the block."""

    def __init__(self, leave: Callable[[], object], value: int = 0) -> None:
        self.leave, self.value = leave, value

    def __index__(self) -> int:
        self.leave()
        return self.value


@pytest.mark.parametrize("use", [
    lambda v, x: v[x], lambda v, x: v[x:5], lambda v, x: v[0:x], lambda v, x: v.__setitem__(x, 1), lambda v, x: v.__setitem__(0, x),
    lambda v, x: v.__setitem__(slice(x, 4), b"1234"), lambda v, x: v.array(shape=x), lambda v, x: v.array(shape=(1,), strides=(x,)),
    lambda v, x: v.array(offset=x),
], ids=range(9))  # fmt: skip
def test_an_object_that_leaves_the_block_in_the_middle_is_a_valueerror(buf: DmaBuf, use: Callable[[Any, Any], Any]) -> None:
    pytest.importorskip("numpy")
    block = buf.write()
    view = block.__enter__()
    with pytest.raises(ValueError, match="released"):
        use(view, Leaves(lambda: block.__exit__(None, None, None)))
    with buf.read(timeout=0) as again:
        assert again == BYTES


def test_views_of_two_threads_are_apart(buf: DmaBuf) -> None:
    seen = []

    def reads() -> None:
        with buf.read() as other:
            seen.append(other[3])

    with buf.read() as view:
        thread = threading.Thread(target=reads)
        thread.start()
        thread.join()
        assert view[3] == BYTES[3]
    assert seen == [BYTES[3]]


def test_a_block_that_is_entered_twice_is_ebusy(buf: DmaBuf) -> None:
    block = buf.read()
    with block as view, pytest.raises(OSError, match=r"already entered.*EBUSY"):
        block.__enter__()
    with block as view:
        assert view == BYTES
