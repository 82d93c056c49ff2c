"""What sync files do with descriptors that came from elsewhere."""

from __future__ import annotations

import errno
import fcntl

from dmabuf._native import OwnedFd, owned
from dmabuf.errors import fail


def duplicate(fd: int, operation: str) -> OwnedFd:
    """Return a duplicate that exec doesn't inherit.

    Raises:
        ClosedError: ``fd`` is not open (EBADF).
        DmaBufError: No descriptor is free (EMFILE).
    """
    try:
        return owned(fcntl.fcntl, fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except (OSError, OverflowError, ValueError) as e:
        number = e.errno if isinstance(e, OSError) and e.errno else errno.EBADF
        remedy = "pass an open file descriptor" if number == errno.EBADF else "raise RLIMIT_NOFILE or close descriptors"
        raise fail(number, operation, f"fd {fd}", remedy) from None
