"""Waiting for the points of timeline semaphores that may not be there yet, and being told of them (semantics 5.14)."""

import asyncio
import errno
import math
import os
import select

import pytest

from dmabuf import DmaFence, TimelineSemaphore, wait_semaphores
from tests.support.errnos import raises_errno
from tests.support.interrupts import ended_by_a_signal
from tests.support.semaphores import reached, told
from tests.support.waiting import Background

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


def test_deadline_is_passed_to_the_fences(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 1)
    with raises_errno(errno.ETIME):
        wait_semaphores([sem], [1], 0, deadline=12345)
    assert fences[0].deadline == 12345


@pytest.mark.parametrize("submitted", [False, True])
def test_a_wait_is_interrupted_by_a_signal_if_asked(sem: TimelineSemaphore, fences: list[DmaFence], submitted: bool) -> None:
    if submitted:
        sem.import_fence(fences[0], 1)
    ended_by_a_signal(lambda: sem.wait(1, for_submit=True, interruptible=True))


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


def test_eventfd_is_written_when_point_is_reached(sem: TimelineSemaphore, fences: list[DmaFence], event: int) -> None:
    sem.eventfd(event, 2)
    sem.import_fence(fences[0], 1)
    sem.import_fence(fences[1], 2)
    fences[0].signal()
    assert not told(event)
    fences[1].signal()
    select.select([event], [], [])
    assert os.eventfd_read(event) == 1


def test_eventfd_is_written_when_point_is_available(sem: TimelineSemaphore, fences: list[DmaFence], event: int) -> None:
    sem.eventfd(event, 2, available=True)
    sem.import_fence(fences[0], 1)
    assert not told(event)
    sem.import_fence(fences[1], 2)
    select.select([event], [], [])


def test_eventfd_is_written_at_once_when_point_is_reached(sem: TimelineSemaphore, event: int) -> None:
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


def test_request_for_an_eventfd_can_be_taken_back(sem: TimelineSemaphore, fences: list[DmaFence], event: int) -> None:
    """A loop whose time is over cancels, closes its eventfd, and comes back, while the point stays unreached."""
    sem.import_fence(fences[0], 1)
    before = len(os.listdir("/proc/self/fd"))
    kept = sem.eventfd(event, 1)
    for point in (1, 2):  # one that is submitted, and one that isn't
        for _ in range(50):
            own = os.eventfd(0, os.EFD_CLOEXEC)
            request = sem.eventfd(own, point)
            request.cancel()
            request.cancel()
            os.close(own)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert fences[0].statistics().callbacks == 1
    fences[0].signal()
    assert os.eventfd_read(event) == 1
    kept.cancel()


def test_eventfd_that_is_full_does_not_block_the_signaler(sem: TimelineSemaphore) -> None:
    own = os.eventfd(0, os.EFD_CLOEXEC)  # a blocking one
    os.eventfd_write(own, 2**64 - 2)
    sem.eventfd(own, 1)
    sem.signal(1)
    assert os.eventfd_read(own) == 2**64 - 2
    os.close(own)


def test_eventfd_is_written_after_a_failed_change(sem: TimelineSemaphore, event: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sem.eventfd(event, 1, available=True)

    def no_memory(data: bytes) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patched, raises_errno(errno.ENOMEM):
        patched.setattr(sem._file, "store", no_memory)
        sem.signal(1)
    assert not told(event)
    sem.signal(1)
    assert told(event)


def test_eventfd_is_written_when_another_semaphore_changes_inside(
    sem: TimelineSemaphore, event: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = sem._file.load
    sem.eventfd(event, 1, available=True)
    with TimelineSemaphore() as other:

        def handler() -> bytes:
            other.signal(1)
            return load()

        with monkeypatch.context() as patched:
            patched.setattr(sem._file, "load", handler)
            sem.signal(1)
    select.select([event], [], [])


def test_eventfd_is_written_when_fence_is_signaled_inside_a_call(sem: TimelineSemaphore, fences: list[DmaFence], event: int) -> None:
    sem.import_fence(fences[0], 1)
    sem.eventfd(event, 1)
    with sem._file.locked():  # as a finaliser or a signal handler in there
        fences[0].signal()
    select.select([event], [], [])


def test_last_close_signals_the_fence_of_a_submission(sem: TimelineSemaphore) -> None:
    pending = sem.domain.shm.fence_pending
    with raises_errno(errno.ETIME, TimeoutError):
        sem.wait(0, 0, for_submit=True)
    handle = sem._event()
    with TimelineSemaphore.from_fd(sem.fileno()) as other:
        sem.close()
        assert pending(handle)
        assert other._event() == handle
    assert not pending(handle)
