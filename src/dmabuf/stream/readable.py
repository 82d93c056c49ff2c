"""``Readable``: the descriptor of a reader that any loop can wait for."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

from dmabuf._native import SD_CLOSED, SD_DIED, SW_NEWS, owned
from dmabuf.domain.dispatcher import dispatcher, unwatch
from dmabuf.errors import needing_descriptors

if TYPE_CHECKING:
    from dmabuf.stream.parts import Part


class Readable:
    """An eventfd whose count is 1 while the reader's next frame, or the end, is there."""

    def __init__(self, reader: Part) -> None:
        with needing_descriptors("fileno", reader):
            self._fd = owned(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fd.mark()  # all eventfds have one inode
        self._reader = weakref.ref(reader)
        self._domain = reader.domain
        self._lock = threading.RLock()
        self._watch: tuple[int, int] | None = None
        self._set = False

    def fileno(self) -> int:
        return self._fd.fileno()

    def look(self, _: int = 0) -> None:
        """Make it readable if there is something to take, else look again at the next change. The dispatcher calls this too."""
        with self._lock:
            reader = self._reader()
            if reader is None or reader.closed or self._fd.number < 0:
                return
            ring = reader.ring
            while True:
                if _ready(reader):
                    if not self._set:
                        self._set = True
                        self._fd.add_one()
                    return
                fence = reader.waits_for or ring.domain.shm.stream_await(ring.stream, ring.gen, SW_NEWS)
                if _ready(reader):  # what changed before the word was looked at wakes nobody
                    continue
                token = dispatcher(ring.domain).watch(fence, self.look, foreign=True)
                if token is not None:
                    self._watch = fence, token
                    return

    def taken(self) -> None:
        """A frame was taken, or there was none."""
        with self._lock:
            reader = self._reader()
            if reader is None or (self._set and _ready(reader)):
                return
            if self._set:
                self._set = False
                os.eventfd_read(self._fd.fileno())
            self._forget()
            self.look()

    def _forget(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            unwatch(self._domain, *watch)

    def close(self) -> None:
        """Close the descriptor."""
        with self._lock:
            self._forget()
            self._fd.close()


def _ready(reader: Part) -> bool:
    if reader.lag > 0:
        return True
    return not reader.waits_for_producer and reader.info()["why"] in (SD_CLOSED, SD_DIED)
