"""Locks of open file descriptions (OFD locks, fcntl(2)), and a second description of a file.

Such a lock belongs to the description. It ends with the description's last descriptor and last mapping, in whichever process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import time
from collections.abc import Callable

from dmabuf._native import OwnedFd, owned
from dmabuf.errors import fail

OFD_GETLK, OFD_SETLK, OFD_SETLKW = 36, 37, 38  # fcntl(2); Python 3.11 has no names for them
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux


def ofd_lock(fd: int, kind: int, start: int, length: int = 1, *, wait: bool = False) -> bool:
    """Set an open-file-description lock (fcntl(2)). Return False if the lock of another description conflicts."""
    try:
        fcntl.fcntl(fd, OFD_SETLKW if wait else OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def ofd_locked(fd: int, start: int, length: int = 1, *, kind: int = fcntl.F_WRLCK) -> bool:
    """Return True if another open file description holds a lock on the bytes. With ``kind=F_RDLCK`` only write locks count."""
    answer = fcntl.fcntl(fd, OFD_GETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def no_proc_at_all(operation: str) -> OSError:
    """Return the error for a file that can't be opened again, because there is no /proc."""
    return fail(errno.ENOSYS, operation, "/proc", "mount it", what="there is no /proc")


def reopen(fd: int) -> int:
    """Open the file behind a descriptor again, and return the new description's descriptor."""
    return reopen_owned(fd).take()


def reopen_owned(fd: int) -> OwnedFd:
    """Do the same as :func:`reopen`; the object owns the descriptor."""
    try:
        return owned(os.open, f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise no_proc_at_all("open domain") from None


def lock_within(seconds: float, take: Callable[[], bool]) -> bool:
    """Call ``take`` until it returns True. Return False if it doesn't, because another process that has the lock is stopped.

    The kernel's own wait for a lock has no timeout.
    """
    end, pause = time.monotonic() + seconds, 0.0001
    while not take():
        if time.monotonic() > end:
            return False
        select.select([], [], [], pause)
        pause = min(2 * pause, 0.016)
    return True


def lock_holder(fd: int, byte: int) -> str:
    """Return who has a lock on a byte of this file, in words: a process by its pid, if /proc shows it (proc_pid_fdinfo(5))."""
    pid = _holder_pid(fd, byte)
    return "another thread of this process" if pid == os.getpid() else f"process {pid}" if pid else "another process"


def _holder_pid(fd: int, byte: int) -> int:
    wanted = b":%d %d %d\n" % (os.fstat(fd).st_ino, byte, byte)
    try:
        pids = list(filter(str.isdigit, os.listdir("/proc")))
    except OSError:
        return 0  # a sandbox hides it, and the message is about something else
    for pid in pids:
        try:
            for name in os.listdir(f"/proc/{pid}/fdinfo"):
                with open(f"/proc/{pid}/fdinfo/{name}", "rb") as f:
                    if any(line.startswith(b"lock:") and line.endswith(wanted) and b"->" not in line for line in f):
                        return int(pid)
        except OSError:
            continue  # it has ended, or is another user's
    return 0
