"""Arguments of a wrong type are a TypeError that names the operation and the argument."""

from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import DmaBuf, DmaFenceArray, Timeline, lock_all


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda buf: dmabuf.allocate(4096, name=5), "allocate: a name is str or bytes, not int"),
        (lambda buf: setattr(buf, "name", 5), "name: a name is str or bytes, not int"),
        (lambda buf: dmabuf.get("3"), "get: fd is the number of a descriptor, an int, not str"),
        (lambda buf: dmabuf.get(buf), "get: fd is the number of a descriptor, an int, not DmaBuf"),
        (lambda buf: buf.read(timeout="1").__enter__(), "read: a timeout is a number of seconds or None, not str"),
        (lambda buf: dmabuf.wait_any([dmabuf.stub_fence()], "1"), "wait_any: a timeout is a number of seconds or None, not str"),
        (lambda buf: DmaFenceArray(dmabuf.stub_fence()), "DmaFenceArray: fences is a list of fences, as [a, b], not one DmaFence"),
        (lambda buf: lock_all([buf]).__enter__(), "lock_all: a DmaResv is expected, as buf.resv, not DmaBuf"),
        (lambda buf: Timeline(5), "timeline: name is str or bytes, not int"),
        (lambda buf: Timeline("camera", driver=5), "timeline: driver is str or bytes, not int"),
    ],
)
def test_wrong_type_is_a_type_error_that_names_the_argument(call: Callable[[DmaBuf], object], message: str) -> None:
    with dmabuf.allocate(4096) as buf, pytest.raises(TypeError) as caught:
        call(buf)
    assert str(caught.value) == message


def test_too_long_name_is_shown_by_the_error() -> None:
    with pytest.raises(dmabuf.errors.InvalidError) as caught:
        dmabuf.allocate(4096, name="x" * 32)
    assert str(caught.value) == f"allocate: name '{'x' * 32}': the name has 32 bytes (EINVAL); use at most 31 bytes, without a NUL"
