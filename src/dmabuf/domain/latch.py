"""``Latch``: an event that is set once.

``threading.Event`` has a lock that its methods take in Python. A signal handler that raises just then leaves it locked, and then ``set()``
waits for ever, in another thread.
"""

from __future__ import annotations

import contextlib
import threading

_LOOK_S = 1.0  # seconds after which a waiter looks by itself, if a signal handler ended another waiter that was to wake it


class Latch:
    """An event that is set once, and waited for without a limit."""

    __slots__ = ("_reset", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._reset = threading.Lock()  # held while the latch is not set
        self._reset.acquire()

    def set(self) -> None:
        """Wake every thread that waits."""
        self.is_set = True
        with contextlib.suppress(RuntimeError):  # it is set already
            self._reset.release()

    def wait(self) -> None:
        """Wait until it is set."""
        while not self.is_set:
            if self._reset.acquire(timeout=_LOOK_S):
                self.set()  # the next waiter
