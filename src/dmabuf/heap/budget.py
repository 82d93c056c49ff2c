"""``Budget``: the limits of an allocation, read before it is made.

If there is no memory for a memfd, its users get SIGBUS or the kernel's OOM killer, long after the call that made it. So a heap checks the
limits first, and a size that they don't allow is ENOMEM at ``allocate``:

==============================  ==========================================================================================
limit                           what is left of it
==============================  ==========================================================================================
``RLIMIT_FSIZE``                the limit itself: beyond it the kernel sends SIGXFSZ; binds one file, not their sum
cgroup v2 ``memory.max``        max - ``memory.current`` + inactive_file + active_file, in this group and every ancestor
cgroup v1 ``limit_in_bytes``    limit - ``usage_in_bytes`` + total_inactive_file + total_active_file, likewise
the machine                     ``MemAvailable`` of ``/proc/meminfo``
==============================  ==========================================================================================

The kernel frees the page cache of files before it kills, so the cache counts as free. Shared memory is not in those lists. Swap doesn't
count, because a frame that is swapped out is not in memory. A cgroup file that is missing, unreadable or without a number limits nothing.
Groups above the root of a cgroup namespace can't be seen, so they are not checked.

A request is counted with 1/256 more, because the kernel charges the page tables (8 B for a page) and the nodes of the file's page tree
(576 B for 64 pages) to the same group.

*Cost.* A check reads half a dozen small files. Small requests share one check: a check that finds ample room grants an eighth of it for the
next 50 ms, and requests of at most 1 MiB are taken from that grant without reading. The other seven eighths are for other processes. If
there is little room, nothing is granted and every request is checked. A grant never refuses: when it is used up or too old, a new check
decides, so no refusal depends on an old number.

*Concurrency.* Two requests that are checked at the same time would both get the same bytes. So :meth:`Budget.claim` counts the bytes that
this process is allocating. How many of them are in the kernel's counters already is unknown. A request that fits only if all of them are
waits until that allocation ends, and is checked again. Between processes the race remains.

Source: Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst, proc(5), getrlimit(2).
"""

from __future__ import annotations

import errno
import operator
import os
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, NamedTuple

from dmabuf._native import Bracket, owned
from dmabuf.domain.limits import limit_of, no_proc
from dmabuf.errors import fail

__all__ = ["Budget", "check", "claim", "left", "whole"]

SMALL: Final = 1 << 20  #: bytes: the largest request that is taken from a grant
GRANT_NS: Final = 50_000_000  #: how long a grant lasts
GRANT_SHARE: Final = 8  #: a grant is this part of what a look found
AMPLE: Final = 256 << 20  #: bytes: with less room than this nothing is granted
BOOKKEEPING: Final = 256  #: one byte more for so many asked for
LAYOUT_NS: Final = 1_000_000_000  #: how long the cgroup directories found are believed

# v1 writes "no limit" as the largest page count: LONG_MAX rounded down to a page.
_UNLIMITED: Final = 1 << 62


class _Files(NamedTuple):
    """How one version of the cgroup file system spells a memory limit."""

    limit: str
    usage: str
    reclaimable: tuple[bytes, bytes]


_V2: Final = _Files("memory.max", "memory.current", (b"inactive_file", b"active_file"))
_V1: Final = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", (b"total_inactive_file", b"total_active_file"))


class _Group(NamedTuple):
    """A cgroup directory and the files of it that are read, as strings: joining paths would cost as much as reading."""

    path: str
    limit: str
    usage: str
    stat: str
    files: _Files


class Room(NamedTuple):
    """Bytes left of one limit (below 0 when it was lowered under its use), and the words for it."""

    left: int
    limit: str
    remedy: str


class _Claim(Bracket):
    """The block of :meth:`Budget.claim`."""

    __slots__ = ("_budget", "_size", "thread")

    def __init__(self, budget: Budget, size: int) -> None:
        self._budget, self._size = budget, size
        self.thread = 0

    def enter(self) -> None:
        """Check and count."""
        self.thread = threading.get_ident()
        self._budget._decide(self._size, self)

    def leave(self) -> None:
        """Count no more."""
        self._budget.unclaim(self)


class Budget:
    """The memory limits of this process, read from a ``/proc`` and the cgroup mounts it names.

    ``proc``: the proc file system. ``root``: the directory to which its mount points are relative. ``clock``: monotonic nanoseconds.
    ``file_limit``: the largest size of a file, negative for no limit. All are for tests; the defaults are this machine's.
    """

    def __init__(
        self,
        proc: str | os.PathLike[str] = "/proc",
        root: str | os.PathLike[str] = "/",
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        file_limit: Callable[[], int] = lambda: limit_of(resource.RLIMIT_FSIZE),
    ) -> None:
        self._proc = os.fspath(proc)
        self._root = os.fspath(root)
        self._clock = clock
        self._file_limit = file_limit
        self._groups: tuple[_Group, ...] = ()
        self._membership: bytes | None = None
        self._groups_until = 0
        self.reset()

    def reset(self) -> None:
        """Forget grants and claims. In a forked child they are the parent's."""
        self._lock = threading.RLock()  # re-entrant, because a finalizer or a signal handler may come in the middle
        self._ended = threading.Condition(self._lock)
        self._granted = 0
        self._granted_until = 0
        self._claims: dict[_Claim, int] = {}  # the bytes of each block that is entered
        self._membership = None

    def check(self, size: int) -> None:
        """Check that the limits allow ``size`` bytes.

        Raises:
            InvalidError: The size is not positive (EINVAL).
            NoMemoryError: A limit doesn't allow it, and the message has the limit and its numbers (ENOMEM).
            NotFoundError: There is no ``/proc`` (ENOENT).
        """
        self._decide(size)

    def left(self) -> int:
        """Return how many bytes the limits leave now, for the size of a cache. Without ``/proc`` it fails with ENOENT."""
        with self._lock:
            return max(0, self.least().left - self._claimed())

    def claim(self, size: int) -> AbstractContextManager[None]:
        """Check as :meth:`check` does, and count ``size`` bytes as used for the block.

        The block reserves the memory (``fallocate``). After it, the memory is in the kernel's counters. At most 1 MiB is not counted.
        """
        return _Claim(self, size)

    def _claimed(self, *, here: bool = False) -> int:
        """Return how many bytes are claimed now; ``here``: by this thread. The lock is held."""
        me = threading.get_ident()
        return sum(size for claim, size in self._claims.items() if not here or claim.thread == me)

    def unclaim(self, claim: _Claim) -> None:
        """End a claim. Ending it twice, and in a forked child, has no effect."""
        with self._lock:
            self._claims.pop(claim, None)
            self._ended.notify_all()

    def _decide(self, size: int, claim: _Claim | None = None) -> None:
        """Allow or refuse ``size`` bytes, and note them for the claim if they are many."""
        size = operator.index(size)
        if size <= 0:
            raise fail(errno.EINVAL, "allocate", f"{size} bytes", "ask for at least one byte", what="the size is not positive")
        file_limit = self._file_limit()
        if 0 <= file_limit < size:
            what = f"RLIMIT_FSIZE allows a file of {file_limit} bytes"
            raise fail(errno.ENOMEM, "allocate", f"{size} bytes", "ask for less, or raise it (ulimit -f)", what=what)
        need = size + size // BOOKKEEPING
        with self._lock:
            if size <= SMALL and need <= self._granted and self._clock() < self._granted_until:
                self._granted -= need
                return
            while True:
                looked = self._clock()
                room = self.least()
                if need > room.left:
                    self._granted = 0
                    break
                free = room.left - self._claimed() - need
                if free >= 0:
                    self._granted = free // GRANT_SHARE if free >= AMPLE else 0
                    self._granted_until = looked + GRANT_NS
                    if claim is not None and size > SMALL:
                        self._claims[claim] = need
                    return
                if self._claimed() == self._claimed(here=True):
                    break  # a signal handler allocates in the middle of an allocation, which it would wait for
                self._ended.wait()
        what = f"it takes {need} bytes with the kernel's bookkeeping, and {max(0, room.left)} are left: {room.limit}"
        raise fail(errno.ENOMEM, "allocate", f"{size} bytes", room.remedy, what=what)

    def least(self) -> Room:
        """Return the limit that leaves the least. Without ``/proc`` it fails with ENOENT."""
        return min([self._machine(), *self.groups().values()], key=operator.attrgetter("left"))

    def groups(self) -> dict[str, Room]:
        """Return what the limit of each cgroup leaves, by its directory, innermost first."""
        return {group.path: room for group in self._find_groups() if (room := _group_room(group)) is not None}

    def _machine(self) -> Room:
        path = self._proc + "/meminfo"
        try:
            available = _field(_read(path), b"MemAvailable:")
        except OSError as error:
            raise no_proc("allocate", path, error.errno or errno.ENOENT) from error
        if available is None:
            raise fail(errno.ENODATA, "allocate", path, "use Linux 3.14 or newer", what="it has no MemAvailable")
        left = available << 10  # the file counts in KiB
        return Room(left, f"MemAvailable of this machine is {left} bytes", "ask for less, or free memory")

    def _find_groups(self) -> tuple[_Group, ...]:
        """Every directory whose limit binds this process, innermost first.

        The mount table may have thousands of lines, so it is read again only when the process changed its group, or after a second.
        """
        try:
            membership = _read(self._proc + "/self/cgroup")
        except OSError:  # a kernel without cgroups
            return ()
        now = self._clock()
        if membership != self._membership or now >= self._groups_until:
            try:
                mounts = _read(self._proc + "/self/mountinfo")
            except OSError:
                mounts = b""
            self._groups = tuple(_locate(membership, mounts, self._root))
            self._membership = membership
            self._groups_until = now + LAYOUT_NS
        return self._groups


def _locate(membership: bytes, mountinfo: bytes, root: str) -> Iterator[_Group]:
    """Yield the directories of the memory controllers, from ``/proc/self/cgroup`` and ``/proc/self/mountinfo``.

    A hybrid machine has both versions mounted, and the controller on one of them. The files tell which, so both are yielded.
    """
    for line in membership.splitlines():
        number, _, rest = line.partition(b":")
        controllers, _, group = rest.partition(b":")
        if number == b"0" and controllers == b"":
            files = _V2
        elif b"memory" in controllers.split(b","):
            files = _V1
        else:
            continue
        best = _mount_of(mountinfo, files, group.removesuffix(b" (deleted)"))
        if best is None:
            continue
        point, inside = best
        parts = [part for part in os.fsdecode(inside).split("/") if part]
        for depth in range(len(parts), -1, -1):
            path = os.path.join(root, os.fsdecode(point.lstrip(b"/")), *parts[:depth])
            yield _Group(path, f"{path}/{files.limit}", f"{path}/{files.usage}", f"{path}/memory.stat", files)


def _mount_of(mountinfo: bytes, files: _Files, group: bytes) -> tuple[bytes, bytes] | None:
    """Return the mount that shows the most ancestors of a group: (mount point, path of the group below it)."""
    best: tuple[bytes, bytes] | None = None
    fallback: tuple[bytes, bytes] | None = None
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(b" - ")
        mount, kind = before.split(b" "), after.split(b" ")
        if not separator or len(mount) < 5 or len(kind) < 3:
            continue
        if files is _V2:
            if kind[0] != b"cgroup2":
                continue
        elif kind[0] != b"cgroup" or b"memory" not in kind[2].split(b","):
            continue
        shown, point = _unescape(mount[3]), _unescape(mount[4])
        inside = _below(group, shown)
        if inside is None:
            # A mount from another cgroup namespace: its paths don't compare, but its top is an ancestor, or the group itself.
            fallback = fallback or (point, b"")
        elif best is None or len(inside) > len(best[1]):
            best = (point, inside)
    return best or fallback


def _below(group: bytes, top: bytes) -> bytes | None:
    """Return ``group`` relative to ``top``, None if it isn't below."""
    top = top.rstrip(b"/")
    if b".." in group.split(b"/") or not (group + b"/").startswith(top + b"/"):
        return None
    return group[len(top) :].strip(b"/")


def _unescape(text: bytes) -> bytes:
    """Undo the kernel's octal escapes of space, tab, newline and backslash."""
    first, *rest = text.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8) & 255]) + part[3:] if part[:3].isdigit() else b"\\" + part for part in rest)


def _group_room(group: _Group) -> Room | None:
    """Return what a cgroup's limit leaves, None if it limits nothing."""
    limit = _number(group.limit)
    if limit is None or limit >= _UNLIMITED:
        return None
    usage = _number(group.usage)
    if usage is None:
        return None
    try:
        stat = _read(group.stat)
    except OSError:
        stat = b""
    cache = sum(_field(stat, name) or 0 for name in group.files.reclaimable)
    used = max(0, usage - cache)  # the counters are read one after the other
    return Room(
        limit - used,
        f"{group.files.limit} of cgroup {group.path} is {limit} bytes, of which {used} are used",
        "ask for less, close buffers, or raise the limit",
    )


def _read(path: str) -> bytes:
    with owned(os.open, path, os.O_RDONLY | os.O_CLOEXEC) as file:
        fd = file.number
        parts = [os.read(fd, 1 << 14)]
        while parts[-1]:
            parts.append(os.read(fd, 1 << 16))
        return b"".join(parts)


def _number(path: str) -> int | None:
    try:
        return int(_read(path))
    except (OSError, ValueError):
        return None


def _field(text: bytes, name: bytes) -> int | None:
    """Return the number after ``name`` at the start of a line."""
    found = re.search(rb"^" + re.escape(name) + rb"\s+(\d+)", text, re.MULTILINE)
    return None if found is None else int(found[1])


_default: Final = Budget()
os.register_at_fork(after_in_child=_default.reset)


def check(size: int) -> None:
    """Raise an error if this machine's limits don't allow ``size`` bytes, see :meth:`Budget.check`."""
    _default.check(size)


def left() -> int:
    """Return how many bytes this machine's limits leave now."""
    return _default.left()


def claim(size: int) -> AbstractContextManager[None]:
    """Check and claim ``size`` bytes for a block, see :meth:`Budget.claim`."""
    return _default.claim(size)


def whole(value: int, what: str) -> int:
    """Return a number of bytes from a caller as an int, also one of numpy. Raise a TypeError that says ``what`` if it isn't an integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} is a number of bytes, an int, not {type(value).__name__}") from None
