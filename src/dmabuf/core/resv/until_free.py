"""Tasks that wait until a reservation lock is free, so that their loop goes on.

A lock is held for microseconds, but somebody may keep it for longer: another process, or another task of the same loop. One thread a lock
waits for all the tasks, whatever their number. It is nobody else's: in a pool that others use too, the tasks that wait could take every
thread, and the holder, who needs one before it unlocks, would wait for them.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import TYPE_CHECKING

from dmabuf.core.task import waiting as awaiting
from dmabuf.core.task.owner import current
from dmabuf.domain.domain import TICK_NS
from dmabuf.domain.forks import fork_lock

if TYPE_CHECKING:
    from dmabuf.core.resv.resv import DmaResv

_guard = fork_lock()
_waiting: dict[DmaResv, dict[awaiting.Pause, None]] = {}  # with a thread each


async def until_free(resv: DmaResv, timeout: float | None) -> bool:
    """Sleep until the lock was free for a moment; False when the time, in seconds, was over first.

    Cancelling leaves nothing registered, and the thread, if nobody else waits, ends within a tick. Errors: RuntimeError no thread is to be
    had.
    """
    stop = awaiting.pause()
    with _guard:
        stops = _waiting.get(resv)
        if stops is None:
            stops = {}
            # The thread comes first, and looks when the guard is free: what a signal handler raises in here leaves no lock without one.
            threading.Thread(target=_wait, args=(resv, stops), name="dmabuf-lock", daemon=True).start()
            _waiting[resv] = stops
        stops[stop] = None
    try:
        return await stop.within(timeout)
    finally:
        with _guard:
            stops.pop(stop, None)


def _wait(resv: DmaResv, stops: dict[awaiting.Pause, None]) -> None:
    """Take the lock and give it back, a tick longer at most than anybody cares."""
    error: BaseException | None = None
    ended: list[awaiting.Pause] = []
    over = False
    while not over:
        try:
            owner = current(resv.domain)
            shm, index = resv._record.at()
            answer = shm.resv_lock(index, owner.word, 0, False, False, time.monotonic_ns() + TICK_NS)
            if answer >= 0:
                shm.resv_unlock(index, owner.word)
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


os.register_at_fork(after_in_child=_waiting.clear)  # a fork takes no thread along
