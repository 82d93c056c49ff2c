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

import errno
import os
import time
from collections.abc import Sequence
from typing import Final, NoReturn, TypeAlias

from dmabuf._native import (
    FF_ACCESS,
    FF_ASKED,
    FF_WRITE,
    Access,
    AccessGroup,
    AccessPath,
    Mapping,
    TimelineSlot,
    release_kept,
    set_access_rules,
    step,
)
from dmabuf.core.access import described, kept
from dmabuf.core.access.tensor import tensor
from dmabuf.core.base.clock import monotonic_deadline
from dmabuf.core.base.usage import Direction, Usage
from dmabuf.core.buffer import residency
from dmabuf.core.buffer.backing import Backing, Descriptor
from dmabuf.core.buffer.handle import Handle
from dmabuf.core.fence import signalling
from dmabuf.core.fence.lazy import ask
from dmabuf.core.resv.lock import held_by, record_of
from dmabuf.core.resv.resv import pending as pending_on
from dmabuf.core.resv.until_free import until_free
from dmabuf.core.resv.ww_mutex import lock_all_until
from dmabuf.core.task import waiting as awaiting
from dmabuf.core.task.owner import Owner, acting, current, publish, thread_of
from dmabuf.domain import naming, place, stream_users
from dmabuf.domain.dispatcher import dispatcher, report
from dmabuf.domain.local import Local
from dmabuf.errors import DmaBufTimeout, contract_warning, fail

_READ, _WRITE = int(Usage.READ), int(Usage.WRITE)
_LOOP_WAIT_NS: Final = 2_000_000  # a lock is held for microseconds; a loop may stand still so long for one

Blocks: TypeAlias = Access | AccessGroup

_SLOT: Final[Local[TimelineSlot]] = Local(lambda domain: domain.timeline_open(b"dmabuf", place.comm() + b"-%d" % os.getpid()))
_TIMELINE: Final[Local[int]] = Local(lambda domain: _SLOT.of(domain).index + 1)
"""The slot number + 1 of this process's timeline for accesses, whose names `dmabuf ls` shows."""


def parts_of(blocks: Blocks) -> tuple[Access, ...]:
    """Return the blocks of a group, or the block alone."""
    return blocks.parts if isinstance(blocks, AccessGroup) else (blocks,)


def operation_of(part: Access) -> str:
    """Return the name of the verb."""
    return "write" if part.write else "read"


class Rules:
    """The rules of accesses that are Python code; C calls them (native/access/block.h says when).

    What a rule takes it returns: C notes it, and undoes everything if a rule raises, be it for a signal handler.
    """

    def prepare(self, part: Access) -> AccessPath:
        """Check what can be checked before anything is done, and return what the accesses of the handle need."""
        handle: Handle = part.handle
        operation = operation_of(part)
        handle.check(operation)
        shared = handle.shared
        shm, index = shared.at()
        # Map first: what may fail must not fail between "granted" and the block. An exporter's memory is mapped once it can't move.
        backing = shared.backing
        if backing is not None:
            backing.mappable(part.buf, operation)
        if backing is None or backing.in_file:
            handle.view_source(part.write)
        domain = handle.domain
        target = record_of(handle.resv).index
        kernel = handle.kernel() is not None
        path = handle.access_path()
        path.aim(shm, shm.life, index, target, _TIMELINE.of(domain), thread_of(domain), backing, kernel)
        return path

    def until(self, blocks: Blocks) -> int:
        """Return the end of the wait, CLOCK_MONOTONIC ns."""
        if isinstance(blocks, AccessGroup):
            return monotonic_deadline(blocks.timeout, "access", "buffers")
        return monotonic_deadline(blocks.timeout, operation_of(blocks), blocks.handle)

    def owner(self, part: Access) -> Owner:
        """Return the thread or task that runs now."""
        return current(part.handle.domain)

    def check(self, part: Access, owner: Owner) -> None:
        """Refuse an access under the buffer's own lock, and warn of one in a signalling section."""
        handle: Handle = part.handle
        if held_by(handle.resv, owner) is not None:
            locked_here(part)
        signalling.check_signalling(operation_of(part), handle, 3)

    def refused(self, part: Access, error: int) -> NoReturn:
        """Raise the error of an access that can't be entered."""
        operation, handle = operation_of(part), part.handle
        if error == errno.EALREADY:
            locked_here(part)
        if error == errno.ETIMEDOUT:
            raise timed_out(part)
        if error == errno.EBUSY:
            remedy, what = "call it again for another block", "this block is already entered, or something made from its view is kept"
            raise fail(errno.EBUSY, operation, handle, remedy, what=what)
        if error == errno.EAGAIN:
            remedy = "don't await, or switch to another greenlet, while you hold the lock"
            what = "another task of this thread holds its reservation lock, and can't go on meanwhile"
            raise fail(errno.EDEADLK, operation, handle, remedy, what=what)
        if error == errno.EDEADLK:
            raise fail(
                errno.EDEADLK,
                operation,
                handle,
                "leave that block first and delete arrays made from its view, or use one write() block",
                what="this thread or task is already inside a block of this buffer",
            )
        if error == errno.EOWNERDEAD:
            raise fail(error, operation, handle, "enter the block again", what="this process left the domain meanwhile")
        if error == errno.EINVAL:
            raise fail(error, operation, handle, "make the range anew", what="its mapping is smaller than the range")
        raise fail(error, operation, handle, "wait for fences, or drop some")

    def torn(self, part: Access, torn: int) -> NoReturn:
        """Raise the error of torn content."""
        handle: Handle = part.handle
        seen = handle.shared.info()
        who = f"process {seen['torn_pid']}" if seen["torn"] == torn else "a process"  # else another write() has ended since
        how = "died or left the domain" if torn == errno.EOWNERDEAD else "raised an exception"
        raise fail(
            torn,
            operation_of(part),
            handle,
            "write() it again: the next complete write makes it whole",
            what=f"its content is torn: {who} {how} while writing",
        )

    def waited(self, owner: Owner) -> None:
        """Have the owner wait for nothing any more, after a wait that raised."""
        if owner.wait_stamp:
            publish(owner, 0)

    def wait(self, blocks: Blocks, owner: Owner, pending: list[int], until: int) -> None:
        """Wait until nothing blocks the accesses."""
        wait(parts_of(blocks), owner, pending, until)

    def locked(self, group: AccessGroup, owner: Owner, until: int) -> list[int]:
        """Add the fences of several accesses under their locks, one of which isn't free. Return what blocks them."""
        for part in group.parts:
            if held_by(part.handle.resv, owner) is not None:
                locked_here(part)
            release_kept(owner.domain.shm, part.target, 0)  # what this process left would be in the way of this very thread
        with lock_all_until((part.handle.resv for part in group.parts), until):
            pending = group.add(owner)
        own = {part.fence for part in group.parts}
        return [fence for fence in dict.fromkeys(pending) if fence not in own]

    async def arrive(self, blocks: Blocks, owner: Owner, pending: list[int] | None, until: int) -> None:
        """Arrive, if the locks were not free, and wait until nothing blocks the accesses."""
        parts = parts_of(blocks)
        if pending is None:
            pending = await arrive_async(blocks, owner, until)
        await wait_async(parts, owner, pending, until)
        for part in parts:
            await _bring(part, owner)

    def map(self, part: Access) -> Mapping:
        """Return the mapping that the block looks through."""
        found: Mapping = part.handle.view_source(part.write)
        return found

    def begin(self, part: Access, backing: Backing) -> None:
        """Call the exporter's op, granted and before the block. The fences were waited for already."""
        backing.begin(part.buf, _direction(part), part)

    def end(self, part: Access, backing: Backing, kept: Descriptor | None) -> None:
        """Call the exporter's op, before the fence ends."""
        backing.end(kept or part.buf, _direction(part), part)

    def keep(self, part: Access, backing: Backing) -> Descriptor | None:
        """Return what :meth:`end` can be called with once the handle may be closed; None: nothing."""
        return backing.keep_open(part.buf)

    def kept(self, part: Access, how: str) -> None:
        """Have what a ``read()`` left give way to writers, or warn of what was detached."""
        if how == "read":
            kept.yields(part)
        else:
            kept.warn(part, zeros=how == "zeros")

    tensor = staticmethod(tensor)
    array = staticmethod(described.array)
    planes = staticmethod(described.planes)

    def in_use(self, part: Access) -> BufferError:
        """Return the error of a writer's block of which so much is kept that it can't be copied, or that can't be detached."""
        return BufferError(
            f"write: {part.handle}: an array made from the view is still in use, and can't be given a copy; the content is torn: "
            "delete it inside the block"
        )

    def report(self, part: Access, error: Exception) -> None:
        """Report what the exporter's op raised when an array that outlived the block went."""
        report(error, self.end)


_RULES: Final = Rules()
set_access_rules(_RULES, signalling.sections)


def _direction(part: Access) -> Direction:
    return Direction.BIDIRECTIONAL if part.write else Direction.FROM_DEVICE


async def _bring(part: Access, owner: Owner) -> None:
    """Bring memory that has been moved away back, in a thread: it may take a disk's time, and wait for other buffers."""
    handle: Handle = part.handle
    backing = handle.shared.backing
    if backing is not None and backing.in_file and residency.is_evicted(handle.descriptor(operation_of(part))):
        await awaiting.to_its_end(lambda: acting(owner, lambda: part.begin(backing)))


def timed_out(part: Access, blocker: str | None = None) -> OSError:
    """Return the error of a wait that took too long. ``blocker``: what it waited for, None to look."""
    what = f"timed out after {part.timeout} s"
    by = _blocker(part) if blocker is None else blocker
    if by:
        what += f", blocked by {by}"
    return fail(errno.ETIMEDOUT, operation_of(part), part.handle, "run `dmabuf ls` to see what blocks the buffer", what=what)


def _blocker(part: Access) -> str:
    """Return what blocks the access, and in which process; empty when nothing does any more."""
    handle: Handle = part.handle
    shm = handle.shared.shm
    for fence in pending_on(handle.resv, _READ if part.write else _WRITE):
        if fence != part.fence and (info := shm.fence_info(fence)) is not None:
            if info["flags"] & FF_ASKED:
                return stream_users.stands_in_the_way(handle.domain, info["seqno"])
            kind = ("read()", "write()")[bool(info["flags"] & FF_WRITE)] if info["flags"] & FF_ACCESS else "a fence"
            return f"{kind} in {naming.process(handle.domain, info['life'])}"
    return ""


# ---- waiting, for one access or several that are granted together ----


def _sleep(parts: Sequence[Access], owner: Owner, pending: Sequence[int], until: int) -> None:
    while pending:
        _sleep_for(parts, owner, pending, until)
        # A stream's slot has no fences of its own, and one that stands for it ends with whoever asked for it first.
        pending = [fence for part in parts for fence in part.blocked()]


def _sleep_for(parts: Sequence[Access], owner: Owner, pending: Sequence[int], until: int) -> None:
    shm = owner.domain.shm
    for fence in pending:
        if not shm.fence_pending(fence):
            continue
        publish(owner, fence, blocking=True)
        step("access_waiting")
        soon = time.monotonic_ns() + kept.WAIT_NS
        if 0 <= until <= soon:
            ended = shm.fence_wait(fence, until, False)
        elif not (ended := shm.fence_wait(fence, soon, False)):
            for part in parts:
                kept.ask(owner.domain, part, fence)
            ended = shm.fence_wait(fence, until, False)
        if not ended:
            raise timed_out(parts[0])


def wait(parts: Sequence[Access], owner: Owner, pending: Sequence[int], until: int) -> None:
    """Wait until nothing blocks the accesses."""
    shm = owner.domain.shm
    ask(owner.domain, pending)
    for fence in pending:
        if shm.fence_is_here(fence) and not sum(release_kept(shm, part.target, fence) for part in parts):
            raise _stalled(parts)
    try:
        _sleep(parts, owner, pending, until)
    finally:
        if owner.wait_stamp:
            publish(owner, 0)
    for part in parts:
        kernel = part.handle.kernel()
        if kernel is not None and not kernel.wait_kernel(part.handle, part.write, until):
            raise timed_out(part, "a kernel fence")


def _stalled(parts: Sequence[Access]) -> OSError:
    """Return the error of an access whose wait would keep another task of its thread from leaving its block."""
    remedy = "wait with `async with`, let one task or greenlet of a thread use the buffer at a time, or delete arrays made from its view"
    what = "another task or greenlet of this thread is inside a block of the buffer, and can't leave it while the thread waits"
    named = parts[0].handle if len(parts) == 1 else "buffers"
    return fail(errno.EDEADLK, operation_of(parts[0]) if len(parts) == 1 else "access", named, remedy, what=what)


async def _ended_within(owner: Owner, fence: int, seconds: float | None) -> bool:
    """Stop the task until a fence is signaled, at most so long. Return False when the time was over first."""
    pause, watcher = awaiting.pause(), dispatcher(owner.domain)

    def done(_: int) -> None:
        pause.end()

    token = watcher.watch(fence, done, foreign=True)
    if token is None:
        return True
    owner.awaiting = pause
    publish(owner, fence)
    try:
        return await pause.within(seconds)
    finally:
        owner.awaiting = None
        watcher.unwatch(fence, token)


async def wait_async(parts: Sequence[Access], owner: Owner, pending: Sequence[int], until: int) -> None:
    """:func:`wait` in a coroutine."""
    ask(owner.domain, pending)
    try:
        await _stop_until_free(parts, owner, pending, until)
    finally:
        if owner.wait_stamp:
            publish(owner, 0)
    for part in parts:
        kernel = part.handle.kernel()
        if kernel is not None and not await kernel.wait_kernel_async(part.handle, part.write, until):
            raise timed_out(part, "a kernel fence")


async def _stop_until_free(parts: Sequence[Access], owner: Owner, pending: Sequence[int], until: int) -> None:
    """Stop the task until nothing is in the way. Not in the caller's ``try``: some compilers leave the jump of such a loop out of it."""
    while pending:
        await _stop_until(parts, owner, pending, until)
        pending = [fence for part in parts for fence in part.blocked()]


async def _stop_until(parts: Sequence[Access], owner: Owner, pending: Sequence[int], until: int) -> None:
    """Stop the task until the fences are signaled."""
    shm, soon = owner.domain.shm, kept.WAIT_NS / 1e9
    for fence in pending:
        if not shm.fence_pending(fence):
            continue
        left = None if until < 0 else max(0.0, (until - time.monotonic_ns()) / 1e9)
        if left is not None and left <= soon:
            ended = await _ended_within(owner, fence, left)
        elif not (ended := await _ended_within(owner, fence, soon)):
            for part in parts:
                kept.ask(owner.domain, part, fence)
            ended = await _ended_within(owner, fence, None if left is None else left - soon)
        if not ended:
            raise timed_out(parts[0])


async def arrive_async(blocks: Blocks, owner: Owner, until: int) -> list[int]:
    """Take the reservation locks when they are free, add the accesses' fences, and return what blocks them.

    A holder, or the next waiter in line, may be stopped at any moment. The loop then stands still for :data:`_LOOP_WAIT_NS` at most.
    """
    parts = parts_of(blocks)
    while True:
        await _locks_free(parts, owner, until)
        limit = time.monotonic_ns() + _LOOP_WAIT_NS
        first = limit if until < 0 else min(limit, until)
        try:
            return _RULES.locked(blocks, owner, first) if isinstance(blocks, AccessGroup) else blocks.arrive(owner, first)
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
                raise timed_out(parts[0])


def locked_here(part: Access) -> NoReturn:
    """Refuse an access of a thread or task that holds the buffer's reservation lock."""
    contract_warning(f"{operation_of(part)}: {part.handle!r}: its reservation lock is held by this thread or task", 3)
    what = "this thread or task holds its reservation lock"
    raise fail(errno.EDEADLK, operation_of(part), part.handle, "unlock the reservation object first", what=what)
