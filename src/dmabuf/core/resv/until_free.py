"""Tasks that wait until a reservation lock is free, so that their loop goes on.

A lock is held for microseconds, but another process, or another task of the same loop, may keep it for longer. One thread for each lock
waits on behalf of all its tasks. The thread comes from no pool: in a pool that others share, the waiting tasks could take every thread,
and the holder, who needs one before it unlocks, would wait for them.
"""

from __future__ import annotations

import os
import threading

from dmabuf._native import hurry
from dmabuf.core.resv.lock import ResvLock, record_of
from dmabuf.core.task.owner import current
from dmabuf.core.task.pause import Pause
from dmabuf.core.task.waiting import pause
from dmabuf.domain.forks import fork_lock

_guard = fork_lock()
_waiting: dict[ResvLock, dict[Pause, None]] = {}  # the locks that have a thread, and the tasks that each thread waits for


async def until_free(resv: ResvLock, timeout: float | None) -> bool:
    """Sleep until the lock was free for a moment, at most ``timeout`` seconds. Return False when the time was over first.

    A canceled task leaves nothing registered. If no other task waits, the thread then ends at a tick. Raises RuntimeError if no thread can
    be started.
    """
    stop = pause()
    with _guard:
        stops = _waiting.get(resv)
        if stops is None:
            stops = {}
            # The thread comes first, and looks when the guard is free. So an exception of a signal handler in this block leaves no lock
            # without a thread.
            threading.Thread(target=_wait, args=(resv, stops), name="dmabuf-lock", daemon=True).start()
            _waiting[resv] = stops
        stops[stop] = None
    try:
        return await stop.within(timeout)
    finally:
        with _guard:
            stops.pop(stop, None)
            if not stops:
                hurry()


class _Unwanted(Exception):
    """No task waits for the lock any more."""


class _Thread(threading.local):
    """The tasks for which the running thread waits."""

    stops: dict[Pause, None] | None = None


_thread = _Thread()


def _look(_: int, __: int) -> None:
    if _thread.stops is not None and not _thread.stops:
        raise _Unwanted


def _wait(resv: ResvLock, stops: dict[Pause, None]) -> None:
    """Take the lock and release it, unless a tick finds that no task waits for it."""
    error: BaseException | None = None
    ended: list[Pause] = []
    over, _thread.stops = False, stops
    resv.domain.tick_hooks.ensure("locks", _look)
    while not over:
        over = True
        try:
            owner = current(resv.domain)
            shm, index = record_of(resv).at()
            if shm.resv_lock(index, owner.word, 0, False, False, -1) >= 0:
                shm.resv_unlock(index, owner.word)
        except _Unwanted:
            over = False
        except BaseException as e:
            error = e
        with _guard:
            over = over or not stops
            if over:
                if _waiting.get(resv) is stops:
                    del _waiting[resv]
                ended = list(stops)
    for stop in ended:
        stop.end(error)
    del error


os.register_at_fork(after_in_child=_waiting.clear)  # a fork takes no thread along
