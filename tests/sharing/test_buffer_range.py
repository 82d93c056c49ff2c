"""Ranges of buffers: the offset is in the value, and nobody can forget it."""

import asyncio
import errno
import mmap
import socket
import struct
from multiprocessing import resource_sharer
from typing import Any

import pytest

import dmabuf
from dmabuf import BufferRange
from dmabuf.sharing import items
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno

PAGE = mmap.PAGESIZE
SIZE = 4 * PAGE

# (offset, length): unaligned, over a page's edge, one byte, the whole, the end.
PARTS = [(1, 7), (PAGE - 3, 6), (0, 1), (0, SIZE), (SIZE - 1, 1), (PAGE, PAGE), (PAGE + 5, 2 * PAGE)]


def filled(buf: dmabuf.DmaBuf) -> bytes:
    content = bytes(i * 7 % 251 for i in range(buf.size))
    with buf.write() as view:
        view[:] = content
    return content


@pytest.fixture(params=PARTS, ids=[f"{offset}+{length}" for offset, length in PARTS])
def part(request: pytest.FixtureRequest, buf: dmabuf.DmaBuf) -> BufferRange:
    return buf.export_range(*request.param)


@pytest.fixture
def buf() -> Any:
    with dmabuf.allocate(SIZE) as made:
        yield made


def test_a_range_shows_its_bytes_and_no_others(buf: dmabuf.DmaBuf, part: BufferRange) -> None:
    content = filled(buf)[part.offset : part.offset + part.length]
    with part.read() as view:
        assert view.readonly
        assert view.tobytes() == content
    with part.mmap() as mapped:
        assert mapped.view.tobytes() == content
        assert mapped.page_offset % PAGE == 0


def test_what_is_written_to_a_range_is_nowhere_else(buf: dmabuf.DmaBuf, part: BufferRange) -> None:
    content = bytearray(filled(buf))
    with part.write() as view:
        view[:] = b"\xff" * len(part)
    content[part.offset : part.offset + part.length] = b"\xff" * len(part)
    with buf.read() as whole:
        assert whole.tobytes() == content


def test_a_range_of_a_range_counts_from_its_start(buf: dmabuf.DmaBuf) -> None:
    content = filled(buf)
    part = buf.export_range(100, 1000)[10:50][5:]
    assert (part.offset, part.length) == (115, 35)
    with part.read() as view:
        assert view.tobytes() == content[115:150]
    assert buf.export_range(100, 1000)[-10:].offset == 1090


def test_the_rest_is_the_default(buf: dmabuf.DmaBuf) -> None:
    assert (len(buf.export_range()), len(buf.export_range(1))) == (SIZE, SIZE - 1)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 0), (0, -1), (0, SIZE + 1), (SIZE, 1), (SIZE, None), (1, SIZE), (1 << 70, 1)])
def test_a_range_that_is_not_inside_is_einval(buf: dmabuf.DmaBuf, offset: int, length: int | None) -> None:
    with raises_errno(errno.EINVAL) as caught:
        buf.export_range(offset, length)
    assert str(SIZE) in str(caught.value)


@pytest.mark.parametrize("part", [slice(5, 5), slice(7, 5), slice(0, 8, 2), slice(SIZE, None)])
def test_a_slice_of_nothing_or_with_a_step_is_einval(buf: dmabuf.DmaBuf, part: slice) -> None:
    with raises_errno(errno.EINVAL):
        buf.export_range()[part]


def test_an_index_is_a_type_error(buf: dmabuf.DmaBuf) -> None:
    with pytest.raises(TypeError, match="sliced"):
        buf.export_range()[3]  # type: ignore[index]


def test_ranges_are_equal_when_all_three_are(buf: dmabuf.DmaBuf) -> None:
    with dmabuf.get(buf.fileno()) as again:
        assert buf.export_range(1, 2) == again.export_range(1, 2)
        assert hash(buf.export_range(1, 2)) == hash(again.export_range(1, 2))
    assert buf.export_range(1, 2) not in (buf.export_range(1, 3), buf.export_range(2, 2), buf, (buf, 1, 2))


def test_a_range_of_a_closed_buffer_is_ebadf(buf: dmabuf.DmaBuf) -> None:
    part = buf.export_range(1, 2)
    buf.close()
    with raises_errno(errno.EBADF), part.read():
        pass
    with raises_errno(errno.EBADF):
        part.mmap()


def test_ranges_of_one_buffer_exclude_each_other_as_it_does(buf: dmabuf.DmaBuf) -> None:
    with buf.export_range(0, 10).read(), pytest.raises(OSError), buf.export_range(20, 10).write(timeout=0):
        pass


def test_the_view_is_released_after_the_block(buf: dmabuf.DmaBuf) -> None:
    with buf.export_range(3, 4).read() as view:
        pass
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_what_outlives_a_reading_block_shows_what_was_read(buf: dmabuf.DmaBuf) -> None:
    content = filled(buf)
    with buf.export_range(3, 4).read() as view:
        kept = memoryview(view)
    with buf.write(timeout=0) as view:
        view[:] = bytes(len(view))
    assert kept.tobytes() == content[3:7]


def test_a_block_that_raises_leaves_the_buffer_torn(buf: dmabuf.DmaBuf) -> None:
    with pytest.raises(ZeroDivisionError), buf.export_range(3, 4).write():
        raise ZeroDivisionError
    with raises_errno(errno.ECANCELED), buf.read():
        pass


def test_tasks_use_ranges_too(buf: dmabuf.DmaBuf) -> None:
    async def main() -> bytes:
        part = buf.export_range(5, 3)
        async with part.write() as view:
            view[:] = b"abc"
        async with part.read() as view:
            return view.tobytes()

    assert asyncio.run(main()) == b"abc"


def test_several_buffers_at_once_are_cut_to_their_ranges(buf: dmabuf.DmaBuf) -> None:
    content, part = filled(buf), buf.export_range(9, 5)
    with dmabuf.access(read=[buf]) as (view,):
        assert part.of(view).tobytes() == content[9:14]
    with raises_errno(errno.EINVAL):
        part.of(memoryview(b"too short"))


def _reader(parent: Parent) -> list[tuple[int, int, bytes]]:
    found = []
    for part in dmabuf.recv(parent.sock):
        with part.buf, part.read() as view:
            found.append((part.offset, part.length, view.tobytes()))
    return found


def test_ranges_travel_to_another_process(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    content, other = filled(buf), child(_reader)
    dmabuf.send(other.sock, buf.export_range(PAGE + 1, 5), buf.export_range(7, 2))
    assert other.result() == [(PAGE + 1, 5, content[PAGE + 1 : PAGE + 6]), (7, 2, content[7:9])]


def test_ranges_travel_through_multiprocessing(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    content, other = filled(buf), child(_sent)
    other.send(buf.export_range(11, 4))
    assert other.result() == content[11:15]
    resource_sharer.stop()


def _sent(parent: Parent) -> bytes:
    part = parent.recv()
    with part.buf, part.read() as view:
        return bytes(view)


@pytest.mark.parametrize("body", [(SIZE, 1), (0, 0), (1, SIZE), ((1 << 64) - 1, 2)])
def test_a_range_in_a_message_that_is_not_inside_of_its_buffer_is_ebadmsg(buf: dmabuf.DmaBuf, body: tuple[int, int]) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    data, fds, _, _ = items.pack_objects((buf.export_range(0, 1),))
    data = data[: -items._PART.size] + items._PART.pack(*body)
    with left, right:
        left.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", *fds))])
        with raises_errno(errno.EBADMSG):
            dmabuf.recv(right)


def test_a_range_in_a_message_without_a_buffer_is_ebadmsg(buf: dmabuf.DmaBuf) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    data = items.pack_objects((buf.export_range(0, 1),))[0]
    head = items.HEADER.size
    alone = items.HEADER.pack(items.MAGIC, 1, 0, 0) + data[head + items.ITEM.size :]
    with left, right:
        left.send(alone)
        with raises_errno(errno.EBADMSG):
            dmabuf.recv(right)
