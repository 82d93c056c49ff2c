"""``SwSync``: a timeline that programs move on by hand, for tests and for pacing (spec 5.11).

It counts from 0, in 32 bits that wrap. ``create_fence(value)`` gives a sync file that ends when the count reaches the value (compared as
signed 32-bit numbers, spec 3.10), ended from the start if it is there already; two for the same pending value share one fence. ``inc(n)``
moves the count on. When the last holder of the timeline's descriptor has closed it, what is pending ends with ``-ENOENT``.

It is a descriptor: it can be sent, inherited, and given to any process of the domain, and every holder may do everything. The count and the
list of pending fences are shared (``domain/shared_file.py``), so an ``inc`` anywhere ends the fences of all, before it returns. One thing
is not as in the kernel: a fence belongs to the process that created it, and when that dies its pending fences end with ``-EOWNERDEAD``,
whoever holds the timeline. A process that dies in the middle of an ``inc`` leaves it done up to a value, with every fence up to it ended.
"""

from __future__ import annotations

import atexit
import errno
import os
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from dmabuf._native import FF_ANYBODY, OFF_CONTEXT, step
from dmabuf.core.fence.fence import KNOWN, DmaFence, Origin, flagged, register, wrap
from dmabuf.core.fence.timeline import Timeline, inherited, slot_of
from dmabuf.core.sync.shared_object import SharedObject
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.domain import place
from dmabuf.domain.dispatcher import dispatcher
from dmabuf.domain.domain import Domain
from dmabuf.domain.shared_file import SharedFile
from dmabuf.errors import fail

KIND: Final = "sw_sync"
INT_MAX: Final = 0x7FFFFFFF
UINT_MAX: Final = 0xFFFFFFFF
MAX_PENDING: Final = 1 << 20
_HEAD: Final = struct.Struct("=8sIIQI16s20x")  # magic, count of the timeline, closed, context, entries, name; entries don't cross pages
_ENTRY: Final = struct.Struct("=QQ")  # handle, value
_MAGIC: Final = b"dmabufW\1"
_VALUE, _CLOSED, _COUNT, _ENDING = 8, 12, 24, 44  # offsets
_U32: Final = struct.Struct("=I")
_LIVE: weakref.WeakSet[SwSync] = weakref.WeakSet()


@dataclass(frozen=True)
class SwSyncStatistics:
    """What a timeline says of itself. ``pending``: fences that have not ended, of every holder."""

    name: str
    context: int
    value: int
    pending: int


class SwFence(DmaFence):
    """A fence of a software timeline. Every holder of the timeline ends it, so its maker keeps it while others may wait for it."""

    __slots__ = ("_keep",)

    _keep: dict[int, SwFence]

    def __del__(self) -> None:
        if self.owned and not flagged(self):
            if not self.shm.fence_drop(self.handle, -errno.ENOENT) and not flagged(self):
                self._keep[self.handle] = _fence(self.domain, self.handle, self._timeline, self._keep)  # somebody else has it


def _fence(domain: Domain, handle: int, timeline: Origin | None, keep: dict[int, SwFence]) -> SwFence:
    fence = SwFence(domain.shm, handle, True)
    fence._keep = keep
    register(fence, domain, timeline)
    return fence


def _ahead(value: int, of: int) -> int:
    """How far a value is ahead of another, as a signed 32-bit number."""
    return (value - of + 0x80000000 & UINT_MAX) - 0x80000000


class SwSync(SharedObject):
    """A software timeline. ``name``: at most 15 bytes, the process's own name if not given.

    Errors: EINVAL a name that is too long or has a NUL; EMFILE; ENOSPC the domain is full.
    """

    __slots__ = ("_keep", "_timeline", "context", "name")

    KIND, NOUN = KIND, "timeline"

    def __init__(self, name: str | bytes | None = None, *, domain: Domain | None = None) -> None:
        domain = domain or Domain.default()
        raw = place.comm() if name is None else os.fsencode(name)
        if len(raw) > 15 or b"\0" in raw:
            raise fail(errno.EINVAL, "SwSync", f"name {name!r}", "at most 15 bytes, without a NUL")
        context = domain.join().add64(OFF_CONTEXT, 1)
        self._set(SharedFile.make(KIND, domain, _HEAD.pack(_MAGIC, 0, 0, context, 0, raw)))

    def _set(self, file: SharedFile) -> None:
        head = file.read(0, _HEAD.size)
        if len(head) != _HEAD.size or not head.startswith(_MAGIC):
            raise fail(errno.EUCLEAN, "from_fd", "a SwSync", "somebody else wrote to its descriptor", what="it begins like none")
        _, _, _, self.context, _, name = _HEAD.unpack(head)
        self.name = os.fsdecode(name.rstrip(b"\0"))
        super()._set(file)
        self._timeline: Timeline | None = None
        self._keep: dict[int, SwFence] = {}
        _LIVE.add(self)

    def __repr__(self) -> str:
        return f"<dmabuf.SwSync {self.name!r} {'closed' if self.closed else f'at {self.value}'}>"

    def close(self) -> None:
        """Close the descriptor; as its last holder, end what is pending with ``-ENOENT``. Again: nothing."""
        self._close(guarded=True)

    def _close(self, *, guarded: bool) -> None:
        if self.closed:
            return
        self.closed = True
        if self._file.close_fd():
            try:
                self._end_all()
            except OSError as e:
                if e.errno != errno.EDEADLK:
                    raise
                self.domain.retries.later(self._end_later)  # called by a signal handler in the middle of a call: when that is over
                return
        elif guarded and self._own_pending():
            _Guard(self, self._file).watch()
            return
        self._file.close()

    def _own_pending(self) -> list[int]:
        if self._timeline is None or inherited(self._timeline):
            return []
        # Without the lock: what others add is not ours.
        found = [handle for handle, _ in self._entries()]
        known = KNOWN.of(self.domain)
        return [handle for handle in found if isinstance(fence := known.get(handle), SwFence) and fence.owned and not flagged(fence)]

    def _end_all(self) -> None:
        with self._file.locked():
            self._file.write(_CLOSED, _U32.pack(1))
            value = self._value()
            for handle, _ in sorted(self._entries(), key=lambda entry: _ahead(entry[1], value)):
                self.domain.join().fence_end_any(handle, -errno.ENOENT)
        self._keep.clear()

    def _end_later(self) -> bool:
        try:
            self._end_all()
        finally:
            self._file.close()
        return True

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not getattr(self, "closed", True) and not ending():
            self.close()

    # ---- what is shared, under the lock ----

    @contextmanager
    def _locked(self, operation: str) -> Iterator[None]:
        self._check(operation)
        self.domain.join()
        with self._file.locked():
            # Who ended fences died before it had rung all that waits for them?
            if self._file.read(_ENDING, 4) == _U32.pack(1) and self.domain.sync_directory.wake_all(self.domain.shm):
                self._file.write(_ENDING, _U32.pack(0))
            yield

    def _value(self) -> int:
        return int(_U32.unpack(self._file.read(_VALUE, 4))[0])

    def _used(self) -> int:
        return min(int(_U32.unpack(self._file.read(_COUNT, 4))[0]), MAX_PENDING)

    def _entries(self) -> list[tuple[int, int]]:
        """(handle, value) of the pending fences."""
        raw = self._file.read(_HEAD.size, self._used() * _ENTRY.size)
        shm = self.domain.shm
        whole = len(raw) // _ENTRY.size * _ENTRY.size
        return [(handle, value) for handle, value in _ENTRY.iter_unpack(raw[:whole]) if handle and shm.fence_pending(handle)]

    def _enter(self, handle: int, value: int) -> None:
        """Put a pending fence on the list: at the end, or, when half of it has ended, on a list made anew."""
        used, pending = self._used(), self._entries()
        if used >= 64 and len(pending) <= used // 2:
            # Shorter from the front: whatever of it is written when we die, each pending fence is there at its old or its new place.
            self._file.write(_HEAD.size, b"".join(_ENTRY.pack(*entry) for entry in pending))
            step("sw_compacted")
            self._file.write(_COUNT, _U32.pack(len(pending)))
            used = len(pending)
        if used >= MAX_PENDING:
            raise fail(errno.ENOSPC, "create_fence", self, "let some end first", what=f"{MAX_PENDING} fences are pending")
        self._file.write(_HEAD.size + used * _ENTRY.size, _ENTRY.pack(handle, value))
        step("sw_entered")  # behind the end: not on the list yet; the fence ends with us
        self._file.write(_COUNT, _U32.pack(used + 1))

    # ---- using it ----

    @property
    def value(self) -> int:
        """The count, 0 to 2³²-1. Errors: EBADF."""
        with self._locked("value"):
            return self._value()

    def create_fence(self, value: int) -> SyncFile:
        """A sync file that ends when the count reaches ``value``; one for the same pending value is shared (SW_SYNC_IOC_CREATE_FENCE).

        Errors: EBADF; EINVAL not a number of 32 bits; ENOSPC the domain is full.
        """
        if not 0 <= value <= UINT_MAX:
            raise fail(errno.EINVAL, "create_fence", f"value {value}", f"a value is 0 to {UINT_MAX}")
        with self._locked("create_fence"):
            self._forget_ended()
            if _ahead(value, self._value()) <= 0:
                fence = self._make(value)
                self.domain.shm.fence_end_any(fence.handle, 0)
                return SyncFile(fence)
            for handle, at in self._entries():
                if at == value and self.domain.shm.fence_mark(handle, "shared", 1):  # else it is just being dropped
                    found = wrap(self.domain, handle, (self.context, value, 0))
                    if not flagged(found):
                        return SyncFile(found)
            fence = self._make(value)
            self._enter(fence.handle, value)
            return SyncFile(fence)

    def _make(self, value: int) -> DmaFence:
        shm, timeline = self.domain.shm, self._timeline
        if timeline is None or inherited(timeline):
            timeline = self._timeline = Timeline(self.name, driver=KIND, seqno64=False, domain=self.domain, _context=self.context)
            self._keep = {}
        handle = shm.fence_alloc(slot_of(timeline) + 1, self.context, value, FF_ANYBODY, 0, 0)
        return _fence(self.domain, handle, timeline, self._keep)

    def _forget_ended(self) -> None:
        for handle in list(self._keep):  # a fence that is collected meanwhile may add itself
            if flagged(self._keep[handle]):
                del self._keep[handle]

    def inc(self, n: int = 1) -> None:
        """Move the count on by n; more than 2³¹-1 in steps, so that no fence is passed over (SW_SYNC_IOC_INC).

        The fences that are due have ended, in the order of their values, when it returns. Errors: EBADF; EINVAL not a number of 32 bits.
        """
        if not 0 <= n <= UINT_MAX:
            raise fail(errno.EINVAL, "inc", f"by {n}", f"a step is 0 to {UINT_MAX}")
        with self._locked("inc"):
            while n > INT_MAX:
                self._step(INT_MAX)
                n -= INT_MAX
            self._step(n)
            self._forget_ended()

    def _step(self, n: int) -> None:
        value, shm = self._value(), self.domain.shm
        target = value + n & UINT_MAX
        due = [(_ahead(at, value), at, handle) for handle, at in self._entries() if _ahead(at, target) <= 0]
        if due:
            self._file.write(_ENDING, _U32.pack(1))
        for ahead, at, handle in sorted(due):
            if ahead > 0:
                self._file.write(_VALUE, _U32.pack(at))
                step("sw_counted")  # this one is due and pending: the next holder's inc ends it, or its owner's death
            shm.fence_end_any(handle, 0)
            step("sw_ended")  # an inc by less
        self._file.write(_VALUE, _U32.pack(target))
        if due:
            self._file.write(_ENDING, _U32.pack(0))

    def get_deadline(self, sync_file: SyncFile) -> int:
        """The earliest deadline set on a fence of a software timeline, CLOCK_MONOTONIC ns (SW_SYNC_GET_DEADLINE).

        Errors: EBADF; EINVAL no sync file, or not of one such fence; ENOENT none was set.
        """
        self._check("get_deadline")
        given: Any = sync_file
        fence = given.fence if isinstance(given, SyncFile) and not given.closed and not given.kernel else None
        if fence is None or not fence.flags & FF_ANYBODY or fence.driver_name != KIND:
            what = "it is no sync file of one fence of a software timeline"
            raise fail(errno.EINVAL, "get_deadline", sync_file, "pass what create_fence() gave", what=what)
        deadline = fence.deadline
        if deadline is None:
            raise fail(errno.ENOENT, "get_deadline", sync_file, "set one with set_deadline()", what="no deadline was set")
        return deadline

    def statistics(self) -> SwSyncStatistics:
        """A snapshot for programs. Errors: EBADF."""
        with self._locked("statistics"):
            return SwSyncStatistics(self.name, self.context, self._value(), len(self._entries()))

    def _info(self) -> str:
        with self._locked("sync_info"):
            value, entries = self._value(), self._entries()
        pending = sorted((_ahead(at, value), at) for _, at in entries)
        shown = _ahead(value, 0)
        return f"{self.name}: {shown}\n" + "".join(f"  fence active: {at} / {shown}\n" for _, at in pending) + "\n"


class _Guard:
    """Of a timeline that was closed here while others hold it, with fences of ours pending: ends those if the last holder dies."""

    def __init__(self, timeline: SwSync, file: SharedFile) -> None:
        self.timeline, self.file, self.domain = timeline, file, timeline.domain
        self.name = f"SwSync {timeline.context} {id(timeline):x}"  # one process can have a timeline open more than once
        self.lock = threading.RLock()  # a signal handler may come in the middle
        self.ending = False

    def watch(self) -> None:
        self.domain.on_tick(self.name, self.tick)
        self.next(0)

    def next(self, _: int) -> None:
        """Keep the dispatcher's thread ticking while a fence of ours is pending."""
        if self.ending:
            return
        watching = dispatcher(self.domain)
        for handle in self.timeline._own_pending():
            if watching.watch(handle, self.next, foreign=True) is not None:
                return
        self.end()

    def tick(self, _: int, __: int) -> None:
        if not self.lock.acquire(blocking=False):
            return  # another thread looks already
        try:
            if self.file.is_last():
                self.ending = True  # the ends call next()
                self.timeline._end_all()
                self.off()
        finally:
            self.lock.release()

    def end(self) -> None:
        with self.lock:
            self.off()

    def off(self) -> None:
        if self.name in self.domain.tick_hooks:
            self.domain.tick_hooks.remove(self.name)
            self.file.close()


def sync_info() -> str:
    """The text of debugfs ``sync/info``: the software timelines that this process holds, the oldest first, and their pending fences.

    As in Linux 6.8, the list of sync files under it is always empty (spec 6.2).
    """
    timelines = sorted((timeline for timeline in list(_LIVE) if not timeline.closed), key=lambda timeline: timeline.context)
    rule = "-" * 14 + "\n"
    return "objs:\n" + rule + "".join(timeline._info() for timeline in timelines) + "fences:\n" + rule


def _close_all() -> None:
    """At exit, as the kernel closes a timeline's descriptor with its process: before the domain is left."""
    for timeline in list(_LIVE):
        try:
            timeline._close(guarded=False)
        except OSError:
            pass  # its fences end with the process's life


atexit.register(_close_all)
