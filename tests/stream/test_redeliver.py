"""Groups with ``group_redeliver=True``: what a member had when it died goes to another one."""

import errno
import select

import pytest

import dmabuf
from dmabuf import Stream
from tests.stream.conftest import SIZE, Make, content, put
from tests.support.children import Child, Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.waiting import Background


def member(parent: Parent, name: str, redeliver: bool = True) -> None:
    """Take a frame at each word from the test, and say what is in it. "keep" keeps it, "release" gives the last one back."""
    kept, frame = [], None
    with Stream.open(name) as stream, stream.reader(group="g", group_redeliver=redeliver, wait_for_producer=True) as reader:
        parent.send("here")
        for word in iter(parent.recv, "end"):
            if word == "release":
                assert frame is not None
                frame.release()
                parent.send("released")
                continue
            frame = reader.next()
            if word == "keep":
                kept.append(frame.keep())
            parent.send(content(frame))


def started(child: Spawn, name: str, redeliver: bool = True) -> Child:
    process = child(member, name, redeliver)
    assert process.recv() == "here"
    return process


def told(process: Child, word: str = "take") -> object:
    process.send(word)
    return process.recv()


def buried(process: Child) -> None:
    process.kill()
    dmabuf.Domain.default().sweep()


def test_frame_of_a_member_that_died_goes_to_another_one(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = started(child, name)
    with stream.reader(group="g", group_redeliver=True) as other:
        put(stream, 1)
        assert told(process) == 1
        put(stream, 2)
        buried(process)
        put(stream, 3)
        assert other.lag == 3
        frames = []
        for _ in range(3):  # the old one first
            frame = other.next(timeout=0)
            frames.append((frame.seq, content(frame)))
        assert frames == [(1, 1), (2, 2), (3, 3)]
        assert (other.lag, other.lost) == (0, 0)
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            other.next(timeout=0)
    put(stream, 4)


def test_frame_is_gone_with_its_member_without_the_option(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = started(child, name, redeliver=False)
    with stream.reader(group="g") as other:
        put(stream, 1)
        assert told(process) == 1
        put(stream, 2)
        buried(process)
        assert content(other.next(timeout=0)) == 2


def test_frames_that_a_dead_member_kept_come_again_in_order(make: Make, name: str, child: Spawn) -> None:
    stream = make(name, buffers=6)
    process = started(child, name)
    with stream.reader(group="g", group_redeliver=True) as other:
        for number in range(1, 5):
            put(stream, number)
        assert [told(process, word) for word in ("keep", "take", "keep", "take")] == [1, 2, 3, 4]  # the 2nd is released by the next
        buried(process)
        assert [content(other.next(timeout=0)) for _ in range(3)] == [1, 3, 4]


def test_frame_that_was_released_does_not_come_again(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = started(child, name)
    with stream.reader(group="g", group_redeliver=True) as other:
        put(stream, 1)
        assert told(process) == 1
        assert told(process, "release") == "released"
        buried(process)
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            other.next(timeout=0)


def test_member_that_closes_has_released_what_it_had(stream: Stream) -> None:
    with stream.reader(group="g", group_redeliver=True) as other:
        with stream.reader(group="g", group_redeliver=True) as first:
            put(stream, 1)
            put(stream, 2)
            assert content(first.next(timeout=0)) == 1
        assert content(other.next(timeout=0)) == 2


def test_frame_that_was_handed_out_again_is_handed_out_a_third_time(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    first, second = started(child, name), started(child, name)
    with stream.reader(group="g", group_redeliver=True) as other:
        put(stream, 1)
        assert told(first) == 1
        buried(first)
        assert told(second) == 1
        buried(second)
        put(stream, 2)
        assert [content(other.next(timeout=0)) for _ in range(2)] == [1, 2]
        assert len(stream.info()["readers"]) == 1


def test_group_whose_members_are_all_dead_begins_anew(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    first, second = started(child, name), started(child, name)
    put(stream, 1)
    put(stream, 2)
    assert (told(first), told(second)) == (1, 2)
    first.kill()
    second.kill()
    dmabuf.Domain.default().sweep()
    assert stream.info()["readers"] == []
    for number in range(3, 10):  # every slot is free
        put(stream, number)
    with stream.reader(group="g", group_redeliver=True) as new:
        assert (content(new.next(timeout=0)), new.lost) == (9, 0)


def test_member_that_comes_before_the_dead_are_reaped_gets_their_frames(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = started(child, name)
    put(stream, 1)
    assert told(process) == 1
    process.stop()
    with stream.reader(group="g", group_redeliver=True) as new:
        process.kill()
        assert content(new.next(timeout=30)) == 1


def test_producer_waits_until_the_frame_was_released(make: Make, name: str, child: Spawn) -> None:
    stream = make(name, buffers=2)
    process = started(child, name)
    with stream.reader(group="g", group_redeliver=True) as other:
        put(stream, 1)
        assert told(process) == 1
        put(stream, 2)
        buried(process)
        with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught:
            put(stream, 3)
        assert "a process that has ended keeps 1 of its slots" in str(caught.value)
        frame = other.next(timeout=0)
        with Background(lambda: put_patiently(stream, 3)) as waiting:
            waiting.until_blocked()
            assert (frame.seq, content(frame)) == (1, 1)
            frame.release()
            assert waiting.result() == 3
        assert [content(other.next(timeout=0)) for _ in range(2)] == [2, 3]


def put_patiently(stream: Stream, number: int) -> int:
    with stream.produce(timeout=30) as frame:
        frame.view[0] = number
        return frame.seq


def test_producer_that_drops_leaves_the_frame_alone(make: Make, name: str, child: Spawn) -> None:
    stream = make(name, when_full="drop", buffers=3)
    process = started(child, name)
    with stream.reader(group="g", group_redeliver=True) as other:
        put(stream, 1)
        assert told(process) == 1
        buried(process)
        for number in range(2, 12):
            put(stream, number)
        frame = other.next(timeout=0)
        for number in range(12, 22):
            put(stream, number)
        assert (frame.seq, content(frame)) == (1, 1)
        assert content(other.next(timeout=0)) == 20  # what is still there comes after it
        assert other.lost == 18


def test_program_that_does_not_know_the_stream_waits_for_the_frame(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = started(child, name)
    with stream.reader(group="g", group_redeliver=True) as other:
        put(stream, 1)
        assert told(process) == 1
        buried(process)
        buf = stream.bufs[0]
        with buf.read(timeout=0) as view:
            assert view[0] == 1
        with raises_errno(errno.ETIMEDOUT, TimeoutError), buf.write(timeout=0):
            pass
        assert content(other.next(timeout=0)) == 1
        other._end_turn()
        with buf.write(timeout=0):
            pass


def test_last_frame_comes_again_before_the_end(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = started(child, name)
    with Stream.open(name) as again, again.reader(group="g", group_redeliver=True) as other:
        put(stream, 1)
        assert told(process) == 1
        stream.close()
        with raises_errno(errno.ETIMEDOUT, TimeoutError):  # it may come again
            other.next(timeout=0)
        with Background(lambda: content(other.next(timeout=30))) as waiting:
            waiting.until_blocked()
            buried(process)
            assert waiting.result() == 1
        with raises_errno(errno.ENODATA):
            other.next(timeout=0)


def test_end_comes_when_the_last_frame_was_released(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = started(child, name)
    with Stream.open(name) as again, again.reader(group="g", group_redeliver=True) as other:
        put(stream, 1)
        assert told(process) == 1
        stream.close()
        with Background(lambda: list(other)) as waiting:
            waiting.until_blocked()
            told(process, "release")
            assert waiting.result() == []


def test_descriptor_is_readable_at_a_frame_that_comes_again_and_at_the_end(make: Make, name: str, child: Spawn) -> None:
    def readable(seconds: float = 0) -> bool:
        return bool(select.select([other], [], [], seconds)[0])

    stream = make(name)
    process = started(child, name)
    with Stream.open(name) as again, again.reader(group="g", group_redeliver=True) as other:
        put(stream, 1)
        assert told(process) == 1
        stream.close()
        assert not readable()
        buried(process)
        assert readable(30)
        assert content(other.next(timeout=0)) == 1
        assert readable(30)
        with raises_errno(errno.ENODATA):
            other.next(timeout=0)


def test_frame_comes_again_with_its_metadata_and_length(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = started(child, name)
    with stream.reader(group="g", group_redeliver=True) as other:
        with stream.produce(timeout=0) as made:
            made.view[0] = 7
            made.used, made.meta = 10, {"a": 1}
        assert told(process) == 7
        buried(process)
        frame = other.next(timeout=0)
        assert (frame.used, frame.meta, len(frame.view)) == (10, {"a": 1}, 10)
        with stream.produce(timeout=0):
            pass
        assert other.next(timeout=0).used == SIZE


def waiter_for_a_fence(parent: Parent, name: str) -> None:
    with Stream.open(name) as stream, stream.reader(group="g", group_redeliver=True) as reader:
        try:
            reader.next(timeout=0)
        except TimeoutError:
            parent.send("waits")
        parent.recv()


def test_frame_whose_member_died_while_its_fence_was_pending_comes_again(make: Make, name: str, child: Spawn) -> None:
    stream, line = make(name), dmabuf.Timeline("filler")
    with stream.reader(group="g", group_redeliver=True) as other:
        fence = line.fence()
        with stream.produce(timeout=0) as made:
            made.fence = fence
            made.view[0] = 5
        process = child(waiter_for_a_fence, name)
        assert process.recv() == "waits"
        buried(process)
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            other.next(timeout=0)
        fence.signal()
        assert content(other.next(timeout=0)) == 5


def test_frame_that_a_closing_member_was_not_shown_goes_to_another_one(stream: Stream) -> None:
    line = dmabuf.Timeline("filler")
    with stream.reader(group="g", group_redeliver=True) as other:
        fence = line.fence()
        with stream.produce(timeout=0) as made:
            made.fence = fence
            made.view[0] = 5
        with stream.reader(group="g", group_redeliver=True) as first, raises_errno(errno.ETIMEDOUT, TimeoutError):
            first.next(timeout=0)
        fence.signal()
        assert content(other.next(timeout=0)) == 5


def test_statistics_show_a_dead_member_whose_frames_wait(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = started(child, name)
    with stream.reader(group="g", group_redeliver=True):
        put(stream, 1)
        assert told(process) == 1
        buried(process)
        (dead,) = (reader for reader in stream.statistics().readers if not reader.pid)
        assert (dead.policy, dead.holds) == ("group", 1)


@pytest.mark.parametrize("redeliver", [False, True])
def test_members_that_do_not_agree_are_refused(stream: Stream, redeliver: bool) -> None:
    with stream.reader(group="g", group_redeliver=redeliver):
        with raises_errno(errno.EINVAL) as caught:
            stream.reader(group="g", group_redeliver=not redeliver)
        assert f"group 'g' has members with group_redeliver={redeliver}" in str(caught.value)
        with stream.reader(group="h", group_redeliver=not redeliver):
            pass
    with stream.reader(group="g", group_redeliver=not redeliver):  # nobody is left who wanted it otherwise
        pass


def test_redelivery_without_a_group_is_refused(stream: Stream) -> None:
    with raises_errno(errno.EINVAL) as caught:
        stream.reader(group_redeliver=True)
    assert "name a group" in str(caught.value)
