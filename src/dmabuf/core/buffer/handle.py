"""``Handle``: one descriptor of a buffer in this process.

The descriptor is closed once, by whichever comes first: ``close()``, the end of a ``with`` block, ``detach()``, which gives it away, or the
garbage collector. All handles of a process together hold one reference to the buffer's record in the domain. It ends with the last of
them and of the reservation object.

Every verb of a buffer takes a handle. What a user has is a *face* of it, a ``DmaBuf`` (core/dma_buf.py), and :func:`handle_of` finds the
handle behind a face. An exporter is given a face too.
"""

from __future__ import annotations

import errno
import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from operator import attrgetter
from typing import Final, Protocol, TypeVar

from dmabuf._native import AccessPath, HandleBase, Mapping, close_attribute, dup_same, is_same, map_same, open_handle, owned, take_attribute
from dmabuf.core.buffer.backing import Backing, KernelSide
from dmabuf.core.buffer.identity import checked_name
from dmabuf.core.buffer.shared import MEMFD, SharedBuffer
from dmabuf.core.contract import Buffer
from dmabuf.core.resv.lock import record_of
from dmabuf.core.resv.resv import DmaResv, resv_of
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import finished
from dmabuf.domain.limits import cant_map
from dmabuf.domain.records import Record, free_gone
from dmabuf.domain.weak_objects import WeakObjects
from dmabuf.errors import ContractError, contract_warning, fail
from dmabuf.uapi.call import OwnedFd

PAGE = os.sysconf("SC_PAGE_SIZE")


_OPEN: Final = (-1).__lt__


class Cancelable(Protocol):
    """What is taken back when the handle is closed."""

    def cancel(self) -> None: ...


class Handle(HandleBase, ABC):
    """An owned descriptor of a buffer.

    ``fd``: -1 once closed. ``shared``: the buffer; of a closed handle perhaps only who it was. ``path``: what accesses of this handle need,
    from the first one on. Its ``mapping`` is what they look through; it is kept, because fresh pages cost more than a copy. ``polls``: what
    makes descriptors of ``poll_fd`` readable.
    """

    __slots__ = ()

    domain: Domain
    fd: int
    shared: SharedBuffer
    size: int
    path: AccessPath | None
    device_view: Mapping | None
    known_resv: DmaResv | None
    resv_record: Record  # of known_resv, once that is there
    ending: Backing | None  # what close() asks, once it has begun
    leaving: bool  # whether close() has begun
    left: bool  # whether close() is done
    polls: WeakObjects[Cancelable] | None
    _life: int

    def __repr__(self) -> str:
        where = "closed" if self.fd < 0 else f"fd {self.fd}"
        name = self.shared.known_name()
        called = "" if name is None else f"{os.fsdecode(name)!r} "
        return f"<dmabuf.DmaBuf {called}{where} ino {self.shared.ino} {self.size} bytes {os.fsdecode(self.shared.home)}>"

    @abstractmethod
    def face(self) -> Buffer:
        """Return a face of this handle, for an exporter."""

    # ---- the descriptor ----

    @property
    def closed(self) -> bool:
        """Whether ``close()`` or ``detach()`` was called."""
        return self.fd < 0

    @property
    def accesses(self) -> int:
        """The number of blocks that are entered, or wait."""
        path = self.path
        return 0 if path is None else path.open

    @property
    def view(self) -> Mapping | None:
        """The mapping that accesses look through, if there is one."""
        path = self.path
        return None if path is None else path.mapping

    def access_path(self) -> AccessPath:
        """Return what accesses of this handle need, made now if it isn't there."""
        path = self.path
        if path is None:
            path = self.path = AccessPath()
        return path

    def _forget_path(self) -> None:
        if self.path is not None:
            self.path.close()
        self.path = self.device_view = self.known_resv = None

    def check(self, operation: str) -> int:
        """Return the descriptor.

        Raises:
            ClosedError: The handle is closed (EBADF).
        """
        if self.fd < 0:
            raise fail(errno.EBADF, operation, self, "open the buffer again", what="the buffer is closed")
        return self.fd

    def descriptor(self, operation: str) -> int:
        """Return the descriptor for a system call that follows at once. The number is compared with the buffer's inode.

        Raises:
            ClosedError: The handle is closed, or somebody else closed its descriptor (EBADF).
        """
        fd = self.check(operation)
        if not is_same(fd, self.shared.dev, self.shared.ino):
            raise self.lost(operation, fd)
        return fd

    def lost(self, operation: str, fd: int) -> OSError:
        """Return the error for a descriptor that is not the buffer's any more."""
        what = f"fd {fd} was closed by somebody else, and the number may be another file's now"
        return fail(errno.EBADF, operation, self, "close the buffer, not its descriptor", what=what)

    def usable(self, operation: str) -> None:
        """Check the handle, and have this process's present membership reference the record."""
        self.check(operation)
        self.shared.ensure()

    def fileno(self) -> int:
        return self.descriptor("fileno")

    def dup(self, cloexec: bool = True) -> int:
        """Return a new descriptor of the buffer, which the caller owns."""
        return self.dup_owned(cloexec).take()

    def dup_owned(self, cloexec: bool = True) -> OwnedFd:
        """Return a new descriptor of the buffer, which the object owns."""
        fd = self.check("dup")
        try:
            return owned(dup_same, fd, self.shared.dev, self.shared.ino, cloexec)
        except OSError as e:
            if e.errno == errno.EBADF:
                raise self.lost("dup", fd) from None
            raise fail(e.errno or errno.EIO, "dup", self, "raise RLIMIT_NOFILE or close descriptors") from None

    def duplicate(self) -> Handle:
        """Return another handle of the buffer, with a descriptor and a close of its own."""
        return open_face(Face, type(self), self.dup_owned(), self.shared)._handle

    def detach(self) -> OwnedFd:
        """Close the handle but keep its descriptor, which the object owns from now on."""
        self.descriptor("detach")
        self._leave("detach")
        given = self._close(given=True)
        if not given:  # another thread closed the handle, or detached the descriptor
            self.check("detach")
        return given[0]

    @finished
    def close_all(self) -> None:
        """Do what ``close()`` does if more is left of the handle than its descriptor, or if a signal handler interrupted it."""
        if self.left:
            return
        if self.fd >= 0 and (self.accesses or self.polls):
            self._leave("close")
        self._forget_path()
        self._close()

    def _close(self, given: bool = False, quiet: bool = False) -> list[OwnedFd]:
        """Do all that follows. What a signal handler interrupts is called again. ``given``: return the descriptor instead of closing it."""
        taken: list[OwnedFd] = []
        again, self.leaving = self.leaving, True
        shared, watch = self.shared, None
        backing = self.ending = self.ending or shared.backing  # which a release takes out of the record
        if backing is not None:
            backing.before_close(self)
        # The last handle of this process drops the reference to the record, unless a reservation object is in use.
        resv = shared.resv_ref
        kept = resv is not None and resv() is not None
        if kept:
            shared.forget(self)
        else:
            watch = shared.leave(self, self.fd, closing=not given)
        if given:
            taken, watch = list(map(OwnedFd, filter(_OPEN, map(take_attribute, (self,), ("fd",))))), None  # one call of C
        else:
            close_attribute(self, "fd", shared.dev, shared.ino)  # if somebody else closed it, nothing is left to close
        if watch is not None:
            watch.free_gone()
        elif again:
            free_gone(self.domain)
        if backing is not None:
            backing.after_close(self, quiet)
        if kept:
            self.shared = shared.tombstone()
        self.left, self.ending = True, None
        return taken

    def _leave(self, operation: str) -> None:
        if self.accesses and self._life == self.shared.shm.life:
            raise fail(
                errno.EBUSY,
                operation,
                self,
                "leave the block first",
                what=f"{self.accesses} read() or write() block of this handle is open",
            )
        for waiting in list(self.polls or ()):
            waiting.cancel()
        # Not unmapped here: an array that outlived its read() block still shows it.
        self._forget_path()
        self.polls = None

    def drop(self) -> None:
        """Close the handle, which nobody has any more. Its end calls this if it isn't closed, and again until it ends (``HandleBase``)."""
        self._forget_path()
        self._close(quiet=True)

    # ---- what stands behind it ----

    @property
    def resv(self) -> DmaResv:
        """The buffer's reservation object, the same object for every handle of this process."""
        found = self.known_resv  # which close() in another thread forgets
        if found is None:
            self.check("resv")
            found = resv_of(self.shared)
            self.resv_record = record_of(found)
            self.known_resv = found
        return found

    def kernel(self) -> KernelSide | None:
        """Return the kernel's side of a kernel dma-buf; None for every other buffer."""
        backing = self.shared.backing
        return None if backing is None else backing.kernel

    def check_locked(self, operation: str) -> None:
        """Fail unless this thread or task holds the buffer's reservation lock.

        Raises:
            ClosedError: The handle is closed (EBADF).
            ContractError: The lock isn't held.
        """
        self.check(operation)
        if not self.resv.held_here():
            other = f", or use {operation}_unlocked()" if operation != "move_notify" else ""
            raise ContractError(f"{operation}: {self!r}: its reservation lock is not held; hold it{other}")

    def check_unlocked(self, operation: str) -> None:
        """Fail if this thread or task holds the buffer's reservation lock. Called by a verb that a face calls.

        Raises:
            ClosedError: The handle is closed (EBADF).
            DeadlockError: The lock is held (EDEADLK, with a ``ContractWarning``).
        """
        self.check(operation)
        resv = self.known_resv
        if resv is not None and resv.held_here():
            contract_warning(f"{operation}: {self!r}: its reservation lock is held by this thread or task", 4)
            what = "this thread or task holds its reservation lock"
            raise fail(errno.EDEADLK, operation, self, "unlock the reservation object first", what=what)

    # ---- its memory ----

    def view_source(self, write: bool) -> Mapping:
        """Return the mapping that an access of this handle looks through."""
        mapping = self.view
        if mapping is None or mapping.closed or mapping.detached or (write and not mapping.writable):
            operation = "write" if write else "read"
            self.check(operation)
            backing = self.shared.backing
            if backing is not None and not backing.in_file:  # asked for each time: the exporter's memory may have moved
                return backing.mmap(self.face(), operation, 0, self.size, write)
            mapping = self._new_view(operation, write)
            self.access_path().mapping = mapping
        return mapping

    def _new_view(self, operation: str, write: bool) -> Mapping:
        size = self.size if self.shared.backing is None else self.size // PAGE * PAGE or self.size
        try:
            return self.map_file(operation, 0, size, True)
        except PermissionError:
            if write:
                what = "its descriptor is read-only"
                raise fail(errno.EACCES, "write", self, "receive a descriptor that is open for writing", what=what) from None
            return self.map_file(operation, 0, size, False)

    def any_view(self) -> Mapping:
        """Return a mapping for devices, writable if the descriptor is, since they learn the direction when they map.

        Accesses don't look through it, because what outlives a block takes their mapping away.
        """
        mapping = self.device_view
        if mapping is None:
            writable = fcntl.fcntl(self.descriptor("attach"), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
            mapping = self.device_view = self._new_view("write" if writable else "read", writable)
        return mapping

    def map_file(self, operation: str, offset: int, length: int, writable: bool) -> Mapping:
        """Return a mapping of the buffer's own file."""
        shared = self.shared
        try:
            return map_same(self.fd, length, offset, writable, False, shared.dev, shared.ino)
        except OSError as e:
            raise self.not_mapped(e, operation, length) from None

    def not_mapped(self, error: OSError, operation: str, length: int) -> OSError:
        """Return the error for a mapping that failed."""
        if error.errno == errno.EBADF:
            self.check(operation)  # another thread closed the buffer meanwhile
            return self.lost(operation, self.fd)
        if error.errno == errno.ENOMEM:
            return cant_map(operation, self, length)
        return fail(error.errno or errno.EIO, operation, self)

    # ---- its name ----

    def name(self) -> bytes | None:
        """Return the name that users gave the buffer; None when it has none."""
        self.check("name")
        kernel = self.kernel()
        found: bytes | None = kernel.name(self) if kernel is not None else self.shared.info()["name"]
        return found

    def set_name(self, value: str | bytes) -> None:
        """Give the buffer a name."""
        self.check("name")
        raw = checked_name(value, "name", self)
        shm, index = self.shared.at()
        kernel = self.kernel()
        if kernel is not None:
            kernel.set_name(self, raw)
        shm.rec_name(index, raw)
        self.shared.message = None  # what send() prepared has the name in it


class Face:
    """What a user has: the face of a handle, and nothing else."""

    __slots__ = ("__weakref__", "_handle")

    _handle: Handle

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Face):
            return False
        mine, its = self._handle.shared, other._handle.shared
        return mine.ino == its.ino and mine.dev == its.dev

    def __hash__(self) -> int:
        shared = self._handle.shared
        return hash((shared.dev, shared.ino))


FaceT = TypeVar("FaceT", bound=Face)


def open_face(face: type[FaceT], kind: type[Handle], fd: int | OwnedFd, shared: SharedBuffer, name: bytes | None = None) -> FaceT:
    """Return a face of a new handle, a ``kind``, which owns ``fd``; it is closed if this raises.

    ``name``: the buffer's, if its record has to be made again. One function, since every buffer that is received comes this way.
    """
    made = open_handle(face, kind, fd, shared)
    handle = made._handle
    try:
        shared.enter(handle, name)
    except BaseException:
        handle.close()  # and not when the traceback goes
        raise
    handle._life = shared.shm.life
    if shared.backing is None and shared.home != MEMFD:
        shared.find_backing(handle.fd)
    return made


def face_of(face: type[FaceT], handle: Handle) -> FaceT:
    """Return another face of a handle."""
    made = object.__new__(face)
    made._handle = handle
    return made


def handle_of(buf: object) -> Handle:
    """Return the handle behind a face."""
    if not isinstance(buf, Face):
        raise TypeError(f"a DmaBuf is expected, not {type(buf).__name__}")
    return buf._handle


handle_behind: Callable[[Face], Handle] = attrgetter("_handle")
""":func:`handle_of` for a caller that has checked that it is a face."""


def close_fd(fd: int | OwnedFd) -> None:
    """Close a descriptor, owned by number or by an object."""
    if isinstance(fd, int):
        os.close(fd)
    else:
        fd.close()
