"""The watchdogs for the tests of a run.

pytest and pytest-timeout start a thread for each test and wait for its end, which takes longer than a short test.
"""

import faulthandler
import math
import threading
import time
from collections.abc import Callable


class Watchdog:
    """Bites when what it watches takes too long. It needs the GIL."""

    def __init__(self) -> None:
        self._watched: tuple[float, Callable[[], object]] | None = None
        self._looks = 0.0  # when the thread looks again, unless it is told
        self._told = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, seconds: float, bite: Callable[[], object]) -> None:
        """Call ``bite`` in so many seconds, in the watchdog's thread, unless `rest` is called before or something else is to be watched."""
        end = time.monotonic() + seconds
        self._watched = end, bite
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        elif end < self._looks:
            self._told.set()

    def rest(self) -> None:
        """What was watched is over. The thread sleeps on; most tests are over long before it looks."""
        self._watched = None

    def close(self) -> None:
        """End the thread. A run doesn't: that ends with its process."""
        self._closed = True
        self._told.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._told.clear()
            self._looks = math.inf  # before the look: who changes what is watched after it finds this, and tells
            watched = self._watched
            if watched is None:
                self._told.wait()
                continue
            end, bite = watched
            left = end - time.monotonic()
            if left > 0:
                self._looks = end
                self._told.wait(left)
            else:
                self._watched = None
                bite()


class LastResort:
    """Ends this process when a test takes too long, even in a native call that never gives the GIL back.

    Args:
        seconds: What each test has at least, and a fifth more at most. 0: no end.
        file: The descriptor for the stacks of all threads.
    """

    def __init__(self, seconds: float, file: int) -> None:
        self._seconds, self._file, self._armed = seconds, file, -math.inf

    def watch(self) -> None:
        """A test begins."""
        now = time.monotonic()
        if self._seconds and now - self._armed > 0.2 * self._seconds:
            faulthandler.dump_traceback_later(1.2 * self._seconds, file=self._file, exit=True)
            self._armed = now

    def forget(self) -> None:
        """Somebody has disarmed it, as pytest does when a test fails."""
        self._armed = -math.inf
