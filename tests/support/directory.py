"""A private directory for the domain of one test run.

On the shared-memory mount where there is one, as in real use. The run holds a lock on it; a directory without one belonged to a run that
was killed, and the next run removes it.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from .leaks import DIRECTORY_PREFIX, SHM


class RunDirectory:
    """A fresh directory of mode 0700, removed by `close()`."""

    def __init__(self) -> None:
        # DMABUF_TEST_BASE: a directory on a file system that is to be tried, such as overlayfs.
        base = Path(os.environ.get("DMABUF_TEST_BASE") or (SHM if os.access(SHM, os.W_OK) else tempfile.gettempdir()))
        _remove_stale(base)
        self.path = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=base))
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the directory and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def _remove_stale(base: Path) -> None:
    for path in base.glob(f"{DIRECTORY_PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            # Another user's, or just removed.
            continue
        try:
            # A directory that another run has made but not locked yet is empty: leave it alone.
            if os.listdir(fd):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
