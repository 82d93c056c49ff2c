"""``Handle``: the descriptor that a ``DmaBuf`` owns, and its hold on the buffer's record.

One descriptor, closed once, whichever comes first: ``close()``, the end of a ``with`` block, ``detach()``, which gives it away, or the
garbage collector. The record of the buffer in the domain is held by all handles of a process together; with the last of them, and of the
reservation object, the hold ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, Self

from dmabuf import _native
from dmabuf.core.access.poll import PollFd
from dmabuf.core.base.closing import Closing
from dmabuf.core.buffer.backing import BACKINGS, EXPORTED
from dmabuf.core.buffer.backing_kernel import KernelBacking
from dmabuf.core.buffer.identity import is_kernel_home
from dmabuf.core.resv.resv import DmaResv
from dmabuf.domain.domain import Domain
from dmabuf.domain.records import KIND_BUFFER, Departures, Record
from dmabuf.errors import fail
from dmabuf.uapi.call import OwnedFd

MEMFD = b"memfd"


class Handle(Closing):
    """What a ``DmaBuf`` is as a descriptor: made, duplicated, given away, closed, compared."""

    __slots__ = ("__weakref__", "_accesses", "_fd", "_life", "_mapping", "_polls", "_record", "_resv", "_size", "domain")

    domain: Domain
    _fd: int
    _record: Record
    _size: int
    _mapping: _native.Mapping | None
    _resv: DmaResv | None
    _accesses: int
    _polls: weakref.WeakSet[PollFd] | None
    _life: int

    def __new__(cls, *_: object, **__: object) -> Self:
        raise TypeError("a DmaBuf is made by dmabuf.allocate(), export(), get(), open() or recv()")

    @classmethod
    def _make(cls, fd: int | OwnedFd, record: Record, name: bytes | None = None) -> Self:
        """A handle that owns fd, which is closed if there can be none. ``name``: of the buffer, if its record has to be made again."""
        try:
            record.enter(name)
        except BaseException:
            close_fd(fd)
            raise
        buf = object.__new__(cls)
        if isinstance(fd, int):
            buf._fd = fd
        else:  # no signal handler can raise between the two: closed by one of them, and once
            buf._fd = fd.number
            fd.take()
        buf._record, buf._size, buf.domain = record, record.size, record.domain
        buf._mapping, buf._resv, buf._accesses, buf._polls = None, None, 0, None
        buf._life = record.shm.life
        if record.live is None and record.home != MEMFD and record.kind == KIND_BUFFER:
            if record.home == EXPORTED:
                record.live = BACKINGS.find("remote")(record, buf._fd)
            elif is_kernel_home(record.home):
                record.live = KernelBacking(record)
                record.last = record.live.last
        return buf

    def _check(self, operation: str) -> int:
        if self._fd < 0:
            raise fail(errno.EBADF, operation, self, "open the buffer again", what="the buffer is closed")
        return self._fd

    def _usable(self, operation: str) -> None:
        self._check(operation)
        self._record.ensure()

    @property
    def closed(self) -> bool:
        """Was ``close()`` or ``detach()`` called?"""
        return self._fd < 0

    def fileno(self) -> int:
        """The fd, borrowed: it stays the buffer's, who closes it. Errors: EBADF."""
        return self._check("fileno")

    def dup(self, cloexec: bool = True) -> int:
        """A new fd of the same buffer, owned by the caller. ``cloexec``: not inherited by exec. Errors: EBADF; EMFILE (dup(2))."""
        fd = self._check("dup")
        try:
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC if cloexec else fcntl.F_DUPFD, 0)
        except OSError as e:
            raise fail(e.errno or errno.EIO, "dup", self, "raise RLIMIT_NOFILE or close descriptors") from None

    def detach(self) -> int:
        """Close the handle but keep its fd, which the caller owns from now on. Errors: EBADF; EBUSY inside an access of this handle."""
        fd = self._check("detach")
        self._leave("detach")
        self._fd = -1
        live = self._record.live
        if live is not None:
            live.leaving()
        self._let_go(fd, closing=False)
        if live is not None:
            live.departed(quiet=False)
        return fd

    def close(self) -> None:
        """Close the handle; again: nothing. Mappings live on (mmap(2)). Errors: EBUSY inside an access of this handle."""
        fd = self._fd
        if fd < 0:
            return
        if self._accesses or self._polls:
            self._leave("close")
        self._fd, self._mapping, self._resv = -1, None, None
        self._close(fd)

    def _close(self, fd: int, quiet: bool = False) -> None:
        live = self._record.live
        if live is not None:
            live.leaving()
        departures = self._let_go(fd)
        os.close(fd)
        if departures is not None:
            departures.look()
        if live is not None:
            live.departed(quiet)

    def _let_go(self, fd: int, closing: bool = True) -> Departures | None:
        """One handle less; with the last of this process (and no reservation object of it in use) its hold on the record ends."""
        record = self._record
        ref = record.resv_ref
        if ref is None or ref() is None:
            return record.leave(fd, closing)
        with record.lock:
            record.handles -= 1
        self._record = record.tombstone()  # the hold is the reservation object's alone from now on
        return None

    def _leave(self, operation: str) -> None:
        if self._accesses and self._life == self._record.shm.life:
            raise fail(
                errno.EBUSY,
                operation,
                self,
                "leave the block first",
                what=f"{self._accesses} read() or write() block of this handle is open",
            )
        for waiting in list(self._polls or ()):
            waiting.cancel()
        # Not unmapped here: an array that outlived its read() block still shows it.
        self._mapping = self._resv = self._polls = None

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:  # bound: at the interpreter's end modules are empty
        if getattr(self, "_fd", -1) >= 0 and not ending():
            fd, self._fd = self._fd, -1
            self._mapping = self._resv = None
            self._close(fd, quiet=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and (self._record.dev, self._record.ino) == (other._record.dev, other._record.ino)

    def __hash__(self) -> int:
        return hash((self._record.dev, self._record.ino))

    def __reduce__(self) -> Any:
        raise TypeError(
            "a DmaBuf is a file descriptor and can't be pickled to bytes: pass it to a multiprocessing process or queue, "
            "or send it with dmabuf.send()"
        )


def close_fd(fd: int | OwnedFd) -> None:
    """Close a descriptor that is somebody's by number, or an object's."""
    if isinstance(fd, int):
        os.close(fd)
    else:
        fd.close()
