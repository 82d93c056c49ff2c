"""A life: a process's membership in a domain, which a lock proves, and which another process ends if the process dies.

A life is one process slot and one byte of the file on which the process holds a write lock. The lock belongs to the description behind a
one-page mapping, which forks don't inherit and whose descriptor is closed. The kernel therefore drops the lock with the process's memory,
however the process ends, and nothing else can take or lose it. The slot says ALIVE from just after the lock is taken until a reaper has
finished.

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

from dmabuf import _native
from dmabuf._native import Shm
from dmabuf.domain.place import LIFE_BYTE, comm, ofd_lock, ofd_locked, reopen
from dmabuf.errors import fail

# A fork while the description of a lock is open would give the child a share in the lock. Forks wait until it is closed.
FORK_GUARD = threading.RLock()

_LIFE_ID_GEN = 0xFFFFF


def slot_offset(index: int) -> int:
    """Return the offset of a process slot in the file."""
    return _native.OFF_LIVES + index * _native.LIFE_BYTES


def life_id(index: int, gen: int) -> int:
    """Return the id of the life with this slot and generation."""
    return (gen & _LIFE_ID_GEN) << 11 | index


def index_of(life: int) -> int:
    """Return the slot of a life."""
    return life & (_native.LIVES - 1)


def start_time(pid: int) -> int:
    """Return the start time of a process in clock ticks after boot, 0 if there is no such process (proc(5), stat field 22)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return int(f.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def alive_slots(shm: Shm) -> list[int]:
    """Return the slots that say ALIVE, whether or not their bytes are locked."""
    high = min(shm.load32(_native.OFF_LIFE_HIGH), _native.LIVES)
    return [i for i in range(high) if shm.load32(slot_offset(i) + _native.LIFE_STATE) == _native.LIFE_ALIVE]


def is_alive(fd: int, index: int) -> bool:
    """Return True if the process that owns this slot is alive.

    Args:
        fd: Any description of the domain's file, except the life's own.
        index: The slot.
    """
    return ofd_locked(fd, LIFE_BYTE + index)


class Life:
    """This process's life in one domain file. It begins at once, and ends with `leave` or with the process."""

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
                    errno.ENOSPC, "join", "the domain", "use a second domain (DMABUF_DOMAIN)", what=f"it has {_native.LIVES} processes"
                )
            _native.step("life_locked")  # a locked byte of a CLEAN slot: the kernel frees it if this process dies
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
        for word in (_native.LIFE_CHUNK, _native.LIFE_DOORBELL, _native.LIFE_SERVED):
            shm.store32(at + word, 0)
        shm.store32(at + _native.LIFE_STATE, _native.LIFE_ALIVE)
        _native.step("life_alive")  # ALIVE without a chunk: the reaper has nothing to end
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
        _native.step("life_chunk")  # the chunk names this life as its owner: the reaper returns it
        shm.store32(at + _native.LIFE_CHUNK, chunk + 1)
        self.chunk = chunk
        return page

    def leave(self) -> None:
        """End this life. What it still owns ends as if the process had died. In a forked child this has no effect."""
        if self.shm.life != self.id:
            return
        with FORK_GUARD:
            _end(self.shm, self.index, self.id)
            self.shm.life = 0
            _native.drop_page(self._page)


def reap(shm: Shm, index: int, ended: Callable[[int], None]) -> bool:
    """End a dead life. Return False if it is alive or another process reaps it.

    Args:
        shm: The domain.
        index: The life's slot.
        ended: Called with the life's id, to remove what it left outside of the file.
    """
    with FORK_GUARD:
        own = _spare(shm.fd)
        try:
            if not ofd_lock(own, fcntl.F_WRLCK, LIFE_BYTE + index):
                return False
            _native.step("reap_locked")
            at = slot_offset(index)
            if shm.load32(at + _native.LIFE_STATE) != _native.LIFE_ALIVE:
                return False  # another reaper was faster
            life = life_id(index, shm.load32(at + _native.LIFE_GEN))
            ended(life)  # before CLEAN is stored: if this reaper dies, the next one does it again
            _native.step("reap_outside")
            _end(shm, index, life)
            return True
        finally:
            ofd_lock(own, fcntl.F_UNLCK, LIFE_BYTE + index)  # closing would not be enough, as a raw fork may share the description
            if own != shm.fd:
                os.close(own)


def _spare(fd: int) -> int:
    """Return a description for a reaper's lock: its own, or the domain's if no descriptor is left."""
    try:
        return reopen(fd)
    except OSError as e:
        if e.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        return fd


def _end(shm: Shm, index: int, life: int) -> None:
    """End everything of a life. If this process dies between two lines, the next reaper does all of it again."""
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
