"""Tasks that wait until a reservation lock is free, so that their loop goes on.

A lock is held for microseconds, but another process, or another task of the same loop, may keep it for longer. One thread for each lock
waits on behalf of all its tasks. The thread comes from no pool: in a pool that others share, the waiting tasks could take every thread,
and the holder, who needs one before it unlocks, would wait for them.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from functools import partial

from dmabuf._native import TICK_RESV
from dmabuf.core.resv.lock import ResvLock, record_of
from dmabuf.core.task.owner import current
from dmabuf.core.task.pause import Pause
from dmabuf.core.task.waiting import pause
from dmabuf.domain import slow_waits
from dmabuf.domain.domain import TICK_NS
from dmabuf.domain.forks import fork_lock

_guard = fork_lock()
_waiting: dict[ResvLock, dict[Pause, None]] = {}  # the locks that have a thread, and the tasks that each thread waits for


async def until_free(resv: ResvLock, timeout: float | None) -> bool:
    """Sleep until the lock was free for a moment, at most ``timeout`` seconds. Return False when the time was over first.

    A canceled task leaves nothing registered. If no other task waits, the thread then ends within a tick. Raises RuntimeError if no thread
    can be started.
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


def _wait(resv: ResvLock, stops: dict[Pause, None]) -> None:
    """Take the lock and release it, in slices of a tick until no task waits for it."""
    error: BaseException | None = None
    ended: list[Pause] = []
    over, wait = False, slow_waits.Wait()
    while not over:
        try:
            owner = current(resv.domain)
            shm, index = record_of(resv).at()
            answer = shm.resv_lock(index, owner.word, 0, False, False, time.monotonic_ns() + TICK_NS)
            if answer >= 0:
                shm.resv_unlock(index, owner.word)
            else:
                wait.look(resv.domain, partial(_holder, resv))
        except BaseException as e:
            error, answer = e, 0
        with _guard:
            over = answer != -errno.ETIMEDOUT or not stops
            if over:
                if _waiting.get(resv) is stops:
                    del _waiting[resv]
                ended = list(stops)
    for stop in ended:
        stop.end(error)
    del error


def _holder(resv: ResvLock) -> str:
    shm, index = record_of(resv).at()
    return slow_waits.named(resv.domain, TICK_RESV, shm.resv_owner(index))


os.register_at_fork(after_in_child=_waiting.clear)  # a fork takes no thread along
