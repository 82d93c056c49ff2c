"""``SemaphoreFile``: the state of a ``TimelineSemaphore`` in its file.

While nothing in it is pending, the state is one number, which stands in a word of the file that every holder maps (``Points``). Then a
signal of a higher point is one compare-and-swap, and a wait is one sleep, without the lock. Everything else first *folds* the number into
the record under the lock: it stores the record and then empties the word, so that at every instant one of the two counts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from dmabuf._native import Shm, step
from dmabuf.core.sync.semaphore_state import (
    EMPTY,
    TIMELINE,
    Leaf,
    Node,
    State,
    View,
    added,
    nonsense,
    packed,
    packed_node,
    without_signaled,
)
from dmabuf.domain.shared_file import SharedFile

_MAGIC: Final = b"dmabufT\2"
CONTENT: Final = _MAGIC.ljust(4096, b"\0")  # of a new file: a page, with the word
_EVENT: Final = 8  # offset of the handle of the fence that is signaled at the next change
_HANDLE: Final = struct.Struct("=Q")


class SemaphoreFile:
    """The file. ``points``: the word. The holder of the file's lock may call everything here except where it says otherwise."""

    __slots__ = ("_file", "_view", "points")

    def __init__(self, file: SharedFile) -> None:
        """Read the state, without the lock.

        Raises:
            DmaBufError: Another program made the file (EUCLEAN), or no descriptor is free (EMFILE).
        """
        if file.read(0, len(_MAGIC)) != _MAGIC:
            raise nonsense()
        try:
            self.points = file.points()
        except ValueError:
            raise nonsense() from None
        self._file, self._view = file, View()

    def look(self) -> View:
        """Return what is there now."""
        point = self.points.value()
        if point >= 0:
            return View(TIMELINE, point)
        try:
            return self._view.update(self._file, self._file.domain.shm.fence_pending)
        except (struct.error, IndexError):
            raise nonsense() from None

    def whole(self) -> State:
        """Return all of it, without what is signaled."""
        return self.look().state(self._file.domain.shm.fence_pending)

    def fold(self) -> None:
        """Let the record hold the state. From here on only a holder of the lock changes it."""
        while (point := self.points.value()) >= 0:
            self._file.store(packed(State(TIMELINE, point, point, [])))
            step("sem_folded")  # the word counts
            self.points.leave(point)  # in vain if it rose meanwhile

    def reset(self, shm: Shm) -> None:
        """Take the lock, and everything out."""
        with self._file.locked():
            self.fold()
            self._replace(shm, lambda _: State(EMPTY, 0, 0, []))

    def put(self, shm: Shm, point: int, leaves: list[Leaf]) -> None:
        """Take the lock, and put fences at a point."""
        with self._file.locked():
            self.fold()
            seen = self.look()
            if seen.kind == TIMELINE and point > seen.head:
                self._wake(shm)
                if self._file.append(packed_node(Node(point, leaves))):
                    self._unfold()
                    return
            self._replace(shm, lambda state: added(state, point, leaves))

    def _replace(self, shm: Shm, change: Callable[[State], State]) -> None:
        data = packed(without_signaled(shm.fence_pending, *change(self.whole())))
        self._wake(shm)
        self._file.store(data)
        self._unfold()

    def _wake(self, shm: Shm) -> None:
        """Wake the waiters, before storing. They block on the lock; if this process dies here, they look again and go back to sleep."""
        event = self.event()
        if event:
            shm.fence_end_any(event, 0)  # a death before the next line leaves that to the next change
            self._file.write(_EVENT, _HANDLE.pack(0))
            step("sem_woken")

    def _unfold(self) -> None:
        """Let the word hold the state again, if nothing is pending."""
        seen = self.look()
        if seen.kind == TIMELINE and not seen.nodes:
            self.points.enter(seen.head)  # in vain for points of more than 63 bits

    def event(self) -> int:
        """Return the handle of the fence that the next change signals, 0: there is none. Also without the lock."""
        raw = self._file.read(_EVENT, 8)
        return int(_HANDLE.unpack(raw)[0]) if len(raw) == 8 else 0

    def set_event(self, handle: int) -> None:
        """Let the next change signal a fence. The state was folded, so that no change goes without the lock."""
        self._file.write(_EVENT, _HANDLE.pack(handle))
        step("sem_event")
