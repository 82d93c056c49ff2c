"""Locks that are free in a forked child, unless the thread that forked holds them.

A fork takes one thread along. A lock that another thread held, the dispatcher's or one of the program's, would never be released in the
child, and whoever closes an inherited buffer there would wait for ever. What such a lock guards is the parent's, or is looked at anew by
the child; so there it starts free.

A raw fork system call runs none of this.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def fork_lock() -> Any:
    """A re-entrant lock; see the module."""
    made = threading.RLock()
    _locks.add(made)
    return made


def _after_fork() -> None:
    for lock in list(_locks):
        if not lock._is_owned():
            lock._at_fork_reinit()  # what threading does with its own


os.register_at_fork(after_in_child=_after_fork)
