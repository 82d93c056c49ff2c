"""Streams between processes: producers and readers that close, die, stop, fork and leave the domain."""

import contextlib
import errno

import pytest

from dmabuf import Domain, Stream
from tests.stream.conftest import SIZE, Make, content, put
from tests.support.budget import times
from tests.support.children import Child, Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.forks import FORKS, in_child
from tests.support.waiting import Background, until, until_asleep


def producer(parent: Parent, name: str, how: str = "published") -> None:
    """Produce a frame at each word from the test; `how` the last one is left."""
    with Stream.open(name) as stream:
        for number in iter(parent.recv, None):
            with stream.produce() as frame:
                frame.view[:] = bytes([number]) * SIZE
            parent.send(frame.seq if frame.open else number)
        with contextlib.ExitStack() as stack:
            if how != "published":
                frame = stack.enter_context(stream.produce())
                if how == "written":
                    frame.view[0] = 99
            parent.send("at the end")
            parent.recv()


def reader(parent: Parent, name: str, policy: str, group: str | None = None) -> None:
    """Take a frame at each word from the test, and say what is in it."""
    with Stream.open(name) as stream, stream.reader(policy, group=group) as frames:  # type: ignore[arg-type]
        parent.send("here")
        while parent.recv() != "end":
            parent.send(content(frames.next()))


def started(child: Spawn, name: str, policy: str = "queue", group: str | None = None) -> Child:
    process = child(reader, name, policy, group)
    assert process.recv() == "here"
    return process


def produced(process: Child, number: int) -> None:
    process.send(number)
    process.recv()


# ---- producers ----


@pytest.mark.parametrize("how", ["published", "empty", "written"])
def test_death_of_the_producer_is_told_after_its_last_frame(make: Make, name: str, child: Spawn, how: str) -> None:
    stream = make(name)
    process = child(producer, name, how)
    frames, patient = stream.reader(), stream.reader(wait_for_producer=True)
    for number in (1, 2):
        produced(process, number)
    process.send(None)
    process.recv()
    with raises_errno(errno.EBUSY) as caught:
        put(stream, 9)
    assert str(process.pid) in str(caught.value)
    process.kill()
    assert [content(frames.next()) for _ in range(2)] == [1, 2]
    with raises_errno(errno.EOWNERDEAD) as caught:
        frames.next()
    assert "its producer died" in str(caught.value)
    with raises_errno(errno.EOWNERDEAD):
        next(iter(frames))
    assert [slot["writing"] for slot in stream.info()["slots"]] == [False] * 4
    assert put(stream, 3) == 3
    assert [content(patient.next()) for _ in range(3)] == [1, 2, 3]
    assert content(frames.next()) == 3


def test_reader_that_waits_hears_of_the_producers_death(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = child(producer, name)
    produced(process, 1)
    frames = stream.reader(newest=False)
    with Background(frames.next) as job:
        job.until_blocked()
        process.kill()
        with raises_errno(errno.EOWNERDEAD):
            job.result()


def test_reader_that_waits_for_a_successor_gets_its_frames(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = child(producer, name)
    produced(process, 1)
    frames = stream.reader(newest=False, wait_for_producer=True)
    with Background(lambda: content(frames.next())) as job:
        job.until_blocked()
        process.kill()
        successor = child(producer, name)
        produced(successor, 2)
        assert job.result() == 2


def test_producer_takes_over_from_a_dead_one_at_once(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = child(producer, name, "written")
    produced(process, 1)
    process.send(None)
    process.recv()
    process.kill()
    assert put(stream, 2) == 2  # nobody has noticed the death before


def test_producer_closes_in_another_process(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = child(producer, name, "published")
    frames = stream.reader()
    produced(process, 1)
    process.send(None)
    process.recv()
    with Background(lambda: [content(frame) for frame in frames]) as job:
        process.send()
        assert job.result() == [1]


def test_stopped_producer_costs_readers_their_timeout_only(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = child(producer, name)
    frames = stream.reader()
    produced(process, 1)
    process.stop()
    assert content(frames.next(timeout=0)) == 1
    with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught:
        frames.next(timeout=0.05)
    assert str(process.pid) in str(caught.value)
    with raises_errno(errno.EBUSY):
        put(stream, 1)
    process.resume()
    produced(process, 2)
    assert content(frames.next()) == 2


# ---- readers ----


@pytest.mark.parametrize(("policy", "group"), [("queue", None), ("queue", "g")], ids=["queue", "member"])
@pytest.mark.parametrize("has", [0, 1])
def test_death_of_a_reader_gives_back_what_it_had(make: Make, name: str, child: Spawn, policy: str, group: str | None, has: int) -> None:
    stream = make(name)
    process = started(child, name, policy, group)
    for number in range(4):
        put(stream, number)
    for _ in range(has):
        process.send("next")
        process.recv()
    with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught:
        put(stream, 4)
    if group is None:
        assert str(process.pid) in str(caught.value)
    with Background(lambda: put_waiting(stream)) as job:
        job.until_blocked()
        process.kill()
        assert job.result() == 5
    assert stream.info()["readers"] == []


def put_waiting(stream: Stream) -> int:
    with stream.produce() as frame:
        return frame.seq


def test_death_of_a_member_leaves_later_frames_to_the_others(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = started(child, name, "queue", "g")
    other = stream.reader(group="g")
    put(stream, 0)
    process.send("next")
    assert process.recv() == 0
    for number in (1, 2):
        put(stream, number)
    process.kill()
    assert [content(other.next(timeout=0)) for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("when_full", ["wait", "drop"])
def test_stopped_latest_reader_costs_nobody_anything(make: Make, name: str, child: Spawn, when_full: str) -> None:
    stream = make(name, when_full=when_full)
    process = started(child, name, "latest")
    put(stream, 0)
    process.send("next")
    assert process.recv() == 0
    process.stop()
    for number in range(1, 20):
        put(stream, number)
    process.resume()
    process.send("next")
    assert process.recv() == 19


def test_stopped_queue_reader_costs_the_producer_its_timeout(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = started(child, name)
    process.stop()
    for number in range(4):
        put(stream, number)
    with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught, stream.produce(timeout=0.02):
        pass
    assert str(process.pid) in str(caught.value)
    process.resume()
    for number in range(4):
        process.send("next")
        assert process.recv() == number
    put(stream, 4)


def test_places_of_dead_readers_are_used_again(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = child(thirty_two, name)
    assert process.recv() == "all"
    with raises_errno(errno.EUSERS):
        stream.reader()
    process.kill()
    Domain.default().sweep()
    put(stream, 1)
    with stream.reader() as again:
        assert content(again.next(timeout=0)) == 1


def test_reader_finds_a_place_though_nobody_has_noticed_the_deaths(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = child(thirty_two, name)
    assert process.recv() == "all"
    process.kill()
    put(stream, 1)
    with stream.reader() as again:
        assert content(again.next(timeout=0)) == 1


def thirty_two(parent: Parent, name: str) -> None:
    with Stream.open(name) as stream:
        kept = [stream.reader() for _ in range(32)]
        parent.send("all")
        parent.recv()
        del kept


def test_frames_come_in_order_and_whole(make: Make, name: str, child: Spawn) -> None:
    count = times(quick=200, full=5000)
    stream = make(name, buffers=3)
    processes = [child(all_frames, name) for _ in range(2)]
    for process in processes:
        assert process.recv() == "here"
    for number in range(1, count + 1):
        with stream.produce() as frame:
            frame.view[:] = bytes([number & 255]) * SIZE
            frame.meta = number
    stream.close()
    assert [process.result() for process in processes] == [count, count]


def all_frames(parent: Parent, name: str) -> int:
    with Stream.open(name) as stream, stream.reader() as frames:
        parent.send("here")
        seq = 0
        for frame in frames:
            seq += 1
            assert (frame.seq, frame.meta) == (seq, seq)
            assert bytes(frame.view) == bytes([seq & 255]) * SIZE
        return seq


# ---- forks, and leaving the domain ----


@pytest.mark.parametrize("fork", FORKS, ids=lambda fork: fork.__name__)
def test_fork_has_no_part_in_the_stream(make: Make, name: str, fork: object) -> None:
    stream = make(name)
    frames = stream.reader()
    put(stream, 1)
    frame = frames.next(timeout=0).keep()
    put(stream, 2)
    assert content(frames.next(timeout=0)) == 2

    def refused() -> None:
        for call in (frames.next, stream.next, stream.reader, lambda: put(stream, 5)):
            with raises_errno(errno.EOWNERDEAD) as caught:
                call()
            assert "before this process was forked" in str(caught.value)
        frame.release()
        frames.close()
        stream.close()

    assert in_child(fork, refused) == 0  # type: ignore[arg-type]
    assert content(frame) == 1
    assert stream.info()["readers"][0]["claims"]
    put(stream, 3)
    assert content(frames.next(timeout=0)) == 3


def test_fork_while_a_frame_is_being_made_publishes_nothing(make: Make, name: str) -> None:
    stream = make(name)
    frames = stream.reader()
    making = stream.produce()
    with making as frame:
        frame.view[0] = 4
        assert in_child(FORKS[0], lambda: making.__exit__(None, None, None)) == 0
        assert in_child(FORKS[0], lambda: making.__exit__(KeyError, KeyError(), None)) == 0
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            frames.next(timeout=0)
        assert stream.info()["slots"][frame.slot]["writing"]
    assert content(frames.next(timeout=0)) == 4


def test_fork_may_open_the_stream_anew(make: Make, name: str) -> None:
    stream = make(name)
    put(stream, 8)

    def look() -> None:
        with Stream.open(name) as other:
            assert content(other.next(timeout=0)) == 8
            with raises_errno(errno.EBUSY):
                put(other, 9)

    assert in_child(FORKS[0], look) == 0


def test_process_that_left_the_domain_has_no_part_any_more(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = child(leaver, name)
    assert process.recv() == "reads and produces"
    put_later = stream.reader(newest=False, wait_for_producer=True)
    process.send("leave")
    assert process.recv() == "left"
    assert len(stream.info()["readers"]) == 1
    put(stream, 5)
    assert content(put_later.next(timeout=0)) == 5
    process.send()
    process.result()


def leaver(parent: Parent, name: str) -> None:
    stream = Stream.open(name)
    frames = stream.reader()
    put(stream, 1)
    frame = frames.next(timeout=0)
    parent.send("reads and produces")
    parent.recv()
    Domain.default().leave()
    parent.send("left")
    for call in (frames.next, lambda: put(stream, 2)):
        with raises_errno(errno.EOWNERDEAD) as caught:
            call()
        assert "before it left the domain" in str(caught.value)
    parent.recv()
    frame.release()
    frames.close()
    stream.close()


def test_stream_outlives_its_maker(name: str, child: Spawn) -> None:
    process = child(maker, name)
    process.recv()
    with Stream.open(name) as stream:
        process.kill()
        assert content(stream.next(timeout=0)) == 1
        put(stream, 2)
        assert content(stream.next(timeout=0)) == 2
    with raises_errno(errno.ENOENT):
        Stream.open(name)


def test_stream_goes_with_the_last_process(name: str, child: Spawn) -> None:
    process = child(maker, name)
    process.recv()
    process.kill()
    with raises_errno(errno.ENOENT):
        Stream.open(name)
    with Stream.create(name, size=SIZE) as stream:
        put(stream, 3)
        assert content(stream.next(timeout=0)) == 3


def maker(parent: Parent, name: str) -> None:
    with Stream.create(name, size=SIZE) as stream:
        put(stream, 1)
        parent.send()
        parent.recv()


def test_death_of_the_waiting_producer_leaves_nothing(make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    frames = stream.reader()
    process = child(producer, name)
    for number in range(4):
        produced(process, number)
    process.send(4)
    until_asleep(process.pid)
    process.kill()
    assert [content(frames.next()) for _ in range(4)] == [0, 1, 2, 3]
    with raises_errno(errno.EOWNERDEAD):
        frames.next()
    until(lambda: not any(slot["writing"] for slot in stream.info()["slots"]))
