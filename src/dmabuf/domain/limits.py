"""The limits of a process that a failed system call doesn't name, for messages that do."""

from __future__ import annotations

import errno
import os
import resource
from typing import Final

from dmabuf.errors import DmaBufError, fail

UNKNOWN: Final = "unknown"
_MAPS: Final = "/proc/sys/vm/max_map_count"


def limit_of(which: int) -> int:
    """Return a limit of this process, RLIM_INFINITY if a filter of system calls (seccomp(2)) hides it; the kernel checks it anyway."""
    try:
        return resource.getrlimit(which)[0]
    except OSError:
        return resource.RLIM_INFINITY


def descriptor_limit() -> str:
    """Return RLIMIT_NOFILE for a message."""
    limit = limit_of(resource.RLIMIT_NOFILE)
    return UNKNOWN if limit == resource.RLIM_INFINITY else str(limit)


def listed(operation: str, directory: str | int) -> list[str]:
    """Return the names in a directory, a path or a descriptor.

    Raises:
        NotPermittedError, DmaBufError: A filter of system calls refuses it (EPERM, ENOSYS).
        OSError: As os.listdir(), without a message of this library.
    """
    try:
        return os.listdir(directory)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOSYS):
            raise
        obj = directory if isinstance(directory, str) else "the domain's directory"
        raise refused(operation, obj, e.errno, "getdents64", "") from None


def read_at(operation: str, obj: object, fd: int, count: int, offset: int) -> bytes:
    """Return bytes of a file at an offset. If a filter of system calls refuses pread(2), the error says so."""
    try:
        return os.pread(fd, count, offset)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOSYS):
            raise
        raise refused(operation, obj, e.errno, "pread64", "") from None


def cant_map(operation: str, obj: object, length: int) -> DmaBufError:
    """Return the error for a mapping of so many bytes that mmap(2) refused with ENOMEM."""
    limit = limit_of(resource.RLIMIT_AS)
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
    limit = limit_of(resource.RLIMIT_FSIZE)
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
