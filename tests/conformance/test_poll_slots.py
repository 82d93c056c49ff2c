"""What a poll leaves behind: a slot for each direction, and a reference until its fence ends (semantics 5.6, appendix A)."""

import errno
import gc
import os
import resource
import select
from collections.abc import Iterator

import pytest

import dmabuf
from dmabuf import DmaBuf, DmaFence, Timeline, Usage
from tests.support.children import Child, Parent, Spawn
from tests.support.drivers import Static
from tests.support.errnos import raises_errno
from tests.support.facts import FACTS
from tests.support.fences import attach
from tests.support.partners import handed
from tests.support.steps import fork, reap
from tests.support.waiting import Background, until

IN, OUT = select.POLLIN, select.POLLOUT
BOTH = IN | OUT
SIZE = 4096


@pytest.fixture
def write(buf: DmaBuf, tl: Timeline) -> DmaFence:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    return fence


@pytest.fixture
def read(buf: DmaBuf, other_tl: Timeline) -> DmaFence:
    fence = other_tl.fence()
    attach(buf.resv, fence, Usage.READ)
    return fence


def count(buf: DmaBuf) -> int:
    """References, as fdinfo says."""
    return int(buf.fdinfo().partition("count:\t")[2].split()[0])


def alive(ino: int) -> bool:
    return any(record.ino == ino for record in dmabuf.buffers())


def test_a_polled_busy_buffer_has_a_reference_for_each_direction(buf: DmaBuf, write: DmaFence) -> None:
    assert buf.poll(BOTH) == 0
    assert count(buf) == FACTS["poll/count-polled"].ret
    for _ in range(10):
        assert buf.poll(BOTH) == 0
    assert count(buf) == FACTS["poll/count-polled"].ret  # one slot a direction, however often
    write.signal()
    assert count(buf) == 1


@pytest.mark.parametrize("events", [IN, OUT])
def test_only_the_direction_that_was_asked_for_has_one(buf: DmaBuf, write: DmaFence, events: int) -> None:
    assert buf.poll(events) == 0
    assert count(buf) == 2
    write.signal()


def test_an_idle_direction_has_none(buf: DmaBuf, read: DmaFence) -> None:
    assert buf.poll(BOTH) == IN
    assert count(buf) == 2
    read.signal()
    assert (buf.poll(BOTH), count(buf)) == (BOTH, 1)


def test_a_polled_busy_buffer_lives_on_until_the_fence_ends(tl: Timeline) -> None:
    fence = tl.fence()
    buf = dmabuf.allocate(SIZE)
    ino = buf.ino
    attach(buf.resv, fence, Usage.WRITE)
    assert buf.poll(IN) == 0
    buf.close()
    del buf
    gc.collect()
    assert alive(ino) is FACTS["poll/alive-polled"].ret
    with dmabuf.open(ino) as again:  # a buffer like any other
        assert again.poll(IN) == 0
    fence.signal()
    until(lambda: alive(ino) is FACTS["poll/alive-after"].ret)


def test_a_busy_buffer_that_nobody_polled_goes_at_once(tl: Timeline) -> None:
    fence = tl.fence()
    buf = dmabuf.allocate(SIZE)
    ino = buf.ino
    attach(buf.resv, fence, Usage.WRITE)
    buf.close()
    del buf
    gc.collect()
    until(lambda: not alive(ino))
    fence.signal()


@pytest.mark.parametrize("end", [0, -errno.EIO], ids=["signalled", "failed"])
def test_the_exporter_is_asked_to_release_only_when_the_fence_has_ended(static: Static, tl: Timeline, end: int) -> None:
    fence = tl.fence()
    buf = dmabuf.export(static, SIZE)
    attach(buf.resv, fence, Usage.READ)
    assert buf.poll(OUT) == 0
    buf.close()
    del buf
    gc.collect()
    assert static.count("release") == 0
    fence.signal(end)
    until(lambda: static.count("release"))


def test_release_never_runs_inside_of_the_callback(static: Static, tl: Timeline) -> None:
    """The fence is signalled with a lock held that the exporter's release wants (appendix A.1)."""
    resv = dmabuf.DmaResv()
    fence = tl.fence()
    seen: list[bool] = []
    static.during["release"] = lambda _: seen.append(resv.trylock())
    buf = dmabuf.export(static, SIZE)
    attach(buf.resv, fence, Usage.WRITE)
    assert buf.poll(IN) == 0
    buf.close()
    del buf
    gc.collect()
    with resv.locked():
        fence.signal()
        until(lambda: seen)
    assert seen == [False]  # another thread's: ours would have been refused as a deadlock


def test_the_directions_are_independent(buf: DmaBuf, write: DmaFence, read: DmaFence) -> None:
    assert buf.poll(BOTH) == 0
    write.signal()
    assert buf.poll(BOTH) == IN
    read.signal()
    assert buf.poll(BOTH) == BOTH


def test_pollers_of_both_directions_wake_exactly_when_their_set_is_done(buf: DmaBuf) -> None:
    timelines = [Timeline(f"t{i}") for i in range(6)]
    fences = [timeline.fence() for timeline in timelines]
    for fence, usage in zip(fences, [Usage.WRITE] * 3 + [Usage.READ] * 3, strict=True):
        attach(buf.resv, fence, usage)
    with Background(lambda: buf.poll(IN, None)) as reader, Background(lambda: buf.poll(OUT, None)) as writer:
        for fence in fences[:2]:
            fence.signal()
            reader.until_blocked()
            writer.until_blocked()
            assert not reader.done
        fences[2].signal()
        assert reader.result() == IN
        for fence in fences[3:5]:
            fence.signal()
            writer.until_blocked()
            assert not writer.done
        fences[5].signal()
        assert writer.result() == OUT


def test_a_direction_stays_busy_until_the_fence_that_was_found_ends(buf: DmaBuf, write: DmaFence, tl: Timeline) -> None:
    """As in the kernel the active slot answers, although the fence has left the list meanwhile."""
    assert buf.poll(IN) == 0
    other = Timeline("replacement")
    done = other.fence()
    with buf.resv.locked():
        buf.resv.replace(write.context, done, Usage.WRITE)
    done.signal()
    assert buf.resv.test_signaled(Usage.BOOKKEEP)
    assert buf.poll(BOTH) == OUT
    write.signal()
    assert buf.poll(BOTH) == BOTH


def test_a_poll_that_times_out_leaves_its_slot(buf: DmaBuf, write: DmaFence) -> None:
    assert buf.poll(BOTH, 0.01) == 0
    assert count(buf) == 3
    write.signal()
    assert count(buf) == 1


def test_a_poll_without_a_free_descriptor_is_answered(buf: DmaBuf, write: DmaFence, no_descriptors: None) -> None:
    assert buf.poll(BOTH) == 0
    write.signal()
    assert buf.poll(BOTH) == BOTH


@pytest.fixture
def no_descriptors(buf: DmaBuf, write: DmaFence) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 4, hard))
    try:
        with raises_errno(errno.EMFILE):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


def test_a_forked_child_begins_without_slots(buf: DmaBuf, write: DmaFence) -> None:
    assert buf.poll(IN) == 0

    def look() -> None:
        assert buf.poll(BOTH) == 0
        buf.close()

    assert reap(fork(look)) == 0
    assert (buf.poll(IN), count(buf)) == (0, 2)
    write.signal()
    assert (buf.poll(IN), count(buf)) == (IN, 1)


# ---- with another process ----


def polls(parent: Parent) -> bool:
    """Polls a busy buffer and closes it; until told."""
    (buf,) = dmabuf.recv(parent.sock)
    assert buf.poll(BOTH) == 0
    buf.close()
    parent.send("polled")
    parent.recv()
    return True


def polled_elsewhere(child: Spawn, fence: DmaFence) -> tuple[Child, int]:
    """A process that polled a buffer busy with the fence, and the inode of the buffer, which nobody holds any more."""
    buf = dmabuf.allocate(SIZE)
    ino = buf.ino
    attach(buf.resv, fence, Usage.WRITE)
    other = handed(child(polls), buf, says="polled")
    buf.close()
    del buf
    gc.collect()
    return other, ino


def test_what_another_process_polled_lives_on_there(child: Spawn, tl: Timeline) -> None:
    fence = tl.fence()
    other, ino = polled_elsewhere(child, fence)
    assert alive(ino)
    fence.signal()
    until(lambda: not alive(ino))
    other.send("end")
    assert other.result() is True


def test_the_death_of_who_polled_ends_the_reference(child: Spawn, tl: Timeline) -> None:
    fence = tl.fence()
    other, ino = polled_elsewhere(child, fence)
    other.kill()
    until(lambda: not alive(ino))
    fence.signal()


def owns(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    fence = Timeline("owner").fence()
    attach(buf.resv, fence, Usage.WRITE)
    buf.close()
    parent.send("has it")
    parent.recv()


def test_the_death_of_the_fences_owner_ends_the_reference(child: Spawn) -> None:
    buf = dmabuf.allocate(SIZE)
    ino = buf.ino
    other = handed(child(owns), buf, says="has it")
    assert buf.poll(IN) == 0
    buf.close()
    del buf
    gc.collect()
    assert alive(ino)
    other.kill()
    until(lambda: not alive(ino))
