"""The descriptor of a sync file, polled and waited for in every way (semantics 5.5)."""

import asyncio
import contextlib
import errno
import math
import os
import select
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaFence, DmaFenceArray, DmaFenceChain, SyncFile, Timeline
from dmabuf._native import SYNC_PER
from dmabuf.domain.sync_files import place_of
from tests.support.errnos import raises_errno
from tests.support.facts import FACTS
from tests.support.interrupts import ended_by_a_signal
from tests.support.sync_files import open_in_domain, polled
from tests.support.waiting import Background

ALL_EVENTS = select.POLLIN | select.POLLOUT | select.POLLPRI | select.POLLRDNORM | select.POLLWRNORM | select.POLLRDHUP


# ---- the descriptor ----


def test_the_descriptor_is_readable_once_the_fence_has_ended_and_stays_so(sf: SyncFile, fence: DmaFence) -> None:
    assert polled(sf) == 0
    fence.signal()
    assert [polled(sf), polled(sf)] == [select.POLLIN] * 2


def test_of_every_event_only_reading_is_ever_reported(sf: SyncFile, fence: DmaFence) -> None:
    assert polled(sf, ALL_EVENTS) == 0
    fence.signal(-errno.EIO)
    assert polled(sf, ALL_EVENTS) == select.POLLIN | select.POLLRDNORM
    assert polled(sf, select.POLLOUT) == 0


def test_a_fence_that_failed_makes_it_readable(sf: SyncFile, fence: DmaFence) -> None:
    sf.fileno()
    fence.signal(-errno.EIO)
    assert (polled(sf), sf.status) == (select.POLLIN, -errno.EIO)


def test_made_of_an_ended_fence_it_is_readable_at_once(fence: DmaFence) -> None:
    fence.signal()
    with SyncFile(fence) as sf:
        assert polled(sf) == select.POLLIN


def test_select_waits_for_it(sf: SyncFile, fence: DmaFence) -> None:
    with Background(lambda: select.select([sf], [], [])[0]) as job:
        job.until_blocked()
        assert not job.done
        fence.signal()
        assert job.result() == [sf]


@pytest.mark.parametrize("flags", [0, select.EPOLLET, select.EPOLLONESHOT], ids=["level", "edge", "oneshot"])
def test_epoll_reports_it(sf: SyncFile, fence: DmaFence, flags: int) -> None:
    with select.epoll() as waiting:
        waiting.register(sf.fileno(), select.EPOLLIN | select.EPOLLOUT | flags)
        assert waiting.poll(0) == []
        fence.signal()
        assert waiting.poll(0) == [(sf.fileno(), select.EPOLLIN)]
        assert waiting.poll(0) == ([] if flags else [(sf.fileno(), select.EPOLLIN)])


def test_an_event_loop_calls_its_reader(sf: SyncFile, fence: DmaFence) -> None:
    async def main() -> None:
        loop, seen = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(sf.fileno(), seen.set)
        loop.call_soon(fence.signal)
        await seen.wait()
        loop.remove_reader(sf.fileno())

    asyncio.run(main())


def test_a_merge_is_readable_only_when_all_its_fences_have_ended(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, a, b = merged
    assert polled(both) == 0
    b.signal()
    assert polled(both) == 0
    a.signal()
    assert polled(both) == select.POLLIN


def test_descriptor_is_readable_with_last_fence_in_any_order() -> None:
    timelines = [Timeline(f"t{i}") for i in range(5)]
    fences = [timeline.fence() for timeline in timelines]
    with SyncFile(DmaFenceArray(fences)) as sf:
        sf.fileno()
        for i in (2, 0, 4, 3):
            fences[i].signal()
            assert polled(sf) == 0
        fences[1].signal()
        assert polled(sf) == select.POLLIN


def test_signal_on_any_array_is_readable_with_first_member(tl: Timeline, other_tl: Timeline) -> None:
    a, b = tl.fence(), other_tl.fence()
    with SyncFile(DmaFenceArray([a, b], signal_on_any=True)) as sf:
        assert polled(sf) == 0
        b.signal()
        assert polled(sf) == select.POLLIN
        a.signal()


def test_chain_is_readable_when_every_point_is_signaled(tl: Timeline, other_tl: Timeline) -> None:
    a, b = tl.fence(), other_tl.fence()
    with SyncFile(DmaFenceChain(DmaFenceChain(None, a, 1), b, 2)) as sf:
        sf.fileno()
        b.signal()
        assert polled(sf) == 0
        a.signal()
        assert polled(sf) == select.POLLIN


@pytest.mark.parametrize(
    ("operation", "number"),
    [
        pytest.param(lambda fd: os.read(fd, 1), FACTS["syncfile/empty-read"].errno, id="read"),
        pytest.param(lambda fd: os.lseek(fd, 0, os.SEEK_SET), FACTS["syncfile/empty-lseek"].errno, id="lseek"),
        pytest.param(lambda fd: dmabuf._native.Mapping(fd, 4096), FACTS["syncfile/empty-mmap"].errno, id="mmap"),
        pytest.param(lambda fd: os.write(fd, b"x"), errno.ENOTCONN, id="write, EBADF in the kernel"),
    ],
)
def test_it_is_for_waiting_only(sf: SyncFile, operation: Callable[[int], object], number: int) -> None:
    with raises_errno(number):
        operation(sf.fileno())


def test_the_descriptor_is_not_inherited_by_exec(sf: SyncFile) -> None:
    assert not os.get_inheritable(sf.fileno())
    copy = sf.dup()
    assert not os.get_inheritable(copy)
    os.close(copy)


def test_the_descriptor_is_made_once_and_closed_with_the_sync_file(sf: SyncFile) -> None:
    fd = sf.fileno()
    assert sf.fileno() == fd
    sf.close()
    sf.close()
    with raises_errno(errno.EBADF):
        os.fstat(fd)


def test_duplicate_outlives_sync_file_and_becomes_readable(tl: Timeline) -> None:
    fence = tl.fence()
    sf = SyncFile(fence)
    fd = sf.dup()
    sf.close()
    assert polled(fd) == 0
    fence.signal()
    assert polled(fd) == select.POLLIN
    os.close(fd)


def test_what_is_forgotten_closes_its_descriptor(tl: Timeline) -> None:
    fence = tl.fence()
    fd = SyncFile(fence).fileno()
    with raises_errno(errno.EBADF):
        os.fstat(fd)
    assert open_in_domain() == 0


def test_nothing_is_left_in_the_domain_after_the_last_descriptor(sf: SyncFile, fence: DmaFence) -> None:
    assert open_in_domain() == 0  # nobody has asked for a descriptor
    copy = sf.dup()
    sf.close()
    assert open_in_domain() == 1
    fence.signal()
    assert open_in_domain() == 1
    os.close(copy)
    assert open_in_domain() == 0


def test_slots_of_closed_sync_files_are_used_by_later_ones(tl: Timeline) -> None:
    fence = tl.fence()
    slots = set()
    for _ in range(1000):
        sf = SyncFile(fence)
        fd = sf.dup()
        slots.add(place_of(fd))
        sf.close()
        os.close(fd)  # by somebody who doesn't know what it is
    assert len(slots) == 1000
    assert len({place.slot for _, place in filter(None, slots)}) < 2 * SYNC_PER  # as many as tests before this one have left
    fence.signal()


def test_slot_of_an_open_descriptor_is_not_used_by_later_ones(tl: Timeline) -> None:
    fence = tl.fence()
    with SyncFile(fence, "kept") as sf:
        kept = sf.dup()
    for _ in range(600):
        with SyncFile(fence, "later") as sf:
            sf.fileno()
    with SyncFile.from_fd(kept) as found:
        assert (found.name, found.fence) == ("kept", fence)
    fence.signal()
    assert polled(kept) == select.POLLIN
    os.close(kept)


def test_many_sync_files_of_one_fence_become_readable(tl: Timeline) -> None:
    fence, other = tl.fence(), tl.fence()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(SyncFile(fence)) for _ in range(300)]  # more than a chunk has slots
        last = stack.enter_context(SyncFile(other))
        assert [polled(sf) for sf in (*files, last)] == [0] * 301
        fence.signal()
        assert [polled(sf) for sf in (*files, last)] == [select.POLLIN] * 300 + [0]
        other.signal()
        assert polled(last) == select.POLLIN


def test_without_a_free_descriptor_there_is_a_clear_error(sf: SyncFile, fence: DmaFence, few_descriptors: Callable[[], None]) -> None:
    few_descriptors()
    with raises_errno(FACTS["limits/emfile-export"].errno or 0):
        sf.fileno()


def test_making_it_readable_needs_no_free_descriptor(
    sf: SyncFile, fence: DmaFence, few_descriptors: Callable[[], Callable[[], None]]
) -> None:
    fd = sf.fileno()
    free = few_descriptors()
    fence.signal()
    assert polled(fd) == select.POLLIN
    free()


@pytest.fixture
def few_descriptors() -> Iterator[Callable[[], Callable[[], None]]]:
    """Use up every descriptor; the answer gives them back."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def free() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        while taken:
            os.close(taken.pop())

    def use_up() -> Callable[[], None]:
        top = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + 8, hard))
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            return free

    yield use_up
    free()


# ---- waiting ----


def test_wait_returns_what_is_left(sf: SyncFile, fence: DmaFence) -> None:
    assert sf.wait(0) == 0.0
    fence.signal()
    assert sf.wait() == math.inf
    assert 0 < sf.wait(5) <= 5


def test_wait_for_a_merge_ends_with_its_last_fence(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, a, b = merged
    with Background(both.wait) as job:
        a.signal()
        job.until_blocked()
        assert not job.done
        b.signal(-errno.EIO)
        assert job.result() == math.inf
    assert both.status == -errno.EIO


def test_wait_is_interrupted_by_a_signal_if_asked(sf: SyncFile) -> None:
    ended_by_a_signal(lambda: sf.wait(interruptible=True))


def test_await_gives_the_status(sf: SyncFile, fence: DmaFence) -> None:
    async def main() -> int:
        asyncio.get_running_loop().call_soon(fence.signal, -errno.EIO)
        return await sf

    assert asyncio.run(main()) == -errno.EIO


def test_a_cancelled_await_leaves_nothing_registered(sf: SyncFile, fence: DmaFence) -> None:
    async def main() -> None:
        task = asyncio.create_task(asyncio.wait_for(_awaited(sf), None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert fence.statistics().callbacks == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fence.statistics().callbacks == 0

    asyncio.run(main())


async def _awaited(sf: SyncFile) -> int:
    return await sf


def test_closing_leaves_nothing_registered() -> None:
    """Any process may signal the fence, so this one watches it, in case that one dies in the middle."""
    with dmabuf.SwSync() as sw, sw.create_fence(1) as sf:
        fence = sf.fence
        sf.fileno()
        assert fence.statistics().callbacks == 1
        sf.close()
        assert fence.statistics().callbacks == 0


class Watched(dmabuf.FenceOps):
    """A fence that does nothing until it is enabled."""

    def __init__(self) -> None:
        self.enabled = 0

    def enable_signaling(self, fence: DmaFence) -> bool:
        self.enabled += 1
        return True


def test_fileno_enables_a_custom_fence_once(tl: Timeline) -> None:
    ops = Watched()
    fence = tl.fence(ops=ops)
    with SyncFile(fence) as sf:
        assert ops.enabled == 0
        assert polled(sf) == polled(sf) == 0
        assert ops.enabled == 1
        fence.signal()
        assert polled(sf) == select.POLLIN


def test_trio_waits_for_it(sf: SyncFile, fence: DmaFence) -> None:
    trio = pytest.importorskip("trio")
    pytest.importorskip("trio.testing")
    seen: list[int] = []

    async def wait() -> None:
        seen.append(await sf)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            fence.signal(-errno.EIO)
        with trio.move_on_after(0.01) as scope:
            await trio.lowlevel.wait_readable(sf)
        assert not scope.cancelled_caught

    trio.run(main)
    assert seen == [-errno.EIO]


@pytest.mark.parametrize("make", [dmabuf.SwSync, dmabuf.TimelineSemaphore], ids=["SwSync", "TimelineSemaphore"])
def test_without_a_free_descriptor_no_timeline_is_made(make: Callable[[], Any], few_descriptors: Callable[[], Callable[[], None]]) -> None:
    with make() as there:
        free = few_descriptors()
        for use in (make, there.dup, lambda: type(there).from_fd(there.fileno())):
            with raises_errno(errno.EMFILE):
                use()
        free()
