"""Access: ``with buf.write() as view`` and ``with buf.read() as view``, and several buffers at once (design: access is a fence).

One step under the reservation lock takes a snapshot of what is in the way and adds the access's own fence; then the snapshot is waited
for. So accesses are granted in the order of their arrival, and overlapping readers can't starve a writer. Every access has a fence
context of its own. States: WAITING until the snapshot has ended, then GRANTED.

A writer that raises, or dies, while GRANTED leaves the content *torn*: the mark is on the record before its fence ends with
``-ECANCELED`` or ``-EOWNERDEAD``, and ``read()`` raises that error until a later ``write()`` has completed. Who raises or dies while
WAITING has written nothing.

An access belongs to the thread or task that entered it; in a forked child the end of the block does nothing. Waiting for one's own
access is EDEADLK at once; a circle of accesses is EDEADLK in the youngest at a tick.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from dmabuf import _native
from dmabuf._native import Shm
from dmabuf.core.base.clock import monotonic_deadline
from dmabuf.core.base.usage import Direction, Usage
from dmabuf.core.buffer import residence
from dmabuf.core.fence import signalling
from dmabuf.core.fence.lazy import ask
from dmabuf.core.resv.lock import held_by, record_of
from dmabuf.core.resv.resv import pending as pending_on
from dmabuf.core.resv.until_free import until_free
from dmabuf.core.resv.ww_mutex import lock_all
from dmabuf.core.task import waiting as awaiting
from dmabuf.core.task.owner import Owner, acting, current, publish
from dmabuf.core.task.pause import Pause
from dmabuf.domain import place
from dmabuf.domain.dispatcher import dispatcher, report
from dmabuf.domain.domain import Domain
from dmabuf.errors import contract_warning, fail

if TYPE_CHECKING:
    from dmabuf.core.dma_buf import DmaBuf

_READ, _WRITE = int(Usage.READ), int(Usage.WRITE)
_pid = os.getpid


def access_timeline(domain: Domain) -> int:
    """The slot number + 1 of this process's timeline for accesses, whose names `dmabuf ls` shows."""
    domain.join()
    found: int | None = domain.local.get("access timeline")
    if found is None:
        index, _ = domain.timeline_open(b"dmabuf", place.comm() + b"-%d" % os.getpid())
        found = domain.local["access timeline"] = index + 1
    return found


class Access:
    """One buffer's ``read()`` or ``write()`` block, sync or async: a context manager for one use at a time."""

    __slots__ = (
        "_entered",
        "_error",
        "_failed",
        "_handle",
        "_index",
        "_kept",
        "_life",
        "_live",
        "_shm",
        "_timeout",
        "_view",
        "_window",
        "buf",
        "write",
    )

    _shm: Shm
    _index: int
    _life: int

    def __init__(self, buf: DmaBuf, write: bool, timeout: float | None) -> None:
        self.buf, self.write, self._timeout = buf, write, timeout
        self._entered = False
        self._view: memoryview | None = None
        self._window: _native.View | None = None
        self._handle = self._error = 0
        self._live: Any = None  # whose begin_cpu_access was called for this access
        self._kept: Any = None  # what to end it on, where it outlives the block and perhaps the handle
        self._failed: Exception | None = None  # what its end_cpu_access raised

    @property
    def operation(self) -> str:
        return "write" if self.write else "read"

    # ---- sync ----

    def __enter__(self) -> memoryview:
        until = self._begin()
        owner = current(self.buf.domain)
        try:
            pending = self._add(owner, until) if self.buf._record.live is None else self._arrive(owner, until)
            if pending is not None:
                _wait([self], owner, pending, until)
                self._grant()
            return self._show()
        except BaseException:
            self._abandon()
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: object) -> None:
        failed = self._finish(-errno.ECANCELED if kind is not None and self.write else 0)
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # else its traceback keeps this frame, and the user's view with it

    # ---- the parts, for one buffer ----

    def _begin(self) -> int:
        """Check what can be checked before anything is done; the end of the wait, CLOCK_MONOTONIC ns or -1."""
        buf = self.buf
        if self._entered:
            raise fail(errno.EBUSY, self.operation, buf, "call it again for another block", what="this block is entered already")
        if buf._fd < 0:
            buf._check(self.operation)
        until = -1 if self._timeout is None else monotonic_deadline(self._timeout, self.operation, buf)
        record = buf._record
        self._shm, self._index = record.at()
        self._life = self._shm.life
        # The mapping comes first: what may fail must not fail between "granted" and the block. An exporter's comes when it can't move.
        live = record.live
        if live is not None:
            live.mappable(buf, self.operation)
        if live is None or live.in_file:
            buf._window_source(self.write)
        self._entered = True
        return until

    def _arrive(self, owner: Owner, until: int) -> list[int] | None:
        """:meth:`_add` for one buffer alone. On a real dma-buf the kernel's fences come before the grant, which so is never at once."""
        if self.buf._kernel() is None:
            return self._add(owner, until)
        if held_by(self.buf.resv, owner) is not None:
            _locked_here(self)
        with lock_all((self.buf.resv,)):
            return self._add(owner, until, locked=True) or []

    def _add(self, owner: Owner, until: int, locked: bool = False) -> list[int] | None:
        """Snapshot and own fence; what has to be waited for, None when it is granted at once."""
        buf, shm, index = self.buf, self._shm, self._index
        resv = buf._resv or buf.resv
        if not locked and held_by(resv, owner) is not None:
            _locked_here(self)
        if not locked and signalling.sections:
            signalling.check_signalling(self.operation, buf)
        timeline = buf.domain.local.get("access timeline") or access_timeline(buf.domain)
        # It stores the handle in self by itself: a signal handler that raises as it returns must not lose it.
        answer = shm.access_begin(index, record_of(resv).index, owner.word, self.write, timeline, until, locked, self)
        if answer is None or isinstance(answer, list):
            return answer
        if answer < 0:
            self._refused(-answer)
        self._torn(answer)

    def _refused(self, error: int) -> NoReturn:
        if error == errno.EALREADY:
            _locked_here(self)
        if error == errno.ETIMEDOUT:
            raise self._timed_out()
        if error == errno.EDEADLK:
            raise fail(
                errno.EDEADLK,
                self.operation,
                self.buf,
                "leave the first block before the second, or take write() for both; one whose array or slice is still in use is not left",
                what="this thread or task is inside an access of the buffer already",
            )
        raise fail(error, self.operation, self.buf, "wait for fences, or drop some")

    def _torn(self, torn: int) -> NoReturn:
        pid = self.buf._record.info()["torn_pid"]
        how = "died" if torn == errno.EOWNERDEAD else "gave up with an exception"
        raise fail(
            torn,
            self.operation,
            self.buf,
            "write() it again: the next complete write makes it whole",
            what=f"its content is torn: the process {pid} {how} while writing",
        )

    def _grant(self) -> None:
        """The way is free. Errors: the torn mark's, for a reader."""
        torn = self._shm.access_grant(self._handle, self._index, self.write)
        if torn:
            self._torn(torn)

    def _show(self) -> memoryview:
        buf = self.buf
        if buf._record.live is not None and self._live is None:
            self._bracket(buf._record.live)
        mapping = buf._mapping or buf._window_source(self.write)
        self._window, view = _native.open_view(mapping, self._released, not self.write)
        self._view = view
        buf._accesses += 1
        return view

    def _bracket(self, live: Any) -> None:
        """The exporter's op, granted and before the block: the fences were waited for already."""
        live.begin(self.buf, Direction.BIDIRECTIONAL if self.write else Direction.FROM_DEVICE)
        self._live = live

    async def _bring(self, owner: Owner) -> None:
        """Granted: memory that has been moved away comes back in a thread; it may take a disk's time, and that of others in the way."""
        buf, live = self.buf, self.buf._record.live
        if live is not None and live.in_file and residence.is_away(buf._check(self.operation)):
            await awaiting.to_its_end(lambda: acting(owner, lambda: self._bracket(live)))

    def _unbracket(self) -> None:
        live, self._live = self._live, None
        kept, self._kept = self._kept, None
        live.end(kept or self.buf, Direction.BIDIRECTIONAL if self.write else Direction.FROM_DEVICE)

    def _abandon(self) -> None:
        """Not entered after all: nobody has seen the view, so nothing was written."""
        self._entered = False
        if self._live is not None:
            with contextlib.suppress(Exception):  # what made us give up is the error to tell
                self._unbracket()
        if self._view is not None:
            self.buf._accesses -= 1
            self._view.release()
            self._view = None
        handle, self._handle = self._handle, 0
        if handle:
            self._shm.fence_signal(handle, 0, True)
        if self._window is not None:
            self._window.retire()
            self._window = None

    def _finish(self, error: int) -> Exception | None:
        """End of the block. Returns the error to raise: a writer's view is still in use, or the exporter's end failed."""
        view, window = self._view, self._window
        if window is None:
            return None
        self._error = error
        in_use = False
        if view is not None:
            self._view = None
            self.buf._accesses -= 1
            try:
                view.release()
            except BufferError:
                in_use = True
            del view
        if self._live is not None and (in_use or window.exports):
            self._kept = self._live.keep_open(self.buf)
            if self._kept is None:
                self._end()  # nothing is left to end it on later
        # Until it is retired the window stays ours: what a signal handler interrupts here, __del__ finishes.
        free = window.retire()
        self._window = None
        self._entered = False
        if free and not in_use:
            failed, self._failed = self._failed, None
            return failed
        if not self.write or error:
            return None
        return BufferError(
            f"write: {self.buf}: an array or slice made from the view is still in use; "
            "the access ends when it is gone: delete it inside the block"
        )

    def _released(self) -> None:
        """The last export is gone: the access ends now."""
        shm, handle = self._shm, self._handle
        if handle and shm.life == self._life:
            if self._live is not None:
                self._end()
            shm.access_end(handle, self._index, self.write, self._error, _pid())
            self._handle = 0

    def _end(self) -> None:
        """The exporter's end, before the fence ends. A write that it could not complete is torn."""
        try:
            self._unbracket()
        except Exception as e:
            if self.write:
                self._error = self._error or -errno.ECANCELED
            if self._window is None:  # an array outlived the block: nobody is there to catch it
                report(e, self._unbracket)
            else:
                self._failed = e

    def _timed_out(self, why: str | None = None) -> OSError:
        return fail(
            errno.ETIMEDOUT,
            self.operation,
            self.buf,
            "`dmabuf ls` shows who is in the way",
            what=f"not granted within {self._timeout} s{_in_the_way(self) if why is None else why}",
        )

    # ---- async ----

    async def __aenter__(self) -> memoryview:
        until = self._begin()
        owner = current(self.buf.domain)
        try:
            await _locks_free([self], owner, until)
            pending = self._arrive(owner, until)
            if pending is not None:
                await _wait_async([self], owner, pending, until)
                self._grant()
            await self._bring(owner)
            return self._show()
        except BaseException:
            self._abandon()
            raise

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        self.__exit__(kind, value, trace)

    def __del__(self) -> None:
        if not self._entered or self._shm.life != self._life:
            return
        if self._window is None:
            self._abandon()
        else:  # entered and never left: as if the block had raised
            self._finish(self._error or (-errno.ECANCELED if self.write else 0))


class ManyAccesses:
    """What :func:`access` returns: several accesses that are granted together."""

    __slots__ = ("_parts", "_timeout")

    def __init__(self, parts: Sequence[Access], timeout: float | None) -> None:
        self._parts = parts
        self._timeout = timeout

    def __enter__(self) -> tuple[memoryview, ...]:
        until = self._begin()
        owner = current(self._parts[0].buf.domain) if self._parts else None
        try:
            if owner is not None:
                _wait(self._parts, owner, self._add(owner, until), until)
                for part in self._parts:
                    part._grant()
            return self._show()
        except BaseException:
            self._abandon()
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: object) -> None:
        failed: Exception | None = None
        for part in reversed(self._parts):
            failed = part._finish(-errno.ECANCELED if kind is not None and part.write else 0) or failed
        if failed is not None:
            try:
                raise failed
            finally:
                del failed

    async def __aenter__(self) -> tuple[memoryview, ...]:
        until = self._begin()
        owner = current(self._parts[0].buf.domain) if self._parts else None
        try:
            if owner is not None:
                await _locks_free(self._parts, owner, until)
                await _wait_async(self._parts, owner, self._add(owner, until), until)
                for part in self._parts:
                    part._grant()
                for part in self._parts:
                    await part._bring(owner)
            return self._show()
        except BaseException:
            self._abandon()
            raise

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        self.__exit__(kind, value, trace)

    def _begin(self) -> int:
        until = monotonic_deadline(self._timeout, "access", "buffers")
        for part in self._parts:
            part._begin()
        return until

    def _add(self, owner: Owner, until: int) -> list[int]:
        for part in self._parts:
            if held_by(part.buf.resv, owner) is not None:
                _locked_here(part)
        pending: dict[int, None] = {}
        with lock_all(part.buf.resv for part in self._parts):
            own: set[int] = set()
            for part in self._parts:
                pending.update(dict.fromkeys(part._add(owner, until, locked=True) or ()))
                own.add(part._handle)
        return [handle for handle in pending if handle not in own]

    def _show(self) -> tuple[memoryview, ...]:
        return tuple(part._show() for part in self._parts)

    def _abandon(self) -> None:
        for part in reversed(self._parts):
            part._abandon()


def _wait(parts: Sequence[Access], owner: Owner, pending: Sequence[int], until: int) -> None:
    shm = parts[0]._shm
    ask(owner.domain, pending)
    try:
        for handle in pending:
            if not shm.fence_pending(handle):
                continue
            publish(owner, handle)
            _native.step("access_waiting")
            if not shm.fence_wait(handle, until, False):
                raise parts[0]._timed_out()
    finally:
        if owner.wait_stamp:
            publish(owner, 0)
    for part in parts:
        kernel = part.buf._kernel()
        if kernel is not None and not kernel.settle(part.buf, part.write, until):
            raise part._timed_out(": in the way is a fence of the kernel's")


async def _locks_free(parts: Sequence[Access], owner: Owner, until: int) -> None:
    """A reservation lock is held for microseconds; a loop must all the same not stand still while somebody's is held for longer."""
    for resv in [part.buf.resv for part in parts]:
        while resv.is_locked() and held_by(resv, owner) is None:
            left = None if until < 0 else max(0.0, (until - time.monotonic_ns()) / 1e9)
            if not await until_free(resv, left):
                raise parts[0]._timed_out()


async def _wait_async(parts: Sequence[Access], owner: Owner, pending: Sequence[int], until: int) -> None:
    shm, watcher = parts[0]._shm, dispatcher(parts[0].buf.domain)
    ask(owner.domain, pending)
    try:
        for handle in pending:
            if not shm.fence_pending(handle):
                continue
            pause = awaiting.pause()

            def done(_: int, pause: Pause = pause) -> None:
                pause.end()

            token = watcher.watch(handle, done, foreign=True)
            if token is None:
                continue
            owner.awaiting = pause
            publish(owner, handle)
            try:
                left = None if until < 0 else max(0.0, (until - time.monotonic_ns()) / 1e9)
                if not await pause.within(left):
                    raise parts[0]._timed_out()
            finally:
                owner.awaiting = None
                watcher.unwatch(handle, token)
    finally:
        if owner.wait_stamp:
            publish(owner, 0)
    for part in parts:
        kernel = part.buf._kernel()
        if kernel is not None and not await kernel.settle_async(part.buf, part.write, until):
            raise part._timed_out(": in the way is a fence of the kernel's")


def _locked_here(part: Access) -> NoReturn:
    contract_warning(f"{part.operation}: {part.buf!r}: its reservation lock is held by this thread or task", 5)
    raise fail(errno.EDEADLK, part.operation, part.buf, "unlock the reservation object first", what="this owner holds its lock")


def _in_the_way(part: Access) -> str:
    """Whose fence it is, for the message."""
    shm = part._shm
    for handle in pending_on(part.buf.resv, _READ if part.write else _WRITE):
        if handle != part._handle and (info := shm.fence_info(handle)) is not None:
            kind = ("read", "write")[bool(info["flags"] & _native.FF_WRITE)] if info["flags"] & _native.FF_ACCESS else "fence"
            return f": in the way is a {kind} of process {part.buf.domain.pid_of(info['life'])}"
    return ""


def _buffers(which: str, given: Any) -> tuple[DmaBuf, ...]:
    """What a keyword of :func:`access` names. Errors: TypeError."""
    from dmabuf.core.dma_buf import DmaBuf

    found = (given,) if isinstance(given, DmaBuf) else tuple(given)
    for buf in found:
        if buf is given or not isinstance(buf, DmaBuf):
            hint = ": take range.buf, and range.of(view) in the block" if hasattr(buf, "of") else ""
            raise TypeError(
                f"access: {which} is a list of buffers, as {which}=[a, b], not {'one' if buf is given else 'of'} {type(buf).__name__}{hint}"
            )
    return found


def access(*, read: Sequence[DmaBuf] = (), write: Sequence[DmaBuf] = (), timeout: float | None = None) -> ManyAccesses:
    """Read and write several buffers at once, without a deadlock whatever others do.

    ``with dmabuf.access(read=[a, b], write=[c]) as views``: a view a buffer, the read ones first, in the order given. ``async with`` too.

    Errors: EINVAL a buffer named twice; EXDEV buffers of several domains; EBADF a closed one; ETIMEDOUT (also ``TimeoutError``), having
    added nothing; EDEADLK one of them is accessed by this thread or task already; EOWNERDEAD, ECANCELED a torn buffer to be read;
    TypeError something else than lists of buffers (for ranges see :meth:`BufferRange.of`).
    """
    read, write = _buffers("read", read), _buffers("write", write)
    parts = [Access(b, False, timeout) for b in read] + [Access(b, True, timeout) for b in write]
    if len({part.buf for part in parts}) != len(parts):
        raise fail(errno.EINVAL, "access", "a buffer named twice", "name each buffer once; write includes reading")
    if len({part.buf.domain for part in parts}) > 1:
        raise fail(errno.EXDEV, "access", "buffers of several domains", "take the buffers of each domain in a block of their own")
    return ManyAccesses(parts, timeout)
