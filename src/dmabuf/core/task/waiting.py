"""Waiting in a coroutine, the same way under asyncio and under trio (so under anyio on both).

A :class:`Pause` is one stop of one task. ``await pause`` sleeps until somebody calls ``pause.end()``, from any thread, at any time, any
number of times; an end before the sleep is kept. Cancelling wakes the task as its framework does, and what is left is the registrant's to
take back.

Ends from outside of a task reach an asyncio loop in batches: however many fences end before the loop turns again, it is woken once.
Neither framework is imported from here: one that isn't imported runs nothing.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from typing import Any


class Pause(ABC):
    """One stop of the running task."""

    __slots__ = ()

    @abstractmethod
    def end(self, error: BaseException | None = None) -> None:
        """Let the task go on, or raise ``error`` in it. From any thread; only the first end counts."""

    @abstractmethod
    def __await__(self) -> Generator[Any, Any, None]: ...

    @abstractmethod
    async def within(self, timeout: float | None) -> bool:
        """Sleep, at most this many seconds; False when the time was over first."""


class _Waker:
    """What is to be ended in one asyncio loop at its next turn."""

    __slots__ = ("_due", "_posted")

    def __init__(self) -> None:
        self._due: deque[tuple[Any, BaseException | None]] = deque()
        self._posted = False

    def post(self, loop: Any, future: Any, error: BaseException | None) -> None:
        self._due.append((future, error))
        if not self._posted:  # else a drain is to come: it clears the mark before it looks
            try:
                self._posted = True
                loop.call_soon_threadsafe(self.drain)
            except RuntimeError:  # the loop was closed: nobody awaits anything any more
                self._posted = False
                self._due.clear()
            except BaseException:  # a signal handler's: the drain may not be to come, and once more does no harm
                self._posted = False
                loop.call_soon_threadsafe(self.drain)
                raise

    def drain(self) -> None:
        self._posted = False
        while self._due:
            _resolve(*self._due.popleft())


_wakers: weakref.WeakKeyDictionary[Any, _Waker] = weakref.WeakKeyDictionary()


def _resolve(future: Any, error: BaseException | None = None) -> None:
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


class _AsyncioPause(Pause):
    __slots__ = ("_expired", "_future", "_loop", "_waker")

    def __init__(self, loop: Any) -> None:
        self._loop, self._future, self._expired = loop, loop.create_future(), False
        waker = _wakers.get(loop)
        self._waker = waker if waker is not None else _wakers.setdefault(loop, _Waker())

    def end(self, error: BaseException | None = None) -> None:
        asyncio = sys.modules["asyncio"]
        if asyncio._get_running_loop() is self._loop and asyncio.current_task(self._loop) is not None:
            # A task of the loop itself runs here, so the loop looks at what is ready before it sleeps. (A signal handler or a finaliser
            # may run here too, while the loop is about to sleep: then no task is current.)
            _resolve(self._future, error)
        else:
            self._waker.post(self._loop, self._future, error)

    def __await__(self) -> Generator[Any, Any, None]:
        yield from self._future

    def _expire(self) -> None:
        if not self._future.done():
            self._expired = True
            self._future.set_result(None)

    async def within(self, timeout: float | None) -> bool:
        timer = None if timeout is None else self._loop.call_later(timeout, self._expire)
        try:
            await self._future
        finally:
            if timer is not None:
                timer.cancel()
        return not self._expired


class _TrioPause(Pause):
    __slots__ = ("_asleep", "_error", "_over", "_task", "_token", "_trio")

    def __init__(self, trio: Any) -> None:
        self._trio = trio
        self._task, self._token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
        self._asleep = self._over = False
        self._error: BaseException | None = None

    def end(self, error: BaseException | None = None) -> None:
        try:
            self._token.run_sync_soon(self._wake, error)
        except self._trio.RunFinishedError:
            pass  # nobody awaits anything any more

    def _wake(self, error: BaseException | None) -> None:
        if not self._over:
            self._over, self._error = True, error
            if self._asleep:
                self._asleep = False
                self._trio.lowlevel.reschedule(self._task)

    def _abort(self, _: object) -> Any:
        self._asleep, self._over = False, True
        return self._trio.lowlevel.Abort.SUCCEEDED

    def __await__(self) -> Generator[Any, Any, None]:
        if self._over:
            yield from self._trio.lowlevel.checkpoint().__await__()
        else:
            self._asleep = True
            yield from self._trio.lowlevel.wait_task_rescheduled(self._abort).__await__()
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def within(self, timeout: float | None) -> bool:
        if timeout is None:
            await self
            return True
        with self._trio.move_on_after(timeout) as scope:
            await self
        return not scope.cancelled_caught


def running() -> tuple[Any, Any] | None:
    """(framework module, task) of the task that runs here, None outside of one."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and (loop := asyncio._get_running_loop()) is not None:
        task = asyncio.current_task(loop)
        if task is not None:
            return asyncio, task
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        return trio, trio.lowlevel.current_task()
    return None


def name_of(task: Any) -> str:
    """A task's name, as its framework shows it."""
    name = getattr(task, "name", None)
    return str(task.get_name() if name is None else name)


def _framework() -> Any:
    found = running()
    if found is None:
        raise RuntimeError(
            "await: no event loop that dmabuf knows runs here: await in a task of asyncio or trio (pip install 'dmabuf[async]')"
        )
    return found[0]


def pause() -> Pause:
    """A stop of the running task. Errors: RuntimeError outside of asyncio and trio."""
    framework = _framework()
    if framework.__name__ == "asyncio":
        return _AsyncioPause(framework._get_running_loop())
    return _TrioPause(framework)


async def checkpoint() -> None:
    """Let other tasks run."""
    framework = _framework()
    await (framework.sleep(0) if framework.__name__ == "asyncio" else framework.lowlevel.checkpoint())


async def descriptor(fd: int, write: bool, timeout: float | None) -> bool:
    """Sleep until a descriptor is readable (``write``: writable), at most this many seconds; False when the time was over first.

    The number must be the caller's own: a loop knows who waits by it.
    """
    framework = _framework()
    if framework.__name__ == "asyncio":
        loop = framework._get_running_loop()
        add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
        stop = _AsyncioPause(loop)
        add(fd, stop.end)
        try:
            return await stop.within(timeout)
        finally:
            remove(fd)
    wait = framework.lowlevel.wait_writable if write else framework.lowlevel.wait_readable
    with framework.move_on_after(math.inf if timeout is None else timeout) as scope:
        await wait(fd)
    return not scope.cancelled_caught


async def in_thread(fn: Callable[[], object]) -> None:
    """Call a blocking function in a thread of its own. A cancelled task goes on at once; the thread when the function is over.

    Not in a pool: what it waits for may be a task that waits for a thread of the pool. Errors: the function's.
    """
    framework = _framework()
    if framework.__name__ != "asyncio":
        await framework.to_thread.run_sync(fn, limiter=framework.CapacityLimiter(1), abandon_on_cancel=True)
        return
    over, failed = _begun(fn)
    await over
    if failed:
        raise failed.pop()


def _begun(fn: Callable[[], object]) -> tuple[_AsyncioPause, list[BaseException]]:
    """Start a thread that calls it: what ends with it, and what it raised (not in the future, which the error's traceback would keep).

    Where no thread is to be had it is called here.
    """
    over = _AsyncioPause(_framework()._get_running_loop())
    failed: list[BaseException] = []

    def run() -> None:
        try:
            fn()
        except BaseException as e:
            failed.append(e)
        over.end()

    try:
        threading.Thread(target=run, name="dmabuf-awaited", daemon=True).start()
    except RuntimeError:
        run()
    return over, failed


async def to_its_end(fn: Callable[[], object]) -> None:
    """Call a blocking function in a thread of its own, so that it waits for no other. Errors: the function's.

    A cancelled task hears of it when the function is over: what it did can then be undone, and nothing goes on behind the task's back.
    """
    framework = _framework()
    if framework.__name__ != "asyncio":
        await framework.to_thread.run_sync(fn, limiter=framework.CapacityLimiter(1))
        await framework.lowlevel.checkpoint_if_cancelled()
        return
    over, failed = _begun(fn)
    cancelled: BaseException | None = None
    while not over._future.done():
        try:
            await framework.wait([over._future])
        except framework.CancelledError as e:
            cancelled = e
    error = cancelled or (failed[0] if failed else None)
    failed.clear()
    try:
        if error is not None:
            raise error
    finally:
        del error, cancelled
