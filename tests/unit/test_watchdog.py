"""The watchdog bites what takes too long, and nothing else."""

import queue
import threading
from contextlib import closing

from tests.support.watchdog import Watchdog

LONG_S, SHORT_S = 1000.0, 0.001


def test_it_bites_each_time_and_what_is_over_is_not_bitten() -> None:
    bites = queue.SimpleQueue[str]()
    with closing(Watchdog()) as dog:
        dog.watch(LONG_S, lambda: bites.put("over"))
        dog.rest()
        dog.watch(SHORT_S, lambda: bites.put("first"))  # while the thread sleeps until the long one's end
        assert bites.get() == "first"
        dog.watch(LONG_S, lambda: bites.put("over"))  # while it watches nothing
        dog.watch(SHORT_S, lambda: bites.put("second"))
        assert bites.get() == "second"
    assert bites.empty()


def test_its_thread_keeps_nobody_from_ending() -> None:
    before = set(threading.enumerate())
    with closing(Watchdog()) as dog:
        dog.watch(LONG_S, lambda: None)
        (thread,) = set(threading.enumerate()) - before
        assert thread.daemon
