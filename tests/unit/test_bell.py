"""What wakes a thread that waits for something to do."""

import threading

import pytest

from dmabuf.domain.bell import Bell
from tests.support.waiting import Background


def test_a_ring_before_the_wait_is_heard() -> None:
    bell = Bell()
    bell.ring()
    bell.ring()  # once or twice is the same
    bell.wait(None)
    bell.wait(0.001)  # and it is silent again: this one is over by the time


def test_a_ring_wakes_who_waits() -> None:
    bell = Bell()
    with Background(lambda: bell.wait(None)) as job:
        job.until_blocked()
        assert not job.done
        bell.ring()


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e-9, 5e-5, threading.TIMEOUT_MAX * 2])
def test_any_number_of_seconds_is_a_limit(seconds: float) -> None:
    bell = Bell()
    if seconds > 1:
        bell.ring()
    bell.wait(seconds)


def test_short_waits_end_whatever_rings_in_the_middle() -> None:
    bell, over = Bell(), threading.Event()

    def rings() -> None:
        while not over.is_set():
            bell.ring()

    with Background(rings):
        for _ in range(5000):
            bell.wait(5e-5)
        over.set()
