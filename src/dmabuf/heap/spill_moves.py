"""The moves of a spill heap: which buffers are in memory, who is let in to them, and how one goes and comes (see `spill` for what a user
sees).

*A move out*, each step with what a ``kill -9`` of the process after it leaves (the importers have ENODEV from then on; nobody reads a
buffer that he wasn't let into before, and nobody moves one that somebody was let into):

====================  =====================================================================================================================
chosen                in use by nobody, and nobody comes in before the move is over (the write lock of byte 1; the state, in this process)
spill_locked          its reservation lock, which is only tried: who holds it is about to use it
spill_told            ``move_notify`` ran; a KERNEL fence is on the reservation object, and the lock is free again. The death ends the fence
spill_waited          every other fence up to BOOKKEEP has ended; tables that importers have kept are revoked: a late device faults
spill_written         the content is in the file too, reserved since ``allocate``. A write that fails ends the move: nothing has changed
spill_punched         its pages are gone from the memfd
spill_left            the budget has the bytes; the fence is signalled
====================  =====================================================================================================================

The lock is not held during the copy, which may take as long as a disk: others look at the fences, and who waits can be told why (``dmabuf
ls``), give up in time, or be interrupted. *A move in* needs no lock and no fence, since nobody has been let in: ``spill_claimed`` (bytes of
the budget), ``spill_reserved`` (pages in the memfd, or ENOMEM), ``spill_read``, ``spill_here``. The file is never synced: it is no
persistence, and a death of the machine takes all with it.

A move is made in a thread where no signal handler raises (`shielded`); who waits for it may be interrupted, and the move is completed.

*Who may call what.* Any thread; the ops of an exporter come with the buffer's reservation lock or without it, as `core.contract` says. The
lock in here is short, is never held while a reservation lock is waited for, a file is copied or a callback runs, and may be taken inside of
one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import weakref
from collections import OrderedDict

from dmabuf._native import Mapping, punch, step
from dmabuf.core.attach import attachment
from dmabuf.core.attach.attachment import DmaBufAttachment
from dmabuf.core.base.usage import Usage
from dmabuf.core.buffer import residency
from dmabuf.core.contract import RevocableImporter
from dmabuf.core.fence.timeline import Timeline
from dmabuf.core.resv.resv import pending
from dmabuf.core.task.owner import current
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.errors import DmaBufError, fail
from dmabuf.heap import budget
from dmabuf.heap.shielded import run_shielded
from dmabuf.heap.spill_buffer import Residency, SpillBuffer
from dmabuf.heap.spill_file import SpillFile, reserve, slices


class ResidentSet:
    """The buffers of one heap, and which of them are in memory: at most ``budget`` bytes. Its fields are read with ``changed`` held."""

    def __init__(self, budget: int, memory_timeout: float, file: SpillFile) -> None:
        self.budget, self.memory_timeout, self.file = budget, memory_timeout, file
        self.lock = threading.RLock()  # a signal handler may use buffers in the middle of us
        self.changed = threading.Condition(self.lock)
        self.order: OrderedDict[SpillBuffer, None] = OrderedDict()  # those that have bytes of the budget, used longest ago first
        self.buffers: set[SpillBuffer] = set()
        self.resident = self.moves_out = self.moves_in = self.written = self.read = 0
        self._timelines: weakref.WeakKeyDictionary[Domain, tuple[int, Timeline]] = weakref.WeakKeyDictionary()
        self.closed = False

    def add(self, b: SpillBuffer) -> None:
        with self.lock:
            self.buffers.add(b)

    def close(self) -> None:
        """No buffer is added any more."""
        with self.lock:
            self.closed = True
            if not self.buffers:
                self.file.close()
                self._timelines.clear()

    # ---- who is let in ----

    def enter(self, b: SpillBuffer, *, write: bool, pin: bool = False, locked: bool = False) -> None:
        """Count a use, or a pin, and have the memory there. ``locked``: its reservation lock is held for this call.

        Errors: ENOMEM; those of the file; EDEADLK from inside of a move of it.
        """
        counted = entered = False
        try:
            with self.lock:
                b.uses += 1  # from here on nobody begins to move it out
                counted = True
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
            if counted and (pin or not entered):
                with self.lock:  # in place: a signal handler may raise as a function is entered
                    b.uses = b.uses - 1 if b.uses else 0
                    self.changed.notify_all()

    def leave(self, b: SpillBuffer, pin: bool = False) -> None:
        """Uncount. An end without a begin is no error of the framework's: nothing."""
        with self.lock:
            if pin:
                b.pins = max(0, b.pins - 1)
            else:
                b.uses = max(0, b.uses - 1)
            self.changed.notify_all()

    def _bring(self, b: SpillBuffer, owner: int, locked: bool) -> None:
        """For the context ``owner``, whose own accesses are in its own way."""
        while (fd := self._away(b, locked)) is not None:
            self._move_in(b, fd, owner)

    def _away(self, b: SpillBuffer, locked: bool) -> int | None:
        """Wait until nobody moves it. None: it is here. Else it is the caller's to bring in, by this duplicate of its description."""
        with self.lock:
            while b.residency is not Residency.IN_MEMORY:
                if b.gone:
                    raise _closed(b)
                if b.residency is Residency.NOT_IN_MEMORY:
                    fd = _duplicate(b)
                    b.residency, b.mover = Residency.MOVING_IN, threading.get_ident()
                    return fd
                if b.mover == threading.get_ident() or (locked and b.telling):  # the lock is the callback's
                    raise fail(errno.EDEADLK, "access", b, "do it after move_notify has returned", what="this thread is moving the buffer")
                self.changed.wait()
            return None

    def _end_move(self, b: SpillBuffer, residency: Residency, *, claimed: bool) -> None:
        """The end of every move."""
        with self.lock:
            b.residency, b.mover = residency, 0
            if not claimed:
                self._unclaim(b)
            if b.gone:
                self._forget(b)
            self.changed.notify_all()

    def _unclaim(self, b: SpillBuffer) -> None:
        """Give its bytes of the budget back, if it has them. The lock is held."""
        if b in self.order:
            del self.order[b]
            self.resident -= b.size

    # ---- moving in ----

    def _move_in(self, b: SpillBuffer, fd: int, owner: int) -> None:
        """Bring it into memory, having the duplicate of its description, which is closed. Errors: ENOMEM; EIO and the like of the file."""
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
                "free memory, or look at the disk of the spill file",
                what=f"its content stays in the spill file: {os.strerror(e.errno or errno.EIO)}",
            ) from None
        finally:
            try:
                if not here:
                    punch(fd, 0, b.size)
            finally:
                os.close(fd)
                self._end_move(b, Residency.IN_MEMORY if here else Residency.NOT_IN_MEMORY, claimed=here)
        step("spill_here")

    def _claim(self, b: SpillBuffer, owner: int) -> None:
        """Bytes of the budget for b, moving others out. Errors: see :meth:`enter`."""
        until: float | None = None
        passed: set[SpillBuffer] = set()  # those whose lock somebody had
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
                    # Fences and mappings of others end without telling us: look again at a tick.
                    self.changed.wait(min(until - now, TICK_NS / 1e9))
                    passed.clear()
            if chosen is not None and not self._move_out(*chosen):
                passed.add(chosen[0])

    def _choose(self, passed: set[SpillBuffer]) -> tuple[SpillBuffer, int] | None:
        """The buffer to move out, marked, with a duplicate of its description. The lock is held."""
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
        """Is it kept by a device or a mapping? The lock is held, and it is here."""
        if b.pins:
            return True
        if not residency.evict(b.private):
            return True
        residency.make_resident(b.private)
        return False

    def _may_end(self, wanting: SpillBuffer, owner: int) -> bool:
        """Is there one that may become free by waiting: not kept by an access of the owner that waits? The lock is held."""
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
            "leave accesses, close mappings, detach devices, or give the heap a larger budget",
            what=f"of the heap's budget of {self.budget} bytes {self.resident} are in use, {pinned} of them pinned",
        )

    # ---- moving out ----

    def _move_out(self, b: SpillBuffer, fd: int) -> bool:
        """Move what :meth:`_choose` chose; False: somebody is about to use it. Errors: those of the file, and then it stays in memory."""
        fence, away = None, False
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
            step("spill_told")
            until = time.monotonic_ns() + int(self.memory_timeout * 1e9)
            if not all(b.resv.domain.shm.fence_wait(handle, until, False) for handle in others):
                return False
            step("spill_waited")
            self._revoke(b)
            if b.dirty and not b.gone:
                self._copy(b, fd, out=True)
                b.stored, b.dirty = True, False
            step("spill_written")
            away = True  # the file has it: nothing that is raised from here on may take zeros for the content
            try:
                punch(fd, 0, b.size)
            except OSError:
                away = False  # it is all still there
                raise
            step("spill_punched")
            with self.lock:
                self.moves_out += 1
            return True
        except DmaBufError:
            raise
        except OSError as e:
            what = f"it stays in memory, so there is no room for another: {os.strerror(e.errno or errno.EIO)}"
            raise fail(e.errno or errno.EIO, "move out", b, f"look at the disk that holds {self.file.directory}", what=what) from None
        finally:
            try:
                if not away:
                    residency.make_resident(fd)
            finally:
                os.close(fd)
                self._end_move(b, Residency.NOT_IN_MEMORY if away else Residency.IN_MEMORY, claimed=not away)
                if fence is not None:
                    fence.signal()
            step("spill_left")

    def _revoke(self, b: SpillBuffer) -> None:
        """What importers were told of and have not unmapped: their devices must not see zeros for content."""
        told: set[DmaBufAttachment] = set()
        with self.lock:
            while b.tables:
                sgt, att, direction = next(iter(b.tables.values()))
                att.dev.unmap_sgtable(sgt, direction)
                del b.tables[id(sgt)]
                told.add(att)
        for att in told:  # the device may be in another process
            if isinstance(att.importer, RevocableImporter):
                att.importer.revoke(att)

    def _copy(self, b: SpillBuffer, fd: int, *, out: bool) -> None:
        whole = memoryview(Mapping(fd, b.size))
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
        with self.lock:
            b.gone = True
            if b.residency in (Residency.IN_MEMORY, Residency.NOT_IN_MEMORY):
                self._forget(b)

    def _forget(self, b: SpillBuffer) -> None:
        """The lock is held, and nobody moves it."""
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
        """In a forked child: the lock may have been another thread's, and the file is the parent's."""
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._timelines = weakref.WeakKeyDictionary()
        self.file.close()


def _duplicate(b: SpillBuffer) -> int:
    """For the length of a move: a release that comes meanwhile closes the description that the framework has lent us."""
    try:
        return fcntl.fcntl(b.private, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError as e:
        raise fail(e.errno or errno.EIO, "move", b, "close descriptors, or raise RLIMIT_NOFILE") from None


def _closed(b: SpillBuffer) -> OSError:
    return fail(errno.EBADF, "access", b, "open the buffer again", what="the buffer is closed")
