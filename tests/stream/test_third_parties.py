"""Programs that know only the buffer of a slot: they wait for the stream, and the stream waits for them."""

import asyncio
import errno
import select
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, Stream, Timeline, Usage, sim
from tests.stream.conftest import SIZE, Make, content, put
from tests.support.children import Child, Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import attach
from tests.support.waiting import Background, until_asleep


@pytest.fixture
def tl() -> Iterator[Timeline]:
    made = Timeline("test")
    yield made
    made.close()


def third(parent: Parent) -> None:
    """Does what it is told with a buffer, in a process that knows no stream: says "in" in the block, and leaves at the next word."""
    (buf,) = dmabuf.recv(parent.sock)
    for how, timeout in iter(parent.recv, None):
        try:
            use(parent, buf, how, timeout)
        except OSError as e:
            parent.send(e.errno)
    buf.close()


def use(parent: Parent, buf: DmaBuf, how: str, timeout: float | None) -> None:
    if how == "poll":
        parent.send("ready" if buf.poll(select.POLLOUT, timeout) else errno.ETIMEDOUT)
        return
    if how == "await":
        asyncio.run(awaited(parent, buf))
        return
    with getattr(buf, how)(timeout=timeout) as view:
        parent.send(("in", view[0]))
        word = parent.recv()
        if how == "write":
            view[:] = bytes([word]) * SIZE
    parent.send("out")


async def awaited(parent: Parent, buf: DmaBuf) -> None:
    async with buf.write() as view:
        parent.send(("in", view[0]))
        view[:] = bytes([parent.recv()]) * SIZE
    parent.send("out")


@pytest.fixture
def other(child: Spawn) -> Callable[[DmaBuf], Child]:
    def start(buf: DmaBuf) -> Child:
        process = child(third)
        dmabuf.send(process.sock, buf)
        return process

    return start


Other = Callable[[DmaBuf], Child]


def slot_of(stream: Stream, seq: int) -> DmaBuf:
    """The buffer in which a frame is."""
    (at,) = [k for k, slot in enumerate(stream.info()["slots"]) if slot["seq"] == seq]
    return stream.bufs[at]


# ---- they wait for the stream ----


@pytest.mark.parametrize("how", ["read", "write"])
def test_access_waits_for_the_frame_that_is_being_made(stream: Stream, other: Other, how: str) -> None:
    with stream.produce() as frame:
        buf = frame.buf
        process = other(buf)
        process.send((how, 0))
        assert process.recv() == errno.ETIMEDOUT
        process.send((how, None))
        until_asleep(process.pid)
        assert not process.has_sent()
        frame.view[:] = bytes([9]) * SIZE
    assert process.recv() == ("in", 9)
    process.send(9)
    assert process.recv() == "out"


@pytest.mark.parametrize("how", ["read", "write"])
@pytest.mark.parametrize("when_full", ["wait", "drop"])
@pytest.mark.parametrize(("policy", "group"), [("queue", None), ("latest", None), ("queue", "g")], ids=["queue", "latest", "member"])
def test_write_waits_for_readers_that_have_the_frame_and_read_does_not(
    make: Make, other: Other, how: str, when_full: str, policy: Any, group: str | None
) -> None:
    stream = make(when_full=when_full)
    with stream.reader(policy, group=group) as reader:
        put(stream, 3)
        frame = reader.next(timeout=0)
        process = other(frame.buf)
        process.send((how, 0))
        if how == "read":
            assert process.recv() == ("in", 3)
            process.send(0)
            assert process.recv() == "out"
            return
        assert process.recv() == errno.ETIMEDOUT
        process.send((how, None))
        until_asleep(process.pid)
        assert not process.has_sent()
        assert content(frame) == 3
        frame.release()
        assert process.recv() == ("in", 3)
        process.send(0)
        assert process.recv() == "out"


@pytest.mark.parametrize("group", [None, "g"])
def test_write_waits_for_readers_to_whom_the_frame_is_promised(stream: Stream, other: Other, group: str | None) -> None:
    with stream.reader(group=group) as reader:
        put(stream, 3)
        process = other(slot_of(stream, 1))
        process.send(("write", None))
        until_asleep(process.pid)
        assert not process.has_sent()
        frame = reader.next(timeout=5)
        assert content(frame) == 3
        frame.release()
        assert process.recv() == ("in", 3)
        process.send(0)
        assert process.recv() == "out"


@pytest.mark.parametrize("death", [False, True])
def test_write_goes_on_when_the_reader_leaves_or_dies(
    stream: Stream, make: Make, name: str, other: Other, child: Spawn, death: bool
) -> None:
    stream = make(name)
    reader = child(holder, name)
    put(stream, 3)
    assert reader.recv() == 3
    process = other(slot_of(stream, 1))
    process.send(("write", None))
    until_asleep(process.pid)
    if death:
        reader.kill()
    else:
        reader.send()
    assert process.recv() == ("in", 3)
    process.send(0)
    assert process.recv() == "out"


def holder(parent: Parent, name: str) -> None:
    with Stream.open(name) as stream, stream.reader() as reader:
        parent.send(content(reader.next().keep()))
        parent.recv()


@pytest.mark.parametrize("how", ["poll", "await"])
def test_poll_and_await_wait_for_readers(stream: Stream, other: Other, how: str) -> None:
    with stream.reader() as reader:
        put(stream, 3)
        frame = reader.next(timeout=0)
        process = other(frame.buf)
        process.send((how, None))
        until_asleep(process.pid)
        assert not process.has_sent()
        frame.release()
        if how == "poll":
            assert process.recv() == "ready"
        else:
            assert process.recv() == ("in", 3)
            process.send(5)
            assert process.recv() == "out"


def test_sync_file_of_a_slot_ends_with_the_readers(stream: Stream) -> None:
    with stream.reader() as reader:
        put(stream, 3)
        frame = reader.next(timeout=0)
        with frame.buf.export_sync_file(write=True) as file:
            poller = select.poll()
            poller.register(file, select.POLLIN)
            assert not poller.poll(0)
            frame.release()
            assert poller.poll(30_000)


def test_sync_file_of_a_slot_ends_with_the_making(stream: Stream) -> None:
    with stream.produce() as frame:
        frame.view[0] = 1
        file = frame.buf.export_sync_file()
        poller = select.poll()
        poller.register(file, select.POLLIN)
        assert not poller.poll(0)
    assert poller.poll(30_000)
    file.close()


def test_fences_of_a_slot_are_those_of_the_stream(stream: Stream) -> None:
    buf = stream.bufs[0]
    assert buf.resv.fences(Usage.BOOKKEEP) == []
    with stream.produce() as frame:
        buf = frame.buf
        (fence,) = buf.resv.fences(Usage.WRITE)
        assert not fence.is_signaled()
        assert buf.resv.wait(Usage.WRITE, timeout=0) == 0
    assert fence.is_signaled()
    assert buf.resv.fences(Usage.BOOKKEEP) == []
    with stream.reader() as reader:
        assert buf.resv.fences(Usage.WRITE) == []
        (fence,) = buf.resv.fences(Usage.READ)
        reader.next(timeout=0).release()
        assert fence.is_signaled()


def test_two_slots_at_once(stream: Stream) -> None:
    with stream.reader() as reader:
        put(stream, 1)
        put(stream, 2)
        one, two = slot_of(stream, 1), slot_of(stream, 2)
        with dmabuf.access(read=[one, two], timeout=0) as (first, second):
            assert (first[0], second[0]) == (1, 2)
        with raises_errno(errno.ETIMEDOUT, TimeoutError), dmabuf.access(read=[one], write=[two], timeout=0):
            pass
        reader.next(timeout=0)
        reader.next(timeout=0).release()
        with dmabuf.access(read=[one], write=[two], timeout=0) as (first, second):
            second[0] = 7
    with two.read(timeout=0) as view:
        assert view[0] == 7


def test_own_frame_by_its_buffer_is_a_deadlock(stream: Stream) -> None:
    with stream.produce() as frame:
        for how in ("read", "write"):
            with raises_errno(errno.EDEADLK), getattr(frame.buf, how)(timeout=0):
                pass
    with stream.reader("latest") as reader:
        frame = reader.next(timeout=0)
        with raises_errno(errno.EDEADLK), frame.buf.write(timeout=0):
            pass
        with frame.buf.read(timeout=0):
            pass


# ---- the stream waits for them ----


@pytest.mark.parametrize("how", ["read", "write"])
def test_producer_passes_over_a_slot_that_a_third_party_uses(stream: Stream, other: Other, how: str) -> None:
    for number in range(4):
        put(stream, number)
    buf = slot_of(stream, 1)
    process = other(buf)
    process.send((how, None))
    assert process.recv() == ("in", 0)
    for _ in range(9):
        with stream.produce(timeout=0) as frame:
            assert frame.buf is not buf
    process.send(50)
    assert process.recv() == "out"
    assert buf in [made_in(stream) for _ in range(4)]


def made_in(stream: Stream, timeout: float | None = 0) -> DmaBuf:
    with stream.produce(timeout=timeout) as frame:
        return frame.buf


@pytest.mark.parametrize("how", ["read", "write"])
def test_producer_waits_when_third_parties_use_every_slot(make: Make, other: Other, how: str) -> None:
    stream = make(buffers=2)
    for number in range(2):
        put(stream, number)
    process = other(slot_of(stream, 1))
    process.send((how, None))
    assert process.recv() == ("in", 0)
    with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught:
        put(stream, 2)
    assert "programs that don't read the stream" in str(caught.value)
    with Background(lambda: made_in(stream, None)) as job:
        job.until_blocked()
        process.send(50)
        assert job.result() is slot_of(stream, 3)
    assert process.recv() == "out"


def test_producer_goes_on_after_the_death_of_a_third_party(make: Make, other: Other) -> None:
    stream = make(buffers=2)
    for number in range(2):
        put(stream, number)
    process = other(slot_of(stream, 1))
    process.send(("write", None))
    process.recv()
    with Background(lambda: put_waiting(stream, 7)) as job:
        job.until_blocked()
        process.kill()
        assert job.result() == 3
    with stream.reader() as reader:
        assert content(reader.next(timeout=0)) == 7


def put_waiting(stream: Stream, number: int) -> int:
    with stream.produce() as frame:
        frame.view[0] = number
        return frame.seq


@pytest.mark.parametrize("when_full", ["wait", "drop"])
@pytest.mark.parametrize("policy", ["queue", "latest"])
def test_joiner_does_not_get_a_frame_that_a_third_party_writes(make: Make, other: Other, when_full: str, policy: Any) -> None:
    stream = make(when_full=when_full)
    put(stream, 1)
    process = other(slot_of(stream, 1))
    process.send(("write", None))
    process.recv()
    with stream.reader(policy) as reader:
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            reader.next(timeout=0)
        put(stream, 2)
        assert content(reader.next(timeout=0)) == 2
    process.send(50)
    assert process.recv() == "out"


def test_latest_gets_what_a_third_party_has_written(stream: Stream, other: Other) -> None:
    put(stream, 1)
    process = other(slot_of(stream, 1))
    process.send(("write", None))
    process.recv()
    with stream.reader("latest") as reader, Background(lambda: bytes(reader.next().view)) as job:
        job.until_blocked()
        process.send(50)
        assert job.result() == bytes([50]) * SIZE
    assert process.recv() == "out"


@pytest.mark.parametrize("when_full", ["wait", "drop"])
@pytest.mark.parametrize(("policy", "group"), [("queue", None), ("latest", None), ("queue", "g")], ids=["queue", "latest", "member"])
def test_frame_that_a_third_party_has_left_torn_is_passed_over(
    make: Make, other: Other, when_full: str, policy: Any, group: str | None
) -> None:
    stream = make(when_full=when_full)
    put(stream, 1)
    buf = slot_of(stream, 1)
    process = other(buf)
    process.send(("write", None))
    process.recv()
    process.kill()
    with raises_errno(errno.EOWNERDEAD), buf.read():
        pass
    with stream.reader(policy, group=group) as reader:
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            reader.next(timeout=0)
        for number in range(2, 8):
            put(stream, number)
            assert content(reader.next(timeout=0)) == number
    with buf.read(timeout=0):
        pass


def test_reading_third_party_does_not_hold_readers_up(stream: Stream, other: Other) -> None:
    put(stream, 1)
    process = other(slot_of(stream, 1))
    process.send(("read", None))
    process.recv()
    for policy in ("queue", "latest"):
        with stream.reader(policy) as reader:  # type: ignore[arg-type]
            assert content(reader.next(timeout=0)) == 1
    process.send(0)
    assert process.recv() == "out"


def test_access_that_came_before_the_stream_is_heeded(name: str, stream: Stream) -> None:
    assert all(slot["foreign"] for slot in stream.info()["slots"])
    for number in range(4):
        put(stream, number)
    assert not any(slot["foreign"] for slot in stream.info()["slots"])


# ---- fences of jobs ----


def test_producer_passes_over_a_slot_with_the_fence_of_a_job(stream: Stream, tl: Timeline) -> None:
    for usage in (Usage.READ, Usage.WRITE, Usage.KERNEL):
        for number in range(4):
            put(stream, number)
        buf, fence = slot_of(stream, stream.info()["published"] - 3), tl.fence()
        attach(buf.resv, fence, usage)
        assert buf not in [made_in(stream) for _ in range(8)]
        fence.signal()
        assert buf in [made_in(stream) for _ in range(4)]


@pytest.mark.parametrize("way", ["signal", "close"])
def test_producer_that_waits_for_a_job_is_woken_by_its_fence(make: Make, tl: Timeline, way: str) -> None:
    stream = make(buffers=2)
    for number in range(2):
        put(stream, number)
    line = Timeline("job")
    fence = line.fence()
    attach(slot_of(stream, 1).resv, fence, Usage.READ)
    with Background(lambda: put_waiting(stream, 5)) as job:
        job.until_blocked()
        if way == "signal":
            fence.signal()
        line.close()
        assert job.result() == 3


@pytest.mark.parametrize("call", ["copy", "replace"])
def test_fences_that_come_otherwise_are_heeded(stream: Stream, tl: Timeline, call: str) -> None:
    for number in range(4):
        put(stream, number)
    buf, fence = slot_of(stream, 1), tl.fence()
    if call == "copy":
        with dmabuf.allocate(SIZE) as source:
            attach(source.resv, fence, Usage.READ)
            with buf.resv.locked():
                buf.resv.copy(source.resv)
    else:
        old = tl.fence()
        attach(buf.resv, old, Usage.READ)
        with buf.resv.locked():
            buf.resv.replace(old.context, fence, Usage.READ)
        old.signal() if not old.is_signaled() else None
    assert buf not in [made_in(stream) for _ in range(8)]
    fence.signal()
    assert buf in [made_in(stream) for _ in range(4)]
    # The list has still the stream's entries.
    with stream.produce() as frame, raises_errno(errno.EDEADLK), frame.buf.write(timeout=0):
        pass


def test_copy_of_a_slots_fences_is_waited_for(stream: Stream) -> None:
    with dmabuf.allocate(SIZE) as target, stream.reader() as reader:
        put(stream, 1)
        frame = reader.next(timeout=0)
        with target.resv.locked():
            target.resv.copy(frame.buf.resv)
        assert target.resv.wait(Usage.READ, timeout=0) == 0
        frame.release()
        assert target.resv.wait(Usage.READ, timeout=30) > 0


def test_device_reads_frames_and_fills_slots(stream: Stream) -> None:
    engine = sim.Engine("dma")
    queue = engine.queue("q")
    with dmabuf.allocate(SIZE) as target, stream.reader() as reader:
        for number in range(1, 9):
            with stream.produce(timeout=0) as frame:
                frame.view[:] = bytes([number]) * SIZE
            got = reader.next(timeout=0)
            fence = queue.copy(got.buf, target)
            got.release()
            fence.wait()
            with target.read(timeout=5) as view:
                assert bytes(view) == bytes([number]) * SIZE
    engine.close()
