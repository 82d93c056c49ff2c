"""``Readable``: the descriptor of a reader that any loop can wait for."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import TYPE_CHECKING

from dmabuf._native import SW_NEWS, owned
from dmabuf.domain.dispatcher import dispatcher, unwatch
from dmabuf.domain.guards import finalizer
from dmabuf.errors import needing_descriptors

if TYPE_CHECKING:
    from dmabuf.stream.parts import Part


class Readable:
    """An eventfd whose count is 1 while the reader's next frame, or the end, is there."""

    _watch: tuple[int, int] | None = None

    def __init__(self, reader: Part) -> None:
        self._lock = threading.RLock()
        with needing_descriptors("fileno", reader):
            self._fd = owned(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fd.mark()  # all eventfds have one inode
        self._reader = weakref.ref(reader)
        self._domain = reader.domain
        self._set = False
        self._none_of = 0  # news when the reader asked in vain, though it had not had all: more must come first
        me = weakref.ref(self)  # a reader that nobody refers to any more goes, with its descriptor

        def changed(_: int) -> None:
            readable = me()
            if readable is not None:
                readable._none_of = 0
                readable.look()

        self._changed = changed

    def fileno(self) -> int:
        return self._fd.fileno()

    def look(self) -> None:
        """Make it readable if there is something to take, else look again at the next change."""
        with self._lock:
            reader = self._reader()
            if reader is None or not reader.reads or self._fd.number < 0:
                return
            ring = reader.ring
            self._forget()
            while True:
                if self._ready(reader):
                    if not self._set:
                        self._fd.add_one()
                        self._set = True
                    return
                fence = _pending_fence(reader) or ring.domain.shm.stream_await(ring.stream, ring.gen, SW_NEWS)
                if self._ready(reader):  # what changed before the word was looked at wakes nobody
                    continue
                token = dispatcher(ring.domain).watch(fence, self._changed, foreign=True)
                if token is not None:
                    self._watch = fence, token
                    return

    def taken(self, vain: int) -> None:
        """A frame was taken (0), or there was none when there was this news."""
        with self._lock:
            reader = self._reader()
            if reader is None:
                return
            self._none_of = 0 if reader.lag == 0 else vain
            if self._set and self._ready(reader):
                return
            self._set = False
            with contextlib.suppress(BlockingIOError):  # also when it isn't set: a signal handler may have raised in between
                os.eventfd_read(self._fd.fileno())
            self.look()

    def _forget(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            unwatch(self._domain, *watch)

    def _ready(self, reader: Part) -> bool:
        fence = reader.waits_for
        if fence:
            return not reader.domain.shm.fence_pending(fence)
        if reader.lag > 0 and not (self._none_of and reader.news == self._none_of):
            return True
        return reader.ended

    def close(self) -> None:
        """Close the descriptor."""
        with self._lock:
            self._forget()
            self._fd.close()

    @finalizer
    def __del__(self) -> None:
        self._forget()


def _pending_fence(reader: Part) -> int:
    """Return the fence for which the reader's next frame waits, 0: none."""
    fence = reader.waits_for
    return fence if fence and reader.domain.shm.fence_pending(fence) else 0
