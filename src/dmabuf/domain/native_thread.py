"""``NativeThread``: a thread that sleeps in C.

Where gevent has replaced threads by greenlets, this is a thread all the same. A greenlet that sleeps in C would stop all the others of its
thread, and with them perhaps the one that would wake it.
"""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable


class NativeThread(threading.Thread):
    """A daemon thread that calls ``task``."""

    def __init__(self, task: Callable[[], object], name: str) -> None:
        super().__init__(target=self._work, name=name, daemon=True)
        self._task, self._here = task, 0
        self._over: _thread.LockType | None = None  # held by a thread that isn't one of the threading module's, until it ends

    def start(self) -> None:
        """Start the thread. Raises RuntimeError if none can be started."""
        monkey = sys.modules.get("gevent.monkey")
        if monkey is None or not monkey.is_module_patched("threading"):
            super().start()
            return
        over: _thread.LockType = monkey.get_original("_thread", "allocate_lock")()
        over.acquire()
        self._over = over
        monkey.get_original("_thread", "start_new_thread")(self._work, ())

    def _work(self) -> None:
        self._here = threading.get_native_id()
        try:
            self._task()
        finally:
            if self._over is not None:
                self._over.release()

    def is_here(self) -> bool:
        """Return True in this thread."""
        return self._here == threading.get_native_id()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended."""
        if self._over is None:
            super().join(timeout)
        elif self._over.acquire(timeout=-1 if timeout is None else timeout):
            self._over.release()
