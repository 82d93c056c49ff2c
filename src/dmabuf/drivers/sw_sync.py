"""``SwSyncTimeline``: the kernel's software timeline, for tests of what waits for the kernel's fences (semantics 5.11).

It needs a kernel with CONFIG_SW_SYNC and the right to use debugfs. A library's own is ``dmabuf.Timeline``.
"""

from __future__ import annotations

from typing import Self

from dmabuf.uapi import sw_sync as uapi
from dmabuf.uapi.call import OwnedFd


class SwSyncTimeline:
    """A timeline that begins at 0; :meth:`close` ends what is pending with ENOENT."""

    def __init__(self, path: str = uapi.PATH) -> None:
        """Errors: ENOENT the kernel has none; EACCES."""
        self._fd = uapi.open_timeline(path)

    def fileno(self) -> int:
        """The descriptor, borrowed."""
        return self._fd.number

    def fence(self, value: int) -> OwnedFd:
        """A kernel's sync_file that is signalled when the timeline reaches the value. Errors: EBADF; EMFILE."""
        return uapi.create_fence(self._fd.number, value, of=self)

    def increment(self, by: int = 1) -> None:
        """Move on. Errors: EBADF."""
        uapi.increment(self._fd.number, by, of=self)

    def deadline(self, sync_file: int) -> int:
        """The earliest deadline in ns that one of its fences was given. Errors: ENOENT none; EINVAL not one of its fences."""
        return uapi.get_deadline(self._fd.number, sync_file, of=self)

    def close(self) -> None:
        """Close it; again: nothing."""
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
