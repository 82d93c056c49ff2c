"""The limits of a process that a failed system call doesn't name, for messages that do."""

from __future__ import annotations

import errno
import os
import resource
from typing import Final

from dmabuf.errors import DmaBufError, fail

_MAPS: Final = "/proc/sys/vm/max_map_count"


def cant_map(operation: str, obj: object, length: int) -> DmaBufError:
    """Return the error for a mapping of so many bytes that mmap(2) refused with ENOMEM."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        what = f"RLIMIT_AS allows this process {limit} bytes of addresses, and {length} more are needed"
        return fail(errno.ENOMEM, operation, obj, "close mappings, or raise it (ulimit -v)", what=what)
    if _is_full():
        what = "this process has as many mappings as it may (vm.max_map_count)"
        return fail(errno.ENOMEM, operation, obj, f"close mappings, or raise {_MAPS}", what=what)
    return fail(errno.ENOMEM, operation, obj, "close mappings, or free memory", what="the kernel has no room for the mapping")


def _is_full() -> bool:
    """Return True if the process has nearly as many mappings as the kernel gives one."""
    try:
        with open(_MAPS, "rb") as limit, open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps) >= int(limit.read()) - 16
    except (OSError, ValueError):
        return False


def file_too_large(operation: str, obj: object, number: int, otherwise: str) -> DmaBufError:
    """Return the error for a file that can't be made as large as it must be. ``otherwise``: what to do if no limit is the cause."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if number == errno.EFBIG and limit != resource.RLIM_INFINITY:
        return fail(number, operation, obj, "raise it (ulimit -f)", what=f"RLIMIT_FSIZE allows a file of {limit} bytes")
    return refused(operation, obj, number, "ftruncate, fallocate or fcntl", otherwise)


def no_memfd(operation: str, obj: object, number: int) -> DmaBufError:
    """Return the error for memfd_create(2), which needs no right: a filter of system calls or a setting of the machine refused it."""
    if number == errno.EACCES:
        what = "the machine allows no memfd that could be executed (vm.memfd_noexec = 2)"
        return fail(number, operation, obj, "set vm.memfd_noexec to 1", what=what)
    return refused(operation, obj, number, "memfd_create", "close buffers, or raise RLIMIT_NOFILE")


def refused(operation: str, obj: object, number: int, call: str, otherwise: str) -> DmaBufError:
    """Return the error for a system call that needs no right, so that EPERM and ENOSYS come from a filter (seccomp(2)).

    ``otherwise``: what to do about any other errno.
    """
    if number in (errno.EPERM, errno.ENOSYS):
        return fail(number, operation, obj, f"allow {call} in the sandbox", what=f"a filter of system calls (seccomp) refuses {call}")
    return fail(number, operation, obj, otherwise)


def no_proc(operation: str, path: str, number: int) -> DmaBufError:
    """Return the error for a file of /proc that isn't there."""
    if os.path.exists(f"{os.path.dirname(path)}/self/stat"):
        remedy = "mount it without subset=pid (in a systemd unit ProcSubset=all)"
        return fail(number, operation, path, remedy, what="/proc shows processes only")
    return fail(number, operation, path, "mount /proc, which dmabuf needs")
