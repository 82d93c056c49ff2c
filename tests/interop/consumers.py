"""What takes a view: how each consumer is called, and what was measured of it. docs/views.md has the same in words."""

from __future__ import annotations

import ctypes
import hashlib
import io
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import dmabuf
from dmabuf import View

SIDE = 64
SIZE = SIDE * SIDE

SHARES = "shares the memory"
COPIES = "copies it"
CALL = "uses it during the call"
REFUSES = "refuses"
READ_ONLY = "shares it, read-only"
WRITABLE = "shares it, and can write it"  # a hole: torch and cffi don't heed read-only
FREE = "nothing is kept"
DETACHED = "a private copy is kept"


class Consumer(NamedTuple):
    """``make(view)`` takes the view, ``first(made)`` is the first byte that it has, ``put(made, byte)`` writes that one.

    ``inside``: what it does in a ``write()`` block. ``reading``: in a ``read()`` block. ``after``: what is kept after a block.
    """

    name: str
    make: Callable[[View], Any]
    first: Callable[[Any], int]
    put: Callable[[Any, int], None] | None
    inside: str
    reading: str
    after: str
    packages: tuple[str, ...] = ()


def _set(made: Any, byte: int) -> None:
    made[0] = byte


def _set_flat(made: Any, byte: int) -> None:
    made.reshape(-1)[0] = byte


def _item(made: Any) -> int:
    return int(made[0])


def _flat(made: Any) -> int:
    return int(made.reshape(-1)[0])


def _bytes(made: Any) -> int:
    return bytes(memoryview(made).cast("B")[:1])[0]


def _square(view: View) -> Any:
    return view.array("u1", (SIDE, SIDE))


def numpy() -> Any:
    return pytest.importorskip("numpy")


def torch() -> Any:
    return pytest.importorskip("torch")


def av() -> Any:
    return pytest.importorskip("av")


def cv2() -> Any:
    return pytest.importorskip("cv2")


def image() -> Any:
    return pytest.importorskip("PIL.Image")


def arrow() -> Any:
    return pytest.importorskip("pyarrow")


def cffi() -> Any:
    return pytest.importorskip("cffi").FFI()


def _nd(buffer: Any) -> Any:
    return numpy().ndarray(SIZE, numpy().uint8, buffer=buffer)


def _frame(view: View) -> Any:
    return av().VideoFrame.from_numpy_buffer(_square(view), format="gray")


def _frame_copy(view: View) -> Any:
    return av().VideoFrame.from_ndarray(_square(view), format="gray")


def _plane(view: View) -> Any:
    made = av().VideoFrame(SIDE, SIDE, "gray")
    made.planes[0].update(view)
    return made


def _plane_byte(made: Any) -> int:
    return memoryview(made.planes[0])[0]


def _set_plane(made: Any, byte: int) -> None:
    memoryview(made.planes[0])[0] = byte


def _inverted(view: View) -> Any:
    """Invert twice, in place."""
    made = _square(view)
    cv2().bitwise_not(made, dst=made)
    return cv2().bitwise_not(made, dst=made)


def _sent(view: View) -> bytes:
    a, b = socket.socketpair()
    with a, b:
        a.sendall(view[:16])
        return b.recv(16)


def _compiled(view: View) -> int:
    numba = pytest.importorskip("numba")
    return int(numba.njit(lambda array: array[0])(view.array()))


def _hashed(view: View) -> bytes:
    return view.tobytes() if hashlib.sha256(view).digest() == hashlib.sha256(view.tobytes()).digest() else b"\xff"


ALL = (
    Consumer("view", lambda v: v, _item, _set, SHARES, READ_ONLY, FREE),
    Consumer("slice", lambda v: v[:5], _item, _set, SHARES, READ_ONLY, FREE),
    Consumer("memoryview", memoryview, _item, _set, SHARES, READ_ONLY, DETACHED),
    Consumer("cast", lambda v: v.cast("Q"), _bytes, lambda m, b: _set(m.cast("B"), b), SHARES, READ_ONLY, DETACHED),
    Consumer("pickle.PickleBuffer", pickle.PickleBuffer, _bytes, lambda m, b: _set(memoryview(m), b), SHARES, READ_ONLY, DETACHED),
    Consumer("bytes", bytes, _item, None, COPIES, COPIES, FREE),
    Consumer("struct.unpack_from", lambda v: struct.unpack_from("<B", v), _item, None, COPIES, COPIES, FREE),
    Consumer("struct.pack_into", lambda v: [struct.pack_into("<B", v, 0, v[0]), v[0]][1:], _item, None, CALL, REFUSES, FREE),
    Consumer("socket.sendall", _sent, _item, None, CALL, CALL, FREE),
    Consumer("hashlib.sha256", _hashed, _item, None, CALL, CALL, FREE),
    Consumer("io.BytesIO", lambda v: io.BytesIO(v).getvalue(), _item, None, COPIES, COPIES, FREE),
    Consumer("readinto", lambda v: [io.BytesIO(v.tobytes()).readinto(v), v[0]][1:], _item, None, CALL, REFUSES, FREE),
    Consumer("ctypes from_buffer", lambda v: (ctypes.c_ubyte * 16).from_buffer(v), _item, _set, SHARES, REFUSES, DETACHED),
    Consumer("ctypes from_buffer_copy", lambda v: (ctypes.c_ubyte * 16).from_buffer_copy(v), _item, _set, COPIES, COPIES, FREE),
    Consumer("view.array", lambda v: v.array(), _item, _set, SHARES, READ_ONLY, DETACHED, ("numpy",)),
    Consumer("np.frombuffer", lambda v: numpy().frombuffer(v, "u1"), _item, _set, SHARES, READ_ONLY, DETACHED, ("numpy",)),
    Consumer("np.asarray", lambda v: numpy().asarray(v), _item, _set, SHARES, READ_ONLY, DETACHED, ("numpy",)),
    Consumer("np.from_dlpack", lambda v: numpy().from_dlpack(v), _item, _set, SHARES, READ_ONLY, DETACHED, ("numpy",)),
    Consumer("np.array", lambda v: numpy().array(v), _item, _set, COPIES, COPIES, FREE, ("numpy",)),
    Consumer("np.ndarray(buffer=view)", lambda v: _nd(v), _item, _set, REFUSES, REFUSES, FREE, ("numpy",)),
    Consumer("np.ndarray(buffer=memoryview(view))", lambda v: _nd(memoryview(v)), _item, _set, SHARES, READ_ONLY, DETACHED, ("numpy",)),
    Consumer("view.tensor", lambda v: v.tensor(), _item, _set, SHARES, REFUSES, DETACHED, ("torch",)),
    Consumer("view.tensor(copy=True)", lambda v: v.tensor(copy=True), _item, _set, COPIES, COPIES, FREE, ("torch",)),
    Consumer("torch.frombuffer", lambda v: torch().frombuffer(v, dtype=torch().uint8), _item, _set,
             SHARES, REFUSES, DETACHED, ("torch",)),
    Consumer("torch.asarray", lambda v: torch().asarray(v, dtype=torch().uint8), _item, _set, SHARES, REFUSES, DETACHED, ("torch",)),
    Consumer("torch.from_dlpack", lambda v: torch().from_dlpack(v), _item, _set, SHARES, REFUSES, DETACHED, ("torch",)),
    Consumer("torch.tensor", lambda v: torch().tensor(v), _item, _set, COPIES, REFUSES, FREE, ("torch",)),
    Consumer("torch.from_numpy", lambda v: torch().from_numpy(v.array()), _item, _set, SHARES, WRITABLE, DETACHED, ("torch", "numpy")),
    Consumer("av.VideoFrame.from_numpy_buffer", _frame, _plane_byte, _set_plane, SHARES, WRITABLE, DETACHED, ("av", "numpy")),
    Consumer("av.VideoFrame.from_ndarray", _frame_copy, _plane_byte, _set_plane, COPIES, COPIES, FREE, ("av", "numpy")),
    Consumer("av plane.update", _plane, _plane_byte, _set_plane, COPIES, COPIES, FREE, ("av",)),
    Consumer("av.Packet", lambda v: av().Packet(v), _bytes, None, SHARES, READ_ONLY, DETACHED, ("av",)),
    Consumer("cv2, dst=view.array()", _inverted, _flat, _set_flat, SHARES, REFUSES, DETACHED, ("cv2", "numpy")),
    Consumer("cv2.bitwise_not", lambda v: 255 - cv2().bitwise_not(_square(v)), _flat, _set_flat, COPIES, COPIES, FREE, ("cv2", "numpy")),
    Consumer("PIL.Image.frombuffer", lambda v: image().frombuffer("L", (SIDE, SIDE), v, "raw", "L", 0, 1),
             lambda m: int(m.getpixel((0, 0))), None, SHARES, READ_ONLY, DETACHED, ("PIL",)),
    Consumer("PIL.Image.fromarray", lambda v: image().fromarray(_square(v)),
             lambda m: int(m.getpixel((0, 0))), None, SHARES, READ_ONLY, DETACHED, ("PIL", "numpy")),
    Consumer("pyarrow.py_buffer", lambda v: arrow().py_buffer(v), _bytes, lambda m, b: _set(memoryview(m), b), SHARES, READ_ONLY, DETACHED,
             ("pyarrow",)),
    Consumer("cffi from_buffer", lambda v: cffi().from_buffer("unsigned char[]", v), _item, _set, SHARES, WRITABLE, DETACHED, ("cffi",)),
    Consumer("cffi from_buffer(require_writable=True)", lambda v: cffi().from_buffer("unsigned char[]", v, require_writable=True),
             _item, _set, SHARES, REFUSES, DETACHED, ("cffi",)),
    Consumer("numba.njit", lambda v: [_compiled(v)], _item, None, CALL, CALL, FREE, ("numba", "numpy")),
)  # fmt: skip


class Seen(NamedTuple):
    """What a consumer did."""

    kept: Any
    what: str


def use(consumer: Consumer, view: View) -> Seen:
    """Take the view, which is writable, or read-only if it says so, and say what that was."""
    for package in consumer.packages:
        pytest.importorskip(package)
    before = view[0]
    try:
        made = consumer.make(view)
    except (BufferError, TypeError, ValueError, RuntimeError, dmabuf.DmaBufError) as e:
        if isinstance(e, ValueError) and "released" in str(e):
            raise
        return Seen(None, REFUSES)
    except Exception as e:  # OpenCV's and PyAV's own
        if type(e).__module__.partition(".")[0] not in ("cv2", "av"):
            raise
        return Seen(None, REFUSES)
    assert consumer.first(made) == before
    return Seen(made, "")
