"""``RemoteTimeline``: a timeline of another process.

Only the process that made a timeline makes and signals its fences. A process that received the timeline with :func:`dmabuf.recv`, or
through multiprocessing, sees its names and whether it still exists. It waits for the timeline's fences.
"""

from __future__ import annotations

import os
from typing import Any

from dmabuf.domain.domain import Domain


class RemoteTimeline:
    """A timeline of another process. ``driver``, ``name``: "" if it was closed before it arrived; ``context``: as in its fences.

    It compares by domain and context, and can be sent on like the timeline itself. ``dmabuf.recv`` makes it.
    """

    __slots__ = ("__weakref__", "_index", "_life", "_number", "context", "domain", "driver", "name")

    def __init__(self, domain: Domain, index: int, number: int, context: int) -> None:
        found = domain.shm.timeline_info(index)
        if found is None or (found[0], found[2]) != (number, context):
            found = (0, 0, 0, 0, b"", b"")
        self.domain, self.context = domain, context
        self.driver, self.name = os.fsdecode(found[4]), os.fsdecode(found[5])
        self._index, self._number, self._life = index, number, found[3]

    @property
    def pid(self) -> int:
        """The process that owns it, 0 if that is gone."""
        return self.domain.pid_of(self._life) if self._life else 0

    @property
    def closed(self) -> bool:
        """Whether it is closed, or its process is gone. Then all its fences are signaled."""
        found = self.domain.shm.timeline_info(self._index)
        return found is None or not found[1] or (found[0], found[2]) != (self._number, self.context) or not self.pid

    def __repr__(self) -> str:
        return f"<dmabuf.RemoteTimeline {self.name!r} context {self.context} of pid {self.pid}{' closed' if self.closed else ''}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteTimeline) and (self.domain, self.context) == (other.domain, other.context)

    def __hash__(self) -> int:
        return hash((self.domain.id, self.context))

    def __reduce__(self) -> Any:
        raise TypeError("a RemoteTimeline can't be pickled to bytes: pass it through multiprocessing, or send it with dmabuf.send()")


def use_of(timeline: RemoteTimeline) -> tuple[int, int]:
    """Return (index, number of the slot's use), by which the timeline is sent on."""
    return timeline._index, timeline._number
