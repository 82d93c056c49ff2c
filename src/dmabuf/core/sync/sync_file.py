"""``SyncFile``: a fence as a file descriptor (semantics 1.10, 5.5, 5.10).

It wraps one fence, as it is at that moment, for good. The descriptor (``fileno()``, made when it is first asked for) is readable once the
fence is signaled, with an error or without, and stays so. It is never writable and never hung up. It can be polled, added to an event
loop, duplicated, inherited, and sent to any program. Its receiver can make a ``SyncFile`` of it (``SyncFile.from_fd``), with the names, the
fences and, once they are signaled, the results. It needs neither its maker nor any other process that has it, and no file. The process
that signals the last of its fences makes it readable, or the process that reaps that fence's owner (``domain/sync_files.py`` says how).

It waits for the plain fences inside containers, so it outlives a container's maker. Of an array that any member signals, it waits for the
array itself.

The same class wraps a ``sync_file`` of the kernel (from a driver). Its descriptor is the kernel's. ``fence`` is then a fence of this
process that is signaled when the descriptor becomes readable, with the kernel fence's error. There is no way back: a fence of this library
is never given to the kernel, which may wait for it where it must not (semantics 3.11).

Using a closed one raises ClosedError (EBADF), except ``close()``, ``closed`` and ``repr``. Any thread may call anything, with or without a
reservation lock.
"""

from __future__ import annotations

import errno
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Self

from dmabuf._native import FF_ANYBODY, OwnedFd
from dmabuf.core.base.closing import Closing
from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.container import is_container
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.stub import private_stub
from dmabuf.core.fence.unwrap import leaves_of, merge
from dmabuf.core.sync import kernel_fences
from dmabuf.core.sync.descriptors import duplicate
from dmabuf.core.sync.sync_file_info import (
    NAME_BYTES,
    SyncFenceInfo,
    SyncFileInfo,
    SyncFileStatistics,
    cut_name,
    fence_info,
    fence_of,
    leaf_of,
    name_of,
)
from dmabuf.domain import sync_files
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.guards import finalizer, finished, numbered
from dmabuf.domain.place import SHARE_DOMAIN
from dmabuf.domain.sync_files import Place, SyncFileRecord
from dmabuf.errors import fail
from dmabuf.uapi import sync_file as uapi


class SyncFile(Closing):
    """A fence as a descriptor.

    Args:
        fence: The fence.
        name: What ``info()`` shows, cut to 31 bytes; None or "" for ``driver-timeline<context>-<seqno>``.

    Raises:
        InvalidError: The name has a NUL (EINVAL).

    Kernel: sync_file (file as fileno, user_name as name, fence), sync_file_create, sync_file_get_name as name.
    """

    __slots__ = (
        "__weakref__",
        "_domain",
        "_fd",
        "_fence",
        "_foreign",
        "_kernel",
        "_leaves",
        "_life",
        "_lock",
        "_name",
        "_place",
        "_watch",
        "closed",
    )

    _fence: DmaFence | None
    _name: bytes

    def __init__(self, fence: DmaFence, name: str | bytes | None = None) -> None:
        if not isinstance(fence, DmaFence):
            raise TypeError(f"SyncFile: a DmaFence is expected, not {type(fence).__name__}")
        self._set(fence.domain, fence, leaves_of(fence), cut_name(name) or name_of(fence))

    def _set(self, domain: Domain, fence: DmaFence | None, leaves: tuple[DmaFence, ...], name: bytes) -> None:
        self._domain, self._fence, self._leaves, self._name = domain, fence, leaves, name
        self._fd: OwnedFd | None = None
        self._place: Place | None = None  # of the descriptor, unless that is the kernel's
        self._kernel, self._life = False, domain.join().life
        self._foreign: deque[DmaFence] = deque()  # that others signal, and that may be pending
        self._watch: tuple[DmaFence, int] | None = None
        self._lock = fork_lock()
        self.closed = False

    @classmethod
    def from_fd(cls, fd: int, *, domain: Domain | None = None) -> Self:
        """Return the sync file behind a descriptor that came as a plain number. The caller keeps the descriptor.

        Args:
            fd: The descriptor, of this library or of the kernel.
            domain: The domain to look in; None means one that this process has open, or the user's default domain.

        Raises:
            ClosedError: ``fd`` is not open (EBADF).
            InvalidError: It is not a sync file (EINVAL).
            CrossDomainError: It belongs to another domain, or to a private one: send those with ``dmabuf.send`` (EXDEV).
            DmaBufError: No descriptor is free (EMFILE).

        Kernel: sync_file_get_fence.
        """
        own = duplicate(fd, "from_fd")
        try:
            return cls.from_owned_fd(own, domain, named=fd)
        except BaseException:
            own.close()
            raise

    @classmethod
    def from_owned_fd(
        cls, own: OwnedFd, domain: Domain | None = None, record: SyncFileRecord | None = None, *, named: int | None = None
    ) -> Self:
        """Return the sync file behind a descriptor, which keeps the descriptor unless this raises.

        Args:
            own: The descriptor.
            domain: As for :meth:`from_fd`.
            record: The record, if it came along.
            named: The number that messages name; None for its own.
        """
        fd = own.number
        said = f"fd {fd if named is None else named}"
        if kernel_fences.is_kernel_sync_file(fd):
            return cls._of_kernel(own, domain or Domain.default())
        found = sync_files.place_of(fd)
        if found is None:
            raise fail(errno.EINVAL, "from_fd", said, "pass the descriptor of a SyncFile", what="not a sync file")
        identity, place = found
        domain = domain if domain is not None and domain.id == identity else known(identity) or Domain.default()
        if domain.id != identity:
            what = "this process doesn't have its domain"
            raise fail(errno.EXDEV, "from_fd", f"sync file of domain {identity}", SHARE_DOMAIN, what=what)
        if record is None:
            if domain.path is None:
                remedy = "send the SyncFile with dmabuf.send() or through multiprocessing"
                raise fail(errno.EXDEV, "from_fd", said, remedy, what="a bare descriptor doesn't lead to a private domain")
            record = sync_files.find(domain, place)
        self = cls.__new__(cls)
        domain.join()
        if record is None:  # every process had left the domain: all its fences are signaled, and their results are lost
            lost = private_stub(0, domain=domain, error=-errno.EOWNERDEAD)
            self._set(domain, lost, (lost,), f"sync-{identity}".encode()[:NAME_BYTES])
            self._fd = own
            return self
        leaves = tuple(fence_of(domain, leaf) for leaf in record.leaves)
        fence = leaves[0] if len(leaves) == 1 else DmaFenceArray(leaves)
        self._set(domain, fence, leaves, record.name)
        self._fd, self._place = own, place
        try:
            self._watch_foreign()
        except BaseException:
            self._fd, self.closed = None, True  # the descriptor is the caller's again
            raise
        return self

    @classmethod
    def _of_kernel(cls, fd: OwnedFd, domain: Domain) -> Self:
        info = uapi.file_info(fd.number)
        self = cls.__new__(cls)
        self._set(domain, None, (), info.name)
        self._fd, self._kernel = fd, True
        return self

    def __repr__(self) -> str:
        state = "closed" if self.closed else {0: "pending", 1: "signaled"}.get(self.status, str(self.status))
        return f"<dmabuf.SyncFile {os.fsdecode(self._name)!r}{' of the kernel' if self._kernel else ''} {state}>"

    def _check(self, operation: str) -> None:
        if self.closed:
            raise fail(errno.EBADF, operation, self, "make or receive it again", what="the sync file is closed")

    # ---- the descriptor ----

    def fileno(self) -> int:
        """Return the descriptor, which the sync file keeps owning. It is readable once the fence is signaled. Made at the first call.

        Raises:
            ClosedError: The sync file is closed (EBADF).
            DmaBufError: No descriptor is free (EMFILE).
            NoSpaceError: The domain's file system is full (ENOSPC).
        """
        self._check("fileno")
        fd = self._fd
        if fd is None:
            with self._lock:
                self._check("fileno")  # another thread may have closed it
                fd = self._fd or self._open()
        return fd.fileno()

    @numbered
    def dup(self) -> OwnedFd:
        """Return a new descriptor of the same sync file, which the caller owns and exec doesn't inherit.

        Raises:
            ClosedError: The sync file is closed (EBADF).
            DmaBufError: No descriptor is free (EMFILE).
        """
        self.share("dup")
        with self._lock:  # if another thread closed it now, the number could become somebody else's
            return duplicate(self.fileno(), "dup")

    def share(self, operation: str) -> None:
        """Note that another process is about to wait: dropping a pending fence is an error from now on.

        Raises:
            ClosedError: The sync file is closed (EBADF).
            NotPermittedError: Its fences are from before a fork, and the domain began again since (EPERM).
        """
        self._check(operation)
        for leaf in self._leaves:
            if leaf.shm is not self._domain.shm:
                remedy = "make or receive a new one"
                raise fail(errno.EPERM, operation, self, remedy, what="its fences are from before a fork, and their domain is gone")
            leaf.shm.fence_share(leaf.handle)

    def record(self) -> SyncFileRecord:
        """Return what goes along with the descriptor to its receiver."""
        return SyncFileRecord(self._name, tuple(map(leaf_of, self._leaves)))

    def _open(self) -> OwnedFd:
        domain = self._domain
        for leaf in self._leaves:
            leaf.publish()
        fd, self._place = sync_files.slots_of(domain).make(self.record())
        self._fd = fd
        self._watch_foreign()
        return fd

    def _watch_foreign(self) -> None:
        """Watch the fences that other processes signal, one after the other.

        Those processes make the descriptor readable. But if one of them dies first, some process has to notice, and the program may do
        nothing but poll the descriptor. While a fence of another process is watched, the dispatcher looks after the dead.
        """
        # Any process may signal some of our own, and may die before it makes the descriptor readable.
        foreign = [leaf for leaf in self._leaves if not leaf.owned or leaf.flags & FF_ANYBODY]
        if foreign:
            self._foreign.extend(foreign)
            self._watch_next()

    def _watch_next(self) -> None:
        with self._lock:
            self._watch = self._listen()
            if self._watch is not None:
                return
            domain, place = self._domain, self._place
        # The signaler of one of them may have died before it handed on the duty to make the descriptor readable.
        if place is not None and not self.closed and self._life == domain.shm.life:
            shm, slot, gen, _ = domain.shm, *place
            if not shm.sync_advance(slot, gen):
                domain.retries.later(lambda: shm.sync_advance(slot, gen))

    def _listen(self) -> tuple[DmaFence, int] | None:
        """Listen to the first of the foreign fences that is pending, if one is. The lock is held."""
        me = weakref.ref(self)

        def again(_: int) -> None:
            this = me()
            if this is not None:
                this._watch_next()

        while self._foreign and not self.closed:
            leaf = self._foreign[0]
            token = leaf.listen(again)
            if token is not None:
                return leaf, token
            self._foreign.popleft()
        return None

    def kernel_fileno(self) -> int:
        """Return the descriptor of a kernel sync_file for a driver. The sync file keeps owning it.

        Raises:
            ClosedError: The sync file is closed (EBADF).
            InvalidError: It is one of this library, and the kernel would wait for a process (EINVAL).
        """
        self._check("kernel_fileno")
        if not self._kernel:
            remedy = "wait for it first, then submit: the kernel must not wait for a process, which may signal late or never"
            raise fail(errno.EINVAL, "kernel_fileno", self, remedy, what="not a kernel sync_file")
        return self.fileno()

    @finished
    def close(self) -> None:
        """Close the descriptor, if it was made, and drop the fence. Closing twice has no effect."""
        self.closed = True
        with self._lock:
            alive = self._domain.shm.life == self._life
            watch, fd, place = self._watch, self._fd, self._place
            if watch is not None and alive:
                watch[0].remove_callback(watch[1])
            self._watch = None
            self._fence, self._leaves = None, ()
            self._foreign.clear()
            if fd is None:
                return
            fd.close()
            if alive and place is not None and place.leaves:
                sync_files.slots_of(self._domain).closed(place)
            self._fd = None  # last: what a signal handler interrupts is done again

    @finalizer
    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # The callback stays in the dispatcher, whose lock this thread may hold. It has no effect any more.
        if hasattr(self, "closed") and not ending():
            self._watch = None
            self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a SyncFile can't be pickled to bytes: pass it through multiprocessing, or send it with dmabuf.send()")

    # ---- what it is ----

    @property
    def name(self) -> str:
        """Its name, at most 31 bytes."""
        self._check("name")
        return os.fsdecode(self._name)

    @property
    def kernel(self) -> bool:
        """Whether it is a kernel sync_file."""
        return self._kernel

    @property
    def domain(self) -> Domain:
        """The domain of its fences."""
        return self._domain

    @property
    def fence(self) -> DmaFence:
        """The fence. For a kernel sync_file: a fence of this process that is signaled with it."""
        self._check("fence")
        with self._lock:
            if self._fence is None:
                self._fence = kernel_fences.fence_of(self.fileno(), self._domain)
                self._leaves = (self._fence,)
            return self._fence

    @property
    def status(self) -> int:
        """0 pending, 1 signaled, or the negative errno that the fence was signaled with."""
        self._check("status")
        if self._kernel and self._fence is None:
            return uapi.file_info(self.fileno()).status
        fence = self.fence
        if is_container(fence) and not fence.is_signaled() and not any(not leaf.is_signaled() for leaf in self._leaves):
            fence.enable_signaling()  # an array that is not enabled doesn't look at its members (semantics 3.15)
        return fence.status

    def is_signaled(self) -> bool:
        """Return True if the fence is signaled.

        Raises:
            ClosedError: The sync file is closed (EBADF).
        """
        return self.status != 0

    def info(self, num_fences: int | None = None) -> SyncFileInfo:
        """Return what FILE_INFO says.

        Args:
            num_fences: The caller's room for fences; None for enough, 0 for the count and the status of the whole.

        Raises:
            ClosedError: The sync file is closed (EBADF).
            InvalidError: The room is too small, or negative (EINVAL).
        """
        self._check("info")
        if self._kernel:
            answer = uapi.file_info(self.fileno(), of=self)
            fences = tuple(
                SyncFenceInfo(os.fsdecode(one.obj_name), os.fsdecode(one.driver_name), one.status, one.flags, one.timestamp_ns)
                for one in answer.fences
            )
            name, status = answer.name, answer.status
        else:
            fences = tuple(map(fence_info, self._leaves))
            name, status = self._name, next((one.status for one in fences if one.status <= 0), 1)
        if num_fences is not None and (num_fences < 0 or 0 < num_fences < len(fences)):
            remedy = f"pass None, or at least {len(fences)}"
            raise fail(errno.EINVAL, "info", self, remedy, what=f"no room: {num_fences} for {len(fences)} fences")
        if num_fences == 0:
            return SyncFileInfo(os.fsdecode(name), self.status, 0, len(fences), ())
        return SyncFileInfo(os.fsdecode(name), status, 0, len(fences), fences)

    def statistics(self) -> SyncFileStatistics:
        """Return a snapshot for programs.

        Raises:
            ClosedError: The sync file is closed (EBADF).
        """
        seen = self.info()
        pending = sum(not one.status for one in seen.fences)
        return SyncFileStatistics(seen.name, seen.status, seen.num_fences, pending, self._fd is not None, self._kernel)

    # ---- using it ----

    def merge(self, other: SyncFile | int, name: str | bytes | None = None) -> SyncFile:
        """Return a new sync file of the pending fences of both, which stay as they are (SYNC_IOC_MERGE; semantics 3.17).

        Signaled fences, failed ones too, are left out, and of one timeline only the latest is kept. Two kernel sync_files give one of the
        kernel's.

        Args:
            other: A SyncFile, or a descriptor of one.
            name: As for the constructor.

        Raises:
            ClosedError: This sync file is closed (EBADF).
            NotFoundError: ``other`` is closed, or not a sync file (ENOENT).
            CrossDomainError: ``other`` belongs to another domain (EXDEV).
            InvalidError: The name has a NUL (EINVAL).
        """
        cut = cut_name(name)
        self._check("merge")
        what = f"fd {other}" if isinstance(other, int) else f"a {type(other).__name__}"
        if isinstance(other, int) and not isinstance(other, bool):
            try:
                with SyncFile.from_fd(other, domain=self._domain) as found:
                    return self._merge(found, cut)
            except OSError as e:
                if e.errno not in (errno.EBADF, errno.EINVAL):
                    raise
        elif isinstance(other, SyncFile):
            if not other.closed:
                return self._merge(other, cut)
            what = "a closed SyncFile"
        raise fail(errno.ENOENT, "merge", what, "merge with an open SyncFile, or its descriptor", what="not an open sync file")

    def _merge(self, other: SyncFile, name: bytes) -> SyncFile:
        if self._kernel and other._kernel:
            made = uapi.merge(self.fileno(), other.fileno(), name, of=self)
            return SyncFile._of_kernel(made, self._domain)
        return SyncFile(merge(self.fence, other.fence), name or None)

    def set_deadline(self, ns: int) -> None:
        """Hint that every fence in it is wanted by a time, in CLOCK_MONOTONIC ns (SET_DEADLINE; semantics 3.12).

        Raises:
            ClosedError: The sync file is closed (EBADF).
            InvalidError: The time is negative (EINVAL).
        """
        self._check("set_deadline")
        if ns < 0:
            raise fail(errno.EINVAL, "set_deadline", self, "pass CLOCK_MONOTONIC ns", what=f"the time {ns} is negative")
        if self._kernel:
            uapi.set_deadline(self.fileno(), ns, of=self)
            return
        for leaf in self._leaves:
            leaf.set_deadline(ns)

    def wait(self, timeout: float | None = None, *, interruptible: bool = False) -> float:
        """Wait until the fence is signaled. Its error is not raised; see ``status``.

        Args:
            timeout: Seconds; None waits without a limit.
            interruptible: Let a signal end the wait.

        Returns:
            The seconds left: more than 0 (inf without a timeout), or 0.0 when the time is over.

        Raises:
            ClosedError: The sync file is closed (EBADF).
            InvalidError: The timeout is negative (EINVAL).
            InterruptedWaitError: A signal arrived (EINTR).
        """
        self._check("wait")
        return self.fence.wait(timeout, interruptible=interruptible)

    def __await__(self) -> Generator[Any, None, int]:
        """Wait in a task of asyncio or trio. The result is ``status``. Canceling leaves nothing registered."""
        self._check("await")
        return self.fence.__await__()


def get_sync_file(fd: int, *, domain: Domain | None = None) -> SyncFile:
    """Return the sync file behind a descriptor, as :meth:`SyncFile.from_fd` does. The caller keeps the descriptor."""
    return SyncFile.from_fd(fd, domain=domain)
