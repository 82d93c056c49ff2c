"""Locks that are free in a forked child, unless the thread that forked holds them.

A forked child has only one thread. A lock that another thread held, such as the dispatcher's, would never be released in the child, and a
child that closes an inherited buffer would wait for ever. What such a lock guards belongs to the parent, or the child reads it again. So in
the child the lock starts free.

None of this runs in a process that a raw fork system call made.
"""

from __future__ import annotations

import os
from typing import Any

from dmabuf._native import ForkLock, free_fork_locks

fork_lock = ForkLock
"""Makes a re-entrant lock that is free in a forked child, see the module."""


def is_mine(lock: Any) -> bool:
    """Return True if the running thread holds a re-entrant lock."""
    return bool(lock._is_owned())


os.register_at_fork(after_in_child=free_fork_locks)
