"""``Retries``: calls that are repeated until they succeed.

What wakes a waiter may find no descriptor free for a moment. A thread then tries again, so that the waiter doesn't wait for ever and no
other thread has to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from dmabuf.domain.forks import fork_lock


class Retries:
    """The calls of one process in one domain. ``life``: returns its life there, 0 when it has none; ``pause``: seconds between tries."""

    def __init__(self, life: Callable[[], int], pause: float) -> None:
        self._life, self._pause = life, pause
        self._lock = fork_lock()
        self._calls: list[Callable[[], bool]] = []
        self._running = False  # in a thread

    def later(self, call: Callable[[], bool]) -> None:
        """Call ``call`` until it returns True, or this process leaves the domain."""
        with self._lock:
            self._calls.append(call)
            self._start()

    def check(self) -> None:
        """Start the thread if none could be started before; called at every tick."""
        if self._calls and not self._running:
            with self._lock:
                self._start()

    def reset(self) -> None:
        """In a forked child: the calls are the parent's."""
        self._calls, self._running = [], False

    def _start(self) -> None:
        """Start the thread unless it runs. The lock is held."""
        if self._calls and not self._running:
            self._running = True
            try:
                threading.Thread(target=self._run, name="dmabuf-retry", daemon=True).start()
            except RuntimeError:  # no thread can be started: the next tick tries again
                self._running = False

    def _run(self) -> None:
        never, life = threading.Event(), self._life()
        while self._life() == life:
            never.wait(self._pause)
            done = [call for call in list(self._calls) if call()]
            with self._lock:
                self._calls = [call for call in self._calls if call not in done]
                if not self._calls:
                    self._running = False
                    return  # decided under the lock: the next later() starts another thread
        with self._lock:  # this process has left the domain, and perhaps joined again
            self._running = False
            if self._life():
                self._start()
