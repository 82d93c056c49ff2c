"""What a domain needs of the place where its file is, and the proof that it is there: each thing is tried.

``prove`` tries a directory once, when a domain's file is made in it. A life's lock is proved each time one is taken, because everything
else rests on it.

*What keeps a life's lock.* On nearly every file system a mapping of one page keeps the lock's description: no fork inherits the page,
closing descriptors doesn't touch it, and it ends with the process's memory. On overlayfs, which is the root of every container, and on a
FUSE file system that passes through, a mapping refers to the file below, and the lock ends with its descriptor. There a thread keeps the
description, in a table of descriptors of its own (native/fds/hold.c). The kernel ends the threads of a dying process in any order. So the
lock of such a life may be free while another thread still runs for some microseconds. Before a life with the mark ``BY_THREAD`` is reaped,
``still_runs`` looks for its process in /proc too. A process that has executed another program keeps its number and start time. So that
question is asked for at most ``DYING_S`` seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from dmabuf._native import OwnedFd, allocate_range, hold_drop, hold_keep, punch, step
from dmabuf.domain.directory import open_at
from dmabuf.domain.guards import finalizer
from dmabuf.domain.limits import listed
from dmabuf.domain.ofd import ofd_lock, ofd_locked, reopen_owned
from dmabuf.errors import errno_name, fail

BY_THREAD: Final = 1 << 63  # in the start time of a life's slot: a thread keeps the life's lock
DYING_S: Final = 1.0  # the longest that the end of a life waits for its process's last thread
PROOF: Final = "proof-"  # and 16 hexadecimal digits: the names that `prove` uses, for a moment
_LEFT: Final = re.compile(PROOF + r"[0-9a-f]{16}(\.new|\.sock)?")
_BYTES: Final = 65536  # of the file that `prove` makes
_LOCK: Final = 1 << 40  # a byte behind the data, as a life's is


class FileSystem(NamedTuple):
    """The file system behind a descriptor. ``kind``: as in proc_pid_mountinfo(5), ``"overlay"``; ``mount``: where it is mounted."""

    kind: str
    mount: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.mount}" if self.kind else "an unknown file system"


def file_system(fd: int) -> FileSystem:
    """Return the file system behind a descriptor, ("", "") if /proc doesn't tell."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as f:
            number = next(line.split()[1] for line in f if line.startswith(b"mnt_id:"))
        with open("/proc/self/mountinfo", "rb") as f:
            fields = next(line.split() for line in f if line.split(maxsplit=1)[0] == number)
        return FileSystem(os.fsdecode(fields[fields.index(b"-") + 1]), os.fsdecode(fields[4]))
    except (OSError, StopIteration, ValueError, IndexError):
        return FileSystem("", "")


def remedy() -> str:
    """Return what to do about a place that lacks something."""
    return f"name a directory on a tmpfs in DMABUF_DOMAIN, such as /dev/shm/dmabuf-{os.geteuid()}"


# ---- a life's lock ----


class Hold:
    """What keeps a lock, until `drop` or the end of the object or the process, however that ends."""

    __slots__ = ("_address", "by_thread")
    _address: int
    by_thread: bool

    def __init__(self, own: OwnedFd, fd: int, byte: int) -> None:
        """Keep the write lock that ``own`` has on a byte, and take over ``own``. Forks must wait meanwhile.

        Args:
            own: A description of the file that has the lock.
            fd: Another description of the file. Through it the call proves that others see the lock.
            byte: The byte of the lock.

        Raises:
            DmaBufError: Nothing keeps the lock (ENOTSUP).
        """
        self._address, self.by_thread = 0, False
        try:
            hold_keep(own, fd, byte, self)
        except OSError as e:
            if e.errno != errno.ENOTSUP:
                raise
            raise lock_is_lost(fd) from None

    def drop(self) -> None:
        """End the hold. The lock is free when this returns."""
        address, self._address = self._address, 0
        if address:
            hold_drop(address, self.by_thread)

    @finalizer
    def __del__(self) -> None:
        if hasattr(self, "_address"):
            self.drop()


def lock_is_lost(fd: int) -> OSError:
    """Return the error for a place where nothing keeps a life's lock. ``fd``: a descriptor of the domain's file."""
    what = f"its file system ({file_system(fd)}) loses the lock of a file that is mapped, and a thread can't keep it"
    return fail(errno.ENOTSUP, "join", "the domain", remedy(), what=what)


class Process(NamedTuple):
    """A process in proc_pid_stat(5).

    ``start``: its start time in clock ticks after boot. ``ended``: it is a zombie without threads. ``stopped``: a signal or a debugger
    stopped it.
    """

    start: int
    ended: bool
    stopped: bool


def process(pid: int) -> Process | None:
    """Return what /proc says about a process, None if it shows none of this number. All of it is one read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
        return Process(int(fields[19]), fields[0] in b"ZX" and int(fields[17]) <= 1, fields[0] in b"Tt")
    except (OSError, IndexError, ValueError):
        return None


def still_runs(pid: int, start: int) -> bool:
    """Return True if /proc shows a thread of this process that may still run."""
    found = process(pid)
    return found is not None and found.start == start & (BY_THREAD - 1) and not found.ended


# ---- the place ----


class Proof(NamedTuple):
    """A place in which a domain can be. ``by_thread``: a thread keeps the lock of each process, because a mapping doesn't."""

    file_system: FileSystem
    by_thread: bool


def prove(directory: int, path: Path) -> Proof:
    """Try in a directory what a domain needs of its file system.

    Args:
        directory: A descriptor of it.
        path: Its path, for the error.

    Raises:
        DmaBufError: Something is missing (ENOTSUP), and the message says what, where, and what to do.
        NoSpaceError: There is no room (ENOSPC).
    """
    found, by_thread = file_system(directory), False
    name = f"{PROOF}{secrets.token_hex(8)}"
    fds: list[OwnedFd] = []
    try:
        for what, attempt in _ATTEMPTS:
            try:
                by_thread |= bool(attempt(directory, name, fds))
                step("place_tried")  # names of the proof are left: the next process that makes the domain removes them
            except OSError as e:
                if e.errno in (errno.EMFILE, errno.ENFILE, errno.EDQUOT, errno.ENOSPC, errno.ENOMEM, errno.EROFS, errno.EACCES):
                    raise fail(e.errno, "open domain", path, _REMEDIES.get(e.errno) or remedy(), what=_SAID.get(e.errno)) from None
                why = f": {errno_name(e.errno)}" if e.errno else ""
                filtered = e.errno in (errno.EPERM, errno.ENOSYS)
                by = f"its file system ({found}), or a filter of system calls (seccomp)," if filtered else f"its file system ({found})"
                raise fail(errno.ENOTSUP, "open domain", path, remedy(), what=f"{by} {what}{why}") from None
    finally:
        for own in fds:
            own.close()
        for ending in ("", ".new", ".sock"):
            with contextlib.suppress(OSError):
                os.unlink(name + ending, dir_fd=directory)
    return Proof(found, by_thread)


def tidy(directory: int) -> None:
    """Remove what a process left that died in `prove`. The caller has the lifecycle lock of the domain that is made here."""
    for name in listed("open domain", directory):
        if _LEFT.fullmatch(name):
            os.unlink(name, dir_fd=directory)


_REMEDIES: Final = {
    errno.EMFILE: "raise RLIMIT_NOFILE or close descriptors",
    errno.ENFILE: "raise fs.file-max or close descriptors",
    errno.ENOSPC: "free space there, or name a directory on another file system in DMABUF_DOMAIN",
}
_SAID: Final = {errno.ENOSPC: "its file system has no room", errno.EROFS: "its file system is mounted read-only"}


def _refused(number: int = 0) -> OSError:
    return OSError(number, os.strerror(number) if number else "")


def _files(directory: int, name: str, fds: list[OwnedFd]) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fds.append(open_at(directory, name, flags, 0o600))
    os.fchmod(fds[0].number, 0o600)  # whatever the umask took away
    fds.append(reopen_owned(fds[0].number))
    one, other = (os.fstat(own.number) for own in fds)
    if (one.st_dev, one.st_ino) != (other.st_dev, other.st_ino) or not stat.S_ISREG(one.st_mode):
        raise _refused()


def _room(directory: int, name: str, fds: list[OwnedFd]) -> None:
    allocate_range(fds[0].number, 0, _BYTES)
    if os.fstat(fds[1].number).st_size != _BYTES:
        raise _refused()


def _holes(directory: int, name: str, fds: list[OwnedFd]) -> None:
    os.pwrite(fds[0].number, b"x" * 4096, 0)
    punch(fds[0].number, 0, 4096)
    if os.pread(fds[1].number, 4096, 0) != bytes(4096):
        raise _refused()


def _mappings(directory: int, name: str, fds: list[OwnedFd]) -> None:
    with mmap.mmap(fds[0].number, _BYTES) as here, mmap.mmap(fds[1].number, _BYTES) as there:
        here[0:8] = b"mapping1"
        os.pwrite(fds[1].number, b"written2", 8)
        if there[0:16] != b"mapping1written2" or here[8:16] != b"written2" or os.pread(fds[1].number, 8, 0) != b"mapping1":
            raise _refused()


def _locks(directory: int, name: str, fds: list[OwnedFd]) -> None:
    one, other = (own.number for own in fds)
    if not ofd_lock(one, fcntl.F_WRLCK, _LOCK):
        raise _refused()
    try:
        if not ofd_locked(other, _LOCK) or ofd_lock(other, fcntl.F_WRLCK, _LOCK) or not ofd_lock(other, fcntl.F_WRLCK, _LOCK + 1):
            raise _refused()
    finally:
        for fd in (one, other):
            ofd_lock(fd, fcntl.F_UNLCK, _LOCK, 2)


def _keeping(directory: int, name: str, fds: list[OwnedFd]) -> bool:
    with reopen_owned(fds[0].number) as own:
        own.set_lock(fcntl.F_WRLCK, _LOCK)
        hold = Hold(own, fds[1].number, _LOCK)
    hold.drop()
    return hold.by_thread


def _renaming(directory: int, name: str, fds: list[OwnedFd]) -> None:
    os.rename(name, f"{name}.new", src_dir_fd=directory, dst_dir_fd=directory)
    there, here = os.stat(f"{name}.new", dir_fd=directory, follow_symlinks=False), os.fstat(fds[0].number)
    if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
        raise _refused()


def _sockets(directory: int, name: str, fds: list[OwnedFd]) -> None:
    address = f"/proc/self/fd/{directory}/{name}.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        server.bind(address)
        os.chmod(address, 0o600)
        server.listen(1)
        client.connect(address)


# What a domain does with its place, in an order in which each needs only what stands before it; and what is wrong if it fails.
_ATTEMPTS: Final[tuple[tuple[str, Callable[[int, str, list[OwnedFd]], bool | None]], ...]] = (
    ("doesn't give two descriptions of a new file", _files),
    ("can't allocate the space of a file (fallocate)", _room),
    ("can't free a part of a file (FALLOC_FL_PUNCH_HOLE)", _holes),
    ("has no mappings that processes share (MAP_SHARED)", _mappings),
    ("has no locks of open file descriptions that others see (F_OFD_SETLK)", _locks),
    ("can't keep a lock for a process", _keeping),
    ("can't rename a file that is open", _renaming),
    ("can't have sockets", _sockets),
)
