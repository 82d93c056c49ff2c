"""Readers of a stream: which frames each gets, and how long a frame lasts."""

import errno
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from dmabuf import Stream
from tests.stream.conftest import Make, content, put
from tests.support.errnos import raises_errno
from tests.support.waiting import Background

# ---- which ----


def test_queue_has_every_frame_in_order(stream: Stream) -> None:
    with stream.reader() as reader:
        for number in range(50):
            put(stream, number)
            if number % 3 == 2:
                got = [reader.next(timeout=0) for _ in range(3)]
                assert [frame.open for frame in got] == [False, False, True]
                assert got[-1].seq == number + 1
        assert (reader.lost, reader.lag) == (0, 2)


def test_latest_passes_over_what_it_comes_too_late_for(stream: Stream) -> None:
    with stream.reader("latest") as reader:
        for number in range(5):
            put(stream, number)
        frame = reader.next(timeout=0)
        assert (content(frame), reader.lost, reader.lag) == (4, 4, 0)
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            reader.next(timeout=0)
        for number in range(5, 7):
            put(stream, number)
        assert (content(reader.next(timeout=0)), reader.lost) == (6, 5)


def test_latest_does_not_hold_the_producer_up(stream: Stream) -> None:
    with stream.reader("latest") as reader:
        put(stream, 0)
        frame = reader.next(timeout=0)
        for number in range(1, 20):
            put(stream, number)
        assert content(frame) == 0


@pytest.mark.parametrize("when_full", ["wait", "drop"])
@pytest.mark.parametrize("policy", ["queue", "latest"])
def test_late_joiner_has_the_newest_frame_at_once(make: Make, when_full: str, policy: Any) -> None:
    stream = make(when_full=when_full)
    for number in range(7):
        put(stream, number)
    with stream.reader(policy) as reader:
        assert reader.lag == 1
        assert (content(reader.next(timeout=0)), reader.lost, reader.lag) == (6, 0, 0)


@pytest.mark.parametrize("when_full", ["wait", "drop"])
@pytest.mark.parametrize("policy", ["queue", "latest"])
def test_joiner_that_wants_the_next_frame_does_not_get_the_newest(make: Make, when_full: str, policy: Any) -> None:
    stream = make(when_full=when_full)
    put(stream, 1)
    with stream.reader(policy, newest=False) as reader:
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            reader.next(timeout=0)
        put(stream, 2)
        assert (content(reader.next(timeout=0)), reader.lost) == (2, 0)


@pytest.mark.parametrize("when_full", ["wait", "drop"])
@pytest.mark.parametrize(("history", "first"), [(1, 9), (3, 7), (4, 6), (10, 6), (2**40, 6)])
def test_history_begins_with_the_oldest_that_is_still_there(make: Make, when_full: str, history: int, first: int) -> None:
    stream = make(when_full=when_full)
    for number in range(10):
        put(stream, number)
    with stream.reader(history=history) as reader:
        assert [content(reader.next(timeout=0)) for _ in range(10 - first)] == list(range(first, 10))


def test_history_of_more_frames_than_there_were(stream: Stream) -> None:
    put(stream, 1)
    with stream.reader(history=4) as reader:
        assert (reader.lag, content(reader.next(timeout=0)), reader.lost) == (1, 1, 0)


def test_stream_has_a_reader_of_its_own_for_each_policy(stream: Stream) -> None:
    put(stream, 1)
    assert content(stream.next(timeout=0)) == 1
    assert content(stream.latest(timeout=0)) == 1
    for number in range(2, 5):
        put(stream, number)
    assert content(stream.latest(timeout=0)) == 4
    seen = []
    for frame in stream:
        seen.append(content(frame))
        if frame.seq == 4:
            break
    assert seen == [2, 3, 4]
    assert len(stream.info()["readers"]) == 2


def test_lag_counts_the_frames_that_wait(stream: Stream) -> None:
    with stream.reader() as reader:
        assert reader.lag == 0
        put(stream, 1)
        put(stream, 2)
        assert reader.lag == 2
        reader.next(timeout=0)
        assert reader.lag == 1


def test_reader_that_waits_gets_the_next_frame(stream: Stream) -> None:
    with stream.reader() as reader, Background(lambda: content(reader.next())) as job:
        job.until_blocked()
        put(stream, 6)
        assert job.result() == 6


def test_timeout_of_a_reader_says_who_produces(stream: Stream) -> None:
    with stream.reader() as reader:
        with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught:
            reader.next(timeout=0)
        assert "nobody has produced yet" in str(caught.value)
        put(stream, 1)
        reader.next(timeout=0)
        with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught:
            reader.next(timeout=0)
        assert "its producer is this process" in str(caught.value)


def test_second_thread_in_a_reader_is_refused(stream: Stream) -> None:
    with stream.reader() as reader, Background(lambda: content(reader.next())) as job:
        job.until_blocked()
        for call in (reader.next, reader.close, lambda: next(reader)):
            with raises_errno(errno.EALREADY):
                call()
        put(stream, 6)
        assert job.result() == 6


def test_second_thread_in_a_producer_is_refused(stream: Stream) -> None:
    with stream.reader() as reader:
        for number in range(4):
            put(stream, number)
        with Background(lambda: put_waiting(stream)) as job:
            job.until_blocked()
            with raises_errno(errno.EALREADY):
                put(stream, 9)
            reader.close()
            assert job.result() == 5


def put_waiting(stream: Stream) -> int:
    with stream.produce() as frame:
        return frame.seq


def test_a_thread_for_each_reader(make: Make) -> None:
    stream = make(buffers=3)
    count = 300

    def all_of(reader: dmabuf.StreamReader) -> list[int]:
        return [frame.seq for frame, _ in zip(reader, range(count), strict=False)]

    with (
        stream.reader() as first,
        stream.reader() as second,
        Background(lambda: all_of(first)) as a,
        Background(lambda: all_of(second)) as b,
    ):
        for _ in range(count + 1):
            put_waiting(stream)
            if a.done and b.done:
                break
        assert a.result() == b.result() == list(range(1, count + 1))


# ---- bad arguments ----


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"policy": "newest"}, "no policy 'newest'"),
        ({"policy": "latest", "group": "a"}, "a group hands out frames in order"),
        ({"group": ""}, "a group hands out frames in order"),
        ({"group": "a", "history": 1}, "a group hands out frames in order"),
        ({"history": -1}, "history is -1"),
        ({"policy": "latest", "history": 1}, "history is 1"),
    ],
    ids=str,
)
def test_reader_with_bad_arguments_is_refused(stream: Stream, keywords: dict[str, Any], text: str) -> None:
    with raises_errno(errno.EINVAL) as caught:
        stream.reader(**keywords)
    assert text in str(caught.value)
    assert stream.info()["readers"] == []


def test_33rd_reader_is_refused(stream: Stream) -> None:
    readers = [stream.reader() for _ in range(32)]
    with raises_errno(errno.EUSERS) as caught:
        stream.reader()
    assert "32 readers" in str(caught.value)
    put(stream, 1)
    assert [content(reader.next(timeout=0)) for reader in readers] == [1] * 32
    readers[5].close()
    assert content(stream.reader().next(timeout=0)) == 1


def test_reader_is_not_pickled(stream: Stream) -> None:
    with stream.reader() as reader, pytest.raises(TypeError, match="belongs to one process"):
        pickle.dumps(reader)


# ---- how long ----


def test_frame_is_over_at_the_next_turn(stream: Stream) -> None:
    for number in range(3):
        put(stream, number)
    seen = []
    with stream.reader(history=3) as reader:
        for frame in reader:
            assert all(not old.open for old in seen)
            seen.append(frame)
            if frame.seq == 3:
                break
        assert seen[-1].open
    assert not seen[-1].open


def test_frame_is_over_at_the_end_of_its_block(stream: Stream) -> None:
    put(stream, 1)
    with stream.reader() as reader:
        with reader.next(timeout=0) as frame:
            view = frame.view
        assert not frame.open
        for look in (lambda: view[0], lambda: frame.view, lambda: frame.meta, lambda: frame.used, frame.array, frame.__enter__):
            with pytest.raises(ValueError, match=r"over|closed|ended|left"):
                look()
        stream.drain(timeout=0)


def test_frame_is_given_back_by_release(stream: Stream) -> None:
    put(stream, 1)
    with stream.reader() as reader:
        frame = reader.next(timeout=0)
        frame.release()
        frame.release()
        assert not frame.open
        stream.drain(timeout=0)


def test_frame_lasts_though_nothing_refers_to_it(stream: Stream) -> None:
    put(stream, 1)
    with stream.reader() as reader:
        reader.next(timeout=0)
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            stream.drain(timeout=0)
        view = stream.next(timeout=0).view
        assert view[0] == 1


@pytest.mark.parametrize("policy", ["queue", "latest"])
@pytest.mark.parametrize("when_full", ["wait", "drop"])
def test_kept_frame_lasts_until_it_is_released(make: Make, when_full: str, policy: Any) -> None:
    stream = make(when_full=when_full)
    with stream.reader(policy) as reader:
        put(stream, 0)
        frame = reader.next(timeout=0).keep()
        slot = frame.slot
        for number in range(1, 9):
            put(stream, number)
            assert content(reader.next(timeout=0)) == number
        assert (frame.open, frame.kept, content(frame), frame.seq) == (True, True, 0, 1)
        frame.release()
        assert not frame.open
        assert not stream.info()["readers"][0]["claims"] & 1 << slot


def test_kept_frame_lasts_until_nothing_refers_to_it(stream: Stream) -> None:
    with stream.reader() as reader:
        put(stream, 0)
        frame = reader.next(timeout=0).keep()
        put(stream, 1)
        reader.next(timeout=0).release()
        assert stream.info()["readers"][0]["claims"]
        del frame
        assert not stream.info()["readers"][0]["claims"]


def test_kept_frame_is_not_given_back_by_its_block(stream: Stream) -> None:
    with stream.reader() as reader:
        put(stream, 3)
        with reader.next(timeout=0) as frame:
            frame.keep()
        assert content(frame) == 3
        frame.release()
        stream.drain(timeout=0)


def with_numpy(frame: dmabuf.Frame) -> Any:
    return pytest.importorskip("numpy").asarray(frame.view)


def of_frame(frame: dmabuf.Frame) -> Any:
    pytest.importorskip("numpy")
    return frame.array()


KEEP: dict[str, Callable[[dmabuf.Frame], Any]] = {
    "cast": lambda frame: frame.view.cast("B"),
    "memoryview": lambda frame: memoryview(frame.view),
    "memoryview of a slice": lambda frame: memoryview(frame.view[:10]),
    "asarray": with_numpy,
    "array": of_frame,
}


@pytest.mark.parametrize("policy", ["queue", "latest"])
@pytest.mark.parametrize("when_full", ["wait", "drop"])
@pytest.mark.parametrize("keep", list(KEEP.values()), ids=list(KEEP))
def test_what_is_made_of_a_view_keeps_its_slot_until_it_is_gone(
    make: Make, keep: Callable[[dmabuf.Frame], Any], when_full: str, policy: Any
) -> None:
    stream = make(when_full=when_full)
    with stream.reader(policy) as reader:
        put(stream, 100)
        kept = keep(reader.next(timeout=0))
        for number in range(9):
            put(stream, number)
            assert content(reader.next(timeout=0)) == number
        assert kept[0] == 100
        claims = stream.info()["readers"][0]["claims"]
        assert claims & 1
        del kept
        gc.collect()
        assert stream.info()["readers"][0]["claims"] == claims & ~1


def test_producer_that_waits_is_told_who_keeps_frames(make: Make) -> None:
    stream = make(buffers=2)
    with stream.reader() as reader:
        put(stream, 1)
        kept = memoryview(reader.next(timeout=0).view)
        put(stream, 2)
        reader.next(timeout=0).release()
        with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught:
            put(stream, 3)
        assert "keeps 1 of its slots" in str(caught.value)
        kept.release()
        del kept
        put(stream, 3)


@pytest.mark.parametrize("keep", list(KEEP.values()), ids=list(KEEP))
def test_close_gives_back_what_is_kept_and_its_users_have_a_copy(make: Make, name: str, keep: Callable[[dmabuf.Frame], Any]) -> None:
    stream = make(name, buffers=2)
    with Stream.open(name) as other:
        reader = other.reader()
        put(stream, 5)
        kept = keep(reader.next(timeout=0))
        frame = None
        put(stream, 6)
        frame = reader.next(timeout=0).keep()
        reader.close()
        assert stream.info()["readers"] == []
        assert not frame.open
        for number in range(7, 10):
            put(stream, number)
        assert kept[0] == 5
        del kept, frame


def test_reader_that_is_forgotten_leaves(stream: Stream) -> None:
    reader = stream.reader()
    put(stream, 1)
    reader.next(timeout=0)
    del reader
    gc.collect()
    assert stream.info()["readers"] == []


def test_stream_that_is_forgotten_stops_producing(make: Make, name: str) -> None:
    make(name)
    other = Stream.open(name)
    put(other, 1)
    del other
    gc.collect()
    with Stream.open(name) as third:
        put(third, 2)


def test_frame_that_is_being_made_is_not_kept_or_released(stream: Stream) -> None:
    with stream.produce() as frame:
        for call in (frame.keep, frame.release):
            with pytest.raises(ValueError, match="being made"):
                call()
        assert frame.written
