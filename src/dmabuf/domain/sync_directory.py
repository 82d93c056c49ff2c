"""``SyncDirectory``: the sync files in a domain's directory, as one process looks after them (see `sync_files` for their names).

A private domain has no directory. There these functions do nothing, and the processes that have a sync file wake its waiters.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dmabuf._native import Shm
from dmabuf.domain import place, sync_files


class SyncDirectory:
    """The directory ``path`` of a domain, None for a private domain."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @contextlib.contextmanager
    def opened(self) -> Iterator[int | None]:
        """Open the directory for the block; None for a private domain."""
        if self.path is None:
            yield None
            return
        fd = place.open_directory(self.path, make=False)
        try:
            yield fd
        finally:
            os.close(fd)

    def wake(self, shm: Shm, handle: int) -> bool:
        """Advance the sync files that wait for a fence, which has ended. Return False if that must be tried again."""
        try:
            with self.opened() as directory:
                for name in [] if directory is None else sync_files.waiting_for(handle, directory):
                    sync_files.advance(shm, name, directory or 0)
        except FileNotFoundError:
            pass  # the directory is gone, and every name in it
        except OSError:  # no descriptor is free for a moment
            return False
        return True

    def wake_all(self, shm: Shm) -> bool:
        """Advance every sync file whose fence has ended, and remove those that no process has open.

        Called after a death, to finish what the dead process had begun. Return False if some of it must be tried again.
        """
        done = True
        try:
            with self.opened() as directory:
                for name in [] if directory is None else sync_files.waiting(directory):
                    sync_files.advance(shm, name, directory or 0)
        except FileNotFoundError:
            pass  # the directory is gone, and every name in it
        except OSError:
            done = False
        self.tidy()
        return done

    def tidy(self) -> None:
        """Remove the names of sync files whose descriptors are all closed."""
        with contextlib.suppress(OSError), self.opened() as directory:
            if directory is not None:
                sync_files.tidy(directory)
