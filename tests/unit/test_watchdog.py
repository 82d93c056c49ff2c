"""The watchdogs bite what takes too long, and nothing else."""

import faulthandler
import queue
import subprocess
import sys
import threading
from contextlib import closing
from typing import Any

import pytest

from tests.support.watchdog import LastResort, Watchdog

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


HANGS = """
import ctypes
from tests.support.watchdog import LastResort
LastResort(0.1, 2).watch()
ctypes.PyDLL(None).pause()  # with the GIL
"""


def test_last_resort_ends_a_native_call_that_keeps_the_gil() -> None:
    ran = subprocess.run([sys.executable, "-c", HANGS], stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 1
    assert "line 5 in <module>" in ran.stderr


def test_last_resort_is_armed_anew_when_it_is_old_or_was_disarmed(monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[Any] = []
    now = [1000.0]
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: armed.append(seconds))
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    resort = LastResort(100.0, 2)
    for seconds, forgotten, count in [(1000.0, False, 1), (1020.0, False, 1), (1021.0, False, 2), (1022.0, True, 3), (1023.0, False, 3)]:
        now[0] = seconds
        if forgotten:
            resort.forget()
        resort.watch()
        assert len(armed) == count
    LastResort(0.0, 2).watch()  # never
    assert armed == [120.0] * 3
