"""``Janitor``: the thread of a device that unmaps and detaches.

A thread that ends fences must not take a reservation lock, because the holder of the lock may be waiting for the next fence. The janitor
signals no fence, so it may take locks.
"""

from __future__ import annotations

import queue as _queue
import threading
from collections.abc import Callable

from dmabuf.domain.dispatcher import alive_soon, report
from dmabuf.domain.latch import Latch


class Janitor:
    """Runs one task after the other, in a thread that starts with the first task. ``name``: the device's."""

    def __init__(self, name: str) -> None:
        self._name = f"dmabuf-{name}-janitor"
        self._tasks: _queue.SimpleQueue[Callable[[], object] | None] = _queue.SimpleQueue()
        self._serving = False  # a thread takes tasks, or no thread may start any more
        self._thread: threading.Thread | None = None
        self._done = Latch()  # the thread has run its last task
        self._starting = threading.RLock()  # re-entrant, because a finalizer or a signal handler may come in the middle

    def later(self, task: Callable[[], object]) -> None:
        """Have the thread call ``task``. Without a thread, because none can be started or after the end, it stays undone."""
        self._tasks.put(task)
        if not self._serving:
            with self._starting:
                if not self._serving:
                    self._start()

    def _start(self) -> None:
        """Start the thread. The lock is held. If none can be started, the next task tries again."""
        thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return
        except BaseException:  # a signal handler raised: the thread may be about to run
            if alive_soon(thread):
                self._serving, self._thread = True, thread
            raise
        self._serving, self._thread = True, thread

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception as e:
                report(e, task)
            del task
        self._done.set()

    def close(self) -> None:
        """Run the tasks that are queued, and end the thread. If a signal handler raises, closing again goes on where it stopped."""
        with self._starting:
            self._serving = True
        if self._thread is not None:
            self._tasks.put(None)
            self._done.wait()
            self._thread.join()

    def stop(self, seconds: float) -> None:
        """End the thread, or leave it behind after so long: it may wait for a lock, and it signals nothing."""
        self._serving = True
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(seconds)
