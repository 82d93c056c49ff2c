"""``SpillFile``: an unlinked file with ranges for the content of buffers, and the choice of its directory.

The file has no name, so it is freed with its last descriptor, however its process ends (O_TMPFILE). On a file system without O_TMPFILE the
file is unlinked just after it is made, and only a process that dies between those two calls leaves it behind. A range is reserved when it
is taken, so that a later write needs no space of the file system, and freed when it is given back. On a file system that copies on write
(btrfs, or one with compression) a reservation covers the first write only.

*The directory.* :func:`default_directory` is the first of ``$DMABUF_SPILL_DIRECTORY``, ``/var/tmp``, the temporary directory and the user's
cache that can be written to and isn't in memory, because spilling to a tmpfs would free nothing. A directory that the environment or the
caller names is not checked.

Any thread may call everything, and no lock is held during a read or write. Errors are the system's, as plain ``OSError``.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dmabuf._native import OwnedFd
from dmabuf.domain.limits import no_proc
from dmabuf.errors import DmaBufError, fail, needing_descriptors

SLICE: Final = 8 << 20  #: bytes of one read or write: between two of them signals are served
RESERVE: Final = 64 << 20  #: bytes of one fallocate, which a signal makes start over
_IN_MEMORY: Final = frozenset({b"tmpfs", b"ramfs", b"devtmpfs", b"hugetlbfs"})


reserve_range, write_at, read_at = OwnedFd.reserve, OwnedFd.pwrite, OwnedFd.pread
"""Names of their own, so that tests can replace them."""


def reserve(fd: OwnedFd, start: int, length: int) -> None:
    """Reserve the space of a range of a file (posix_fallocate(3)).

    Raises:
        OSError: There is no space (ENOSPC, EFBIG, EDQUOT). A part may be reserved.
    """
    for at in range(start, start + length, RESERVE):
        reserve_range(fd, at, min(RESERVE, start + length - at))


def slices(length: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the pieces in which ``length`` bytes are copied."""
    for start in range(0, length, SLICE):
        yield start, min(start + SLICE, length)


class SpillFile:
    """A file without a name in ``directory``.

    Raises:
        DmaBufError: No file can be made there (ENOENT, ENOTDIR, EACCES, EROFS and the like).
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.fspath(directory)
        self._lock = threading.RLock()
        self._free: list[tuple[int, int]] = []  # (start, length), in order, with no two adjacent
        self._end = 0
        self._fd: OwnedFd
        try:
            with needing_descriptors("spill", self.directory):
                self._fd = _unnamed(self.directory)
        except DmaBufError:
            raise
        except OSError as e:
            raise fail(
                e.errno or errno.EIO, "spill", self.directory, "name a writable directory on a disk (DMABUF_SPILL_DIRECTORY)"
            ) from None

    def __repr__(self) -> str:
        return f"<SpillFile in {self.directory}>"

    def fileno(self) -> int:
        """Return the descriptor, which the file keeps; -1 if closed."""
        return self._fd.number

    def take(self, length: int) -> int:
        """Reserve a range and return its first byte.

        Raises:
            OSError: There is no space, and nothing is taken (ENOSPC, EFBIG, EDQUOT).
        """
        with self._lock:
            start = self._find(length)
        try:
            reserve(self._fd, start, length)
        except BaseException:
            self.give(start, length)
            raise
        return start

    def _find(self, length: int) -> int:
        for i, (start, room) in enumerate(self._free):
            if room >= length:
                self._free[i : i + 1] = [(start + length, room - length)] if room > length else []
                return start
        start = self._end
        self._end += length
        return start

    def give(self, start: int, length: int) -> None:
        """Free a range, also in the file system."""
        with contextlib.suppress(OSError):  # on a file system without holes the file keeps the space for the next take()
            self._fd.punch(start, length)
        with self._lock:
            i = bisect.bisect(self._free, (start, length))
            if i < len(self._free) and self._free[i][0] == start + length:
                length += self._free.pop(i)[1]
            if i and sum(self._free[i - 1]) == start:
                i -= 1
                before = self._free.pop(i)
                start, length = before[0], before[1] + length
            if start + length == self._end:
                self._end = start
            else:
                self._free.insert(i, (start, length))

    def write(self, start: int, view: memoryview) -> None:
        """Write all of the view at ``start``. After an error (ENOSPC, EIO and the like) a part may be written."""
        done = 0
        while done < len(view):
            done += write_at(self._fd, view[done:], start + done)

    def read(self, start: int, view: memoryview) -> None:
        """Fill the view from ``start``. A shorter file is EIO, as is an error of the disk."""
        done = 0
        while done < len(view):
            got = read_at(self._fd, view[done:], start + done)
            if not got:
                raise OSError(errno.EIO, "the spill file is shorter than its content")
            done += got

    def close(self) -> None:
        """Close the file and lose its content. Closing twice has no effect."""
        self._fd.close()


def _unnamed(directory: str) -> OwnedFd:
    try:
        return next(map(OwnedFd, map(os.open, (directory,), (os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC,), (0o600,))))
    except OSError as e:
        # EOPNOTSUPP: not this file system; EISDIR: not this kernel (open(2)).
        if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    fd, path = tempfile.mkstemp(prefix="dmabuf-spill-", dir=directory)
    own = OwnedFd(fd)
    os.unlink(path)
    return own


def default_directory() -> str:
    """Return the directory to use if none is named. If every candidate is read-only, missing or in memory, it fails with ENODEV."""
    named = os.environ.get("DMABUF_SPILL_DIRECTORY")
    if named:
        return named
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for directory in ("/var/tmp", tempfile.gettempdir(), cache):
        if os.access(directory, os.W_OK | os.X_OK) and not in_memory(directory):
            return directory
    raise fail(
        errno.ENODEV,
        "spill",
        "no directory",
        "name one in DMABUF_SPILL_DIRECTORY, or pass SpillHeap(directory=…)",
        what="every usual place for temporary files is in memory or can't be written to",
    )


def in_memory(directory: str, mountinfo: str = "/proc/self/mountinfo") -> bool:
    """Return True if the directory is on a file system in memory (proc_pid_mountinfo(5))."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}".encode()
    with needing_descriptors("spill", directory):
        try:
            mounts = Path(mountinfo).read_bytes().splitlines()
        except FileNotFoundError:
            raise no_proc("spill", mountinfo, errno.ENOENT) from None
    for line in mounts:
        before, _, after = line.partition(b" - ")
        if before.split()[2:3] == [wanted]:
            return after.split()[:1] != [] and after.split()[0] in _IN_MEMORY
    return False
