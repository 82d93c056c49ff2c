"""What sync files do with descriptors: duplicate one, look whether it is readable, see to it that it becomes so."""

from __future__ import annotations

import errno
import fcntl
import select

from dmabuf.domain import sync_files
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail


def duplicate(fd: int, operation: str) -> int:
    """Return a duplicate that exec doesn't inherit.

    Raises:
        ClosedError: ``fd`` is not open (EBADF).
        DmaBufError: No descriptor is free (EMFILE).
    """
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except (OSError, OverflowError, ValueError) as e:
        number = e.errno if isinstance(e, OSError) and e.errno else errno.EBADF
        remedy = "pass an open file descriptor" if number == errno.EBADF else "raise RLIMIT_NOFILE or close descriptors"
        raise fail(number, operation, f"fd {fd}", remedy) from None


def is_readable(fd: int) -> bool:
    """Return True if a descriptor is readable now."""
    asked = select.poll()
    asked.register(fd, select.POLLIN)
    return bool(asked.poll(0))


def advance(domain: Domain, stem: str, over: bool) -> bool:
    """Do for a sync file what the signaler of its last fence may have died before it did.

    Args:
        domain: The sync file's domain.
        stem: Its name in the domain's directory.
        over: Whether all its fences are signaled, so that it is made readable.

    Returns:
        False if no descriptor is free for that, so that it must be tried again.
    """
    try:
        with domain.sync_directory.opened() as directory:
            for name in [] if directory is None else sync_files.waiting(directory, stem):
                sync_files.advance(domain.shm, name, directory or 0)
            if over:
                sync_files.make_readable(stem, directory)
    except FileNotFoundError:
        pass  # the directory is gone, and the socket's name with it
    except OSError:
        return False
    return True


def forget_if_last(domain: Domain, stem: str) -> None:
    """Remove the names of a sync file if no process has a descriptor of it."""
    try:
        with domain.sync_directory.opened() as directory:
            if directory is not None and not sync_files.is_open(stem, directory):
                sync_files.remove(stem, directory)
    except OSError:
        pass  # the next process that tidies the directory removes them
