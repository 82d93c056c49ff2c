"""Waiting in a coroutine, the same way under asyncio and under trio, and so under anyio on both.

The functions ask which framework's task runs, and pass the call on to ``on_asyncio`` or ``on_trio``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from dmabuf.core.task.on_asyncio import ASYNCIO
from dmabuf.core.task.on_trio import TRIO
from dmabuf.core.task.pause import Framework, Pause


def running() -> object | None:
    """Return the task of asyncio or trio that runs in this thread, or None outside of one.

    Each access and each lock calls this, so it repeats ``runs_here`` of both frameworks.
    """
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and (loop := asyncio._get_running_loop()) is not None:
        task: object | None = asyncio.current_task(loop)
        if task is not None:
            return task
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        found: object = trio.lowlevel.current_task()
        return found
    return None


def name_of(task: object) -> str:
    """Return a task's name, as its framework shows it."""
    name = getattr(task, "name", None)
    return str(getattr(task, "get_name")() if name is None else name)  # noqa: B009  (asyncio's tasks have only the method)


def _framework() -> Framework:
    if ASYNCIO.runs_here():
        return ASYNCIO
    if TRIO.runs_here():
        return TRIO
    raise RuntimeError("await: no event loop that dmabuf knows runs here; await in a task of asyncio or trio (pip install 'dmabuf[async]')")


def pause() -> Pause:
    """Return a stop of the running task. Raises RuntimeError outside of asyncio and trio."""
    return _framework().pause()


async def checkpoint() -> None:
    """Let other tasks run."""
    await _framework().checkpoint()


async def descriptor(fd: int, write: bool, timeout: float | None) -> bool:
    """Sleep until a descriptor is readable (``write``: writable), at most this many seconds. Return False when the time was over first.

    The descriptor must be the caller's own, because a loop knows its waiters by the number.
    """
    return await _framework().descriptor(fd, write, timeout)


async def in_thread(fn: Callable[[], object]) -> None:
    """Call a blocking function in a thread of its own, and raise what it raises.

    A canceled task continues at once, and the thread ends with the function. The thread comes from no pool: what the function waits for
    may be a task that waits for a thread of the pool.
    """
    await _framework().in_thread(fn)


async def to_its_end(fn: Callable[[], object]) -> None:
    """Call a blocking function in a thread of its own, so that it waits for no other, and raise what it raises.

    A canceled task continues when the function is over: what it did can then be undone, and nothing goes on behind the task's back.
    """
    await _framework().to_its_end(fn)
