"""What wakes a thread that waits for something to do."""

import threading

import pytest

from dmabuf.domain.auto_reset_event import AutoResetEvent
from tests.support.budget import times
from tests.support.waiting import Background


def test_set_before_wait_ends_it() -> None:
    event = AutoResetEvent()
    event.set()
    event.set()  # once or twice is the same
    event.wait(None)
    event.wait(0.001)  # and it is reset: this one times out


def test_set_wakes_the_waiter() -> None:
    event = AutoResetEvent()
    with Background(lambda: event.wait(None)) as job:
        job.until_blocked()
        assert not job.done
        event.set()


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e-9, 5e-5, threading.TIMEOUT_MAX * 2])
def test_any_number_of_seconds_is_a_limit(seconds: float) -> None:
    event = AutoResetEvent()
    if seconds > 1:
        event.set()
    event.wait(seconds)


def test_short_waits_end_while_the_event_is_set_often() -> None:
    event, over = AutoResetEvent(), threading.Event()

    def sets() -> None:
        while not over.is_set():
            event.set()

    with Background(sets):
        for _ in range(times(quick=100, full=5000)):
            event.wait(5e-5)
        over.set()
