"""Groups: each frame goes to one member."""

import errno

import pytest

from dmabuf import Stream
from tests.stream.conftest import Make, content, put
from tests.support.budget import times
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.waiting import Background, until


def test_each_frame_goes_to_one_member(stream: Stream) -> None:
    with stream.reader(group="a") as first, stream.reader(group="a") as second, stream.reader(group="b") as other:
        seen = []
        for number in range(0, 20, 2):
            put(stream, number)
            put(stream, number + 1)
            seen += [content(reader.next(timeout=0)) for reader in (second, first)]
            for reader in (first, second):
                with raises_errno(errno.ETIMEDOUT, TimeoutError):
                    reader.next(timeout=0)
            assert [content(other.next(timeout=0)) for _ in range(2)] == [number, number + 1]
        assert seen == list(range(20))


def test_member_that_joins_goes_on_where_the_group_is(stream: Stream) -> None:
    put(stream, 0)
    with stream.reader(group="a") as first:
        assert content(first.next(timeout=0)) == 0
        with stream.reader(group="a") as second:
            with raises_errno(errno.ETIMEDOUT, TimeoutError):
                second.next(timeout=0)
            put(stream, 1)
            assert content(second.next(timeout=0)) == 1


def test_first_member_has_the_newest_frame_at_once(stream: Stream) -> None:
    for number in range(6):
        put(stream, number)
    with stream.reader(group="a") as member:
        assert (content(member.next(timeout=0)), member.lost) == (5, 0)
    for number in range(6, 12):
        put(stream, number)
    with stream.reader(group="a", newest=False) as member:
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            member.next(timeout=0)
        put(stream, 12)
        assert content(member.next(timeout=0)) == 12


def test_member_that_leaves_leaves_its_frames_to_the_others(stream: Stream) -> None:
    with stream.reader(group="a") as first:
        with stream.reader(group="a") as second:
            for number in range(3):
                put(stream, number)
            assert content(second.next(timeout=0)) == 0
        assert [content(first.next(timeout=0)) for _ in range(2)] == [1, 2]


def test_group_without_members_keeps_nothing(stream: Stream) -> None:
    with stream.reader(group="a"):
        for number in range(4):
            put(stream, number)
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            put(stream, 4)
    for number in range(4, 12):
        put(stream, number)


def test_members_hold_frames_at_the_same_time(stream: Stream) -> None:
    with stream.reader(group="a") as first, stream.reader(group="a") as second:
        put(stream, 0)
        put(stream, 1)
        one, two = first.next(timeout=0), second.next(timeout=0)
        put(stream, 2)
        put(stream, 3)
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            put(stream, 4)
        assert (content(one), content(two)) == (0, 1)
        two.release()
        put(stream, 4)
        assert content(one) == 0


def test_members_of_a_stream_that_drops_count_what_is_gone(dropping: Stream) -> None:
    with dropping.reader(group="a") as first, dropping.reader(group="a") as second:
        for number in range(10):
            put(dropping, number)
        seen = [content(reader.next(timeout=0)) for _ in range(2) for reader in (first, second)]
        assert seen == [6, 7, 8, 9]
        assert first.lost + second.lost == 6


def test_member_that_waits_is_woken(stream: Stream) -> None:
    with stream.reader(group="a") as first, stream.reader(group="a") as second:

        def one(reader: object) -> int:
            return content(next(reader))  # type: ignore[call-overload, no-any-return]

        with Background(lambda: one(first)) as a, Background(lambda: one(second)) as b:
            a.until_blocked()
            b.until_blocked()
            put(stream, 1)
            until(lambda: a.done or b.done)
            put(stream, 2)
            assert {a.result(), b.result()} == {1, 2}


def test_9th_group_is_refused(stream: Stream) -> None:
    members = [stream.reader(group=f"g{number}") for number in range(8)]
    with raises_errno(errno.ENOSPC) as caught:
        stream.reader(group="another")
    assert "8 groups" in str(caught.value)
    assert len(stream.info()["readers"]) == len(members)
    with stream.reader(group="g3"):
        pass


def test_group_without_members_makes_room_for_another(stream: Stream) -> None:
    for number in range(20):
        put(stream, number)
        with stream.reader(group=f"g{number}") as member:
            assert content(member.next(timeout=0)) == number


def member(parent: Parent, name: str, group: str) -> list[int]:
    seen = []
    with Stream.open(name) as stream, stream.reader(group=group) as reader:
        parent.send("here")
        for frame in reader:
            seen.append(frame.seq)
            assert content(frame) == frame.seq & 255
    return seen


@pytest.mark.parametrize("buffers", [2, 8])
def test_processes_of_a_group_share_the_frames(make: Make, name: str, child: Spawn, buffers: int) -> None:
    count = times(quick=100, full=2000)
    stream = make(name, buffers=buffers)
    members = [child(member, name, group) for group in ("a", "a", "b", "a")]
    for process in members:
        assert process.recv() == "here"
    for number in range(1, count + 1):
        with stream.produce() as frame:
            frame.view[0] = number & 255
    stream.drain()
    stream.close()
    results = [process.result() for process in members]
    assert results[2] == list(range(1, count + 1))
    shared = results[0] + results[1] + results[3]
    assert sorted(shared) == list(range(1, count + 1))
    assert all(seen == sorted(seen) for seen in results)
