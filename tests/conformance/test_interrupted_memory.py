"""What a process remembers of shared state is right, wherever a signal handler interrupts it: see tests/support/every_stop.py."""

import os
from collections.abc import Callable

from dmabuf import SwSync, Timeline, TimelineSemaphore
from tests.support.every_stop import Trip

_MOST = 2000


def interrupted_everywhere(run: Callable[[Trip], object]) -> None:
    """Call ``run`` with a signal before the first stop, the second, and so on, until no signal comes."""
    for n in range(1, _MOST):
        trip = Trip(n)
        run(trip)
        if not trip.arrived:
            assert n > 10
            return
    raise AssertionError("there is no end")


def test_fence_is_signaled_by_the_next_inc_after_an_interrupted_one() -> None:
    def run(trip: Trip) -> None:
        with SwSync() as sw:
            first, second = sw.create_fence(1), sw.create_fence(3)
            trip.run(sw.inc)
            assert second.status == 0
            sw.inc(1 - sw.value)
            assert (first.status, second.status) == (1, 0), trip.where
            sw.inc(2)
            assert second.status == 1, trip.where

    interrupted_everywhere(run)


def test_fence_is_not_signaled_early_after_an_interrupted_look() -> None:
    def run(trip: Trip) -> None:
        with SwSync() as sw, SwSync.from_fd(sw.fileno()) as other:
            late = sw.create_fence(10)
            other.inc(4)
            trip.run(lambda: sw.create_fence(12))
            sw.inc(4)
            assert (late.status, sw.value) == (0, 8), trip.where
            sw.inc(2)
            assert late.status == 1, trip.where

    interrupted_everywhere(run)


def facts(semaphore: TimelineSemaphore) -> tuple[int, int, int]:
    return semaphore.query(), semaphore.query(submitted=True), semaphore.statistics().pending


def test_semaphore_is_what_others_see_after_an_interrupted_look() -> None:
    timeline = Timeline()

    def run(trip: Trip) -> None:
        fences = [timeline.fence() for _ in range(4)]
        with TimelineSemaphore() as sem, TimelineSemaphore.from_fd(sem.fileno()) as other:
            for point, fence in enumerate(fences[:2], 1):
                sem.import_fence(fence, point)
            for point, fence in enumerate(fences[2:], 3):
                other.import_fence(fence, point)
            trip.run(sem.query)
            for ended in range(5):
                assert facts(sem) == (ended, 4, 4 - ended), trip.where
                if ended < 4:
                    fences[ended].signal()

    interrupted_everywhere(run)


def test_interrupted_request_for_an_eventfd_is_taken_back() -> None:
    timeline = Timeline()
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)

    def run(trip: Trip) -> None:
        fence = timeline.fence()
        with TimelineSemaphore() as sem:
            sem.import_fence(fence, 1)
            before = len(os.listdir("/proc/self/fd"))
            trip.run(lambda: sem.eventfd(eventfd, 1))
            if trip.arrived and not trip.where.startswith("<lambda>"):  # else it may have been made, and its caller was interrupted
                assert len(os.listdir("/proc/self/fd")) == before, trip.where
            fence.signal()

    interrupted_everywhere(run)
    os.close(eventfd)
