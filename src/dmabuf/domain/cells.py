"""Cells: a little state behind a descriptor, which whoever holds the descriptor may change, and no death can spoil.

A cell is a memfd named ``dmabuf-KIND:<domain>:<nonce>``. Its bytes are read and written under its lock, an open-file-description lock on
byte 0 that the kernel frees when the holder dies; what is written is ordered by whoever writes so that a death between two writes leaves
a state that the next holder of the lock understands. Every description that travels carries a read lock on byte 1: who can take the write
lock there is the last. Both are taken through a description of the process's own, which never travels.

A forked child holds what it inherits, and makes a description of its own at first use.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from dmabuf import _native
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.place import ofd_lock, reopen
from dmabuf.errors import fail

PAGE_ROOM = 256  # bytes at the beginning of a cell with a record: whoever makes it has the first half
_RECORD = struct.Struct("=IIQQQQQQ")  # which of two copies counts; of each: offset, room, length
_RECORD_AT = 128
_LOCK, _LEASE = 0, 1  # bytes of the file that bear the locks
_NAME = re.compile(r"/memfd:dmabuf-([a-z_]+):([0-9a-f]{16}):[0-9a-f]{16}(?: \(deleted\))?\Z")
_ALL: weakref.WeakSet[Cell] = weakref.WeakSet()


class _Turn:
    """Whose turn it is in this process, whichever of its handles of a cell is used: a second one would wait for the first for ever."""

    __slots__ = ("__weakref__", "held", "mutex")

    def __init__(self) -> None:
        self.mutex = threading.RLock()
        self.held = False


_turns: weakref.WeakValueDictionary[tuple[int, int], _Turn] = weakref.WeakValueDictionary()  # by (st_dev, st_ino)


class Cell:
    """One cell, as a process holds it. ``fd``: the descriptor that travels, -1 once closed."""

    def __init__(self, fd: int, domain: Domain) -> None:
        """Takes over the fd, unless it raises."""
        self.domain = domain
        self._own = reopen(fd)
        try:
            if not ofd_lock(fd, fcntl.F_RDLCK, _LEASE):
                raise fail(errno.ENODEV, "open", f"fd {fd}", "make a new one", what="its last holder is closing it")
        except BaseException:
            os.close(self._own)
            raise
        self.fd = fd
        self._turn = _turn_of(self._own)
        _ALL.add(self)

    @classmethod
    def make(cls, kind: str, domain: Domain, content: bytes) -> Cell:
        """A new one. Errors: EMFILE, ENOMEM."""
        try:
            fd = os.memfd_create(f"dmabuf-{kind}:{domain.id}:{secrets.token_hex(8)}", os.MFD_CLOEXEC)
        except OSError as e:
            raise fail(e.errno or errno.EIO, kind, "memfd", "raise RLIMIT_NOFILE or close descriptors") from None
        try:
            os.pwrite(fd, content, 0)
            return cls(fd, domain)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def of_fd(cls, fd: int, kind: str, domain: Domain | None, operation: str) -> Cell:
        """The cell behind a descriptor, which the caller keeps.

        Errors: EBADF; EINVAL no cell of that kind; EXDEV another domain; EMFILE.
        """
        try:
            own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except (OSError, OverflowError, ValueError) as e:
            number = e.errno if isinstance(e, OSError) and e.errno else errno.EBADF
            remedy = "pass an open file descriptor" if number == errno.EBADF else "raise RLIMIT_NOFILE or close descriptors"
            raise fail(number, operation, f"fd {fd}", remedy) from None
        try:
            return cls.taken(own, kind, domain, operation)
        except BaseException:
            os.close(own)
            raise

    @classmethod
    def taken(cls, fd: int, kind: str, domain: Domain | None, operation: str) -> Cell:
        """:meth:`of_fd` that takes over the fd, unless it raises."""
        found, identity = look(fd)
        if found != kind:
            raise fail(errno.EINVAL, operation, f"fd {fd}", f"pass the descriptor of a {kind}", what="it is something else")
        home = domain if domain is not None and domain.id == identity else known(identity) or Domain.default()
        if home.id != identity:
            remedy = "start both processes with the same DMABUF_DOMAIN, or send the domain along: dmabuf.send(sock, domain, …)"
            raise fail(errno.EXDEV, operation, f"domain {identity}", remedy, what="this process does not have its domain")
        return cls(fd, home)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock. Errors: EDEADLK this thread holds it: a signal handler came in the middle of a call."""
        turn = self._turn
        with turn.mutex:
            if turn.held:
                remedy = "don't call it from a signal handler, a fence's callback, or a garbage collector's callback"
                raise fail(errno.EDEADLK, "lock", "shared state", remedy, what="this thread is in the middle of a call")
            if self._own < 0:  # forked
                self._own = reopen(self.fd)
            own = self._own
            try:
                turn.held = True
                if not ofd_lock(own, fcntl.F_WRLCK, _LOCK):
                    _native.step("~cell")
                    ofd_lock(own, fcntl.F_WRLCK, _LOCK, wait=True)
                yield
            finally:
                # Also when a signal handler raised before we knew that we have it: to unlock what isn't locked does nothing.
                try:
                    if own == self._own:
                        ofd_lock(own, fcntl.F_UNLCK, _LOCK)
                finally:
                    turn.held = False

    def read(self, offset: int, n: int) -> bytes:
        """Fewer bytes at the end of the file."""
        return os.pread(self._own if self._own >= 0 else self.fd, n, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Errors: ENOSPC, ENOMEM no memory, and nothing was written."""
        if os.pwrite(self._own, data, offset) != len(data):
            raise fail(errno.ENOSPC, "write", "shared state", "free memory")

    def load(self) -> bytes:
        """The record that was stored last, b"" before the first."""
        raw = self.read(_RECORD_AT, _RECORD.size)
        if len(raw) < _RECORD.size:
            return b""
        which, _, *copies = _RECORD.unpack(raw)
        offset, room, length = copies[3 * (which & 1) : 3 * (which & 1) + 3]
        return self.read(offset, min(length, room)) if length else b""

    def store(self, data: bytes) -> None:
        """Replace the record: the other copy is written, and then it is the one that counts. A death leaves the old or the new one.

        Errors: ENOSPC, ENOMEM, and the old one counts.
        """
        raw = self.read(_RECORD_AT, _RECORD.size)
        which, _, *copies = _RECORD.unpack(raw) if len(raw) == _RECORD.size else (1, 0, 0, 0, 0, 0, 0, 0)
        other = 1 - (which & 1)
        offset, room, _ = copies[3 * other : 3 * other + 3]
        if len(data) > room:
            offset, room = max(self.size, PAGE_ROOM), max(2 * len(data), 1024)
            self.write(offset + room - 1, b"\0")
        self.write(offset, data)
        copies[3 * other : 3 * other + 3] = offset, room, len(data)
        self.write(_RECORD_AT, _RECORD.pack(which, 0, *copies))
        _native.step("cell_written")  # the copy that counts is untouched
        self.write(_RECORD_AT, _RECORD.pack(other, 0, *copies)[:4])
        _native.step("cell_switched")

    @property
    def size(self) -> int:
        return os.fstat(self._own if self._own >= 0 else self.fd).st_size

    def let_go(self) -> bool:
        """Close the descriptor that travels; True when nobody has one any more. The rest stays usable until :meth:`close`."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            if self._own < 0:
                self._own = reopen(fd)
            os.close(fd)
        return self.is_last()

    def is_last(self) -> bool:
        """Has nobody a descriptor that travels? Then nobody ever will."""
        return self.fd < 0 and self._own >= 0 and ofd_lock(self._own, fcntl.F_WRLCK, _LEASE)

    def close(self) -> None:
        """Close what is left; again: nothing."""
        for fd in (self.fd, self._own):
            if fd >= 0:
                os.close(fd)
        self.fd = self._own = -1


def look(fd: int) -> tuple[str, str]:
    """(kind, domain's id) of a cell's descriptor; ("", "") of anything else."""
    try:
        match = _NAME.match(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        return "", ""
    return (match[1], match[2]) if match else ("", "")


def _turn_of(fd: int) -> _Turn:
    about = os.fstat(fd)
    return _turns.setdefault((about.st_dev, about.st_ino), _Turn())


def _after_fork() -> None:
    """The child shares the parent's descriptions, and so its locks: it lets go of them at once."""
    _turns.clear()
    for cell in list(_ALL):
        if cell._own >= 0:
            os.close(cell._own)
        cell._own, cell._turn = -1, _turn_of(cell.fd) if cell.fd >= 0 else _Turn()


os.register_at_fork(after_in_child=_after_fork)
