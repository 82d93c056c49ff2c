"""A worker's thread that signals its fences after a while, as a device does: so that every wait of another worker has an end."""

from __future__ import annotations

import queue
import random
import threading

from dmabuf import DmaFence

_LONGEST = 0.01  # s


class Signaller:
    """Signals the fences that it is given, in their order, each after a random while."""

    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)
        self._queue: queue.SimpleQueue[tuple[DmaFence, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def take(self, fence: DmaFence, error: int) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="signaller", daemon=True)
            self._thread.start()
        self._queue.put((fence, error))

    def _run(self) -> None:
        pause = threading.Event()
        while (entry := self._queue.get()) is not None:
            pause.wait(self._rng.uniform(0, _LONGEST))
            fence, error = entry
            fence.signal(error)
            del entry, fence

    def end(self) -> None:
        """Signal what is left, and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()
