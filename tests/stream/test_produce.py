"""The producer of a stream: what a frame is until it is published, and what becomes of it."""

import contextlib
import errno
import math
import time
from typing import Any

import pytest

import dmabuf
from dmabuf import Stream
from tests.stream.conftest import SIZE, Make, content, put
from tests.support.errnos import raises_errno
from tests.support.waiting import Background


class Mishap(Exception):
    """What goes wrong inside a block."""


def test_frame_is_published_at_the_end_of_its_block(stream: Stream) -> None:
    with stream.reader() as reader:
        with stream.produce() as frame:
            frame.view[:] = bytes([7]) * SIZE
            with raises_errno(errno.ETIMEDOUT, TimeoutError):
                reader.next(timeout=0)
        got = reader.next(timeout=0)
        assert (got.seq, bytes(got.view)) == (1, bytes([7]) * SIZE)


def test_frame_is_discarded_when_its_block_raises(stream: Stream) -> None:
    with stream.reader() as reader:
        with contextlib.suppress(Mishap), stream.produce() as frame:
            frame.view[0] = 1
            raise Mishap
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            reader.next(timeout=0)
        assert put(stream, 2) == 1, "a frame that is discarded leaves no gap"
        assert content(reader.next(timeout=0)) == 2


def test_frame_is_not_published_when_it_was_discarded(stream: Stream) -> None:
    with stream.reader() as reader:
        with stream.produce() as frame:
            frame.discard()
            with pytest.raises(ValueError, match="the frame is over"):
                frame.view  # noqa: B018
            with stream.produce() as other:  # the slot is free at once
                other.view[0] = 5
        assert content(reader.next(timeout=0)) == 5
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            reader.next(timeout=0)


def test_discarded_frame_is_torn_for_who_knows_only_its_buffer_until_the_next(stream: Stream) -> None:
    for _ in range(2):
        with stream.produce() as frame:
            frame.view[0] = 1
            buf = frame.buf
            frame.discard()
        with raises_errno(errno.ECANCELED), buf.read(timeout=0):
            pass
    for number in range(4):
        put(stream, number)
    with buf.read(timeout=0) as view:
        assert view[0] in range(4)


def test_frame_that_nobody_looked_at_is_not_torn_when_it_is_discarded(stream: Stream) -> None:
    put(stream, 3)
    with stream.produce() as frame:
        buf = frame.buf
        frame.discard()
    with buf.read(timeout=0):
        pass


def test_block_is_left_once_and_entered_once(stream: Stream) -> None:
    making = stream.produce()
    with making:
        pass
    making.__exit__(None, None, None)
    assert stream.info()["published"] == 1
    with making, pytest.raises(ValueError, match="was entered already"):
        making.__enter__()
    assert stream.info()["published"] == 2


def test_block_that_is_never_left_discards_its_frame(stream: Stream) -> None:
    making = stream.produce()
    making.__enter__().view[0] = 1
    del making
    assert put(stream, 1) == 1


def test_second_frame_at_once_is_refused(stream: Stream) -> None:
    with stream.produce(), raises_errno(errno.EINPROGRESS), stream.produce():
        pass
    assert stream.info()["published"] == 1


@pytest.mark.parametrize("timeout", [-1, math.nan, -math.inf])
def test_timeout_below_zero_is_refused(stream: Stream, timeout: float) -> None:
    with raises_errno(errno.EINVAL), stream.produce(timeout=timeout):
        pass
    with stream.reader() as reader, raises_errno(errno.EINVAL):
        reader.next(timeout=timeout)


@pytest.mark.parametrize("timeout", ["1", b"", object()])
def test_timeout_of_a_wrong_type_is_refused(stream: Stream, timeout: Any) -> None:
    with pytest.raises(TypeError), stream.produce(timeout=timeout):
        pass
    with stream.reader() as reader, pytest.raises(TypeError):
        reader.next(timeout=timeout)


def test_wrong_arguments_are_refused(stream: Stream) -> None:
    with pytest.raises(TypeError, match="timeout"):
        stream.produce(1, 2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="timeout"):
        stream.produce(seconds=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"Stream\.create"):
        Stream()


# ---- used, meta, timestamp ----


def test_used_says_how_long_the_readers_view_is(stream: Stream) -> None:
    with stream.reader() as reader:
        for used in (0, 1, 100, SIZE):
            with stream.produce(timeout=0) as frame:
                assert frame.used == SIZE
                frame.used = used
                assert len(frame.view) == SIZE
            got = reader.next(timeout=0)
            assert (got.used, len(got.view)) == (used, used)
        put(stream, 0)
        assert reader.next(timeout=0).used == SIZE


@pytest.mark.parametrize(("used", "error"), [(-1, ValueError), (SIZE + 1, ValueError), (2**70, OverflowError), ("1", TypeError)])
def test_used_out_of_range_is_refused(stream: Stream, used: Any, error: type[Exception]) -> None:
    with stream.produce() as frame, pytest.raises(error):
        frame.used = used


@pytest.mark.parametrize("value", [None, b"", b"\0\xff", True, 0, -1.5, "text", [1, [2]], {"a": {"b": [None]}}], ids=repr)
def test_meta_arrives_as_it_was(stream: Stream, value: Any) -> None:
    with stream.reader() as reader:
        with stream.produce() as frame:
            frame.meta = value
            assert frame.meta == value
        got = reader.next(timeout=0).meta
        assert (got, type(got)) == (value, type(value))


def test_meta_of_an_older_frame_of_the_slot_is_not_shown(stream: Stream) -> None:
    with stream.reader() as reader:
        for number in range(8):
            with stream.produce(timeout=0) as frame:
                assert frame.meta is None
                if number < 4:
                    frame.meta = number
            assert reader.next(timeout=0).meta == (number if number < 4 else None)


@pytest.mark.parametrize(("described", "there"), [(False, [1, 2, 3, 4]), (True, [2, 3, 4])])
def test_frame_in_the_slot_keeps_its_meta_when_the_next_is_discarded(stream: Stream, described: bool, there: list[int]) -> None:
    for _ in range(4):
        with stream.produce() as frame:
            frame.meta = frame.seq
    with stream.produce() as frame:  # in the slot of frame 1
        assert frame.meta is None
        if described:
            frame.meta = "of a frame that nobody sees"
        buf = frame.buf
        frame.discard()
    with stream.reader(history=4) as reader:
        assert [reader.next(timeout=0).meta for _ in range(reader.lag)] == there
    with buf.read(timeout=0):  # its bytes are as they were
        pass


def test_meta_has_its_room_and_not_a_byte_more(make: Make) -> None:
    stream = make(meta_bytes=10)
    with stream.reader() as reader:
        with stream.produce() as frame:
            frame.meta = b"0123456789"
            with pytest.raises(ValueError, match=r"11 bytes; the stream has room for 10"):
                frame.meta = b"0123456789x"
            assert frame.meta == b"0123456789"
        assert reader.next(timeout=0).meta == b"0123456789"


def test_meta_is_refused_without_room(make: Make) -> None:
    stream = make(meta_bytes=0)
    with stream.reader() as reader:
        with stream.produce() as frame:
            assert frame.meta is None
            with pytest.raises(ValueError, match="without room for metadata"):
                frame.meta = 1
        assert reader.next(timeout=0).meta is None


@pytest.mark.parametrize("value", [object(), {1, 2}, {"a": object()}])
def test_meta_that_json_can_not_say_is_refused(stream: Stream, value: Any) -> None:
    with stream.produce() as frame, pytest.raises(TypeError, match="give bytes"):
        frame.meta = value


def test_meta_of_4096_bytes_for_each_of_64_slots(make: Make) -> None:
    stream = make(buffers=64, meta_bytes=4096)
    with stream.reader() as reader:
        for number in range(64):
            with stream.produce(timeout=0) as frame:
                frame.meta = bytes([number]) * 4096
        for number in range(64):
            assert reader.next(timeout=0).meta == bytes([number]) * 4096


def test_readers_can_not_set_what_the_producer_said(stream: Stream) -> None:
    with stream.reader() as reader:
        put(stream, 1)
        frame = reader.next(timeout=0)
        with pytest.raises(AttributeError, match="producer only"):
            frame.used = 1
        with pytest.raises(AttributeError, match="producer only"):
            frame.meta = 1
        with pytest.raises(AttributeError):
            del frame.meta
        with pytest.raises(ValueError, match="only the producer"):
            frame.discard()
        with pytest.raises(TypeError):
            frame.view[0] = 1


def test_timestamp_is_that_of_the_publishing(stream: Stream) -> None:
    with stream.reader() as reader:
        with stream.produce() as frame:
            assert frame.timestamp_ns == 0
            before = time.monotonic_ns()
        after = time.monotonic_ns()
        assert before <= reader.next(timeout=0).timestamp_ns <= after


def test_layout_is_that_of_each_frame(make: Make) -> None:
    np = pytest.importorskip("numpy")
    stream = make(size=None, shape=(2, 3), dtype="uint16")
    with stream.reader() as reader:
        with stream.produce() as frame:
            frame.array()[...] = np.arange(6).reshape(2, 3)
        array = reader.next(timeout=0).array()
        assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert not array.flags.writeable
        del array


# ---- when it is full ----


def test_waiting_producer_never_overwrites_what_a_reader_has_not_had(stream: Stream) -> None:
    with stream.reader() as reader:
        for number in range(4):
            put(stream, number)
        with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught:
            put(stream, 4)
        assert "has 4 frames to read" in str(caught.value)
        assert [content(reader.next(timeout=0)) for _ in range(4)] == [0, 1, 2, 3]


def test_waiting_producer_goes_on_when_a_frame_is_given_back(stream: Stream) -> None:
    with stream.reader() as reader:
        for number in range(4):
            put(stream, number)

        def produce() -> int:
            with stream.produce() as frame:
                return frame.seq

        with Background(produce) as job:
            job.until_blocked()
            reader.next(timeout=0)
            assert not job.done
            reader.next(timeout=0)
            assert job.result() == 5


def test_dropping_producer_goes_on_and_readers_count_what_they_lost(dropping: Stream) -> None:
    with dropping.reader() as reader:
        for number in range(10):
            put(dropping, number)
        assert reader.lag == 10
        assert [content(reader.next(timeout=0)) for _ in range(4)] == [6, 7, 8, 9]
        assert (reader.lost, reader.lag) == (6, 0)


def test_dropping_producer_waits_when_every_slot_but_the_newest_is_held(dropping: Stream) -> None:
    with dropping.reader() as reader:
        kept = []
        for number in range(3):
            put(dropping, number)
            kept.append(reader.next(timeout=0).keep())
        put(dropping, 3)
        with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught:
            put(dropping, 4)
        assert "keeps 3 of its slots" in str(caught.value)
        kept.pop(0).release()
        put(dropping, 4)
        assert [content(frame) for frame in kept] == [1, 2]
        del kept


def test_producer_without_readers_never_waits_and_keeps_the_newest(stream: Stream) -> None:
    for number in range(20):
        put(stream, number)
    with stream.reader() as reader:
        assert content(reader.next(timeout=0)) == 19


@pytest.mark.parametrize("buffers", [2, 3, 64])
@pytest.mark.parametrize("when_full", ["wait", "drop"])
def test_each_frame_arrives_whatever_the_number_of_buffers(make: Make, buffers: int, when_full: str) -> None:
    stream = make(buffers=buffers, when_full=when_full)
    with stream.reader() as reader:
        for number in range(2 * buffers + 1):
            put(stream, number)
            assert content(reader.next(timeout=0)) == number
        assert reader.lost == 0


def test_drain_waits_until_all_is_given_back(stream: Stream) -> None:
    with stream.reader() as reader:
        stream.drain(timeout=0)
        put(stream, 1)
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            stream.drain(timeout=0)
        frame = reader.next(timeout=0)
        with Background(stream.drain) as job:
            job.until_blocked()
            frame.release()
            job.result()


# ---- one producer ----


def test_second_producer_is_refused_and_told_who_produces(make: Make, name: str) -> None:
    first = make(name)
    with Stream.open(name) as second:
        put(first, 1)
        with raises_errno(errno.EBUSY) as caught:
            put(second, 2)
        assert "the stream has a producer: this process" in str(caught.value)
        assert (first.producing, second.producing) == (True, False)
        first.close()
        assert put(second, 2) == 2


def test_producer_that_closes_ends_the_iteration_of_readers(make: Make, name: str) -> None:
    first = make(name)
    with Stream.open(name) as second, second.reader() as reader, second.reader(wait_for_producer=True) as patient:
        for number in range(3):
            put(first, number)
        first.close()
        assert [content(frame) for frame in reader] == [0, 1, 2]
        with raises_errno(errno.ENODATA):
            reader.next()
        assert [content(patient.next(timeout=0)) for _ in range(3)] == [0, 1, 2]
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            patient.next(timeout=0)
        put(second, 3)
        assert content(patient.next(timeout=0)) == 3
        assert content(reader.next(timeout=0)) == 3


def test_closed_stream_refuses_everything(make: Make) -> None:
    stream = make()
    reader = stream.reader()
    put(stream, 1)
    frame = reader.next(timeout=0)
    stream.close()
    stream.close()
    assert (stream.closed, reader.closed, frame.open) == (True, True, False)
    for call in (stream.reader, stream.next, stream.latest, stream.unlink, stream.drain, reader.next, lambda: put(stream, 1)):
        with raises_errno(errno.EBADF):
            call()
    with raises_errno(errno.EBADF):
        next(iter(reader))
    with pytest.raises(ValueError, match="the frame is over"):
        frame.seq  # noqa: B018


def test_frame_that_is_being_made_is_discarded_by_close(make: Make, name: str) -> None:
    stream = make(name)
    with Stream.open(name) as other, other.reader() as reader:
        put(stream, 1)
        with stream.produce() as frame:
            frame.view[0] = 9
            stream.close()
        assert [content(got) for got in reader] == [1]


@pytest.mark.parametrize("keep", ["array", "memoryview"])
def test_what_outlives_the_block_of_a_producer_is_a_copy(stream: Stream, keep: str) -> None:
    np = pytest.importorskip("numpy")
    kept: list[Any] = []

    def produce() -> None:
        with stream.produce() as frame:
            frame.view[0] = 1
            kept.append(np.asarray(frame.view) if keep == "array" else memoryview(frame.view))

    with stream.reader() as reader:
        with pytest.warns(dmabuf.KeptWarning, match="private copy"):
            produce()
        kept[0][0] = 2
        assert (kept[0][0], content(reader.next(timeout=0))) == (2, 1)
        kept.clear()


def test_frame_is_published_though_the_warning_of_what_is_kept_is_an_error(stream: Stream) -> None:
    kept: list[Any] = []
    with stream.reader() as reader:
        making = stream.produce()
        frame = making.__enter__()
        frame.view[0] = 1
        kept.append(memoryview(frame.view))
        with pytest.raises(dmabuf.KeptWarning):
            making.__exit__(None, None, None)
        assert content(reader.next(timeout=0)) == 1
