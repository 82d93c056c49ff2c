"""Locks that are free in a forked child, unless the thread that forked holds them.

A forked child has only one thread. A lock that another thread held, such as the dispatcher's, would never be released in the child, and a
child that closes an inherited buffer would wait for ever. What such a lock guards belongs to the parent, or the child reads it again. So in
the child the lock starts free.

None of this runs in a process that a raw fork system call made.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from dmabuf.domain.weak_objects import WeakObjects

_locks: WeakObjects[Any] = WeakObjects()


def fork_lock() -> Any:
    """Return a re-entrant lock that is free in a forked child, see the module."""
    made = threading.RLock()
    _locks.add(made)
    return made


def is_mine(lock: Any) -> bool:
    """Return True if the running thread holds a re-entrant lock."""
    return bool(lock._is_owned())


def _after_fork() -> None:
    for lock in list(_locks):
        if not lock._is_owned():
            lock._at_fork_reinit()  # as threading does with its own locks


os.register_at_fork(after_in_child=_after_fork)
