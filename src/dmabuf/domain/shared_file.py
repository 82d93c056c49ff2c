"""``SharedFile``: a little state behind a descriptor. Every process that has the descriptor may change it, and no death can spoil it.

The file is a memfd named ``dmabuf-KIND:<domain>:<nonce>``. Its bytes are read and written under its lock, an open-file-description lock on
byte 0, which the kernel frees when the holder dies. Writers order their writes so that a death between two of them leaves a state that the
next holder of the lock understands. Every description that travels has a read lock on byte 1: a process that can take the write lock there
is the last one. Both locks are taken through a description of the process's own, which never travels.

A forked child shares what it inherits, and makes a description of its own at first use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from dmabuf._native import Bracket, OwnedFd, Points, WeakValues, owned, step
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.forks import fork_lock, is_mine
from dmabuf.domain.limits import no_memfd
from dmabuf.domain.ofd import lock_holder, lock_within
from dmabuf.domain.place import SHARE_DOMAIN
from dmabuf.domain.weak_objects import WeakObjects
from dmabuf.errors import ClosedError, DmaBufError, fail

RECORD_ROOM = 256  # bytes at the beginning of a file with a record; the first half is for the module that made the file
LOCK_S = 30.0  # seconds that a process waits for the lock, which others hold for microseconds
MOST_BYTES = 16 << 20  # of a record, so that a number that somebody wrote costs no more
_RECORD = struct.Struct("=IIQQQQQQ")  # which of two copies counts; of each: offset, room, length
_RECORD_AT = 128
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK = 1033, 1, 2  # linux/fcntl.h
_LOCK, _REFERENCE_LOCK = 0, 1  # bytes of the file that the locks are on
set_lock = OwnedFd.set_lock  # a name of its own, so that tests can replace it
_NAME = re.compile(r"/memfd:dmabuf-([a-z_]+):([0-9a-f]{16}):[0-9a-f]{16}(?: \(deleted\))?\Z")
_ALL: WeakObjects[SharedFile] = WeakObjects()


class _ProcessLock:
    """A lock between the handles of one file in this process. Their descriptions would wait for each other for ever."""

    __slots__ = ("__weakref__", "mutex")

    def __init__(self) -> None:
        self.mutex = threading.RLock()  # re-entrant only to know its owner


_adding = fork_lock()  # to look and add in one step
_process_locks: WeakValues[tuple[int, int], _ProcessLock] = WeakValues()  # by (st_dev, st_ino)


class _Locked(Bracket):
    """A block that holds the lock of a file."""

    __slots__ = ("_file", "_own", "_process_lock", "_then")

    def __init__(self, file: SharedFile, then: Callable[[], object] | None) -> None:
        self._file, self._process_lock, self._then = file, file._process_lock, then
        self._own: OwnedFd | None = None

    def enter(self) -> None:
        """Take the lock."""
        mutex = self._process_lock.mutex
        if is_mine(mutex):
            remedy = "don't call it from a signal handler or a garbage collector's callback"
            raise fail(errno.EDEADLK, "lock", "shared state", remedy, what="this thread is in the middle of another call")
        own = self._file._description()
        self._own = own  # from here on leave() undoes what is done
        mutex.acquire()
        if not set_lock(own, fcntl.F_WRLCK, _LOCK):
            step("~cell")
            self._wait(own)
        if self._then is not None:
            self._then()

    def _wait(self, own: OwnedFd) -> None:
        if not lock_within(LOCK_S, lambda: set_lock(own, fcntl.F_WRLCK, _LOCK)):
            what = f"{lock_holder(own.fileno(), _LOCK)} has held its lock for {LOCK_S:g} s"
            raise fail(errno.ETIMEDOUT, "lock", "shared state", "continue that process (kill -CONT), or end it", what=what)

    def leave(self) -> None:
        """Release it. A signal handler may have raised before it was taken: releasing a free lock has no effect."""
        own, mutex = self._own, self._process_lock.mutex
        if own is None or not is_mine(mutex):
            return
        if own is self._file._own:  # not in a forked child
            with contextlib.suppress(ClosedError):  # somebody else closed the descriptor, and the kernel freed the lock with it
                own.set_lock(fcntl.F_UNLCK, _LOCK)
        mutex.release()


class SharedFile:
    """A file, as one process has it open.

    ``_fd``: the descriptor that travels; ``_own``: this process's description, None in a forked child that has used neither yet. Each call
    compares the inode (``OwnedFd``), so nothing is read from, or written to, a file that got the number of a descriptor that was closed.
    """

    def __init__(self, fd: OwnedFd, domain: Domain) -> None:
        """Take ownership of ``fd``, unless it raises."""
        self.domain = domain
        own = fd.reopen()
        try:
            if not fd.set_lock(fcntl.F_RDLCK, _REFERENCE_LOCK):
                raise fail(errno.ENODEV, "open", f"fd {fd.number}", "make a new one", what="its last process is closing it")
        except BaseException:
            own.close()
            raise
        self._fd = fd
        self._own: OwnedFd | None = own
        self._process_lock = _process_lock_of(own)
        _ALL.add(self)

    @property
    def fd(self) -> int:
        """The descriptor that travels, compared just now; -1 once closed."""
        return self._fd.fileno()

    def points(self) -> Points:
        """Return the first page of the file, mapped.

        Raises:
            ValueError: The file isn't sealed, so it could get shorter.
            DmaBufError: No descriptor is free (EMFILE).
        """
        # A mapping keeps its description, with the locks that are on it, as long as it lives, also in a forked child. This one gets none.
        with self._fd.reopen() as file:
            return Points(file)

    def dup(self) -> OwnedFd:
        """Return a duplicate of the descriptor that travels.

        Raises:
            ClosedError: The file is closed (EBADF).
            DmaBufError: No descriptor is free (EMFILE).
        """
        return self._fd.dup()

    @classmethod
    def make(cls, kind: str, domain: Domain, content: bytes, *, sealed: bool = False) -> SharedFile:
        """Return a new file with this content. A ``sealed`` one never gets shorter, so it can be mapped.

        Raises:
            NoMemoryError: There is no memory (ENOMEM).
            DmaBufError: No descriptor is free (EMFILE).
        """
        try:
            name = f"dmabuf-{kind}:{domain.id}:{secrets.token_hex(8)}"
            flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealed else 0)
            fd = next(map(OwnedFd, map(os.memfd_create, (name,), (flags,))))
        except OSError as e:
            raise no_memfd(kind, "memfd", e.errno or errno.EIO) from None
        try:
            fd.pwrite(content, 0)
            if sealed:
                fcntl.fcntl(fd.fileno(), _F_ADD_SEALS, _F_SEAL_SEAL | _F_SEAL_SHRINK)
            return cls(fd, domain)
        except BaseException:
            fd.close()
            raise

    @classmethod
    def of_fd(cls, fd: int, kind: str, domain: Domain | None, operation: str) -> SharedFile:
        """Return the file behind a descriptor, which the caller keeps.

        Raises:
            ClosedError: ``fd`` is not open (EBADF).
            InvalidError: It is not a file of this kind (EINVAL).
            CrossDomainError: It belongs to another domain (EXDEV).
            DmaBufError: No descriptor is free (EMFILE).
        """
        try:
            own = owned(fcntl.fcntl, fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except (OSError, OverflowError, ValueError) as e:
            number = e.errno if isinstance(e, OSError) and e.errno else errno.EBADF
            remedy = "pass an open file descriptor" if number == errno.EBADF else "raise RLIMIT_NOFILE or close descriptors"
            raise fail(number, operation, f"fd {fd}", remedy) from None
        try:
            return cls.from_owned_fd(own, kind, domain, operation)
        except BaseException:
            own.close()
            raise

    @classmethod
    def from_owned_fd(cls, own: OwnedFd, kind: str, domain: Domain | None, operation: str) -> SharedFile:
        """Do the same as :meth:`of_fd`, but keep ``own``, unless it raises."""
        fd = own.number
        found, identity = kind_of(fd)
        if found != kind:
            raise fail(errno.EINVAL, operation, f"fd {fd}", f"pass the descriptor of a {kind}", what=f"not a {kind}")
        found_domain = domain if domain is not None and domain.id == identity else known(identity) or Domain.default()
        if found_domain.id != identity:
            raise fail(errno.EXDEV, operation, f"domain {identity}", SHARE_DOMAIN, what="this process is not in its domain")
        return cls(own, found_domain)

    def locked(self, then: Callable[[], object] | None = None) -> AbstractContextManager[None]:
        """Hold the lock in a block. ``then`` is called first in the block.

        Raises:
            DeadlockError: This thread holds it already, because a signal handler came in the middle of a call (EDEADLK).
            DmaBufTimeout: Another process has held it for :data:`LOCK_S`, because it is stopped (ETIMEDOUT).
        """
        return _Locked(self, then)

    def _description(self) -> OwnedFd:
        """Return this process's own description. A forked child makes one at first use."""
        if self._own is None:
            self._own = self._fd.reopen()
        return self._own

    def read(self, offset: int, n: int) -> bytes:
        """Return the bytes at an offset: fewer at the end of the file."""
        file = self._own or self._fd
        # Of much, no more than there is, whatever the file says of itself.
        data = bytearray(n if n <= RECORD_ROOM else max(0, min(n, file.size() - offset)))
        got = file.pread(data, offset) if data else 0
        return bytes(data[:got])

    def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data``, or nothing.

        Raises:
            NoSpaceError, NoMemoryError: There is no memory, and nothing was written (ENOSPC, ENOMEM).
            DmaBufError: The file can't get larger (EFBIG), or another program has sealed it.
        """
        try:
            written = self._description().pwrite(data, offset)
        except DmaBufError:
            raise
        except (OSError, OverflowError) as e:  # another program sealed it, or made it as large as a file can be
            number = e.errno if isinstance(e, OSError) and e.errno else errno.EFBIG
            raise fail(number, "write", "shared state", "free memory, or make a new one") from None
        if written != len(data):
            raise fail(errno.ENOSPC, "write", "shared state", "free memory")

    def _copies(self) -> tuple[int, int, list[int]]:
        """Return which copy of the record counts, the version, and (offset, room, length) of each copy, one after the other."""
        raw = self.read(_RECORD_AT, _RECORD.size)
        which, version, *copies = _RECORD.unpack(raw) if len(raw) == _RECORD.size else (1, 0, 0, 0, 0, 0, 0, 0)
        return which & 1, version, copies

    def version(self) -> tuple[int, int]:
        """Return a number that is another one after each :meth:`store`, and the record's length."""
        which, version, copies = self._copies()
        _, room, length = copies[3 * which : 3 * which + 3]
        return version, min(length, room, MOST_BYTES)

    def load(self, start: int = 0) -> bytes:
        """Return the record that was stored last, and what was appended to it, from a byte on; b"" before the first."""
        which, _, copies = self._copies()
        offset, room, length = copies[3 * which : 3 * which + 3]
        length = min(length, room, MOST_BYTES) - start
        return self.read(offset + start, length) if length > 0 else b""

    def store(self, data: bytes) -> None:
        """Replace the record: write the copy that doesn't count, then make it count. A death leaves the old record or the new one.

        Raises:
            NoSpaceError, NoMemoryError: There is no memory, and the old record still counts (ENOSPC, ENOMEM).
        """
        if len(data) > MOST_BYTES:
            raise fail(errno.ENOSPC, "write", "shared state", "wait for some of it first", what=f"it has {len(data)} bytes")
        which, version, copies = self._copies()
        other = 1 - which
        offset, room, _ = copies[3 * other : 3 * other + 3]
        self._check_room(offset, room)
        if len(data) > room:
            offset, room = max(self.size, RECORD_ROOM), max(2 * len(data), 1024)
            self.write(offset + room - 1, b"\0")
        self.write(offset, data)
        copies[3 * other : 3 * other + 3] = offset, room, len(data)
        self.write(_RECORD_AT, _RECORD.pack(which, version, *copies))
        step("file_written")  # the copy that counts is unchanged
        self.write(_RECORD_AT, _RECORD.pack(other, version + 1 & 0xFFFFFFFF, *copies)[:8])
        step("file_switched")

    def append(self, data: bytes) -> bool:
        """Append to the record. A death leaves it as it was, or longer. Return False if there is no room: then store the whole record."""
        which, _, copies = self._copies()
        offset, room, length = copies[3 * which : 3 * which + 3]
        self._check_room(offset, room)
        if not length or length + len(data) > min(room, MOST_BYTES):
            return False
        self.write(offset + length, data)
        step("file_appended")  # behind the end
        self.write(_RECORD_AT + 8 + 8 * (3 * which + 2), (length + len(data)).to_bytes(8, sys.byteorder))
        step("file_longer")
        return True

    def _check_room(self, offset: int, room: int) -> None:
        if room and not RECORD_ROOM <= offset <= offset + room <= self.size:
            raise fail(errno.EUCLEAN, "write", "shared state", "make a new one", what="another program wrote to its descriptor")

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return (self._own or self._fd).size()

    def close_fd(self) -> bool:
        """Close the descriptor that travels. Return True if no process has one. The rest stays usable until :meth:`close`."""
        if self._fd.number >= 0:
            try:
                self._description()
            except ClosedError:
                return False  # somebody else closed it: whether it is the last can't be said any more
            finally:
                self._fd.close()
        return self.is_last()

    @property
    def opened(self) -> bool:
        """Whether :meth:`close` has anything to close."""
        return self._fd.number >= 0 or (self._own is not None and self._own.number >= 0)

    def is_last(self) -> bool:
        """Return True if no process has a descriptor that travels. Then none ever will."""
        if self._fd.number >= 0 or self._own is None:
            return False
        try:
            return set_lock(self._own, fcntl.F_WRLCK, _REFERENCE_LOCK)
        except ClosedError:
            return False  # somebody else closed it: a lock on another file would prove nothing

    def is_alone(self) -> bool:
        """Return True if nothing but this object has a descriptor that travels: no process, message, forked child or duplicate.

        All of those share one description with this object, so its locks don't tell them apart. Therefore this object takes a new one. The
        old one keeps its read lock as long as anything has it. The locks are in order at every instant, if a signal handler raises.
        """
        try:
            set_lock(self._fd, fcntl.F_RDLCK, _REFERENCE_LOCK)  # perhaps such a handler left the write lock
            self._fd.renew(_REFERENCE_LOCK)
            alone = set_lock(self._fd, fcntl.F_WRLCK, _REFERENCE_LOCK)
            set_lock(self._fd, fcntl.F_RDLCK, _REFERENCE_LOCK)
        except OSError:
            return False  # no descriptor is free to look with, or somebody else closed this one
        return alone

    def close(self) -> None:
        """Close everything. Closing twice has no effect."""
        self._fd.close()
        if self._own is not None:
            self._own.close()


def kind_of(fd: int) -> tuple[str, str]:
    """Return (kind, domain's id) of a shared file's descriptor, ("", "") of anything else."""
    try:
        match = _NAME.match(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        return "", ""
    return (match[1], match[2]) if match else ("", "")


def _process_lock_of(fd: OwnedFd) -> _ProcessLock:
    with _adding:
        found = _process_locks.get((fd.dev, fd.ino))
        if found is None:
            found = _process_locks[fd.dev, fd.ino] = _ProcessLock()
        return found


def _after_fork() -> None:
    """Close the descriptions that the child shares with the parent, and with them the locks."""
    _process_locks.clear()
    for file in list(_ALL):
        if file._own is not None:
            file._own.close()
        file._own, file._process_lock = None, _process_lock_of(file._fd)


os.register_at_fork(after_in_child=_after_fork)
