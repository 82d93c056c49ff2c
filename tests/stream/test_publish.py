"""Publishing buffers that exist, with fences for what is still to come."""

import errno
from collections.abc import Iterator

import pytest

import dmabuf
from dmabuf import Stream, Timeline
from tests.stream.conftest import SIZE, Make, content
from tests.support.budget import times
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.every_stop import at_every_stop
from tests.support.waiting import Background, until_asleep


@pytest.fixture
def tl() -> Iterator[Timeline]:
    made = Timeline("test")
    yield made
    made.close()


@pytest.fixture
def bufs() -> Iterator[list[dmabuf.DmaBuf]]:
    made = [dmabuf.allocate(SIZE) for _ in range(3)]
    yield made
    for buf in made:
        buf.close()


@pytest.fixture
def stream(make: Make, bufs: list[dmabuf.DmaBuf]) -> Stream:
    return make(size=None, buffers=bufs)


def fill(buf: dmabuf.DmaBuf, number: int) -> None:
    with buf.write(timeout=5) as view:
        view[0] = number


def test_buffer_is_published_with_what_is_in_it(stream: Stream) -> None:
    with stream.reader() as reader:
        for seq in range(1, 10):
            buf = stream.bufs[seq % 3]
            fill(buf, seq)
            assert stream.publish(buf, meta={"n": seq}, timeout=0) == seq
            frame = reader.next(timeout=0)
            assert (frame.seq, content(frame), frame.meta, frame.buf) == (seq, seq, {"n": seq}, buf)
            frame.release()


@pytest.mark.parametrize("policy", ["queue", "latest"])
def test_reader_waits_for_the_fence(stream: Stream, tl: Timeline, policy: str) -> None:
    fence = tl.fence()
    with stream.reader(policy) as reader:
        stream.publish(stream.bufs[0], fence=fence)
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            reader.next(timeout=0)
        with Background(lambda: reader.next().seq) as job:
            job.until_blocked()
            assert not job.done
            fence.signal()
            assert job.result() == 1


@pytest.mark.parametrize("policy", ["queue", "latest"])
def test_frame_whose_fence_fails_is_passed_over(stream: Stream, tl: Timeline, policy: str) -> None:
    first = tl.fence()
    with stream.reader(policy) as reader:  # type: ignore[arg-type]
        stream.publish(stream.bufs[0], fence=first)
        first.signal(-errno.EIO)
        stream.publish(stream.bufs[1])
        assert (reader.next(timeout=5).seq, reader.lost) == (2, 1)


def engine(parent: Parent) -> None:
    """Publishes a frame that it is to fill, as a camera's driver would."""
    with Stream.open(parent.recv()) as stream:
        line = Timeline("camera")
        fence = line.fence()
        stream.publish(stream.bufs[0], fence=fence)
        parent.send("published")
        parent.recv()
        fence.signal()


def test_frame_of_a_fence_whose_process_dies_is_passed_over(make: Make, bufs: list[dmabuf.DmaBuf], name: str, child: Spawn) -> None:
    stream = make(name, size=None, buffers=bufs)
    process = child(engine)
    process.send(name)
    assert process.recv() == "published"
    with stream.reader(wait_for_producer=True) as reader, Background(lambda: reader.next().seq) as job:
        job.until_blocked()
        process.kill()
        stream.publish(stream.bufs[1], timeout=30)
        assert (job.result(), reader.lost) == (2, 1)


def test_frame_of_a_fence_that_failed_long_ago_is_passed_over(stream: Stream, tl: Timeline) -> None:
    with stream.reader() as reader:
        fence = tl.fence()
        stream.publish(stream.bufs[0], fence=fence)
        fence.signal(-errno.EIO)
        del fence
        for _ in range(40):  # its slot is used again and again
            fences = [tl.fence() for _ in range(60)]
            for fence in fences:
                fence.signal(-errno.EIO)
            del fence, fences
        stream.publish(stream.bufs[1])
        assert (reader.next(timeout=5).seq, reader.lost) == (2, 1)


def test_third_party_waits_for_the_fence(stream: Stream, tl: Timeline, child: Spawn) -> None:
    fence = tl.fence()
    buf = stream.bufs[0]
    stream.publish(buf, fence=fence)
    process = child(third)
    dmabuf.send(process.sock, buf)
    assert process.recv() == errno.ETIMEDOUT
    until_asleep(process.pid)
    fence.signal()
    assert process.result() == 0


def third(parent: Parent) -> int:
    (buf,) = dmabuf.recv(parent.sock)
    with buf:
        with raises_errno(errno.ETIMEDOUT, TimeoutError), buf.read(timeout=0):
            pass
        parent.send(errno.ETIMEDOUT)
        with buf.read(timeout=30) as view:
            return view[0]


def test_producers_own_process_waits_for_the_fence_of_a_published_frame(stream: Stream, tl: Timeline) -> None:
    fence = tl.fence()
    buf = stream.bufs[0]
    stream.publish(buf, fence=fence)
    with raises_errno(errno.ETIMEDOUT, TimeoutError), buf.read(timeout=0):
        pass
    fence.signal()
    with buf.read(timeout=0):
        pass


def test_producer_passes_over_a_slot_whose_fence_is_pending(stream: Stream, tl: Timeline) -> None:
    fence = tl.fence()
    stream.publish(stream.bufs[0], fence=fence)
    for _ in range(6):
        with stream.produce(timeout=0) as frame:
            assert frame.buf is not stream.bufs[0]
    fence.signal()
    seen = []
    for _ in range(3):
        with stream.produce(timeout=0) as frame:
            seen.append(frame.buf)
    assert stream.bufs[0] in seen


def test_publish_of_the_wrong_buffer_is_refused(stream: Stream) -> None:
    with dmabuf.allocate(SIZE) as other, raises_errno(errno.EINVAL):
        stream.publish(other)
    stream.publish(stream.bufs[0])
    with raises_errno(errno.EINVAL):
        stream.publish(stream.bufs[0])
    with pytest.raises(TypeError, match="give bytes"):
        stream.publish(stream.bufs[1], meta=object())
    assert stream.publish(stream.bufs[1]) == 2


def test_publish_waits_until_readers_have_given_the_buffer_back(stream: Stream) -> None:
    with stream.reader() as reader:
        stream.publish(stream.bufs[0])
        stream.publish(stream.bufs[1])
        with raises_errno(errno.ETIMEDOUT, TimeoutError):
            stream.publish(stream.bufs[0], timeout=0)
        with Background(lambda: stream.publish(stream.bufs[0])) as job:
            job.until_blocked()
            reader.next(timeout=0).release()
            assert job.result() == 3


def test_buffers_of_another_stream_are_refused(stream: Stream, make: Make) -> None:
    with raises_errno(errno.EBUSY):
        make(size=None, buffers=list(stream.bufs))
    with dmabuf.allocate(2 * SIZE) as other, dmabuf.allocate(SIZE) as one, raises_errno(errno.EINVAL):
        make(size=None, buffers=[one, other])


def test_publish_that_a_signal_interrupts_leaves_the_stream_usable(stream: Stream) -> None:
    turn = iter(range(10**9))

    def publish() -> None:
        newest = stream.info()["published"]
        at = next(k for k, slot in enumerate(stream.info()["slots"]) if not newest or slot["seq"] != newest)
        stream.publish(stream.bufs[at], meta=next(turn), timeout=1)

    stops, faults = at_every_stop(publish, publish, step=times(quick=5, full=1))
    assert not faults, "\n".join(faults)
    assert stops > 3


def test_publish_that_is_interrupted_once_it_has_its_slot_leaves_the_stream_usable(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Stream._take

    def interrupted(self: Stream, timeout: float | None, slot: int) -> None:
        take(self, timeout, slot)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "_take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.publish(stream.bufs[0])
    assert stream.publish(stream.bufs[0], timeout=0) == 1


def test_publish_in_the_block_of_a_frame_is_refused(stream: Stream) -> None:
    with stream.produce() as frame:
        frame.view[0] = 4
        other = next(buf for buf in stream.bufs if buf is not frame.buf)
        with raises_errno(errno.EINPROGRESS):
            stream.publish(other)
    assert content(stream.next(timeout=0)) == 4


# ---- passed on ----


def far_reader(parent: Parent) -> list[int]:
    (stream,) = dmabuf.recv(parent.sock)
    with stream, stream.reader(wait_for_producer=True) as reader:
        parent.send("here")
        return [content(reader.next(timeout=30)) for _ in range(3)]


def test_stream_without_a_name_is_sent(make: Make, child: Spawn) -> None:
    stream = make()
    process = child(far_reader)
    dmabuf.send(process.sock, stream)
    assert process.recv() == "here"
    until_asleep(process.pid)
    for number in range(3):
        with stream.produce() as frame:
            frame.view[0] = number
    assert process.result() == [0, 1, 2]


def test_statistics_say_who_reads_and_how_far(make: Make, name: str) -> None:
    stream = make(name)
    with stream.reader() as reader, stream.reader("latest", newest=False):
        for number in range(3):
            with stream.produce() as frame:
                frame.view[0] = number
        reader.next(timeout=0).release()
        told = stream.statistics()
        assert (told.name, told.published, told.state, told.slots, told.size, told.writing) == (name, 3, "alive", 4, SIZE, 0)
        assert [(one.policy, one.seen, one.lag) for one in told.readers] == [("queue", 1, 2), ("latest", 0, 3)]
