"""``Access``: ``with buf.write() as view`` and ``with buf.read() as view`` (design: an access is a fence).

One step under the reservation lock takes a snapshot of the fences that block the access, and adds the access's own fence. The access then
waits for the snapshot. So accesses are granted in the order of their arrival, and overlapping readers can't starve a writer. Every access
has a fence context of its own. It is WAITING until the snapshot has ended, and then GRANTED.

A writer that raises or dies while GRANTED leaves the content *torn*. The record is marked before the writer's fence ends with
``-ECANCELED`` or ``-EOWNERDEAD``, and ``read()`` raises that error until a later ``write()`` has completed. A writer that raises or dies
while WAITING has written nothing.

An access belongs to the thread or task that entered it. In a forked child the end of the block has no effect. An access that would wait for
another one of its own thread or task raises EDEADLK at once. So does one without ``async`` that would stop the thread whose other task, or
greenlet, it waits for. In a cycle of accesses, the youngest raises EDEADLK at a tick.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Sequence
from typing import Final, NoReturn, TypeVar

from dmabuf._native import FF_ACCESS, FF_WRITE, Shm, TimelineSlot, View, open_view, step
from dmabuf.core.base.clock import monotonic_deadline
from dmabuf.core.base.usage import Direction, Usage
from dmabuf.core.buffer import residency
from dmabuf.core.buffer.backing import Backing, Descriptor
from dmabuf.core.buffer.handle import Handle
from dmabuf.core.contract import Buffer
from dmabuf.core.fence import signalling
from dmabuf.core.fence.lazy import ask
from dmabuf.core.resv.lock import held_by
from dmabuf.core.resv.resv import pending as pending_on
from dmabuf.core.resv.until_free import until_free
from dmabuf.core.resv.ww_mutex import lock_all_until
from dmabuf.core.task import waiting as awaiting
from dmabuf.core.task.owner import Owner, acting, current, publish
from dmabuf.core.task.pause import Pause
from dmabuf.domain import place
from dmabuf.domain.dispatcher import dispatcher, report
from dmabuf.domain.local import Local
from dmabuf.errors import DmaBufTimeout, contract_warning, fail

_READ, _WRITE = int(Usage.READ), int(Usage.WRITE)
_pid = os.getpid
_LOOP_WAIT_NS: Final = 2_000_000  # a lock is held for microseconds; a loop may stand still so long for one
T = TypeVar("T")


_SLOT: Final[Local[TimelineSlot]] = Local(lambda domain: domain.timeline_open(b"dmabuf", place.comm() + b"-%d" % os.getpid()))
_TIMELINE: Final[Local[int]] = Local(lambda domain: _SLOT.of(domain).index + 1)
"""The slot number + 1 of this process's timeline for accesses, whose names `dmabuf ls` shows."""


class Access:
    """One buffer's ``read()`` or ``write()`` block, sync or async: a context manager for one use at a time."""

    __slots__ = (
        "_asked",
        "_entered",
        "_error",
        "_failed",
        "_index",
        "_kept",
        "_life",
        "_shm",
        "_timeout",
        "_view",
        "_window",
        "buf",
        "fence",
        "handle",
        "write",
    )

    _shm: Shm
    _index: int
    _life: int

    def __init__(self, buf: Buffer, handle: Handle, write: bool, timeout: float | None) -> None:
        self.buf, self.handle, self.write, self._timeout = buf, handle, write, timeout
        self._entered = False
        self._view: memoryview | None = None
        self._window: View | None = None
        self.fence = self._error = 0  # the native call stores the fence's handle
        self._asked: Backing | None = None  # whose begin_cpu_access was called for this access
        self._kept: Descriptor | None = None  # what to end it on, if it outlives the block and perhaps the handle
        self._failed: Exception | None = None  # what its end_cpu_access raised

    @property
    def operation(self) -> str:
        """The name of the verb."""
        return "write" if self.write else "read"

    # ---- sync ----

    def __enter__(self) -> memoryview:
        until = self.begin()
        handle = self.handle
        owner = current(handle.domain)
        try:
            pending = self.add(owner, until) if handle.shared.backing is None else self._arrive(owner, until)
            if pending is not None:
                wait([self], owner, pending, until)
                self.grant()
            return self.show()
        except BaseException:
            self.abandon()
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: object) -> None:
        failed = self.finish(-errno.ECANCELED if kind is not None and self.write else 0)
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # else its traceback keeps this frame, and the user's view with it

    # ---- the parts, for one buffer ----

    def begin(self) -> int:
        """Check what can be checked before anything is done. Returns the end of the wait, CLOCK_MONOTONIC ns or -1."""
        handle = self.handle
        if self._entered:
            raise fail(errno.EBUSY, self.operation, handle, "call it again for another block", what="this block is already entered")
        if handle.fd < 0:
            handle.check(self.operation)
        until = -1 if self._timeout is None else monotonic_deadline(self._timeout, self.operation, handle)
        shared = handle.shared
        self._shm, self._index = shared.at()
        self._life = self._shm.life
        # Map first: what may fail must not fail between "granted" and the block. An exporter's memory is mapped once it can't move.
        backing = shared.backing
        if backing is not None:
            backing.mappable(self.buf, self.operation)
        if backing is None or backing.in_file:
            handle.view_source(self.write)
        self._entered = True
        return until

    def _arrive(self, owner: Owner, until: int) -> list[int] | None:
        """:meth:`add` for one buffer alone. The grant of a kernel dma-buf is never immediate, since the kernel's fences come first."""
        if self.handle.kernel() is None:
            return self.add(owner, until)
        if held_by(self.handle.resv, owner) is not None:
            locked_here(self)
        with lock_all_until((self.handle.resv,), until):
            return self.add(owner, until, locked=True) or []

    def add(self, owner: Owner, until: int, locked: bool = False) -> list[int] | None:
        """Take the snapshot and add the own fence. Returns the fences to wait for, None when the access is granted at once."""
        handle, shm, index = self.handle, self._shm, self._index
        resv = handle.known_resv or handle.resv
        if not locked and owner.locks and held_by(resv, owner) is not None:
            locked_here(self)
        if not locked and signalling.sections:
            signalling.check_signalling(self.operation, handle)
        timeline = handle.domain.local.get(_TIMELINE) or _TIMELINE.of(handle.domain)
        # It stores the fence in self by itself, so that a signal handler that raises as it returns can't lose the fence.
        answer = shm.access_begin(index, handle.resv_record.index, owner.word, self.write, timeline, until, locked, self)
        if answer is None or isinstance(answer, list):
            return answer
        if answer < 0:
            self._refused(-answer)
        self._torn(answer)

    def _refused(self, error: int) -> NoReturn:
        if error == errno.EALREADY:
            locked_here(self)
        if error == errno.ETIMEDOUT:
            raise self.timed_out()
        if error == errno.EBUSY:
            remedy = "don't await, or switch to another greenlet, while you hold the lock"
            what = "another task of this thread holds its reservation lock, and can't go on meanwhile"
            raise fail(errno.EDEADLK, self.operation, self.handle, remedy, what=what)
        if error == errno.EDEADLK:
            raise fail(
                errno.EDEADLK,
                self.operation,
                self.handle,
                "leave that block first and delete arrays made from its view, or use one write() block",
                what="this thread or task is already inside a block of this buffer",
            )
        raise fail(error, self.operation, self.handle, "wait for fences, or drop some")

    def _torn(self, torn: int) -> NoReturn:
        seen = self.handle.shared.info()
        who = f"process {seen['torn_pid']}" if seen["torn"] == torn else "a process"  # else another write() has ended since
        how = "died" if torn == errno.EOWNERDEAD else "raised an exception"
        raise fail(
            torn,
            self.operation,
            self.handle,
            "write() it again: the next complete write makes it whole",
            what=f"its content is torn: {who} {how} while writing",
        )

    def grant(self) -> None:
        """Note that nothing blocks the access any more. Raises the error of torn content, for a reader."""
        torn = self._shm.access_grant(self.fence, self._index, self.write)
        if torn:
            self._torn(torn)

    def show(self) -> memoryview:
        """Return the view of the block."""
        handle = self.handle
        backing = handle.shared.backing
        if backing is not None and self._asked is None:
            self._bracket(backing)
        mapping = handle.view or handle.view_source(self.write)
        self._window, view = open_view(mapping, self._released, not self.write)
        self._view = view
        handle.accesses += 1
        return view

    def _bracket(self, backing: Backing) -> None:
        """Call the exporter's op, granted and before the block. The fences were waited for already."""
        backing.begin(self.buf, Direction.BIDIRECTIONAL if self.write else Direction.FROM_DEVICE)
        self._asked = backing

    async def bring(self, owner: Owner) -> None:
        """Once granted, bring memory that has been moved away back, in a thread: it may take a disk's time, and wait for other buffers."""
        handle, backing = self.handle, self.handle.shared.backing
        if backing is not None and backing.in_file and residency.is_evicted(handle.descriptor(self.operation)):
            await awaiting.to_its_end(lambda: acting(owner, lambda: self._bracket(backing)))

    def _unbracket(self) -> None:
        backing, self._asked = self._asked, None
        kept, self._kept = self._kept, None
        assert backing is not None
        backing.end(kept or self.buf, Direction.BIDIRECTIONAL if self.write else Direction.FROM_DEVICE)

    def abandon(self) -> None:
        """Don't enter after all: nobody has seen the view, so nothing was written."""
        self._entered = False
        if self._asked is not None:
            with contextlib.suppress(Exception):  # the error to report is the one that made the access give up
                self._unbracket()
        if self._view is not None:
            self.handle.accesses -= 1
            self._view.release()
            self._view = None
        fence, self.fence = self.fence, 0
        if fence:
            self._shm.fence_signal(fence, 0, True)
        if self._window is not None:
            self._window.retire()
            self._window = None

    def finish(self, error: int) -> Exception | None:
        """End the block. Returns the error to raise: a writer's view is still in use, or the exporter's end failed."""
        view, window = self._view, self._window
        if window is None:
            return None
        self._error = error
        in_use = False
        if view is not None:
            self._view = None
            self.handle.accesses -= 1
            try:
                view.release()
            except BufferError:
                in_use = True
            del view
        if self._asked is not None and (in_use or window.exports):
            self._kept = self._asked.keep_open(self.buf)
            if self._kept is None:
                self._end()  # nothing is left to end it on later
        # Until the window is retired it belongs to this access: if a signal handler raises here, __del__ finishes.
        free = window.retire()
        self._window = None
        self._entered = False
        if free and not in_use:
            failed, self._failed = self._failed, None
            return failed
        if not self.write or error:
            return None
        return BufferError(
            f"write: {self.handle}: an array or slice made from the view is still in use; "
            "delete it inside the block, since the access ends when it is gone"
        )

    def _released(self) -> None:
        """End the access: the last export of the view is gone."""
        shm, fence = self._shm, self.fence
        if fence and shm.life == self._life:
            if self._asked is not None:
                self._end()
            shm.access_end(fence, self._index, self.write, self._error, _pid())
            self.fence = 0

    def _end(self) -> None:
        """Call the exporter's end, before the fence ends. A write that the exporter could not complete is torn."""
        try:
            self._unbracket()
        except Exception as e:
            if self.write:
                self._error = self._error or -errno.ECANCELED
            if self._window is None:  # an array outlived the block, so nobody can catch it
                report(e, self._unbracket)
            else:
                self._failed = e

    def timed_out(self, blocker: str | None = None) -> OSError:
        """Return the error of a wait that took too long. ``blocker``: what it waited for, None to look."""
        what = f"timed out after {self._timeout} s"
        by = self._blocker() if blocker is None else blocker
        if by:
            what += f", blocked by {by}"
        return fail(errno.ETIMEDOUT, self.operation, self.handle, "run `dmabuf ls` to see what blocks the buffer", what=what)

    def _blocker(self) -> str:
        """Return what blocks the access, and in which process; empty when nothing does any more."""
        shm = self._shm
        for fence in pending_on(self.handle.resv, _READ if self.write else _WRITE):
            if fence != self.fence and (info := shm.fence_info(fence)) is not None:
                kind = ("read()", "write()")[bool(info["flags"] & FF_WRITE)] if info["flags"] & FF_ACCESS else "a fence"
                return f"{kind} in process {self.handle.domain.pid_of(info['life'])}"
        return ""

    # ---- async ----

    async def __aenter__(self) -> memoryview:
        until = self.begin()
        owner = current(self.handle.domain)
        try:
            pending = await arrive_async([self], owner, until, lambda limit: self._arrive(owner, limit))
            if pending is not None:
                await wait_async([self], owner, pending, until)
                self.grant()
            await self.bring(owner)
            return self.show()
        except BaseException:
            self.abandon()
            raise

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        self.__exit__(kind, value, trace)

    def __del__(self) -> None:
        if not self._entered or self._shm.life != self._life:
            return
        if self._window is None:
            self.abandon()
        else:  # entered and never left: as if the block had raised
            self.finish(self._error or (-errno.ECANCELED if self.write else 0))


# ---- waiting, for one access or several that are granted together ----


def _sleep(parts: Sequence[Access], owner: Owner, pending: Sequence[int], until: int) -> None:
    shm = parts[0]._shm
    for fence in pending:
        if not shm.fence_pending(fence):
            continue
        publish(owner, fence, blocking=True)
        step("access_waiting")
        if not shm.fence_wait(fence, until, False):
            raise parts[0].timed_out()


def wait(parts: Sequence[Access], owner: Owner, pending: Sequence[int], until: int) -> None:
    """Wait until nothing blocks the accesses."""
    shm = parts[0]._shm
    ask(owner.domain, pending)
    for fence in pending:
        if shm.fence_is_here(fence):
            raise _stalled(parts)
    try:
        _sleep(parts, owner, pending, until)
    finally:
        if owner.wait_stamp:
            publish(owner, 0)
    for part in parts:
        kernel = part.handle.kernel()
        if kernel is not None and not kernel.wait_kernel(part.handle, part.write, until):
            raise part.timed_out("a kernel fence")


def _stalled(parts: Sequence[Access]) -> OSError:
    """Return the error of an access whose wait would keep another task of its thread from leaving its block."""
    remedy = "wait with `async with`, let one task or greenlet of a thread use the buffer at a time, or delete arrays made from its view"
    what = "another task or greenlet of this thread is inside a block of the buffer, and can't leave it while the thread waits"
    named = parts[0].handle if len(parts) == 1 else "buffers"
    return fail(errno.EDEADLK, parts[0].operation if len(parts) == 1 else "access", named, remedy, what=what)


async def wait_async(parts: Sequence[Access], owner: Owner, pending: Sequence[int], until: int) -> None:
    """:func:`wait` in a coroutine."""
    shm, watcher = parts[0]._shm, dispatcher(parts[0].handle.domain)
    ask(owner.domain, pending)
    try:
        for fence in pending:
            if not shm.fence_pending(fence):
                continue
            pause = awaiting.pause()

            def done(_: int, pause: Pause = pause) -> None:
                pause.end()

            token = watcher.watch(fence, done, foreign=True)
            if token is None:
                continue
            owner.awaiting = pause
            publish(owner, fence)
            try:
                left = None if until < 0 else max(0.0, (until - time.monotonic_ns()) / 1e9)
                if not await pause.within(left):
                    raise parts[0].timed_out()
            finally:
                owner.awaiting = None
                watcher.unwatch(fence, token)
    finally:
        if owner.wait_stamp:
            publish(owner, 0)
    for part in parts:
        kernel = part.handle.kernel()
        if kernel is not None and not await kernel.wait_kernel_async(part.handle, part.write, until):
            raise part.timed_out("a kernel fence")


async def arrive_async(parts: Sequence[Access], owner: Owner, until: int, arrive: Callable[[int], T]) -> T:
    """Call ``arrive(limit)``, which takes the reservation locks, when they are free, until it gets them before its limit.

    A holder, or the next waiter in line, may be stopped at any moment. The loop then stands still for :data:`_LOOP_WAIT_NS` at most.
    """
    while True:
        await _locks_free(parts, owner, until)
        limit = time.monotonic_ns() + _LOOP_WAIT_NS
        try:
            return arrive(limit if until < 0 else min(limit, until))
        except DmaBufTimeout:
            if 0 <= until <= limit:
                raise
        await awaiting.checkpoint()


async def _locks_free(parts: Sequence[Access], owner: Owner, until: int) -> None:
    """Wait until nobody else holds the reservation locks: usually microseconds, but an event loop must not block if it takes longer."""
    for resv in [part.handle.resv for part in parts]:
        while resv.is_locked() and held_by(resv, owner) is None:
            left = None if until < 0 else max(0.0, (until - time.monotonic_ns()) / 1e9)
            if not await until_free(resv, left):
                raise parts[0].timed_out()


def locked_here(part: Access) -> NoReturn:
    """Refuse an access of a thread or task that holds the buffer's reservation lock."""
    contract_warning(f"{part.operation}: {part.handle!r}: its reservation lock is held by this thread or task", 5)
    what = "this thread or task holds its reservation lock"
    raise fail(errno.EDEADLK, part.operation, part.handle, "unlock the reservation object first", what=what)
