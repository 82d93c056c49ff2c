"""The descriptor of a reader, for any loop."""

import contextlib
import errno
import gc
import os
import select
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from dmabuf import Domain, Stream
from dmabuf.domain.dispatcher import dispatcher
from dmabuf.stream import rules
from dmabuf.stream.readable import Readable
from tests.stream.conftest import Make, content, put
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.waiting import Background


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


def test_reader_that_nobody_has_any_more_goes_with_its_descriptor(stream: Stream) -> None:
    watching = dispatcher(Domain.default()).watching
    reader = stream.reader()
    assert not readable(reader)
    gone = weakref.ref(reader)
    del reader
    gc.collect()
    assert gone() is None
    assert dispatcher(Domain.default()).watching == watching
    assert stream.info()["readers"] == []


def test_refused_close_leaves_the_descriptor_as_it_was(stream: Stream) -> None:
    with stream.reader() as reader:
        number = reader.fileno()
        with Background(lambda: content(reader.next())) as job:
            job.until_blocked()
            with raises_errno(errno.EALREADY):
                reader.close()
            put(stream, 5)
            assert job.result() == 5
        assert reader.fileno() == number
        put(stream, 6)
        assert readable(reader, 30_000)


def test_descriptor_waits_for_the_fence_of_a_frame_that_was_asked_for(stream: Stream) -> None:
    fence = dmabuf.Timeline("fills").fence()
    with stream.reader() as reader:
        stream.publish(stream.bufs[0], fence=fence)
        with raises_errno(errno.ETIMEDOUT):
            reader.next(timeout=0)
        assert not readable(reader), "who waits for it would ask again and again"
        fence.signal()
        assert readable(reader, 30_000)
        assert reader.next(timeout=0).seq == 1


def once_before_told(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Do something between the next look of a reader and the word of it that its descriptor hears."""
    told, left = rules.StreamRules.taken, [do]

    def taken(self: rules.StreamRules, port: Any, vain: int) -> None:
        if left:
            left.pop()()
        told(self, port, vain)

    monkeypatch.setattr(rules.StreamRules, "taken", taken)


def test_frame_that_comes_right_after_a_look_in_vain_is_not_missed(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    with stream.reader() as reader:
        reader.fileno()
        once_before_told(monkeypatch, lambda: put(stream, 1))
        with raises_errno(errno.ETIMEDOUT):
            reader.next(timeout=0)
        assert readable(reader)
        assert content(reader.next(timeout=0)) == 1


def test_fence_that_ends_right_after_a_look_in_vain_is_not_missed(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    fence = dmabuf.Timeline("fills").fence()
    with stream.reader() as reader:
        reader.fileno()
        stream.publish(stream.bufs[0], fence=fence)
        once_before_told(monkeypatch, fence.signal)
        with raises_errno(errno.ETIMEDOUT):
            reader.next(timeout=0)
        assert readable(reader, 30_000)
        assert reader.next(timeout=0).seq == 1


def test_foreign_writer_that_ends_right_after_a_look_in_vain_is_not_missed(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    with stream.reader("latest") as reader:
        put(stream, 1)
        reader.fileno()
        with contextlib.ExitStack() as stack:
            stack.enter_context(stream.bufs[0].write(timeout=1))
            once_before_told(monkeypatch, stack.close)
            with raises_errno(errno.ETIMEDOUT):
                reader.next(timeout=0)
        assert readable(reader, 30_000)
        assert content(reader.next(timeout=0)) == 1


def interrupt() -> None:
    raise KeyboardInterrupt


def test_descriptor_hears_of_a_look_in_which_a_signal_handler_raised(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    with stream.reader() as reader:
        put(stream, 1)
        reader.fileno()
        once_before_told(monkeypatch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            content(reader.next(timeout=0))
        assert not readable(reader)
        put(stream, 2)
        assert readable(reader, 30_000)


def test_descriptor_that_a_signal_handler_left_half_reset_is_reset(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    left, read = [interrupt], os.eventfd_read

    def eventfd_read(fd: int) -> int:
        if left:
            left.pop()()
        return read(fd)

    with stream.reader() as reader:
        put(stream, 1)
        reader.fileno()
        monkeypatch.setattr(os, "eventfd_read", eventfd_read)
        with pytest.raises(KeyboardInterrupt):
            content(reader.next(timeout=0))
        assert not readable(reader)


def test_descriptor_whose_making_a_signal_handler_ended_works_the_next_time(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    with stream.reader() as reader:
        with monkeypatch.context() as patch:
            patch.setattr(Readable, "look", lambda _: interrupt())
            with pytest.raises(KeyboardInterrupt):
                reader.fileno()
        assert not readable(reader)
        put(stream, 1)
        assert readable(reader, 30_000)
        reader.next(timeout=0)
        assert not readable(reader)


def test_descriptor_of_a_latest_reader_passes_a_torn_frame_by(stream: Stream) -> None:
    with stream.reader("latest") as reader:
        put(stream, 1)
        with contextlib.suppress(KeyError), stream.bufs[0].write(timeout=1) as view:
            view[0] = 9
            raise KeyError
        assert reader.lag == 1
        reader.fileno()
        with raises_errno(errno.ETIMEDOUT):
            reader.next(timeout=0)
        assert not readable(reader), "who waits for it would ask again and again"
        put(stream, 2)
        assert readable(reader, 30_000)
        assert content(reader.next(timeout=0)) == 2
