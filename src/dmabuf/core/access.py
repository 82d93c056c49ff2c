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

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dmabuf import _native
from dmabuf.core.fence import monotonic_deadline
from dmabuf.core.owner import Owner, current, deadlock, publish
from dmabuf.core.resv import DmaResv
from dmabuf.core.usage import Usage
from dmabuf.core.ww_mutex import lock_all
from dmabuf.domain.dispatcher import dispatcher
from dmabuf.domain.domain import Domain
from dmabuf.errors import contract_warning, fail

if TYPE_CHECKING:
    from dmabuf.core.buffer import DmaBuf

_READ, _WRITE = int(Usage.READ), int(Usage.WRITE)
_FLAGS = (_native.FF_ACCESS, _native.FF_ACCESS | _native.FF_WRITE)
_OFF_CONTEXT = _native.OFF_CONTEXT


def access_timeline(domain: Domain) -> int:
    """The slot number + 1 of this process's timeline for accesses, whose names `dmabuf ls` shows."""
    domain.join()
    found: int | None = domain.local.get("access timeline")
    if found is None:
        with open("/proc/self/comm", "rb") as f:
            comm = f.read().strip()
        index, _ = domain.timeline_open(b"dmabuf", comm[:15] + b"-%d" % os.getpid())
        found = domain.local["access timeline"] = index + 1
    return found


class _Hand:
    """One buffer of an access: its fence, its window and view, and how it ends."""

    __slots__ = ("buf", "done", "error", "handle", "index", "life", "record", "shm", "view", "window", "write")

    def __init__(self, buf: DmaBuf, write: bool) -> None:
        self.buf, self.write = buf, write
        self.record = buf._record
        self.shm = self.record.shm
        self.handle = self.life = self.error = self.index = 0
        self.view: memoryview | None = None
        self.window: _native.Window | None = None
        self.done = False

    def add(self, resv: DmaResv, owner: Owner, pending: list[int]) -> None:
        """Lock held: collect what is in the way, add the own fence."""
        shm, index = self.shm, self.index
        target = resv._record.index
        for handle in shm.resv_pending(target, _READ if self.write else _WRITE, 0):
            info = shm.fence_info(handle)
            if info is not None and info["owner"] == owner.word:
                raise fail(
                    errno.EDEADLK,
                    "write" if self.write else "read",
                    self.buf,
                    "leave the first block before the second, or take write() for both",
                    what="this thread or task is inside an access of the buffer already",
                )
            pending.append(handle)
        if (answer := shm.resv_reserve(target, 1)) < 0:
            raise fail(-answer, "access", self.buf, "wait for fences, or drop some")
        context = shm.add64(_OFF_CONTEXT, 1)
        self.handle = shm.fence_alloc(access_timeline(self.buf.domain), context, 1, _FLAGS[self.write], owner.word, index + 1)
        self.life = shm.life
        _native.step("access_fence")  # pending and unknown: ends with us
        shm.resv_add(target, self.handle, _WRITE if self.write else _READ, 1)
        _native.step("access_added")  # WAITING: dying here writes nothing

    def grant(self) -> memoryview:
        """The way is free: show the memory. Errors: the torn mark's, for a reader."""
        buf, shm = self.buf, self.shm
        if not self.write and (torn := shm.rec_torn(self.index)):
            raise fail(torn, "read", buf, "write() it again: the next complete write makes it whole", what=_torn_text(torn, buf))
        mapping = buf._window_source(self.write)
        self.window, self.view = _native.window_view(mapping, self._released, not self.write)
        shm.fence_mark(self.handle, "granted", 1)
        _native.step("access_granted")  # GRANTED: dying from here on tears what is written
        buf._accesses += 1
        return self.view

    def abandon(self, error: int) -> None:
        """Give up while WAITING: nothing was written."""
        if self.handle and not self.done:
            self.done = True
            self.shm.fence_signal(self.handle, error, True)

    def finish(self, error: int) -> BufferError | None:
        """End of the block. Returns the error to raise when a writer's view is still in use."""
        view, window = self.view, self.window
        self.view = None
        if view is None or window is None:
            return None
        self.buf._accesses -= 1
        self.error = error
        held: BufferError | None = None
        try:
            view.release()
        except BufferError as e:
            held = e
        del view
        if not window.retire() and held is None:
            held = BufferError("a slice of the view is still in use")
        if held is None or not self.write or error:
            return None
        return BufferError(
            f"write: {self.buf}: an array or slice made from the view is still in use; "
            "the access ends when it is gone: delete it inside the block"
        )

    def _released(self) -> None:
        """The last export is gone: the access ends now."""
        if self.done or self.shm.life != self.life:
            return
        self.done = True
        shm, index = self.shm, self.index
        if self.write:
            if self.error:
                shm.rec_set(index, "torn_pid", os.getpid())
                shm.rec_set(index, "torn", -self.error)
                _native.step("access_torn")  # torn, still pending: the reaper marks it again
            elif shm.rec_torn(index):
                shm.rec_set(index, "torn", 0)
                _native.step("access_whole")  # whole, still GRANTED: dying here tears it again, which is only cautious
        shm.fence_signal(self.handle, self.error, True)
        _native.step("access_ended")


def _torn_text(torn: int, buf: DmaBuf) -> str:
    pid = buf._record.info()["torn_pid"]
    how = "died" if torn == errno.EOWNERDEAD else "gave up with an exception"
    return f"its content is torn: the process {pid} {how} while writing"


class Access:
    """What ``read()``, ``write()`` and ``access()`` return: a context manager, sync or async, for one use."""

    __slots__ = ("_hands", "_inside", "_many", "_owner", "_timeout")

    def __init__(self, wanted: Sequence[tuple[DmaBuf, bool]], timeout: float | None, many: bool) -> None:
        self._hands = [_Hand(buf, write) for buf, write in wanted]
        self._many = many
        self._timeout = timeout
        self._inside = False
        self._owner: Owner | None = None

    # ---- sync ----

    def __enter__(self) -> Any:
        until = self._begin()
        owner = self._owner = current(self._hands[0].buf.domain) if self._hands else None
        pending: list[int] = []
        try:
            if owner is not None:
                self._add(owner, pending, until)
                if pending:
                    self._wait(owner, pending, until)
            return self._grant()
        except BaseException:
            self._abandon()
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: object) -> None:
        self._inside = False
        failed: BufferError | None = None
        for hand in reversed(self._hands):
            failed = hand.finish(-errno.ECANCELED if kind is not None and hand.write else 0) or failed
        if failed is not None:
            raise failed

    def _begin(self) -> int:
        if self._inside:
            raise fail(
                errno.EBUSY,
                "access",
                self._hands[0].buf,
                "call read() or write() again for another block",
                what="this block is entered already",
            )
        for hand in self._hands:
            hand.buf._usable("write" if hand.write else "read")
            hand.index = hand.record.ensure()
            hand.shm, hand.done, hand.handle = hand.record.shm, False, 0
        until = monotonic_deadline(self._timeout, "access", self._hands[0].buf if self._hands else "no buffer")
        self._inside = True
        return until

    def _add(self, owner: Owner, pending: list[int], until: int) -> None:
        if len(self._hands) == 1:
            hand = self._hands[0]
            resv = hand.buf.resv
            if resv._held is not None and resv._mine(owner) is not None:
                _locked_here(hand)
            try:
                resv.acquire(owner, until=until, operation="access")
            except TimeoutError:
                raise self._timed_out() from None
            try:
                hand.add(resv, owner, pending)
            finally:
                resv.release()
            return
        for hand in self._hands:
            if hand.buf.resv._mine(owner) is not None:
                _locked_here(hand)
        with lock_all(hand.buf.resv for hand in self._hands):
            before: set[int] = set()
            for hand in self._hands:
                found: list[int] = []
                hand.add(hand.buf.resv, owner, found)
                pending.extend(h for h in found if h not in before)
                before.update(found)

    def _wait(self, owner: Owner, pending: list[int], until: int) -> None:
        shm = self._hands[0].shm
        try:
            for handle in pending:
                if not shm.fence_pending(handle):
                    continue
                publish(owner, handle)
                _native.step("access_waiting")
                if not shm.fence_wait(handle, until, False):
                    raise self._timed_out()
        finally:
            if owner.wait_stamp:
                publish(owner, 0)

    def _timed_out(self) -> OSError:
        hand = self._hands[0]
        return fail(
            errno.ETIMEDOUT,
            "access" if self._many else "write" if hand.write else "read",
            hand.buf,
            "`dmabuf ls` shows who is in the way",
            what=f"not granted within {self._timeout} s{_in_the_way(hand)}",
        )

    def _grant(self) -> Any:
        if not self._many:
            return self._hands[0].grant()
        return tuple(hand.grant() for hand in self._hands)

    def _abandon(self) -> None:
        """Nothing is granted after all; what was granted before a later one failed has not been seen by anybody."""
        self._inside = False
        for hand in reversed(self._hands):
            if hand.window is not None and hand.view is not None:
                hand.buf._accesses -= 1
                hand.view.release()
                hand.view = None
            hand.abandon(0)
            if hand.window is not None:
                hand.window.retire()

    # ---- async ----

    async def __aenter__(self) -> Any:
        until = self._begin()
        owner = self._owner = current(self._hands[0].buf.domain) if self._hands else None
        pending: list[int] = []
        try:
            if owner is not None:
                await self._add_async(owner, pending, until)
                if pending:
                    await self._wait_async(owner, pending, until)
            return self._grant()
        except BaseException:
            self._abandon()
            raise

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        self.__exit__(kind, value, trace)

    async def _add_async(self, owner: Owner, pending: list[int], until: int) -> None:
        # A reservation lock is held for microseconds; a loop must all the same not stand still while somebody else's is not.
        loop = asyncio.get_running_loop()
        while any(hand.buf.resv.is_locked() and hand.buf.resv._mine(owner) is None for hand in self._hands):
            gone = threading.Event()
            try:
                await loop.run_in_executor(None, _until_free, [hand.buf.resv for hand in self._hands], until, gone)
            except TimeoutError:
                raise self._timed_out() from None
            finally:
                gone.set()
        self._add(owner, pending, until)

    async def _wait_async(self, owner: Owner, pending: list[int], until: int) -> None:
        loop = asyncio.get_running_loop()
        shm, watcher = self._hands[0].shm, dispatcher(self._hands[0].buf.domain)
        try:
            for handle in pending:
                if not shm.fence_pending(handle):
                    continue
                future: asyncio.Future[None] = loop.create_future()

                def done(_: int, future: asyncio.Future[None] = future) -> None:
                    with contextlib.suppress(RuntimeError):  # the loop was closed: nobody awaits it any more
                        loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(None))

                token = watcher.watch(handle, done, foreign=True)
                if token is None:
                    continue
                owner.awaiting = (loop, future)
                publish(owner, handle)
                try:
                    left = None if until < 0 else max(0.0, (until - time.monotonic_ns()) / 1e9)
                    async with asyncio.timeout(left):
                        await future
                except TimeoutError:
                    raise self._timed_out() from None
                finally:
                    owner.awaiting = None
                    watcher.unwatch(handle, token)
        finally:
            if owner.wait_stamp:
                publish(owner, 0)

    def __del__(self) -> None:
        if getattr(self, "_inside", False):
            for hand in self._hands:  # entered and never left: as if the block had raised
                if hand.view is not None and hand.shm.life == hand.life:
                    hand.finish(-errno.ECANCELED)


def _until_free(resvs: Sequence[DmaResv], until: int, gone: threading.Event) -> None:
    """In a helper thread: wait until none of the locks is held, by taking and giving back each."""
    for resv in resvs:
        if not gone.is_set():
            owner = current(resv.domain)
            resv_lock, index = resv._record.shm.resv_lock, resv._record.ensure()
            answer = resv_lock(index, owner.word, 0, False, False, until)
            if answer >= 0:
                resv._record.shm.resv_unlock(index, owner.word)
            elif answer == -errno.ETIMEDOUT:
                raise TimeoutError


def _locked_here(hand: _Hand) -> None:
    contract_warning(f"{'write' if hand.write else 'read'}: {hand.buf!r}: its reservation lock is held by this thread or task", 5)
    raise deadlock("write" if hand.write else "read", hand.buf)


def _in_the_way(hand: _Hand) -> str:
    """Whose fence it is, for the message."""
    shm = hand.shm
    for handle in hand.buf.resv.pending(_READ if hand.write else _WRITE):
        if handle != hand.handle and (info := shm.fence_info(handle)) is not None:
            kind = ("read", "write")[bool(info["flags"] & _native.FF_WRITE)] if info["flags"] & _native.FF_ACCESS else "fence"
            return f": in the way is a {kind} of process {hand.buf.domain.pid_of(info['life'])}"
    return ""


def access(*, read: Sequence[DmaBuf] = (), write: Sequence[DmaBuf] = (), timeout: float | None = None) -> Access:
    """Read and write several buffers at once, without a deadlock whatever others do.

    ``with dmabuf.access(read=[a, b], write=[c]) as views``: a view a buffer, the read ones first, in the order given. ``async with`` too.

    Errors: EINVAL a buffer named twice; EXDEV buffers of several domains; EBADF a closed one; ETIMEDOUT (also ``TimeoutError``), having
    added nothing; EDEADLK one of them is accessed by this thread or task already; EOWNERDEAD, ECANCELED a torn buffer to be read.
    """
    wanted = [(b, False) for b in read] + [(b, True) for b in write]
    if len({b for b, _ in wanted}) != len(wanted):
        raise fail(errno.EINVAL, "access", "a buffer named twice", "name each buffer once; write includes reading")
    if len({b.domain for b, _ in wanted}) > 1:
        raise fail(errno.EXDEV, "access", "buffers of several domains", "take the buffers of each domain in a block of their own")
    return Access(wanted, timeout, True)
