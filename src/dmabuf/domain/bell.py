"""``Bell``: what wakes a thread that waits for something to do.

``queue.SimpleQueue`` would do, but its ``get(timeout=…)`` can wait for ever in CPython 3.11: woken without an item after its time is
over, it waits with what is left, a negative number, which it takes for no limit.
"""

from __future__ import annotations

import contextlib
import threading


class Bell:
    """Rung by anybody, a finaliser or a signal handler too: ringing takes no lock. Rung twice before anybody looks is rung once."""

    __slots__ = ("_silent",)

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()

    def ring(self) -> None:
        """Wake who waits, or who comes next."""
        with contextlib.suppress(RuntimeError):  # it has been rung already
            self._silent.release()

    def wait(self, seconds: float | None) -> None:
        """Until it rings, or so long; None: without a limit."""
        self._silent.acquire(timeout=-1 if seconds is None else min(max(seconds, 0), threading.TIMEOUT_MAX))
