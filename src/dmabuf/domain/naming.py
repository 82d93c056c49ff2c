"""What messages call the processes of a domain.

The slot of a life says which number its process has in its own PID namespace. Here the number may be another process's, or nobody's. A
process is the one of the slot if /proc shows the slot's start time for the number.
"""

from __future__ import annotations

import os
from typing import Protocol

from dmabuf._native import LIFE_COMM, LIFE_PID, LIFE_START, Shm
from dmabuf.domain import lives, proved

UNSEEN = "in another PID namespace"  # where a process is whose number doesn't lead to it here


class Named(Protocol):
    """A domain."""

    shm: Shm

    def pid_of(self, life: int) -> int: ...


def label_of(shm: Shm, index: int) -> str:
    """Return the label of the process of a slot, or the kernel's name of it; "" if it has none."""
    return os.fsdecode(shm.read(lives.slot_offset(index) + LIFE_COMM, lives.LABEL_BYTES + 1).partition(b"\0")[0])


def seen(shm: Shm, index: int) -> proved.Process | None:
    """Return what /proc says about the process of a slot; None if the slot's number is another process's here, or nobody's."""
    at = lives.slot_offset(index)
    found = proved.process(shm.load32(at + LIFE_PID))
    return found if found is not None and found.start == shm.load64(at + LIFE_START) & (proved.BY_THREAD - 1) else None


def process(domain: Named, life: int) -> str:
    """Return the process of a life in words: ``process 512 (camera)``."""
    pid = domain.pid_of(life)
    if not pid:
        return "a process that has ended"
    if life == domain.shm.life:
        return f"this process ({pid})"
    index = lives.index_of(life)
    found = seen(domain.shm, index)
    about = [label_of(domain.shm, index), UNSEEN if found is None else "which is stopped" if found.stopped else ""]
    text = ", ".join(filter(None, about))
    return f"process {pid} ({text})" if text else f"process {pid}"
