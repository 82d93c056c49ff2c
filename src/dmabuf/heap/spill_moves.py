"""The moves of a spill heap: which buffers are in memory, and how a buffer moves out and in (`spill` has the user's view).

*A move out* has these steps, each with the state that a ``kill -9`` just after it leaves. The importers get ENODEV from then on. No process
reads a buffer without having entered it, and no entered buffer is moved.

====================  =====================================================================================================================
chosen                nothing uses the buffer, and nothing can until the move ends (the write lock of byte 1, and the state in this process)
spill_locked          its reservation lock is held. It is only tried, because another holder is about to use the buffer
spill_notified        ``move_notify`` ran, a KERNEL fence is on the reservation object, and the lock is free. A death signals the fence
spill_waited          every other fence up to BOOKKEEP is signaled. Tables that importers kept are revoked, so a late device faults
spill_written         the content is in the file too, in the range reserved by ``allocate``. If the write fails, nothing has changed
spill_punched         the memfd has no pages any more
spill_left            the budget has the bytes, and the fence is signaled
====================  =====================================================================================================================

The lock is not held during the copy, which may take as long as a disk. Other processes see the fence, so a waiter can find out why it waits
(``dmabuf ls``), time out, or be interrupted. *A move in* needs no lock and no fence, because nothing has entered the buffer. Its steps are
``spill_claimed`` (bytes of the budget), ``spill_reserved`` (pages in the memfd, or ENOMEM), ``spill_read`` and ``spill_here``. The file is
never synced, because it keeps nothing beyond the process.

A move runs in a thread where no signal handler raises (`shielded`). A caller that waits for it may be interrupted, and the move goes on.

*Threads.* Any thread may call everything. An exporter's ops come with the buffer's reservation lock or without it, as `core.contract` says.
The lock of this module is held for a short time only: never while a thread waits for a reservation lock, copies a file or runs a callback.
It may be taken inside a reservation lock.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections import OrderedDict

from dmabuf._native import OwnedFd, map_same, step
from dmabuf.core.attach import attachment
from dmabuf.core.attach.attachment import DmaBufAttachment
from dmabuf.core.base.usage import Usage
from dmabuf.core.buffer import residency
from dmabuf.core.contract import RevocableImporter
from dmabuf.core.fence.timeline import Timeline
from dmabuf.core.resv.resv import pending
from dmabuf.core.task.owner import current
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.domain.guards import WeakKeys
from dmabuf.errors import DmaBufError, fail
from dmabuf.heap import budget
from dmabuf.heap.shielded import run_shielded
from dmabuf.heap.spill_buffer import Residency, SpillBuffer
from dmabuf.heap.spill_file import SpillFile, reserve, slices

punch = OwnedFd.punch
"""A name of its own, so that tests can replace it."""


class ResidentSet:
    """The buffers of one heap, and which of them are in memory: at most ``budget`` bytes. Its fields are read with ``changed`` held."""

    def __init__(self, budget: int, memory_timeout: float, file: SpillFile) -> None:
        self.budget, self.memory_timeout, self.file = budget, memory_timeout, file
        self.lock = threading.RLock()  # re-entrant, because a signal handler may use buffers in the middle
        self.changed = threading.Condition(self.lock)
        self.order: OrderedDict[SpillBuffer, None] = OrderedDict()  # that have bytes of the budget, used longest ago first
        self.buffers: set[SpillBuffer] = set()
        self.resident = self.moves_out = self.moves_in = self.written = self.read = 0
        self._timelines: weakref.WeakKeyDictionary[Domain, tuple[int, Timeline]] = WeakKeys()
        self.closed = False

    def add(self, b: SpillBuffer) -> None:
        """Add a buffer, which is not in memory."""
        with self.lock:
            self.buffers.add(b)

    def close(self) -> None:
        """Note that no more buffers will be added."""
        with self.lock:
            self.closed = True
            if not self.buffers:
                self.file.close()
                self._timelines.clear()

    # ---- uses ----

    def enter(self, b: SpillBuffer, *, write: bool, pin: bool = False, locked: bool = False, counted: bool = False) -> None:
        """Count a use, or a pin, and move the buffer in if need be. ``locked``: whether its reservation lock is held for this call.
        ``counted``: the caller has counted the use, so that the one counted here is only for this call.

        Raises:
            NoMemoryError: The budget has no room for it in time (ENOMEM).
            DeadlockError: The caller is inside a move of the buffer (EDEADLK).
            DmaBufError: The file can't be read or written (EIO and the like).
        """
        inside = entered = False
        try:
            with self.lock:
                b.uses += 1  # from here on no thread begins to move it out
                inside = True
            if b.residency is not Residency.IN_MEMORY:
                owner = current(b.resv.domain).word
                run_shielded(lambda: self._bring(b, owner, locked))
            with self.lock:
                if b not in self.order:
                    raise _closed(b)
                b.dirty = b.dirty or write
                b.pins += pin
                self.order.move_to_end(b)
                entered = True
        finally:
            if inside and (pin or counted or not entered):
                with self.lock:  # not in a function, because a signal handler may raise as a function is entered
                    b.uses = b.uses - 1 if b.uses else 0
                    self.changed.notify_all()

    def leave(self, b: SpillBuffer, pin: bool = False) -> None:
        """Uncount a use, or a pin. Without one this has no effect, as the framework allows an end without a begin."""
        with self.lock:
            if pin:
                b.pins = max(0, b.pins - 1)
            else:
                b.uses = max(0, b.uses - 1)
            self.changed.notify_all()

    def less_used(self) -> None:
        """Note that a buffer has a use less."""
        with self.lock:
            self.changed.notify_all()

    def _bring(self, b: SpillBuffer, owner: int, locked: bool) -> None:
        """Move a buffer in for the context ``owner``, for whose own accesses it is useless to wait."""
        while (fd := self._start_move_in(b, locked)) is not None:
            self._move_in(b, fd, owner)

    def _start_move_in(self, b: SpillBuffer, locked: bool) -> OwnedFd | None:
        """Wait until no thread moves it. Return None if it is in memory, else a duplicate of its description with which to move it in."""
        with self.lock:
            return self._wait_to_move_in(b, locked)

    def _wait_to_move_in(self, b: SpillBuffer, locked: bool) -> OwnedFd | None:
        while b.residency is not Residency.IN_MEMORY:
            if b.gone:
                raise _closed(b)
            if b.residency is Residency.NOT_IN_MEMORY:
                fd = _duplicate(b)
                b.residency, b.mover = Residency.MOVING_IN, threading.get_ident()
                return fd
            if b.mover == threading.get_ident() or (locked and b.telling):  # the lock belongs to the callback
                raise fail(errno.EDEADLK, "access", b, "use it after move_notify has returned", what="this thread is moving the buffer")
            self.changed.wait()
        return None

    def _end_move(self, b: SpillBuffer, residency: Residency, *, claimed: bool) -> None:
        """End a move, out or in."""
        with self.lock:
            b.residency, b.mover = residency, 0
            if not claimed:
                self._unclaim(b)
            if b.gone:
                self._forget(b)
            self.changed.notify_all()

    def _unclaim(self, b: SpillBuffer) -> None:
        """Free its bytes of the budget, if it has them. The lock is held."""
        if b in self.order:
            del self.order[b]
            self.resident -= b.size

    # ---- moving in ----

    def _move_in(self, b: SpillBuffer, fd: OwnedFd, owner: int) -> None:
        """Move a buffer in, and close ``fd``, the duplicate of its description. It fails as :meth:`enter` does."""
        here = False
        try:
            self._claim(b, owner)
            step("spill_claimed")
            with budget.claim(b.size):
                reserve(fd, 0, b.size)
            step("spill_reserved")
            if b.stored:
                self._copy(b, fd, out=False)
            step("spill_read")
            residency.make_resident(fd)
            here = True
            with self.lock:
                self.moves_in += 1
        except DmaBufError:
            raise
        except OSError as e:
            raise fail(
                errno.ENOMEM if e.errno in (errno.ENOSPC, errno.EFBIG) else e.errno or errno.EIO,
                "move in",
                b,
                "free memory, or check the disk of the spill file",
                what=f"its content stays in the spill file: {os.strerror(e.errno or errno.EIO)}",
            ) from None
        finally:
            try:
                if not here:
                    punch(fd, 0, b.size)
            finally:
                fd.close()
                self._end_move(b, Residency.IN_MEMORY if here else Residency.NOT_IN_MEMORY, claimed=here)
        step("spill_here")

    def _claim(self, b: SpillBuffer, owner: int) -> None:
        """Take bytes of the budget for ``b``, and move others out if need be. It fails as :meth:`enter` does."""
        until: float | None = None
        passed: set[SpillBuffer] = set()  # whose reservation lock was held
        while True:
            with self.lock:
                if self.resident + b.size <= self.budget:
                    self.resident += b.size
                    self.order[b] = None
                    return
                chosen = self._choose(passed)
                if chosen is None:
                    now = time.monotonic()
                    until = now + self.memory_timeout if until is None else until
                    if now >= until or not self._may_end(b, owner):
                        raise self._full(b)
                    # No notification comes when a fence or mapping of another process ends, so check again at a tick.
                    self.changed.wait(min(until - now, TICK_NS / 1e9))
                    passed.clear()
            if chosen is not None and not self._move_out(*chosen):
                passed.add(chosen[0])

    def _choose(self, passed: set[SpillBuffer]) -> tuple[SpillBuffer, OwnedFd] | None:
        """Return the buffer to move out, marked, and a duplicate of its description. The lock is held."""
        for b in self.order:
            if b.residency is not Residency.IN_MEMORY or b.uses or b.pins or b in passed or not b.resv.test_signaled(Usage.BOOKKEEP):
                continue
            if residency.evict(b.private):
                try:
                    fd = _duplicate(b)
                except BaseException:
                    residency.make_resident(b.private)
                    raise
                b.residency, b.mover = Residency.MOVING_OUT, threading.get_ident()
                return b, fd
        return None

    def pinned(self, b: SpillBuffer) -> bool:
        """Return True if a device or a mapping keeps it in memory, where it is. The lock is held."""
        if b.pins:
            return True
        if not residency.evict(b.private):
            return True
        residency.make_resident(b.private)
        return False

    def _may_end(self, wanting: SpillBuffer, owner: int) -> bool:
        """Return True if waiting may free a buffer: one that no access of the waiting owner keeps. The lock is held."""
        return any(b is not wanting and not (b.resv.domain is wanting.resv.domain and self._accessed(b, owner)) for b in self.order)

    def _accessed(self, b: SpillBuffer, owner: int) -> bool:
        fences = (b.resv.domain.shm.fence_info(handle) for handle in pending(b.resv, Usage.BOOKKEEP))
        return any(info is not None and info["owner"] == owner for info in fences)

    def _full(self, wanting: SpillBuffer) -> OSError:
        pinned = sum(b.size for b in self.order if b.residency is Residency.IN_MEMORY and self.pinned(b))
        return fail(
            errno.ENOMEM,
            "move in",
            wanting,
            "leave blocks, close mappings, detach devices, or raise the budget",
            what=f"the spill heap is full: {self.resident} of {self.budget} bytes in use, {pinned} pinned",
        )

    # ---- moving out ----

    def _move_out(self, b: SpillBuffer, fd: OwnedFd) -> bool:
        """Move a chosen buffer out. Return False if it is about to be used. After an error of the file the buffer stays in memory."""
        fence, evicted = None, False
        try:
            step("spill_chosen")
            if not b.resv.trylock():
                return False
            try:
                step("spill_locked")
                if not b.resv.test_signaled(Usage.BOOKKEEP):
                    return False
                backing = b.shared.backing
                if backing is not None:
                    b.telling = True
                    try:
                        attachment.notify_moves(backing)
                    finally:
                        b.telling = False
                others = pending(b.resv, Usage.BOOKKEEP)  # of importers that can't stop at once
                b.resv.reserve(1)
                fence = self._timeline(b.resv.domain).fence()
                b.resv.add(fence, Usage.KERNEL)
            finally:
                b.resv.unlock()
            step("spill_notified")
            until = time.monotonic_ns() + int(self.memory_timeout * 1e9)
            if not all(b.resv.domain.shm.fence_wait(handle, until, False) for handle in others):
                return False
            step("spill_waited")
            self._revoke(b)
            if b.dirty and not b.gone:
                self._copy(b, fd, out=True)
                b.stored, b.dirty = True, False
            step("spill_written")
            evicted = True  # the file has it: whatever is raised from here on must not take zeros for the content
            try:
                punch(fd, 0, b.size)
            except OSError:
                evicted = False  # all of it is still in memory
                raise
            step("spill_punched")
            with self.lock:
                self.moves_out += 1
            return True
        except DmaBufError:
            raise
        except OSError as e:
            what = f"it stays in memory, so there is no room for another: {os.strerror(e.errno or errno.EIO)}"
            raise fail(e.errno or errno.EIO, "move out", b, f"check the disk of {self.file.directory}", what=what) from None
        finally:
            try:
                if not evicted:
                    residency.make_resident(fd)
            finally:
                fd.close()
                self._end_move(b, Residency.NOT_IN_MEMORY if evicted else Residency.IN_MEMORY, claimed=not evicted)
                if fence is not None:
                    fence.signal()
            step("spill_left")

    def _revoke(self, b: SpillBuffer) -> None:
        """Unmap tables that importers kept after the notification, so that their devices don't take zeros for content."""
        told: set[DmaBufAttachment] = set()
        while b.tables:
            with self.lock:
                if not b.tables:
                    break  # an importer has unmapped the last one itself
                _, (sgt, att, direction) = b.tables.popitem()
            att.dev.unmap_sgtable(sgt, direction)  # it waits for the device's accesses, so the lock is free
            told.add(att)
        for att in told:  # the device may be in another process
            if isinstance(att.importer, RevocableImporter):
                att.importer.revoke(att)

    def _copy(self, b: SpillBuffer, fd: OwnedFd, *, out: bool) -> None:
        whole = memoryview(map_same(fd.number, b.size, 0, True, False, fd.dev, fd.ino))
        try:
            for start, end in slices(b.size):
                step("spill_copying")
                with whole[start:end] as piece:
                    (self.file.write if out else self.file.read)(b.at + start, piece)
        finally:
            del whole  # an error's traceback keeps this frame, and must not keep the mapping
        with self.lock:
            if out:
                self.written += b.size
            else:
                self.read += b.size

    def _timeline(self, domain: Domain) -> Timeline:
        with self.lock:
            found = self._timelines.get(domain)
            life = domain.life
            if found is None or found[0] != life:
                found = self._timelines[domain] = life, Timeline("moves", driver="spill", domain=domain)
            return found[1]

    # ---- the end ----

    def released(self, b: SpillBuffer) -> None:
        """Forget a buffer that the framework has released."""
        with self.lock:
            b.gone = True
            if b.residency in (Residency.IN_MEMORY, Residency.NOT_IN_MEMORY):
                self._forget(b)

    def _forget(self, b: SpillBuffer) -> None:
        """Forget a buffer that no thread moves. The lock is held."""
        if b not in self.buffers:
            return
        self.buffers.discard(b)
        self._unclaim(b)
        self.file.give(b.at, b.size)
        if self.closed and not self.buffers:
            self.file.close()
            self._timelines.clear()
        self.changed.notify_all()

    def forked(self) -> None:
        """In a forked child, make new locks, which other threads of the parent may have held, and close the parent's file."""
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._timelines = WeakKeys()
        self.file.close()


def _duplicate(b: SpillBuffer) -> OwnedFd:
    """Return a duplicate of its description for a move, because a release meanwhile closes the one that the framework lends."""
    try:
        return b.private.dup()
    except DmaBufError:
        raise
    except OSError as e:
        raise fail(e.errno or errno.EIO, "move", b, "close descriptors, or raise RLIMIT_NOFILE") from None


def _closed(b: SpillBuffer) -> OSError:
    return fail(errno.EBADF, "access", b, "open the buffer again", what="the buffer is closed")
