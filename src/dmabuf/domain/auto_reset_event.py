"""``AutoResetEvent``: what wakes a thread that waits for work.

``queue.SimpleQueue`` would do, but its ``get(timeout=…)`` can wait for ever in CPython 3.11. When it wakes without an item after its time
is over, it waits for the remaining time, a negative number, which it takes for no limit.
"""

from __future__ import annotations

import contextlib
import threading


class AutoResetEvent:
    """An auto-reset event.

    ``set()`` takes no lock, so finalizers and signal handlers may call it. Two calls before a ``wait()`` count as one.
    """

    __slots__ = ("_reset",)

    def __init__(self) -> None:
        self._reset = threading.Lock()  # held while the event is not set
        self._reset.acquire()

    def set(self) -> None:
        """Wake the thread that waits, or the next one that will."""
        with contextlib.suppress(RuntimeError):  # it is set already
            self._reset.release()

    def wait(self, seconds: float | None) -> None:
        """Wait until the event is set, and reset it; at most so long, None: without a limit."""
        self._reset.acquire(timeout=-1 if seconds is None else min(max(seconds, 0), threading.TIMEOUT_MAX))
