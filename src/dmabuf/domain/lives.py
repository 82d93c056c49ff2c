"""A life: a process's membership in a domain, which a lock proves, and which another process ends if the process dies.

A life is one process slot and one byte of the file on which the process holds a write lock. The lock belongs to the description behind a
one-page mapping, which forks don't inherit and whose descriptor is closed. The kernel therefore drops the lock with the process's memory,
however the process ends, and nothing else can take or lose it. Where a mapping doesn't keep a lock, a thread does (see `proved`). The slot
says ALIVE from just after the lock is taken until a reaper has finished.

A reaper takes the write lock of the dead life's byte. That proves the death, keeps other reapers out, and is freed if the reaper dies. Then
it ends everything that the dead process left, in idempotent steps, and stores CLEAN last. A new process claims only CLEAN slots. All of
this is in ``native/domain/life.c``.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Callable

from dmabuf._native import (
    LIFE_ALIVE,
    LIFE_BYTE,
    LIFE_BYTES,
    LIFE_COMM,
    LIFE_GEN,
    LIFE_PID,
    LIFE_START,
    LIFE_STATE,
    LIVES,
    OFF_LIFE_HIGH,
    OFF_LIVES,
    Shm,
)
from dmabuf.domain import proved
from dmabuf.domain.place import comm
from dmabuf.errors import needing_descriptors

# A fork while a descriptor is open that a child must not have would give the child a copy. Forks wait until it is known.
FORK_GUARD = threading.RLock()

_LIFE_ID_GEN = 0xFFFFF
LABEL_BYTES = 15
labels: list[bytes] = []  # what the program calls this process, if it does


def slot_offset(index: int) -> int:
    """Return the offset of a process slot in the file."""
    return OFF_LIVES + index * LIFE_BYTES


def life_id(index: int, gen: int) -> int:
    """Return the id of the life with this slot and generation."""
    return (gen & _LIFE_ID_GEN) << 11 | index


def life_at(shm: Shm, index: int) -> int:
    """Return the id of the present life of a slot."""
    return life_id(index, shm.load32(slot_offset(index) + LIFE_GEN))


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
        ClosedError: Nobody can say, because the domain's descriptor was closed by somebody else (EBADF). That is not a death.
    """
    return shm.locked(LIFE_BYTE + index)


def begin(shm: Shm) -> int:
    """Begin a life of this process. Return its first chunk.

    Raises:
        NoSpaceError: The domain has as many processes as it can, or no room for the life's chunk (ENOSPC).
        DmaBufError: No descriptor is free (EMFILE), or nothing keeps the life's lock (ENOTSUP).
    """
    with needing_descriptors("join", "the domain"):
        try:
            return shm.life_begin(os.getpid(), os.geteuid(), start_time(os.getpid()), time.time_ns(), *(labels or [comm()]))
        except OSError as e:
            if e.errno != errno.ENOTSUP:
                raise
            raise proved.lock_is_lost(shm.fd) from None


def store_label(shm: Shm) -> None:
    """Write this process's label into its slot. Its life must not end meanwhile.

    A reader sees the old label or the new one, or for an instant the first half of one of them.
    """
    at = slot_offset(index_of(shm.life)) + LIFE_COMM
    first, second = struct.unpack("=QQ", (labels[0] if labels else comm()).ljust(16, b"\0"))
    shm.store64(at + 8, 0)
    shm.store64(at, first)
    shm.store64(at + 8, second)


def reap(shm: Shm, index: int, remove: Callable[[int], None]) -> bool:
    """End a dead life. Return False if it is alive or another process reaps it.

    Args:
        shm: The domain.
        index: The life's slot.
        remove: Called with the life's id, to remove what it left outside of the file.
    """
    at = slot_offset(index)
    life = life_at(shm, index)
    return not _still_dies(shm, at, life) and shm.life_reap(life, remove)


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
    _dying.pop(life, None)  # the process has executed another program
    return False
