"""``SwSync``: a timeline that a program advances by hand, for tests and for pacing (semantics 5.11).

It counts from 0, in 32 bits that wrap. ``create_fence(value)`` gives a sync file that is signaled when the count reaches the value
(compared as signed 32-bit numbers, semantics 3.10), or from the start if the count is already there. Two for the same pending value share
one fence. ``inc(n)`` advances the count. When the last holder of the timeline's descriptor closes it, the pending fences are signaled with
``-ENOENT``.

It is a descriptor: it can be sent, inherited, and given to any process of the domain, and every holder may do everything. All share the
count and the list of pending fences (``domain/shared_file.py``), so an ``inc`` in any process signals the fences of all before it returns.
One thing differs from the kernel: a fence belongs to the process that created it. When that process dies, its pending fences are signaled
with ``-EOWNERDEAD``, even if others hold the timeline. A process that dies in the middle of an ``inc`` leaves it done up to some value,
with every fence up to that value signaled.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from dmabuf._native import FF_ANYBODY, OFF_CONTEXT, Bracket, hurry, step
from dmabuf.core.fence.fence import KNOWN, DmaFence, Origin, flagged, register, wrap
from dmabuf.core.fence.timeline import Timeline, inherited, slot_of
from dmabuf.core.sync.shared_object import SharedObject
from dmabuf.core.sync.sw_pending import U32, UINT_MAX, VALUE, PendingFences, ahead
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.domain import place
from dmabuf.domain.dispatcher import dispatcher
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import finalizer, finished
from dmabuf.domain.shared_file import SharedFile
from dmabuf.domain.weak_objects import WeakObjects
from dmabuf.errors import ClosedError, fail

KIND: Final = "sw_sync"
INT_MAX: Final = 0x7FFFFFFF
_HEAD: Final = struct.Struct("=8sIIQI16s20x")  # magic, count of the timeline, closed, context, entries, name
_MAGIC: Final = b"dmabufW\1"
_CLOSED, _ENDING = 12, 44  # offsets
_KEPT: Final = 16  # fences that nobody has any more, from which on to look whether they are signaled
_OPEN: WeakObjects[SwSync] = WeakObjects()


@dataclass(frozen=True)
class SwSyncStatistics:
    """A snapshot of a timeline. ``pending``: the pending fences of all holders."""

    name: str
    context: int
    value: int
    pending: int


class SwFence(DmaFence):
    """A fence of a software timeline. Any holder of the timeline signals it, so its maker keeps it while others may wait for it."""

    __slots__ = ("_keep",)

    _keep: dict[int, SwFence]

    @finalizer
    def __del__(self) -> None:
        if self.owned and not flagged(self) and hasattr(self, "_names"):  # else it was never complete, and nobody knows it
            if not self.shm.fence_drop(self.handle, -errno.ENOENT) and not flagged(self):
                again = SwFence(self.shm, self.handle, True)
                self.disown()
                self._keep[self.handle] = _complete(again, self.domain, self._timeline, self._keep)  # another process references it


class _Ended(Bracket):
    """A block that signals fences while it holds a lock. Their callbacks, which are the program's, run after it, when the lock is free."""

    __slots__ = ("_domain", "_handles")

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._handles: deque[int] = deque()

    def enter(self) -> _Ended:
        """Begin it."""
        return self

    def end(self, handle: int, error: int) -> None:
        """Signal a fence."""
        self._handles.append(handle)  # first: a signal handler may raise after the next line
        self._domain.join().fence_end_any(handle, error, True)

    def leave(self) -> None:
        """Run the callbacks of those that are signaled."""
        shm = self._domain.shm
        while self._handles:
            handle = self._handles[0]
            if (on_local := shm.on_local) is not None and not shm.fence_pending(handle):
                on_local(handle)
            self._handles.popleft()


def _complete(fence: SwFence, domain: Domain, timeline: Origin | None, keep: dict[int, SwFence]) -> SwFence:
    fence._keep = keep
    register(fence, domain, timeline)
    return fence


def _is_own(fence: DmaFence | None) -> bool:
    return isinstance(fence, SwFence) and fence.owned


class SwSync(SharedObject):
    """A software timeline.

    Args:
        name: At most 15 bytes; None for the name of the process.
        domain: The domain to make it in; None means the user's default domain.

    Raises:
        InvalidError: The name is too long or has a NUL (EINVAL).
        NoSpaceError: The domain is full (ENOSPC).
        DmaBufError: No descriptor is free (EMFILE).
    """

    __slots__ = ("_guarded", "_keep", "_next_look", "_own", "_pending", "_timeline", "context", "name")

    KIND, NOUN = KIND, "timeline"

    def __init__(self, name: str | bytes | None = None, *, domain: Domain | None = None) -> None:
        domain = domain or Domain.default()
        raw = place.comm() if name is None else os.fsencode(name)
        if len(raw) > 15 or b"\0" in raw:
            wrong = "it has a NUL" if b"\0" in raw else f"it has {len(raw)} bytes"
            raise fail(errno.EINVAL, "SwSync", f"name {name!r}", "use at most 15 bytes, without a NUL", what=wrong)
        context = domain.join().add64(OFF_CONTEXT, 1)
        self._set(SharedFile.make(KIND, domain, _HEAD.pack(_MAGIC, 0, 0, context, 0, raw)))

    def _set(self, file: SharedFile) -> None:
        head = file.read(0, _HEAD.size)
        if len(head) != _HEAD.size or not head.startswith(_MAGIC):
            raise fail(errno.EUCLEAN, "from_fd", "a SwSync", "make a new one", what="another program wrote to its descriptor")
        _, _, _, self.context, _, name = _HEAD.unpack(head)
        self.name = os.fsdecode(name.rstrip(b"\0"))
        self._timeline: Timeline | None = None
        self._guarded = False  # whether something else closes the file, later
        self._keep: dict[int, SwFence] = {}
        self._next_look = _KEPT
        self._own: deque[int] | None = None
        self._pending = PendingFences(file)
        super()._set(file)
        _OPEN.add(self)

    def __repr__(self) -> str:
        return f"<dmabuf.SwSync {self.name!r} {'closed' if self.closed else f'at {self.value}'}>"

    @finished
    def close(self) -> None:
        """Close the descriptor. The last holder signals the pending fences with ``-ENOENT``. Closing twice has no effect."""
        self._close(guarded=True)

    def _close(self, *, guarded: bool) -> None:
        if self.closed and (self._guarded or not self._file.opened):
            return
        self.closed = True
        if self._file.close_fd():
            try:
                self._signal_all()
            except OSError as e:
                if e.errno != errno.EDEADLK:
                    self._file.close()
                    raise
                self._guarded = True
                self.domain.retries.later(self._signal_later)  # a signal handler called it in the middle of a call
                return
        elif guarded and self._own_pending():
            self._guarded = True
            _Guard(self, self._file).watch()
            return
        self._file.close()

    def _own_pending(self) -> deque[int]:
        """Return the fences of this process that may be pending, of which the first is. For a timeline that is closed here."""
        if self._own is None:
            self._own = deque()
            if self._timeline is not None and not inherited(self._timeline):
                known = KNOWN.of(self.domain)
                with contextlib.suppress(ClosedError):  # somebody else closed the descriptors: who has the timeline can't be said any more
                    # Without the lock, because entries that others add now are not ours.
                    self._own.extend(handle for handle, _ in self._pending.all(self.domain.shm) if _is_own(known.get(handle)))
        while self._own and not self.domain.shm.fence_pending(self._own[0]):
            self._own.popleft()
        return self._own

    def _signal_all(self) -> None:
        with _Ended(self.domain) as ended, self._file.locked():
            self._file.write(_CLOSED, U32.pack(1))
            value = self._pending.count()
            for handle, _ in sorted(self._pending.all(self.domain.join()), key=lambda entry: ahead(entry[1], value)):
                ended.end(handle, -errno.ENOENT)
        self._keep.clear()

    def _signal_later(self) -> bool:
        try:
            self._signal_all()
        finally:
            self._file.close()
        return True

    @finalizer
    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not getattr(self, "closed", True) and not ending():
            self.close()

    # ---- what is shared, under the lock ----

    def _locked(self, operation: str) -> AbstractContextManager[None]:
        self._check(operation)
        self.domain.join()
        return self._file.locked(self._wake_what_was_missed)

    def _wake_what_was_missed(self) -> None:
        """Wake what a process that signaled fences did not, because it died. The lock is held."""
        if self._file.read(_ENDING, 4) == U32.pack(1) and self.domain.wake_sync_files():
            self._file.write(_ENDING, U32.pack(0))

    # ---- using it ----

    @property
    def value(self) -> int:
        """The count, 0 to 2³²-1."""
        with self._locked("value"):
            return self._pending.count()

    def create_fence(self, value: int) -> SyncFile:
        """Return a sync file that is signaled when the count reaches a value (SW_SYNC_IOC_CREATE_FENCE).

        Raises:
            ClosedError: The timeline is closed (EBADF).
            InvalidError: The value is not a number of 32 bits (EINVAL).
            NoSpaceError: The domain is full (ENOSPC).
        """
        if not 0 <= value <= UINT_MAX:
            raise fail(errno.EINVAL, "create_fence", f"value {value}", f"pass 0 to {UINT_MAX}", what="it is not a number of 32 bits")
        with self._locked("create_fence"):
            self._forget_signaled()
            if ahead(value, self._pending.count()) <= 0:
                fence = self._make(value)
                self.domain.shm.fence_end_any(fence.handle, 0)
                return SyncFile(fence)
            handle = self._pending.at(self.domain.shm, value)
            if handle and self.domain.shm.fence_share(handle):  # else its owner is dropping it now
                found = wrap(self.domain, handle, (self.context, value, 0))
                if not flagged(found):
                    return SyncFile(found)
            fence = self._make(value)
            self._pending.append(self.domain.shm, fence.handle, value)
            return SyncFile(fence)

    def _make(self, value: int) -> DmaFence:
        shm, timeline = self.domain.shm, self._timeline
        if timeline is None or inherited(timeline):
            timeline = self._timeline = Timeline(self.name, driver=KIND, seqno64=False, domain=self.domain, _context=self.context)
            self._keep = {}
        return _complete(SwFence.made(shm, slot_of(timeline) + 1, self.context, value, FF_ANYBODY), self.domain, timeline, self._keep)

    def _forget_signaled(self) -> None:
        if len(self._keep) < self._next_look:
            return
        for handle in list(self._keep):  # a copy, because a fence that is collected now may add itself
            if flagged(self._keep[handle]):
                del self._keep[handle]
        self._next_look = max(_KEPT, 2 * len(self._keep))

    def inc(self, n: int = 1) -> None:
        """Advance the count by n, and signal the fences that are due, in the order of their values (SW_SYNC_IOC_INC).

        More than 2³¹-1 is done in steps, so that no fence is passed over.

        Raises:
            ClosedError: The timeline is closed (EBADF).
            InvalidError: ``n`` is not a number of 32 bits (EINVAL).
        """
        if not 0 <= n <= UINT_MAX:
            raise fail(errno.EINVAL, "inc", f"by {n}", f"pass 0 to {UINT_MAX}", what="it is not a number of 32 bits")
        with _Ended(self.domain) as ended, self._locked("inc"):
            if n > INT_MAX:
                self._step(INT_MAX, ended)
                n -= INT_MAX
            if n > INT_MAX:  # at most twice what a step can do, and one
                self._step(INT_MAX, ended)
                n -= INT_MAX
            self._step(n, ended)
            self._forget_signaled()

    def _step(self, n: int, ended: _Ended) -> None:
        shm = self.domain.shm
        target = self._pending.count() + n & UINT_MAX
        due = self._pending.due(shm, n)
        if due:
            self._file.write(_ENDING, U32.pack(1))
        for distance, at, handle in due:
            if distance > 0:
                self._file.write(VALUE, U32.pack(at))
                step("sw_counted")  # this one is due and pending: the next inc of any holder signals it, or its owner's death
            ended.end(handle, 0)
            step("sw_ended")  # as after an inc by less
        self._file.write(VALUE, U32.pack(target))
        self._pending.settle()
        if due:
            self._file.write(_ENDING, U32.pack(0))

    def get_deadline(self, sync_file: SyncFile) -> int:
        """Return the earliest deadline of a fence of a software timeline, in CLOCK_MONOTONIC ns (SW_SYNC_GET_DEADLINE).

        Args:
            sync_file: What :meth:`create_fence` returned.

        Raises:
            ClosedError: The timeline is closed (EBADF).
            InvalidError: It is not a sync file of one such fence (EINVAL).
            NotFoundError: No deadline was set (ENOENT).
        """
        self._check("get_deadline")
        given: object = sync_file
        fence = given.fence if isinstance(given, SyncFile) and not given.closed and not given.kernel else None
        if fence is None or not fence.flags & FF_ANYBODY or fence.driver_name != KIND:
            what = "not a sync file of one fence of a software timeline"
            raise fail(errno.EINVAL, "get_deadline", sync_file, "pass what create_fence() returned", what=what)
        deadline = fence.deadline
        if deadline is None:
            raise fail(errno.ENOENT, "get_deadline", sync_file, "set one with set_deadline()", what="no deadline was set")
        return deadline

    def statistics(self) -> SwSyncStatistics:
        """Return a snapshot for programs.

        Raises:
            ClosedError: The timeline is closed (EBADF).
        """
        with self._locked("statistics"):
            return SwSyncStatistics(self.name, self.context, self._pending.count(), len(self._pending.all(self.domain.shm)))

    def _info(self) -> str:
        with self._locked("sync_info"):
            value, entries = self._pending.count(), self._pending.all(self.domain.shm)
        pending = sorted((ahead(at, value), at) for _, at in entries)
        shown = ahead(value, 0)
        return f"{self.name}: {shown}\n" + "".join(f"  fence active: {at} / {shown}\n" for _, at in pending) + "\n"


class _Guard:
    """For a timeline that this process closed while others hold it, with its own fences pending: signals them if the last holder dies.

    Ticks, signals of the fences and signal handlers come in any thread and in the middle of one another. Each adds its step to ``_todo``,
    and the thread that has the lock does all of them. No thread waits for the lock.
    """

    def __init__(self, timeline: SwSync, file: SharedFile) -> None:
        self.timeline, self.file, self.domain = timeline, file, timeline.domain
        self.name = f"SwSync {timeline.context} {id(timeline):x}"  # one process can have a timeline open more than once
        self._lock = threading.Lock()
        self._todo: deque[Callable[[], None]] = deque()
        self._over = False  # the file is closed

    def watch(self) -> None:
        """Begin, with a hook of the tick."""
        self.domain.on_tick(self.name, self.tick)
        self.next(0)

    def next(self, _: int) -> None:
        """One of the fences was signaled."""
        self._do(self._watch_next)

    def tick(self, _: int, __: int) -> None:
        """Signal the fences if no process has a descriptor of the timeline."""
        hurry()  # who closes it may live on
        self._do(self._signal_if_last)

    def _do(self, step: Callable[[], None]) -> None:
        if step not in self._todo:
            self._todo.append(step)
        while self._todo and self._lock.acquire(blocking=False):
            try:
                self._work_off()
            finally:
                self._lock.release()

    def _work_off(self) -> None:
        while self._todo and not self._over:
            self._todo.popleft()()
        if self._over:
            self._todo.clear()

    def _watch_next(self) -> None:
        """Keep the dispatcher's thread ticking while one of the fences is pending."""
        watching = dispatcher(self.domain)
        while left := self.timeline._own_pending():
            if watching.watch(left[0], self.next, foreign=True) is not None:
                return
        self._end()

    def _signal_if_last(self) -> None:
        if self.file.is_last():
            self.timeline._signal_all()
            self._end()

    def _end(self) -> None:
        self._over = True
        self.domain.tick_hooks.remove(self.name)
        self.file.close()


def sync_info() -> str:
    """Return the text of debugfs ``sync/info``: the software timelines that this process holds, oldest first, with their pending fences.

    As in Linux 6.8, the list of sync files under it is always empty (semantics 6.2).
    """
    timelines = sorted((timeline for timeline in list(_OPEN) if not timeline.closed), key=lambda timeline: timeline.context)
    rule = "-" * 14 + "\n"
    return "objs:\n" + rule + "".join(timeline._info() for timeline in timelines) + "fences:\n" + rule


def _close_all() -> None:
    """Close every timeline at exit, before this process leaves the domain, as the kernel does with the descriptors of a process."""
    for timeline in list(_OPEN):
        try:
            timeline._close(guarded=False)
        except OSError:
            pass  # its fences are signaled when the process is reaped


atexit.register(_close_all)
