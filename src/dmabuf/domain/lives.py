"""A life: a process's membership in a domain, which a lock proves, and which another process ends if the process dies.

A life is one process slot and one byte of the file on which the process holds a write lock. The lock belongs to the description behind a
one-page mapping, which forks don't inherit and whose descriptor is closed. The kernel therefore drops the lock with the process's memory,
however the process ends, and nothing else can take or lose it. Where a mapping doesn't keep a lock, a thread does (see `proved`). The slot
says ALIVE from just after the lock is taken until a reaper has finished.

A reaper takes the write lock of the dead life's byte. That proves the death, keeps other reapers out, and is freed if the reaper dies. Then
it ends everything that the dead process left, in idempotent steps, and stores CLEAN last. A new process claims only CLEAN slots.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable

from dmabuf._native import (
    CH_CTX,
    CH_FENCE,
    CH_LIFE,
    CH_TIMELINE,
    LIFE_ALIVE,
    LIFE_BYTES,
    LIFE_CHUNK,
    LIFE_CLEAN,
    LIFE_COMM,
    LIFE_DOORBELL,
    LIFE_GEN,
    LIFE_JOINED,
    LIFE_PID,
    LIFE_SERVED,
    LIFE_START,
    LIFE_STATE,
    LIFE_UID,
    LIVES,
    OFF_LIFE_HIGH,
    OFF_LIVES,
    TIMELINES_PER,
    OwnedFd,
    Shm,
    step,
)
from dmabuf.domain import proved
from dmabuf.domain.place import LIFE_BYTE, comm
from dmabuf.errors import fail

# A fork while the description of a lock is open would give the child a share in the lock. Forks wait until it is closed.
FORK_GUARD = threading.RLock()

_LIFE_ID_GEN = 0xFFFFF


def slot_offset(index: int) -> int:
    """Return the offset of a process slot in the file."""
    return OFF_LIVES + index * LIFE_BYTES


def life_id(index: int, gen: int) -> int:
    """Return the id of the life with this slot and generation."""
    return (gen & _LIFE_ID_GEN) << 11 | index


def index_of(life: int) -> int:
    """Return the slot of a life."""
    return life & (LIVES - 1)


def start_time(pid: int) -> int:
    """Return the start time of a process in clock ticks after boot, 0 if there is no such process (proc(5), stat field 22)."""
    found = proved.process(pid)
    return found.start if found is not None else 0


def alive_slots(shm: Shm) -> list[int]:
    """Return the slots that say ALIVE, whether or not their bytes are locked."""
    high = min(shm.load32(OFF_LIFE_HIGH), LIVES)
    return [i for i in range(high) if shm.load32(slot_offset(i) + LIFE_STATE) == LIFE_ALIVE]


def is_alive(shm: Shm, index: int) -> bool:
    """Return True if the process that owns this slot is alive.

    Raises:
        ClosedError: Nobody can say, because the domain's descriptor was closed by somebody else (EBADF). That is no death.
    """
    return shm.locked(LIFE_BYTE + index)


class Life:
    """This process's life in one domain file. It begins at once, and ends with `leave` or with the process."""

    def __init__(self, shm: Shm) -> None:
        self.shm = shm
        with FORK_GUARD:
            self.hold = self._claim()

    def _claim(self) -> proved.Hold:
        shm = self.shm
        own = shm.reopen()
        try:
            for index in range(LIVES):
                at = slot_offset(index)
                if shm.load32(at + LIFE_STATE) != LIFE_CLEAN:
                    continue
                if not own.set_lock(fcntl.F_WRLCK, LIFE_BYTE + index):
                    continue
                if shm.load32(at + LIFE_STATE) != LIFE_CLEAN:
                    own.set_lock(fcntl.F_UNLCK, LIFE_BYTE + index)
                    continue
                break
            else:
                raise fail(errno.ENOSPC, "join", "the domain", "use a second domain (DMABUF_DOMAIN)", what=f"it has {LIVES} processes")
            step("life_locked")  # a locked byte of a CLEAN slot: the kernel frees it if this process dies
            hold = proved.Hold(own, shm.fd, LIFE_BYTE + index)
        finally:
            own.close()
        gen = (shm.load32(at + LIFE_GEN) + 1) & _LIFE_ID_GEN or 1
        shm.store32(at + LIFE_GEN, gen)
        shm.store32(at + LIFE_PID, os.getpid())
        shm.store32(at + LIFE_UID, os.geteuid())
        shm.store64(at + LIFE_START, start_time(os.getpid()) | (proved.BY_THREAD if hold.by_thread else 0))
        shm.store64(at + LIFE_JOINED, time.time_ns())
        name = comm().ljust(16, b"\0")
        for i in (0, 8):
            shm.store64(at + LIFE_COMM + i, int.from_bytes(name[i : i + 8], "little"))
        for word in (LIFE_CHUNK, LIFE_DOORBELL, LIFE_SERVED):
            shm.store32(at + word, 0)
        shm.store32(at + LIFE_STATE, LIFE_ALIVE)
        step("life_alive")  # ALIVE without a chunk: the reaper has nothing to end
        while (high := shm.load32(OFF_LIFE_HIGH)) <= index:
            shm.cas32(OFF_LIFE_HIGH, high, index + 1)
        self.index, self.id = index, life_id(index, gen)
        shm.life = self.id
        try:
            chunk = shm.chunk_claim(CH_LIFE)
        except BaseException:
            shm.life = 0
            shm.store32(at + LIFE_STATE, LIFE_CLEAN)
            hold.drop()
            raise
        step("life_chunk")  # the chunk names this life as its owner: the reaper returns it
        shm.store32(at + LIFE_CHUNK, chunk + 1)
        self.chunk = chunk
        return hold

    def leave(self) -> None:
        """End this life. What it still owns ends as if the process had died. In a forked child this has no effect."""
        if self.shm.life != self.id:
            return
        with FORK_GUARD:
            _end(self.shm, self.index, self.id)
            self.shm.life = 0
            self.hold.drop()


def reap(shm: Shm, index: int, ended: Callable[[int], None]) -> bool:
    """End a dead life. Return False if it is alive or another process reaps it.

    Args:
        shm: The domain.
        index: The life's slot.
        ended: Called with the life's id, to remove what it left outside of the file.
    """
    with FORK_GUARD:
        own = _spare(shm)
        try:
            if not own.set_lock(fcntl.F_WRLCK, LIFE_BYTE + index):  # compares the file too: a lock on another one is no proof
                return False
            step("reap_locked")
            at = slot_offset(index)
            if shm.load32(at + LIFE_STATE) != LIFE_ALIVE:
                return False  # another reaper was faster
            life = life_id(index, shm.load32(at + LIFE_GEN))
            if _still_dies(shm, at, life):
                return False
            ended(life)  # before CLEAN is stored: if this reaper dies, the next one does it again
            step("reap_outside")
            _end(shm, index, life)
            return True
        finally:
            own.set_lock(fcntl.F_UNLCK, LIFE_BYTE + index)  # closing would not be enough, as a raw fork may share the description
            if own.number != shm.fd:
                own.close()
            else:
                own.take()


_dying: dict[int, float] = {}
"""When this process first found the lock of a life free, although a thread of the life's process may still run."""


def _still_dies(shm: Shm, at: int, life: int) -> bool:
    """Return True if a thread kept the life's lock, and another thread of its process may not have stopped yet."""
    start = shm.load64(at + LIFE_START)
    if not start & proved.BY_THREAD or not proved.still_runs(shm.load32(at + LIFE_PID), start):
        _dying.pop(life, None)
        return False
    now = time.monotonic()
    if now - _dying.setdefault(life, now) < proved.DYING_S:
        return True
    del _dying[life]  # the process has executed another program
    return False


def _spare(shm: Shm) -> OwnedFd:
    """Return a description for a reaper's lock: its own, or the domain's if no descriptor is left."""
    try:
        return shm.reopen()
    except OSError as e:
        if e.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        return OwnedFd(shm.fd)


def _end(shm: Shm, index: int, life: int) -> None:
    """End everything of a life. If this process dies between two lines, the next reaper does all of it again."""
    at = slot_offset(index)
    shm.store32(at + LIFE_SERVED, 0)
    chunks = shm.chunks_of(life)
    for chunk, kind in chunks:
        if kind == CH_FENCE:
            shm.reap_fences(chunk, -errno.EOWNERDEAD)
    step("reap_fences_done")
    for chunk, kind in chunks:
        if kind in (CH_LIFE, CH_CTX):
            shm.reap_life_chunk(chunk, kind)
        elif kind == CH_TIMELINE:
            for i in range(TIMELINES_PER):
                shm.timeline_close(chunk * TIMELINES_PER + i)
    step("reap_contexts_done")
    shm.reap_table_lock(life)
    for chunk, _ in chunks:
        shm.chunk_return(chunk, life)
    step("reap_returned")
    shm.store32(at + LIFE_CHUNK, 0)
    shm.store32(at + LIFE_STATE, LIFE_CLEAN)
    step("reap_clean")
