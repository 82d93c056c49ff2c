"""Timeline semaphores: points, and waiting for what may not be there yet (spec 5.14)."""

import asyncio
import errno
import gc
import math
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_sharer
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, DmaFence, DmaFenceArray, SwSync, SyncFile, Timeline, TimelineSemaphore, wait_semaphores
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.steps import Held, fork, killed_at, reap, trace
from tests.support.waiting import Background, until_asleep
from tests.support.ways import WAYS, received, sent


@pytest.fixture
def sem() -> Iterator[TimelineSemaphore]:
    with TimelineSemaphore() as made:
        yield made


@pytest.fixture
def fences(tl: Timeline) -> list[DmaFence]:
    return [tl.fence() for _ in range(5)]


def points(sem: TimelineSemaphore) -> tuple[int, int]:
    return sem.query(), sem.query(submitted=True)


def reached(sem: TimelineSemaphore, point: int = 0) -> bool:
    try:
        return sem.wait(point, 0) > 0
    except TimeoutError:
        return False


# ---- binary use ----


def test_a_new_one_has_no_fence(sem: TimelineSemaphore) -> None:
    with raises_errno(errno.EINVAL):
        sem.wait(0, 0)
    with raises_errno(errno.EINVAL):
        sem.export_fence()
    with raises_errno(errno.ETIME, TimeoutError):
        sem.wait(0, 0, for_submit=True)


def test_one_can_begin_signalled() -> None:
    with TimelineSemaphore(signaled=True) as sem:
        assert sem.wait() == math.inf
        assert sem.export_fence().status == 1


def test_signal_and_reset(sem: TimelineSemaphore) -> None:
    sem.signal()
    assert reached(sem)
    sem.reset()
    with raises_errno(errno.EINVAL):
        sem.wait(0, 0)


def test_a_fence_replaces_the_one_before(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0])
    assert sem.export_fence() is fences[0]
    sem.import_fence(fences[1])
    assert sem.export_fence() is fences[1]
    fences[1].signal()
    assert reached(sem)


def test_binary_use_has_no_points(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0])
    assert points(sem) == (0, 0)
    with raises_errno(errno.EINVAL):
        sem.wait(1, 0)


# ---- points ----


def test_points_are_reached_in_their_order(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    for point, fence in zip((1, 2, 3), fences, strict=False):
        sem.import_fence(fence, point)
    assert points(sem) == (0, 3)
    fences[1].signal()
    assert [reached(sem, point) for point in (1, 2, 3)] == [False] * 3
    fences[0].signal()
    assert points(sem) == (2, 3)
    assert [reached(sem, point) for point in (0, 1, 2, 3)] == [False, True, True, False]
    fences[2].signal()
    assert points(sem) == (3, 3)
    assert reached(sem)


def test_a_point_in_a_gap_is_the_next(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 2)
    sem.import_fence(fences[1], 6)
    fences[0].signal()
    assert [reached(sem, point) for point in (1, 2, 3, 6)] == [True, True, False, False]
    assert sem.export_fence(4) is fences[1]
    fences[1].signal()
    assert reached(sem, 5)


def test_a_point_beyond_the_last_has_no_fence(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 2)
    with raises_errno(errno.EINVAL):
        sem.wait(3, 0)
    with raises_errno(errno.EINVAL):
        sem.export_sync_file(3)


def test_a_number_that_does_not_rise_is_raised_and_begins_anew(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 5)
    sem.import_fence(fences[1], 3)
    assert points(sem) == (0, 5)
    fences[1].signal()
    assert not reached(sem, 5)  # what came before belongs to it
    fences[0].signal()
    assert points(sem) == (5, 5)


def test_a_timeline_goes_on_after_a_binary_fence(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0])
    sem.import_fence(fences[1], 1)
    fences[1].signal()
    assert not reached(sem, 1)
    fences[0].signal()
    assert reached(sem, 1)


def test_a_binary_fence_ends_the_timeline(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 7)
    sem.import_fence(fences[1])
    assert (points(sem), sem.export_fence() is fences[1]) == ((0, 0), True)


def test_signal_at_a_point(sem: TimelineSemaphore) -> None:
    sem.signal(4)
    assert points(sem) == (4, 4)
    assert reached(sem, 4)


def test_a_fence_that_failed_counts_as_reached(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 1)
    fences[0].signal(-errno.EIO)
    assert points(sem) == (1, 1)


def test_a_container_is_taken_apart(sem: TimelineSemaphore, tl: Timeline, other_tl: Timeline) -> None:
    a, b = tl.fence(), other_tl.fence()
    sem.import_fence(DmaFenceArray([a, b]), 1)
    assert sem.statistics() == dmabuf.core.semaphore.SemaphoreStatistics(0, 1, 2)
    a.signal()
    assert sem.export_fence(1) is b
    b.signal()
    assert reached(sem, 1)


def test_thousands_of_points(sem: TimelineSemaphore) -> None:
    with SwSync() as sw:
        files = [sw.create_fence(value) for value in range(1, 301)]
        for value, sf in enumerate(files, 1):
            sem.import_sync_file(sf, value)
        sw.inc(100)
        assert points(sem) == (100, 300)
        sw.inc(200)
        assert points(sem) == (300, 300)


# ---- transfer, sync files ----


def test_transfer_takes_a_points_fences(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    with TimelineSemaphore() as other:
        other.import_fence(fences[0], 1)
        other.import_fence(fences[1], 2)
        sem.transfer(other, 1, 10)
        fences[0].signal()
        assert (points(sem), points(other)) == ((10, 10), (1, 2))
        sem.transfer(other, 2)
        assert sem.export_fence() is fences[1]


def test_transfer_of_what_is_not_there_is_einval(sem: TimelineSemaphore) -> None:
    with TimelineSemaphore() as other, raises_errno(errno.EINVAL):
        sem.transfer(other)


def test_transfer_waits_for_submission_if_asked(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    with TimelineSemaphore() as other:
        with Background(lambda: sem.transfer(other, 3, 1, for_submit=True)) as job:
            job.until_blocked()
            assert not job.done
            other.import_fence(fences[0], 3)
            job.result()
        assert sem.export_fence(1) is fences[0]


def test_sync_files_go_in_and_out(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    with SyncFile(fences[0]) as sf:
        sem.import_sync_file(sf, 1)
        sem.import_sync_file(sf.fileno(), 2)
    with sem.export_sync_file(2) as out:
        assert (out.status, out.info().num_fences) == (0, 1)
        fences[0].signal()
        assert select.select([out], [], [], 0)[0] == [out]


# ---- waiting ----


def test_wait_for_submit_goes_on_to_the_fence(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    with Background(lambda: sem.wait(2, for_submit=True)) as job:
        job.until_blocked()
        sem.import_fence(fences[0], 1)
        job.until_blocked()
        sem.import_fence(fences[1], 2)
        fences[1].signal()
        job.until_blocked()
        assert not job.done
        fences[0].signal()
        assert job.result() == math.inf


def test_wait_available_ends_with_the_submission(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    with Background(lambda: sem.wait(1, available=True)) as job:
        job.until_blocked()
        assert not job.done
        sem.import_fence(fences[0], 1)
        assert job.result() == math.inf
    assert not reached(sem, 1)


def three(fences: list[DmaFence]) -> list[TimelineSemaphore]:
    made = [TimelineSemaphore() for _ in range(3)]
    for sem, fence in zip(made, fences, strict=False):
        sem.import_fence(fence, 1)
    return made


def test_wait_all(fences: list[DmaFence]) -> None:
    sems = three(fences)
    with Background(lambda: wait_semaphores(sems, [1] * 3)) as job:
        for fence in (fences[2], fences[0]):
            fence.signal()
            job.until_blocked()
            assert not job.done
        fences[1].signal()
        assert job.result() == (0, math.inf)


def test_wait_any_tells_the_first(fences: list[DmaFence]) -> None:
    sems = three(fences)
    with Background(lambda: wait_semaphores(sems, [1] * 3, all=False)) as job:
        job.until_blocked()
        assert not job.done
        fences[2].signal()
        assert job.result() == (2, math.inf)
    fences[1].signal()
    index, left = wait_semaphores(sems, [1] * 3, 5, all=False)
    assert (index, 0 < left <= 5) == (1, True)


def test_wait_any_for_submit(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    with TimelineSemaphore() as other:
        sem.import_fence(fences[0], 1)
        with Background(lambda: wait_semaphores([sem, other], [1, 1], all=False, for_submit=True)) as job:
            job.until_blocked()
            other.signal(1)
            assert job.result() == (1, math.inf)


def test_wait_for_none_is_over() -> None:
    assert wait_semaphores([]) == (0, math.inf)


@pytest.mark.parametrize("all_", [True, False], ids=["all", "any"])
def test_a_wait_times_out_with_etime(fences: list[DmaFence], all_: bool) -> None:
    sems = three(fences)
    for timeout in (0, 0.01):
        with raises_errno(errno.ETIME, TimeoutError):
            wait_semaphores(sems, [1] * 3, timeout, all=all_)


def test_a_wait_for_a_submission_times_out_with_etime(sem: TimelineSemaphore) -> None:
    for timeout in (0, 0.01):
        with raises_errno(errno.ETIME):
            sem.wait(1, timeout, for_submit=True)


def test_a_deadline_is_told_to_the_fences(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 1)
    with raises_errno(errno.ETIME):
        wait_semaphores([sem], [1], 0, deadline=12345)
    assert fences[0].deadline == 12345


@pytest.mark.parametrize("submitted", [False, True])
def test_a_wait_is_interrupted_by_a_signal_if_asked(sem: TimelineSemaphore, fences: list[DmaFence], submitted: bool) -> None:
    if submitted:
        sem.import_fence(fences[0], 1)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    here = threading.get_ident()

    def interrupt() -> None:
        until_asleep(os.getpid())
        signal.pthread_kill(here, signal.SIGUSR1)

    try:
        with Background(interrupt), raises_errno(errno.EINTR):
            sem.wait(1, for_submit=True, interruptible=True)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_await(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    async def main() -> None:
        task = asyncio.create_task(sem.reached(1))
        await asyncio.sleep(0)
        sem.import_fence(fences[0], 1)
        await asyncio.sleep(0)
        assert not task.done()
        fences[0].signal()
        await task

    asyncio.run(main())


def test_a_cancelled_await_leaves_nothing_registered(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 1)

    async def main() -> None:
        task = asyncio.create_task(sem.reached(1))
        await asyncio.sleep(0)
        assert fences[0].statistics().callbacks == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fences[0].statistics().callbacks == 0

    asyncio.run(main())


# ---- eventfd ----


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def told(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_an_eventfd_is_told_when_a_point_is_reached(sem: TimelineSemaphore, fences: list[DmaFence], event: int) -> None:
    sem.eventfd(event, 2)
    sem.import_fence(fences[0], 1)
    sem.import_fence(fences[1], 2)
    fences[0].signal()
    assert not told(event)
    fences[1].signal()
    select.select([event], [], [])
    assert os.eventfd_read(event) == 1


def test_an_eventfd_is_told_when_a_point_is_available(sem: TimelineSemaphore, fences: list[DmaFence], event: int) -> None:
    sem.eventfd(event, 2, available=True)
    sem.import_fence(fences[0], 1)
    assert not told(event)
    sem.import_fence(fences[1], 2)
    select.select([event], [], [])


def test_an_eventfd_is_told_at_once_of_what_is_reached(sem: TimelineSemaphore, event: int) -> None:
    sem.signal(3)
    sem.eventfd(event, 2)
    assert told(event)


def test_closing_takes_an_eventfd_back(sem: TimelineSemaphore, fences: list[DmaFence], event: int) -> None:
    sem.import_fence(fences[0], 1)
    sem.eventfd(event, 1)
    assert fences[0].statistics().callbacks == 1
    sem.close()
    assert fences[0].statistics().callbacks == 0
    fences[0].signal()
    assert not told(event)


def test_an_eventfd_is_told_after_a_change_that_failed(sem: TimelineSemaphore, event: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sem.eventfd(event, 1, available=True)

    def no_memory(data: bytes) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patched, raises_errno(errno.ENOMEM):
        patched.setattr(sem._cell, "store", no_memory)
        sem.signal(1)
    assert not told(event)
    sem.signal(1)
    assert told(event)


def test_an_eventfd_is_told_when_another_is_changed_in_the_middle(
    sem: TimelineSemaphore, event: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = sem._cell.load
    sem.eventfd(event, 1, available=True)
    with TimelineSemaphore() as other:

        def handler() -> bytes:
            other.signal(1)
            return load()

        with monkeypatch.context() as patched:
            patched.setattr(sem._cell, "load", handler)
            sem.signal(1)
    select.select([event], [], [])


def test_an_eventfd_is_told_of_a_fence_that_ends_in_the_middle_of_a_call(
    sem: TimelineSemaphore, fences: list[DmaFence], event: int
) -> None:
    sem.import_fence(fences[0], 1)
    sem.eventfd(event, 1)
    with sem._cell.locked():  # as a finaliser or a signal handler in there
        fences[0].signal()
    select.select([event], [], [])


def test_the_last_holder_ends_the_fence_that_stands_for_a_submission(sem: TimelineSemaphore) -> None:
    pending = sem.domain.shm.fence_pending
    with raises_errno(errno.ETIME, TimeoutError):
        sem.wait(0, 0, for_submit=True)
    handle = sem._event()
    with TimelineSemaphore.from_fd(sem.fileno()) as other:
        sem.close()
        assert pending(handle)
        assert other._event() == handle
    assert not pending(handle)


# ---- bad arguments ----

USES: dict[str, Callable[[TimelineSemaphore], object]] = {
    "signal": lambda sem: sem.signal(),
    "reset": lambda sem: sem.reset(),
    "query": lambda sem: sem.query(),
    "wait": lambda sem: sem.wait(0, 0),
    "import_fence": lambda sem: sem.import_fence(dmabuf.stub_fence()),
    "export_fence": lambda sem: sem.export_fence(),
    "import_sync_file": lambda sem: sem.import_sync_file(SyncFile(dmabuf.stub_fence())),
    "export_sync_file": lambda sem: sem.export_sync_file(),
    "transfer": lambda sem: sem.transfer(sem),
    "eventfd": lambda sem: sem.eventfd(0),
    "fileno": lambda sem: sem.fileno(),
    "dup": lambda sem: sem.dup(),
    "statistics": lambda sem: sem.statistics(),
    "reached": lambda sem: sem.reached().send(None),
    "with": lambda sem: sem.__enter__(),
}


@pytest.mark.parametrize("use", list(USES.values()), ids=list(USES))
def test_a_closed_one_is_ebadf(sem: TimelineSemaphore, use: Callable[[TimelineSemaphore], object]) -> None:
    sem.close()
    sem.close()
    with raises_errno(errno.EBADF):
        use(sem)


def test_a_closed_one_among_several_is_enoent(sem: TimelineSemaphore) -> None:
    other = TimelineSemaphore()
    other.close()
    with raises_errno(errno.ENOENT):
        wait_semaphores([sem, other], timeout=0)
    with raises_errno(errno.ENOENT):
        sem.transfer(other)


POINTS: dict[str, Callable[[TimelineSemaphore, int], object]] = {
    "signal": lambda sem, point: sem.signal(point),
    "wait": lambda sem, point: sem.wait(point, 0),
    "import_fence": lambda sem, point: sem.import_fence(dmabuf.stub_fence(), point),
    "export_fence": lambda sem, point: sem.export_fence(point),
    "import_sync_file": lambda sem, point: sem.import_sync_file(SyncFile(dmabuf.stub_fence()), point),
    "export_sync_file": lambda sem, point: sem.export_sync_file(point),
    "transfer to": lambda sem, point: sem.transfer(TimelineSemaphore(signaled=True), 0, point),
    "transfer from": lambda sem, point: sem.transfer(TimelineSemaphore(signaled=True), point),
    "eventfd": lambda sem, point: sem.eventfd(0, point),
}


@pytest.mark.parametrize("point", [-1, 1 << 64])
@pytest.mark.parametrize("use", list(POINTS.values()), ids=list(POINTS))
def test_a_point_has_64_bits(sem: TimelineSemaphore, use: Callable[[TimelineSemaphore, int], object], point: int) -> None:
    with raises_errno(errno.EINVAL):
        use(sem, point)


def test_the_last_point_is_one(sem: TimelineSemaphore) -> None:
    sem.signal((1 << 64) - 1)
    assert points(sem) == ((1 << 64) - 1,) * 2


@pytest.mark.parametrize(
    ("points_", "timeout", "deadline"),
    [([], 0, None), ([1, 2], 0, None), ([0], -1, None), ([0], math.nan, None), ([0], 0, -1)],
    ids=["no point", "two points", "negative timeout", "NaN", "negative deadline"],
)
def test_a_wait_with_bad_arguments_is_einval(sem: TimelineSemaphore, points_: list[int], timeout: float, deadline: int | None) -> None:
    sem.signal()
    with raises_errno(errno.EINVAL):
        wait_semaphores([sem], points_, timeout, deadline=deadline)


@pytest.mark.parametrize("what", [None, 3, "x"])
def test_what_is_no_fence_is_a_type_error(sem: TimelineSemaphore, what: Any) -> None:
    with pytest.raises(TypeError):
        sem.import_fence(what)


@pytest.mark.parametrize("what", [None, "x", -1, 99999], ids=["None", "str", "-1", "closed"])
def test_what_is_no_sync_file_is_einval(sem: TimelineSemaphore, what: Any) -> None:
    with raises_errno(errno.EINVAL):
        sem.import_sync_file(what)


def test_a_closed_sync_file_is_einval(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sf = SyncFile(fences[0])
    sf.close()
    with raises_errno(errno.EINVAL):
        sem.import_sync_file(sf)


@pytest.mark.parametrize("what", [None, 3])
def test_what_is_no_semaphore_is_a_type_error(sem: TimelineSemaphore, what: Any) -> None:
    with pytest.raises(TypeError):
        wait_semaphores([what])
    with pytest.raises(TypeError):
        sem.transfer(what)


def test_a_fence_of_another_domain_is_exdev(sem: TimelineSemaphore) -> None:
    elsewhere = Timeline("elsewhere", domain=dmabuf.Domain.private())
    with raises_errno(errno.EXDEV):
        sem.import_fence(elsewhere.fence())


def test_semaphores_of_two_domains_are_not_waited_for_together(sem: TimelineSemaphore) -> None:
    with TimelineSemaphore(domain=dmabuf.Domain.private()) as other, raises_errno(errno.EXDEV):
        wait_semaphores([sem, other], timeout=0)


@pytest.mark.parametrize(("fd", "number"), [(99999, errno.EBADF), (0, errno.EINVAL)], ids=["closed", "no eventfd"])
def test_an_eventfd_is_asked_for(sem: TimelineSemaphore, fd: int, number: int) -> None:
    with raises_errno(number):
        sem.eventfd(fd)


def test_from_fd_of_another_descriptor_is_einval(buf: DmaBuf) -> None:
    with raises_errno(errno.EINVAL):
        TimelineSemaphore.from_fd(buf.fileno())
    with SwSync() as sw, raises_errno(errno.EINVAL):
        TimelineSemaphore.from_fd(sw.fileno())


def test_spoilt_content_is_euclean(sem: TimelineSemaphore) -> None:
    sem.signal(1)
    os.pwrite(sem.fileno(), b"\xff" * 256, 256)
    with raises_errno(errno.EUCLEAN):
        sem.query()


def test_it_is_not_pickled_to_bytes(sem: TimelineSemaphore) -> None:
    import pickle

    with pytest.raises(TypeError, match="multiprocessing"):
        pickle.dumps(sem)


# ---- across processes ----


@pytest.fixture
def sharer_ends() -> Iterator[None]:
    """multiprocessing keeps a thread and a socket for descriptors on their way; end them with the test."""
    yield
    resource_sharer.stop()


def submits(parent: Parent, way: str) -> None:
    """Submits point 1, then signals it as told."""
    with received(parent, TimelineSemaphore, way) as sem:
        fence = Timeline("other").fence()
        parent.send("ready")
        parent.recv()
        sem.import_fence(fence, 1)
        parent.send("submitted")
        parent.recv()
        fence.signal()


@pytest.mark.usefixtures("sharer_ends")
@WAYS
def test_points_are_seen_by_every_holder(child: Spawn, sem: TimelineSemaphore, way: str) -> None:
    other = child(submits, way)
    sent(other, sem, way)
    assert other.recv() == "ready"
    with Background(lambda: sem.wait(1, available=True)) as job:
        job.until_blocked()
        other.send("submit")
        assert job.result() == math.inf
    assert (other.recv(), points(sem)) == ("submitted", (0, 1))
    with Background(lambda: sem.wait(1)) as job:
        job.until_blocked()
        other.send("signal")
        assert job.result() == math.inf
    assert points(sem) == (1, 1)
    other.result()


def test_the_death_of_who_submitted_ends_the_wait(child: Spawn, sem: TimelineSemaphore) -> None:
    other = child(submits, "dmabuf.send")
    sent(other, sem, "dmabuf.send")
    assert other.recv() == "ready"
    other.send("submit")
    assert other.recv() == "submitted"
    with Background(lambda: sem.wait(1)) as job:
        job.until_blocked()
        other.kill()
        assert job.result() == math.inf


def waits(parent: Parent) -> None:
    (sem,) = dmabuf.recv(parent.sock)
    parent.send("waiting")
    sem.wait(1, for_submit=True)
    sem.close()


def test_the_death_of_who_waits_first_leaves_the_others_waiting(child: Spawn, sem: TimelineSemaphore) -> None:
    first, second = child(waits), child(waits)
    for other in (first, second):
        dmabuf.send(other.sock, sem)
        assert other.recv() == "waiting"
        until_asleep(other.pid)
    first.kill()
    with Background(lambda: sem.wait(1, for_submit=True)) as job:
        job.until_blocked()
        sem.signal(1)
        assert job.result() == math.inf
    second.result()


def test_a_forked_child_submits(sem: TimelineSemaphore) -> None:
    assert reap(fork(lambda: sem.signal(3))) == 0
    assert points(sem) == (3, 3)


def test_an_eventfd_is_told_of_what_another_process_does(child: Spawn, sem: TimelineSemaphore, event: int) -> None:
    sem.eventfd(event, 1)
    other = child(submits, "dmabuf.send")
    dmabuf.send(other.sock, sem)
    assert other.recv() == "ready"
    other.send("submit")
    assert other.recv() == "submitted"
    assert not told(event)
    other.send("signal")
    select.select([event], [], [])
    other.result()


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_wherever_a_change_is_killed_it_is_done_or_not(sem: TimelineSemaphore) -> None:
    steps = trace(lambda: sem.signal(7))
    assert {"cell_written", "cell_switched"} <= set(steps)
    for count in range(1, len(steps) + 2):
        with TimelineSemaphore() as other:
            other.signal(1)
            with Background(lambda other=other: other.wait(9, for_submit=True)) as job:  # type: ignore[misc]
                job.until_blocked()
                killed_at(lambda other=other: other.signal(7), count)  # type: ignore[misc]
                assert points(other) in ((1, 1), (7, 7))
                other.signal(9)
                assert job.result() == math.inf
            assert points(other) == (9, 9)


@pytest.mark.crash
@pytest.mark.parametrize("step", ["sem_woken", "cell_written", "cell_switched"])
def test_who_is_killed_with_the_lock_leaves_it_free(sem: TimelineSemaphore, step: str) -> None:
    with Background(lambda: sem.wait(2, for_submit=True)) as waiting:
        waiting.until_blocked()
        with Held(lambda: sem.signal(1), only=step) as other:
            assert other.run_to(step)
            with Background(lambda: sem.signal(2)) as job:
                job.until_blocked()
                assert not job.done
                other.kill()
                job.result()
        assert waiting.result() == math.inf
    assert sem.query() == 2


def test_a_private_domains_travels_with_its_domain() -> None:
    domain = dmabuf.Domain.private()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, TimelineSemaphore(domain=domain) as sem:
        dmabuf.send(here, domain, sem)
        _, again = dmabuf.recv(there)
        with again:
            again.signal(5)
        assert points(sem) == (5, 5)
    gc.collect()


def test_many_threads_submit_and_wait(sem: TimelineSemaphore) -> None:
    """Each waits for the point before its own, and signals its own."""

    def run(at: int) -> None:
        for point in range(at, 41, 4):
            if point > 1:
                sem.wait(point - 1, for_submit=True)
            sem.signal(point)

    running = [threading.Thread(target=run, args=(at,)) for at in (1, 2, 3, 4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert points(sem) == (40, 40)
