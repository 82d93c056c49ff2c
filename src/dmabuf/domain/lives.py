"""A process's life in a domain: claimed, kept by a lock, ended by whoever notices.

A life is one slot of the table and one byte of the file that the process holds a write lock on. The lock hangs on a one-page mapping
that forks don't inherit and whose fd is closed, so the kernel drops it with the process's memory, however that ends: nothing can fake
or lose it. The slot says ALIVE from the moment after the lock is taken until the moment before a reaper gives it back.

Reaping takes the write lock of the dead life's byte (proof and exclusivity in one, freed if the reaper dies), ends what the dead left,
each part idempotent, and stores CLEAN last. A newcomer takes only CLEAN slots.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable

from dmabuf import _native
from dmabuf._native import Shm
from dmabuf.domain.place import LIFE_BYTE, comm, ofd_lock, ofd_locked, reopen
from dmabuf.errors import fail

# A fork between "a description is open" and "it is closed" would give the child a share in the lock: forks wait for these moments.
FORK_GUARD = threading.RLock()

_LIFE_ID_GEN = 0xFFFFF


def slot_offset(index: int) -> int:
    return _native.OFF_LIVES + index * _native.LIFE_BYTES


def life_id(index: int, gen: int) -> int:
    return (gen & _LIFE_ID_GEN) << 11 | index


def index_of(life: int) -> int:
    return life & (_native.LIVES - 1)


def start_time(pid: int) -> int:
    """Clock ticks after boot at which a process started, 0 when there is none (proc(5), stat field 22)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return int(f.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def alive_slots(shm: Shm) -> list[int]:
    """Indices of the slots that say ALIVE, whoever holds their bytes."""
    high = min(shm.load32(_native.OFF_LIFE_HIGH), _native.LIVES)
    return [i for i in range(high) if shm.load32(slot_offset(i) + _native.LIFE_STATE) == _native.LIFE_ALIVE]


def is_alive(fd: int, index: int) -> bool:
    """Is the life's byte locked? fd: any description of the domain's file but the life's own."""
    return ofd_locked(fd, LIFE_BYTE + index)


class Life:
    """This process's life in one domain file: claimed at once, ended by :meth:`leave` or by death."""

    def __init__(self, shm: Shm) -> None:
        self.shm = shm
        with FORK_GUARD:
            self._page = self._claim()

    def _claim(self) -> int:
        shm = self.shm
        own = reopen(shm.fd)
        try:
            for index in range(_native.LIVES):
                at = slot_offset(index)
                if shm.load32(at + _native.LIFE_STATE) != _native.LIFE_CLEAN:
                    continue
                if not ofd_lock(own, fcntl.F_WRLCK, LIFE_BYTE + index):
                    continue
                if shm.load32(at + _native.LIFE_STATE) != _native.LIFE_CLEAN:
                    ofd_lock(own, fcntl.F_UNLCK, LIFE_BYTE + index)
                    continue
                break
            else:
                raise fail(
                    errno.ENOSPC, "join", "the domain", f"it has room for {_native.LIVES} processes: use a second domain (DMABUF_DOMAIN)"
                )
            _native.step("life_locked")  # a locked byte of a CLEAN slot: free again when we die
            page = _native.hold_page(own)
        finally:
            os.close(own)
        gen = (shm.load32(at + _native.LIFE_GEN) + 1) & _LIFE_ID_GEN or 1
        shm.store32(at + _native.LIFE_GEN, gen)
        shm.store32(at + _native.LIFE_PID, os.getpid())
        shm.store32(at + _native.LIFE_UID, os.geteuid())
        shm.store64(at + _native.LIFE_START, start_time(os.getpid()))
        shm.store64(at + _native.LIFE_JOINED, time.time_ns())
        name = comm().ljust(16, b"\0")
        for i in (0, 8):
            shm.store64(at + _native.LIFE_COMM + i, int.from_bytes(name[i : i + 8], "little"))
        for word in (_native.LIFE_CHUNK, _native.LIFE_BELL, _native.LIFE_SERVED):
            shm.store32(at + word, 0)
        shm.store32(at + _native.LIFE_STATE, _native.LIFE_ALIVE)
        _native.step("life_alive")  # ALIVE with nothing: the reaper has nothing to end
        while (high := shm.load32(_native.OFF_LIFE_HIGH)) <= index:
            shm.cas32(_native.OFF_LIFE_HIGH, high, index + 1)
        self.index, self.id = index, life_id(index, gen)
        shm.life = self.id
        try:
            chunk = shm.chunk_claim(_native.CH_LIFE)
        except BaseException:
            shm.life = 0
            shm.store32(at + _native.LIFE_STATE, _native.LIFE_CLEAN)
            _native.drop_page(page)
            raise
        _native.step("life_chunk")  # the chunk names us as owner: the reaper returns it
        shm.store32(at + _native.LIFE_CHUNK, chunk + 1)
        self.chunk = chunk
        return page

    def leave(self) -> None:
        """End this life in order: what it still owns ends as if it had died. Does nothing in a forked child."""
        if self.shm.life != self.id:
            return
        with FORK_GUARD:
            _end(self.shm, self.index, self.id)
            self.shm.life = 0
            _native.drop_page(self._page)


def reap(shm: Shm, index: int, ended: Callable[[int], None]) -> bool:
    """End a dead life if nobody else is doing so; False when it lives or is being reaped. ``ended``: removes what it left outside."""
    with FORK_GUARD:
        own = _spare(shm.fd)
        try:
            if not ofd_lock(own, fcntl.F_WRLCK, LIFE_BYTE + index):
                return False
            _native.step("reap_locked")
            at = slot_offset(index)
            if shm.load32(at + _native.LIFE_STATE) != _native.LIFE_ALIVE:
                return False  # another reaper was here before us
            life = life_id(index, shm.load32(at + _native.LIFE_GEN))
            ended(life)  # before CLEAN: a reaper that dies in the middle is followed by another
            _native.step("reap_outside")
            _end(shm, index, life)
            return True
        finally:
            ofd_lock(own, fcntl.F_UNLCK, LIFE_BYTE + index)  # not just closed: a raw fork may have shared the description
            if own != shm.fd:
                os.close(own)


def _spare(fd: int) -> int:
    """A description to hold a reaper's lock: one of its own, or, with no descriptor left, the domain's."""
    try:
        return reopen(fd)
    except OSError as e:
        if e.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        return fd


def _end(shm: Shm, index: int, life: int) -> None:
    """Everything of a life ends; a death between any two lines leaves it for the next reaper to do again."""
    at = slot_offset(index)
    shm.store32(at + _native.LIFE_SERVED, 0)
    chunks = shm.chunks_of(life)
    for chunk, kind in chunks:
        if kind == _native.CH_FENCE:
            shm.reap_fences(chunk, -errno.EOWNERDEAD)
    _native.step("reap_fences_done")
    for chunk, kind in chunks:
        if kind in (_native.CH_LIFE, _native.CH_CTX):
            shm.reap_life_chunk(chunk, kind)
        elif kind == _native.CH_TIMELINE:
            for i in range(_native.TIMELINES_PER):
                shm.timeline_close(chunk * _native.TIMELINES_PER + i)
    _native.step("reap_contexts_done")
    shm.reap_table_lock(life)
    for chunk, _ in chunks:
        shm.chunk_return(chunk, life)
    _native.step("reap_returned")
    shm.store32(at + _native.LIFE_CHUNK, 0)
    shm.store32(at + _native.LIFE_STATE, _native.LIFE_CLEAN)
    _native.step("reap_clean")
