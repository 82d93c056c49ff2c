"""``SharedFile``: a little state behind a descriptor. Every process that has the descriptor may change it, and no death can spoil it.

The file is a memfd named ``dmabuf-KIND:<domain>:<nonce>``. Its bytes are read and written under its lock, an open-file-description lock on
byte 0, which the kernel frees when the holder dies. Writers order their writes so that a death between two of them leaves a state that the
next holder of the lock understands. Every description that travels has a read lock on byte 1: a process that can take the write lock there
is the last one. Both locks are taken through a description of the process's own, which never travels.

A forked child shares what it inherits, and makes a description of its own at first use.
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

from dmabuf._native import step
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.place import ofd_lock, reopen
from dmabuf.errors import fail

RECORD_ROOM = 256  # bytes at the beginning of a file with a record; the first half is for the module that made the file
_RECORD = struct.Struct("=IIQQQQQQ")  # which of two copies counts; of each: offset, room, length
_RECORD_AT = 128
_LOCK, _REFERENCE_LOCK = 0, 1  # bytes of the file that the locks are on
_NAME = re.compile(r"/memfd:dmabuf-([a-z_]+):([0-9a-f]{16}):[0-9a-f]{16}(?: \(deleted\))?\Z")
_ALL: weakref.WeakSet[SharedFile] = weakref.WeakSet()


class _ProcessLock:
    """A lock between the handles of one file in this process. Their descriptions would wait for each other for ever."""

    __slots__ = ("__weakref__", "held", "mutex")

    def __init__(self) -> None:
        self.mutex = threading.RLock()
        self.held = False


_process_locks: weakref.WeakValueDictionary[tuple[int, int], _ProcessLock] = weakref.WeakValueDictionary()  # by (st_dev, st_ino)


class SharedFile:
    """A file, as one process has it open. ``fd``: the descriptor that travels, -1 once closed."""

    def __init__(self, fd: int, domain: Domain) -> None:
        """Take ownership of ``fd``, unless it raises."""
        self.domain = domain
        self._own = reopen(fd)
        try:
            if not ofd_lock(fd, fcntl.F_RDLCK, _REFERENCE_LOCK):
                raise fail(errno.ENODEV, "open", f"fd {fd}", "make a new one", what="its last process is closing it")
        except BaseException:
            os.close(self._own)
            raise
        self.fd = fd
        self._process_lock = _process_lock_of(self._own)
        _ALL.add(self)

    @classmethod
    def make(cls, kind: str, domain: Domain, content: bytes) -> SharedFile:
        """Return a new file with this content. Errors: EMFILE, ENOMEM."""
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
    def of_fd(cls, fd: int, kind: str, domain: Domain | None, operation: str) -> SharedFile:
        """Return the file behind a descriptor, which the caller keeps.

        Errors: EBADF; EINVAL not a file of that kind; EXDEV another domain; EMFILE.
        """
        try:
            own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except (OSError, OverflowError, ValueError) as e:
            number = e.errno if isinstance(e, OSError) and e.errno else errno.EBADF
            remedy = "pass an open file descriptor" if number == errno.EBADF else "raise RLIMIT_NOFILE or close descriptors"
            raise fail(number, operation, f"fd {fd}", remedy) from None
        try:
            return cls.from_owned_fd(own, kind, domain, operation)
        except BaseException:
            os.close(own)
            raise

    @classmethod
    def from_owned_fd(cls, fd: int, kind: str, domain: Domain | None, operation: str) -> SharedFile:
        """Do the same as :meth:`of_fd`, but take ownership of ``fd``, unless it raises."""
        found, identity = kind_of(fd)
        if found != kind:
            raise fail(errno.EINVAL, operation, f"fd {fd}", f"pass the descriptor of a {kind}", what=f"not a {kind}")
        found_domain = domain if domain is not None and domain.id == identity else known(identity) or Domain.default()
        if found_domain.id != identity:
            remedy = "start both processes with the same DMABUF_DOMAIN, or send the domain along: dmabuf.send(sock, domain, …)"
            raise fail(errno.EXDEV, operation, f"domain {identity}", remedy, what="this process is not in its domain")
        return cls(fd, found_domain)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock. Errors: EDEADLK this thread holds it already, because a signal handler came in the middle of a call."""
        process_lock = self._process_lock
        with process_lock.mutex:
            if process_lock.held:
                remedy = "don't call it from a signal handler, a fence's callback, or a garbage collector's callback"
                raise fail(errno.EDEADLK, "lock", "shared state", remedy, what="this thread is in the middle of another call")
            if self._own < 0:  # forked
                self._own = reopen(self.fd)
            own = self._own
            try:
                process_lock.held = True
                if not ofd_lock(own, fcntl.F_WRLCK, _LOCK):
                    step("~cell")
                    ofd_lock(own, fcntl.F_WRLCK, _LOCK, wait=True)
                yield
            finally:
                # A signal handler may have raised before we knew that we have the lock. Unlocking a free lock has no effect.
                try:
                    if own == self._own:
                        ofd_lock(own, fcntl.F_UNLCK, _LOCK)
                finally:
                    process_lock.held = False

    def read(self, offset: int, n: int) -> bytes:
        """Return the bytes at an offset: fewer at the end of the file."""
        return os.pread(self._own if self._own >= 0 else self.fd, n, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data``. Errors: ENOSPC, ENOMEM no memory, and nothing was written."""
        if os.pwrite(self._own, data, offset) != len(data):
            raise fail(errno.ENOSPC, "write", "shared state", "free memory")

    def load(self) -> bytes:
        """Return the record that was stored last, b"" before the first."""
        raw = self.read(_RECORD_AT, _RECORD.size)
        if len(raw) < _RECORD.size:
            return b""
        which, _, *copies = _RECORD.unpack(raw)
        offset, room, length = copies[3 * (which & 1) : 3 * (which & 1) + 3]
        return self.read(offset, min(length, room)) if length else b""

    def store(self, data: bytes) -> None:
        """Replace the record: write the copy that doesn't count, then make it count. A death leaves the old record or the new one.

        Errors: ENOSPC, ENOMEM, and the old record counts.
        """
        raw = self.read(_RECORD_AT, _RECORD.size)
        which, _, *copies = _RECORD.unpack(raw) if len(raw) == _RECORD.size else (1, 0, 0, 0, 0, 0, 0, 0)
        other = 1 - (which & 1)
        offset, room, _ = copies[3 * other : 3 * other + 3]
        if len(data) > room:
            offset, room = max(self.size, RECORD_ROOM), max(2 * len(data), 1024)
            self.write(offset + room - 1, b"\0")
        self.write(offset, data)
        copies[3 * other : 3 * other + 3] = offset, room, len(data)
        self.write(_RECORD_AT, _RECORD.pack(which, 0, *copies))
        step("cell_written")  # the copy that counts is unchanged
        self.write(_RECORD_AT, _RECORD.pack(other, 0, *copies)[:4])
        step("cell_switched")

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return os.fstat(self._own if self._own >= 0 else self.fd).st_size

    def close_fd(self) -> bool:
        """Close the descriptor that travels. Return True if no process has one. The rest stays usable until :meth:`close`."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            if self._own < 0:
                self._own = reopen(fd)
            os.close(fd)
        return self.is_last()

    def is_last(self) -> bool:
        """Return True if no process has a descriptor that travels. Then none ever will."""
        return self.fd < 0 and self._own >= 0 and ofd_lock(self._own, fcntl.F_WRLCK, _REFERENCE_LOCK)

    def close(self) -> None:
        """Close everything. Closing twice has no effect."""
        for fd in (self.fd, self._own):
            if fd >= 0:
                os.close(fd)
        self.fd = self._own = -1


def kind_of(fd: int) -> tuple[str, str]:
    """Return (kind, domain's id) of a shared file's descriptor, ("", "") of anything else."""
    try:
        match = _NAME.match(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        return "", ""
    return (match[1], match[2]) if match else ("", "")


def _process_lock_of(fd: int) -> _ProcessLock:
    about = os.fstat(fd)
    return _process_locks.setdefault((about.st_dev, about.st_ino), _ProcessLock())


def _after_fork() -> None:
    """Close the descriptions that the child shares with the parent, and with them the locks."""
    _process_locks.clear()
    for file in list(_ALL):
        if file._own >= 0:
            os.close(file._own)
        file._own, file._process_lock = -1, _process_lock_of(file.fd) if file.fd >= 0 else _ProcessLock()


os.register_at_fork(after_in_child=_after_fork)
