"""The descriptor of a reader, for any loop."""

import errno
import select

import pytest

from dmabuf import Stream
from tests.stream.conftest import Make, content, put
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno


def readable(reader: object, ms: int = 0) -> bool:
    poller = select.poll()
    poller.register(reader, select.POLLIN)  # type: ignore[arg-type]
    return bool(poller.poll(ms))


@pytest.mark.parametrize("policy", ["queue", "latest"])
def test_descriptor_is_readable_while_there_is_a_frame(stream: Stream, policy: str) -> None:
    with stream.reader(policy) as reader:  # type: ignore[arg-type]
        assert not readable(reader)
        put(stream, 1)
        assert readable(reader, 30_000)
        frame = reader.next(timeout=0)
        assert not readable(reader)
        assert content(frame) == 1
        put(stream, 2)
        put(stream, 3)
        assert readable(reader, 30_000)
        reader.next(timeout=0)
        assert readable(reader, 0) == (policy == "queue")


def test_descriptor_is_readable_at_the_end(make: Make, name: str) -> None:
    stream = make(name)
    with Stream.open(name) as other, other.reader() as reader:
        put(stream, 1)
        reader.next(timeout=0)
        assert not readable(reader)
        stream.close()
        assert readable(reader, 30_000)
        with raises_errno(errno.ENODATA):
            reader.next(timeout=0)
        assert readable(reader)


def producer(parent: Parent, name: str) -> None:
    with Stream.open(name) as stream:
        put(stream, 1)
        parent.send()
        parent.recv()


def test_descriptor_is_readable_when_the_producer_dies(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = child(producer, name)
    process.recv()
    with stream.reader() as reader:
        assert readable(reader, 30_000)
        reader.next(timeout=0)
        assert not readable(reader)
        process.kill()
        assert readable(reader, 30_000)
        with raises_errno(errno.EOWNERDEAD):
            reader.next(timeout=0)


def test_descriptor_of_a_closed_reader_is_refused(stream: Stream) -> None:
    reader = stream.reader()
    reader.fileno()
    reader.close()
    with raises_errno(errno.EBADF):
        reader.fileno()
