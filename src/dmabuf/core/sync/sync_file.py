"""``SyncFile``: a fence as a file descriptor (spec 1.10, 5.5, 5.10).

It wraps one fence, as it is at that moment, for good. The descriptor (``fileno()``, made when it is first asked for) is readable once the
fence has ended, with an error or without, and stays so; it is never writable and never hung up. It can be polled, added to an event
loop, duplicated, inherited, and sent to any program; whoever gets it can make a ``SyncFile`` of it (``SyncFile.from_fd``), with the names,
the fences and, once they have ended, the results. It needs neither its maker nor any other process that has it: who ends the last of its
fences rings it, or who reaps the owner of that one (``domain/sync_files.py`` says how).

What it waits for are the plain fences inside of containers, so it outlives the container's maker too; of an array that any member ends
it waits for the array itself.

A ``sync_file`` of the kernel (from a driver) is wrapped by the same class: its descriptor is the kernel's, and ``fence`` is a fence of this
process that ends when the descriptor becomes readable, with the kernel fence's error. The other way there is none: a fence of this
library is never given to the kernel, which may wait for it where it must not (spec 3.11).

Using a closed one is EBADF, except ``close()``, ``closed`` and ``repr``. Any thread may call anything, with or without a reservation lock.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import select
import sys
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Self

from dmabuf._native import FF_ANYBODY, Shm
from dmabuf.core.base.closing import Closing
from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.container import is_container
from dmabuf.core.fence.fence import DmaFence, flagged, wrap
from dmabuf.core.fence.stub import private_stub
from dmabuf.core.fence.unwrap import leaves_of, merge
from dmabuf.core.sync import kernel_fences as kernel_sync
from dmabuf.domain import sync_files
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.local import Local
from dmabuf.domain.sync_files import Leaf, SyncFileRecord
from dmabuf.errors import fail
from dmabuf.uapi import sync_file as uapi

NAME_BYTES = 31  # of a char[32] with its NUL (spec 5.1)
_OPENED: Local[Iterator[int]] = Local(lambda _: itertools.count(1))
_TIDY_EVERY = 64  # descriptors made between two looks for names that nobody holds


@dataclass(frozen=True)
class SyncFenceInfo:
    """One fence of a sync file (struct sync_fence_info): ``obj_name`` its timeline's name. ``timestamp_ns``: CLOCK_MONOTONIC, 0 pending."""

    obj_name: str
    driver_name: str
    status: int
    flags: int
    timestamp_ns: int


@dataclass(frozen=True)
class SyncFileInfo:
    """What FILE_INFO says. ``status``: 1 signalled, 0 pending, else the errno of the first that failed."""

    name: str
    status: int
    flags: int
    num_fences: int
    fences: tuple[SyncFenceInfo, ...]


@dataclass(frozen=True)
class SyncFileStatistics:
    """A snapshot. ``descriptor``: was it asked for? ``kernel``: is it a sync_file of the kernel's?"""

    name: str
    status: int
    fences: int
    pending: int
    descriptor: bool
    kernel: bool


class SyncFile(Closing):
    """A fence as a descriptor. ``name``: shown by ``info()``, cut to 31 bytes; None or "" for ``driver-timeline<context>-<seqno>``.

    Errors: TypeError no fence; EINVAL a name with a NUL.

    Kernel: sync_file (file as fileno, user_name as name, fence), sync_file_create, sync_file_get_name as name.
    """

    __slots__ = (
        "__weakref__",
        "_domain",
        "_fd",
        "_fence",
        "_kernel",
        "_leaves",
        "_life",
        "_lock",
        "_name",
        "_stem",
        "_watch",
        "closed",
    )

    _fence: DmaFence | None
    _name: bytes

    def __init__(self, fence: DmaFence, name: str | bytes | None = None) -> None:
        if not isinstance(fence, DmaFence):
            raise TypeError(f"SyncFile: a DmaFence is expected, not {type(fence).__name__}")
        self._set(fence.domain, fence, leaves_of(fence), _cut(name) or _generated(fence))

    def _set(self, domain: Domain, fence: DmaFence | None, leaves: tuple[DmaFence, ...], name: bytes, fd: int = -1, stem: str = "") -> None:
        self._domain, self._fence, self._leaves, self._name = domain, fence, leaves, name
        self._fd, self._stem, self._kernel, self._life = fd, stem, False, domain.join().life
        self._watch: tuple[DmaFence, int] | None = None
        self._lock = fork_lock()
        self.closed = False

    @classmethod
    def from_fd(cls, fd: int, *, domain: Domain | None = None) -> Self:
        """The sync file behind a descriptor that came as a plain number; the caller keeps the descriptor.

        Errors: EBADF no open fd; EINVAL no sync file; EXDEV one of another domain, or of a private domain (send those with
        ``dmabuf.send``); EMFILE. Kernel: sync_file_get_fence.
        """
        own = _duplicate(fd, "from_fd")
        try:
            return cls.from_owned_fd(own, domain, named=fd)
        except BaseException:
            os.close(own)
            raise

    @classmethod
    def from_owned_fd(
        cls, fd: int, domain: Domain | None = None, record: SyncFileRecord | None = None, *, named: int | None = None
    ) -> Self:
        """:meth:`from_fd` that takes over the fd, unless it raises. ``record``: if it came along. ``named``: the fd in messages."""
        said = f"fd {fd if named is None else named}"
        if kernel_sync.is_kernel_sync_file(fd):
            return cls._of_kernel(fd, domain or Domain.default())
        found = sync_files.stem_of(fd)
        if found is None:
            raise fail(errno.EINVAL, "from_fd", said, "pass the descriptor of a SyncFile", what="it is no sync file")
        stem, private = found
        identity = sync_files.identity_of(stem)
        domain = domain if domain is not None and domain.id == identity else known(identity) or Domain.default()
        if domain.id != identity:
            remedy = "start both processes with the same DMABUF_DOMAIN, or send the domain along: dmabuf.send(sock, domain, sync_file)"
            raise fail(errno.EXDEV, "from_fd", f"sync file of domain {identity}", remedy, what="this process does not have its domain")
        if record is None:
            if private:
                remedy = "send the SyncFile with dmabuf.send() or through multiprocessing"
                raise fail(errno.EXDEV, "from_fd", said, remedy, what="a private domain has no place to look it up in")
            with domain.sync_directory.opened() as directory:
                record = sync_files.find(stem, directory or 0)
        self = cls.__new__(cls)
        shm = domain.join()
        if record is None:  # everybody had left the domain, so all its fences have ended; how, nobody knows
            ended = private_stub(0, domain=domain, error=-errno.EOWNERDEAD)
            self._set(domain, ended, (ended,), stem.encode()[:NAME_BYTES], fd, stem)
            return self
        leaves = tuple(_fence_of(domain, shm, leaf) for leaf in record.leaves)
        fence = leaves[0] if len(leaves) == 1 else DmaFenceArray(leaves)
        self._set(domain, fence, leaves, record.name, fd, stem)
        try:
            self._look()
        except BaseException:
            self._fd, self.closed = -1, True  # the descriptor is the caller's again
            raise
        return self

    @classmethod
    def _of_kernel(cls, fd: int, domain: Domain) -> Self:
        info = uapi.file_info(fd)
        self = cls.__new__(cls)
        self._set(domain, None, (), info.name, fd)
        self._kernel = True
        return self

    def __repr__(self) -> str:
        state = "closed" if self.closed else {0: "pending", 1: "signalled"}.get(self.status, str(self.status))
        return f"<dmabuf.SyncFile {os.fsdecode(self._name)!r}{' of the kernel' if self._kernel else ''} {state}>"

    def _check(self, operation: str) -> None:
        if self.closed:
            raise fail(errno.EBADF, operation, self, "make or receive it again", what="the sync file is closed")

    # ---- the descriptor ----

    def fileno(self) -> int:
        """The descriptor, borrowed: readable once the fence has ended. Made at the first call. Errors: EBADF; EMFILE; ENOSPC."""
        self._check("fileno")
        if self._fd < 0:
            with self._lock:
                self._check("fileno")  # another thread may have closed it
                if self._fd < 0:
                    self._open()
        return self._fd

    def dup(self) -> int:
        """A new descriptor of the same sync file, owned by the caller, not inherited by exec. Errors: EBADF, EMFILE."""
        self.share("dup")
        with self._lock:  # closed meanwhile, the number would be somebody else's
            return _duplicate(self.fileno(), "dup")

    def share(self, operation: str) -> None:
        """Somebody else is about to wait: to drop a pending fence from now on hurts.

        Errors: EBADF; EPERM fences from before a fork, whose domain began anew since.
        """
        self._check(operation)
        for leaf in self._leaves:
            if leaf.shm is not self._domain.shm:
                raise fail(errno.EPERM, operation, self, "what a fork inherits is inert once its domain is gone")
            leaf.shm.fence_mark(leaf.handle, "shared", 1)

    def record(self) -> SyncFileRecord:
        """What goes along with the descriptor, for whoever receives it."""
        found = []
        for leaf in self._leaves:
            names = os.fsencode(leaf.driver_name), os.fsencode(leaf.timeline_name)
            found.append(Leaf(leaf.handle, leaf.context, leaf.seqno, leaf.timeline_index, leaf.status, leaf.timestamp, *names))
        return SyncFileRecord(self._name, tuple(found))

    def _open(self) -> None:
        domain = self._domain
        shm = domain.join()
        for leaf in self._leaves:
            leaf.publish()
        if next(_OPENED.of(domain)) % _TIDY_EVERY == 0:
            domain.sync_directory.tidy()
        stem = sync_files.new_stem(domain.id)
        with domain.sync_directory.opened() as directory:
            fd = sync_files.listen(stem, directory)
            try:
                if directory is not None:
                    sync_files.register(shm, stem, directory, self.record())
            except BaseException:
                os.close(fd)
                if directory is not None:
                    sync_files.remove(stem, directory)
                raise
        self._fd, self._stem = fd, stem
        self._look()

    def _look(self) -> None:
        """Watch a pending fence that another process ends, so that somebody looks after its death; in a private domain, where who ends a
        fence rings nothing, any pending fence. None: see that it was rung."""
        with self._lock:
            self._watch = None
            if self.closed or self._fd < 0 or self._kernel:
                return
            me = weakref.ref(self)

            def again(_: int) -> None:
                this = me()
                if this is not None:
                    this._look()

            private = self._domain.path is None
            for leaf in self._leaves:
                # One that anybody ends is ours, and who ends it may die before it rings.
                watched = private or not leaf.owned or leaf.flags & FF_ANYBODY
                token = leaf.listen(again) if watched else None
                if token is not None:
                    self._watch = (leaf, token)
                    return
            ended = [flagged(leaf) for leaf in self._leaves]
            if not any(ended) or _readable(self._fd):
                return
            # Of what is pending every fence is ours; who ended the one before may have died before it handed on the duty to ring.
            domain, stem, over = self._domain, self._stem, all(ended)
            if not _rung(domain, stem, over):
                domain.retries.later(lambda: _rung(domain, stem, over))

    def kernel_fileno(self) -> int:
        """The borrowed descriptor of a sync_file of the kernel's, to be given to a driver.

        Errors: EBADF; EINVAL a sync file of this library: the kernel would wait for a process.
        """
        self._check("kernel_fileno")
        if not self._kernel:
            remedy = "wait for it here, then submit: a fence of a process may come late or never, and the kernel must not wait for one"
            raise fail(errno.EINVAL, "kernel_fileno", self, remedy, what="it is no sync_file of the kernel's")
        return self._fd

    def close(self) -> None:
        """Close the descriptor, if it was made, and let go of the fence; again: nothing."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            watch, self._watch = self._watch, None
            fd, self._fd = self._fd, -1
            alive = self._domain.shm.life == self._life
        if watch is not None and alive:
            watch[0].remove_callback(watch[1])
        self._fence, self._leaves = None, ()
        if fd >= 0:
            os.close(fd)
            if not self._kernel and self._domain.path is not None:
                self._forget()

    def _forget(self) -> None:
        """Remove its names if that was the last descriptor of it."""
        try:
            with self._domain.sync_directory.opened() as directory:
                if directory is not None and not sync_files.is_open(self._stem, directory):
                    sync_files.remove(self._stem, directory)
        except OSError:
            pass  # whoever tidies the next time does it

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # Nothing is taken back from the dispatcher, whose lock this thread may hold; what is registered there does nothing any more.
        if not getattr(self, "closed", True) and not ending():
            self._watch = None
            self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a SyncFile can't be pickled to bytes: pass it through multiprocessing, or send it with dmabuf.send()")

    # ---- what it is ----

    @property
    def name(self) -> str:
        """Its name, at most 31 bytes. Errors: EBADF."""
        self._check("name")
        return os.fsdecode(self._name)

    @property
    def kernel(self) -> bool:
        """Is it a sync_file of the kernel's?"""
        return self._kernel

    @property
    def domain(self) -> Domain:
        """The domain of its fences."""
        return self._domain

    @property
    def fence(self) -> DmaFence:
        """The fence. Of a kernel's: a fence of this process that ends with it. Errors: EBADF."""
        self._check("fence")
        with self._lock:
            if self._fence is None:
                self._fence = kernel_sync.fence_of(self._fd, self._domain)
                self._leaves = (self._fence,)
            return self._fence

    @property
    def status(self) -> int:
        """0 pending, 1 signalled, or the negative errno that the fence ended with. Errors: EBADF."""
        self._check("status")
        if self._kernel and self._fence is None:
            return uapi.file_info(self._fd).status
        fence = self.fence
        if is_container(fence) and not fence.is_signaled() and not any(not leaf.is_signaled() for leaf in self._leaves):
            fence.enable_signaling()  # an array that nobody asked yet doesn't look at its members (spec 3.15)
        return fence.status

    def is_signaled(self) -> bool:
        """Has the fence ended? Errors: EBADF."""
        return self.status != 0

    def info(self, num_fences: int | None = None) -> SyncFileInfo:
        """FILE_INFO. ``num_fences``: the room that the caller has; None for enough, 0 for the count and the whole's status alone.

        Errors: EBADF; EINVAL not enough room, or a negative one.
        """
        self._check("info")
        if self._kernel:
            told = uapi.file_info(self._fd, of=self)
            fences = tuple(
                SyncFenceInfo(os.fsdecode(one.obj_name), os.fsdecode(one.driver_name), one.status, one.flags, one.timestamp_ns)
                for one in told.fences
            )
            name, status = told.name, told.status
        else:
            fences = tuple(map(_fence_info, self._leaves))
            name, status = self._name, next((one.status for one in fences if one.status <= 0), 1)
        if num_fences is not None and (num_fences < 0 or 0 < num_fences < len(fences)):
            raise fail(errno.EINVAL, "info", self, f"there are {len(fences)} fences: ask with None, or with that many")
        if num_fences == 0:
            return SyncFileInfo(os.fsdecode(name), self.status, 0, len(fences), ())
        return SyncFileInfo(os.fsdecode(name), status, 0, len(fences), fences)

    def statistics(self) -> SyncFileStatistics:
        """A snapshot for programs. Errors: EBADF."""
        seen = self.info()
        pending = sum(not one.status for one in seen.fences)
        return SyncFileStatistics(seen.name, seen.status, seen.num_fences, pending, self._fd >= 0, self._kernel)

    # ---- using it ----

    def merge(self, other: SyncFile | int, name: str | bytes | None = None) -> SyncFile:
        """A new sync file of the pending fences of both; they stay as they are (SYNC_IOC_MERGE; spec 3.17).

        ``other``: a SyncFile, or a descriptor of one. Signalled fences, failed ones too, are left out, and of one timeline only the latest
        is kept. Two of the kernel's give one of the kernel's.

        Errors: EBADF; ENOENT ``other`` is closed or no sync file; EXDEV of another domain; EINVAL a name with a NUL.
        """
        cut = _cut(name)
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
        raise fail(errno.ENOENT, "merge", what, "merge with an open SyncFile, or its descriptor", what="it is no sync file")

    def _merge(self, other: SyncFile, name: bytes) -> SyncFile:
        if self._kernel and other._kernel:
            made = uapi.merge(self._fd, other._fd, name, of=self)
            return SyncFile._of_kernel(made.take(), self._domain)
        return SyncFile(merge(self.fence, other.fence), name or None)

    def set_deadline(self, ns: int) -> None:
        """Hint that somebody wants it by this CLOCK_MONOTONIC time in ns, for every fence in it (SET_DEADLINE; spec 3.12).

        Errors: EBADF; EINVAL a negative time.
        """
        self._check("set_deadline")
        if ns < 0:
            raise fail(errno.EINVAL, "set_deadline", self, "a deadline is CLOCK_MONOTONIC nanoseconds")
        if self._kernel:
            uapi.set_deadline(self._fd, ns, of=self)
            return
        for leaf in self._leaves:
            leaf.set_deadline(ns)

    def wait(self, timeout: float | None = None, *, interruptible: bool = False) -> float:
        """Wait until the fence has ended; the seconds left (> 0; inf for None), 0.0 when timed out. Its error is what ``status`` says.

        Errors: EBADF; EINVAL a negative timeout; EINTR a signal, if ``interruptible``.
        """
        self._check("wait")
        return self.fence.wait(timeout, interruptible=interruptible)

    def __await__(self) -> Generator[Any, None, int]:
        """Wait in a coroutine; the result is ``status``. Cancelling leaves nothing registered. Errors: EBADF."""
        self._check("await")
        return self.fence.__await__()


def get_sync_file(fd: int, *, domain: Domain | None = None) -> SyncFile:
    """The sync file behind a descriptor, which the caller keeps: :meth:`SyncFile.from_fd`."""
    return SyncFile.from_fd(fd, domain=domain)


def _duplicate(fd: int, operation: str) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except (OSError, OverflowError, ValueError) as e:
        number = e.errno if isinstance(e, OSError) and e.errno else errno.EBADF
        remedy = "pass an open file descriptor" if number == errno.EBADF else "raise RLIMIT_NOFILE or close descriptors"
        raise fail(number, operation, f"fd {fd}", remedy) from None


def _rung(domain: Domain, stem: str, over: bool) -> bool:
    """See to it that a sync file is rung, now if all its fences have ended (``over``); False when no descriptor is free for that."""
    try:
        with domain.sync_directory.opened() as directory:
            for name in [] if directory is None else sync_files.waiting(directory, stem):
                sync_files.advance(domain.shm, name, directory or 0)
            if over:
                sync_files.make_readable(stem, directory)
    except FileNotFoundError:
        pass  # the directory is gone, and with it the socket's name
    except OSError:
        return False
    return True


def _readable(fd: int) -> bool:
    asked = select.poll()
    asked.register(fd, select.POLLIN)
    return bool(asked.poll(0))


def _generated(fence: DmaFence) -> bytes:
    seqno = fence.seqno - (1 << 64) if fence.seqno >= 1 << 63 else fence.seqno
    return os.fsencode(f"{fence.driver_name}-{fence.timeline_name}{fence.context}-{seqno}")[:NAME_BYTES]


def _cut(name: str | bytes | None) -> bytes:
    raw = b"" if name is None else os.fsencode(name)
    if b"\0" in raw:
        raise fail(errno.EINVAL, "name", "a sync file", "a name has no NUL")
    return raw[:NAME_BYTES]


def _fence_of(domain: Domain, shm: Shm, leaf: Leaf) -> DmaFence:
    past = leaf.context, leaf.seqno, leaf.timeline, leaf.status, leaf.timestamp
    return wrap(domain, leaf.handle, past, (os.fsdecode(leaf.driver), os.fsdecode(leaf.name)))


def _fence_info(leaf: DmaFence) -> SyncFenceInfo:
    def cut(text: str) -> str:
        return os.fsdecode(os.fsencode(text)[:NAME_BYTES])

    status = leaf.status  # before the timestamp, which comes with it
    return SyncFenceInfo(cut(leaf.timeline_name), cut(leaf.driver_name), status, 0, leaf.timestamp)
