"""``SwSyncTimeline``: the kernel's software timeline, for tests of code that waits for the kernel's fences (semantics 5.11).

It needs a kernel with CONFIG_SW_SYNC and the right to use debugfs. This library's own timeline is ``dmabuf.Timeline``.
"""

from __future__ import annotations

from typing import Self

from dmabuf.domain.guards import finished
from dmabuf.uapi import sw_sync as uapi
from dmabuf.uapi.call import OwnedFd


class SwSyncTimeline:
    """A timeline that begins at 0. :meth:`close` signals pending fences with ENOENT.

    Raises:
        NotFoundError: The kernel has no software timelines (ENOENT).
        NotPermittedError: This user may not use debugfs (EACCES).
    """

    def __init__(self, path: str = uapi.PATH) -> None:
        self._fd = uapi.open_timeline(path)

    def fileno(self) -> int:
        """Return the descriptor, which the timeline keeps."""
        return self._fd.fileno()

    def fence(self, value: int) -> OwnedFd:
        """Return a sync_file of the kernel that is signaled when the timeline reaches the value.

        Raises:
            ClosedError: The object is closed (EBADF).
            DmaBufError: No descriptor is left (EMFILE).
        """
        return uapi.create_fence(self._fd.fileno(), value, of=self)

    def increment(self, by: int = 1) -> None:
        """Increment the timeline.

        Raises:
            ClosedError: The object is closed (EBADF).
        """
        uapi.increment(self._fd.fileno(), by, of=self)

    def deadline(self, sync_file: int) -> int:
        """Return the earliest deadline of its fences in ns.

        Raises:
            NotFoundError: No deadline was set (ENOENT).
            InvalidError: The descriptor is not one of its fences (EINVAL).
        """
        return uapi.get_deadline(self._fd.fileno(), sync_file, of=self)

    def close(self) -> None:
        """Close the timeline. Closing twice has no effect."""
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    @finished
    def __exit__(self, *_: object) -> None:
        self.close()
