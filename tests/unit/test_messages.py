"""Messages name what they are about, and say what to do instead."""

import errno
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain.records import in_words
from dmabuf.errors import DmaBufError


def refused(number: int, says: str, call: Callable[[], object]) -> None:
    with pytest.raises(DmaBufError, match=says) as caught:
        call()
    assert caught.value.errno == number
    assert caught.value.remedy


def send_as_a_list(buf: DmaBuf) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        dmabuf.send(ours, [buf])  # type: ignore[arg-type]


@pytest.fixture
def camera() -> Iterator[DmaBuf]:
    with dmabuf.allocate(4096, name="camera-3") as buf:
        yield buf


# ---- a buffer's name ----


def test_message_about_a_named_buffer_has_the_name(camera: DmaBuf) -> None:
    says = f"mmap: <dmabuf.DmaBuf 'camera-3' fd {camera.fileno()} ino {camera.ino} 4096 bytes memfd>: "
    refused(errno.EINVAL, says, lambda: camera.mmap(1))


def test_message_about_a_buffer_without_a_name_has_its_inode() -> None:
    with dmabuf.allocate(4096) as buf:
        refused(errno.EINVAL, rf"mmap: <dmabuf.DmaBuf fd \d+ ino {buf.ino} ", lambda: buf.mmap(1))


def test_message_has_the_name_that_the_buffer_has_now(camera: DmaBuf) -> None:
    camera.name = "it's\nnew"
    assert repr("it's\nnew") in repr(camera)
    assert "\n" not in repr(camera)
    assert str(handle_of(camera).shared) == f'buffer "it\'s\\nnew" ino {camera.ino}'


def test_closed_handle_has_the_name_while_the_record_lives(camera: DmaBuf) -> None:
    other = camera.get_dma_buf()
    other.close()
    refused(errno.EBADF, "read: <dmabuf.DmaBuf 'camera-3' closed ino", lambda: other.read().__enter__())


def test_closed_buffer_has_no_name_of_another_one() -> None:
    buf = dmabuf.allocate(4096, name="first")
    buf.close()
    with dmabuf.allocate(4096, name="second"):  # has the slot of the first one's record
        assert "second" not in repr(buf)


def test_attachment_is_named_by_its_buffer(camera: DmaBuf) -> None:
    attachment = camera.attach(dmabuf.Device("gpu"))
    assert repr(attachment) == f"<dmabuf.DmaBufAttachment gpu on buffer 'camera-3' ino {camera.ino} static>"
    attachment.detach()


def test_spill_buffer_is_named_in_messages(tmp_path: Path) -> None:
    heap = dmabuf.SpillHeap(budget=8192, directory=tmp_path, memory_timeout=0)
    with heap.allocate(8192, name="frame") as frame, heap.allocate(8192) as other, frame.write():
        refused(errno.ENOMEM, "move in: <spill buffer ino", lambda: other.write().__enter__())
    with heap.allocate(8192, name="frame") as frame, heap.allocate(8192) as other, other.write():
        refused(errno.ENOMEM, f"move in: <spill buffer 'frame' ino {frame.ino} ", lambda: frame.write().__enter__())
    heap.close()


def test_inode_of_an_unknown_buffer_is_its_words(camera: DmaBuf) -> None:
    shared = handle_of(camera).shared
    assert in_words(camera.domain, shared.dev, shared.ino) == f"buffer 'camera-3' ino {shared.ino}"
    assert in_words(camera.domain, shared.dev, 1) == "buffer ino 1"


def test_range_is_named_by_its_buffer(camera: DmaBuf) -> None:
    assert "bytes at 0 of <dmabuf.DmaBuf 'camera-3' fd" in repr(dmabuf.BufferRange(camera, 0, 16))


# ---- arguments ----


def test_shape_without_elements_says_so() -> None:
    says = r"allocate: shape \(4, 0\): it has no elements, .*give each dimension at least 1"
    refused(errno.EINVAL, says, lambda: dmabuf.allocate(shape=(4, 0), dtype="u1"))
    with dmabuf.allocate(64, shape=(4, 0), dtype="u1") as buf:
        assert buf.layout is not None


@pytest.mark.parametrize(("dtype", "name"), [(float, "float64"), ("float", "float64"), (int, "int64"), (complex, "complex128")])
def test_type_of_python_is_answered_with_the_dtype_that_numpy_takes_it_for(dtype: object, name: str) -> None:
    says = f"layout: tensor: .* doesn't say how many bits it has .EINVAL.; pass '{name}', which numpy takes it for, or another of: bool, "
    refused(errno.EINVAL, says, lambda: dmabuf.allocate(shape=(4,), dtype=dtype))


def test_empty_path_of_a_domain_says_so() -> None:
    refused(errno.EINVAL, "open domain: '': the path is empty", lambda: dmabuf.Domain.open(""))


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("access: say which buffers are read and which are written, as access", lambda buf: dmabuf.access(buf)),
        ("access: say which buffers are read", lambda buf: dmabuf.access([buf])),
        ("allocate: pass a number of bytes, or shape= and dtype=, or layout=", lambda _: dmabuf.allocate()),
        ("range: buf is a DmaBuf, not int", lambda _: dmabuf.BufferRange(3, 0, 1)),
        ("mmap: offset is a number of bytes, an int, not str", lambda buf: buf.mmap("0")),
        ("mmap: length is a number of bytes, an int, not float", lambda buf: buf.mmap(0, 4096.0)),
        ("wait_any: fences is a list of fences, as .a, b., not int", lambda _: dmabuf.wait_any(3)),
        ("device: a name is a str, not int", lambda _: dmabuf.Device(3)),
        ("open domain: expected the path of a directory, not int", lambda _: dmabuf.Domain.open(3)),
        ("not list; pass its items one by one, as send", lambda buf: send_as_a_list(buf)),
    ],
)
def test_argument_of_a_wrong_type_says_what_to_pass(camera: DmaBuf, says: str, call: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=says):
        call(camera)


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        ("beyond the 4096 bytes of the view: give a smaller one", {"shape": (5000,)}),
        ("the offset -2 is not within the 4096 bytes of the view: give one that is", {"offset": -2}),
        ("2 strides for 1 dimensions: give one for each", {"shape": (3,), "strides": (1, 2)}),
        ("dimension of -2: give the whole shape", {"shape": (-2,)}),
    ],
)
def test_array_that_does_not_fit_says_what_to_give(camera: DmaBuf, says: str, arguments: dict[str, Any]) -> None:
    with camera.read() as view, pytest.raises(ValueError, match=says):
        view.array("u1", **arguments)


def test_resv_is_named_by_its_buffer(camera: DmaBuf) -> None:
    assert repr(camera.resv) == f"<dmabuf.DmaResv of buffer 'camera-3' ino {camera.ino}>"
