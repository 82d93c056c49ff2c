"""Tasks of asyncio. Never imports asyncio: where no task of it can run, nothing in this module is called.

Ends from outside of a task reach a loop in batches. However many pauses end before the loop turns again, it is woken once.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from dmabuf.core.task.pause import Framework, Pause
from dmabuf.domain.guards import WeakKeys

if TYPE_CHECKING:
    import asyncio


class Waker:
    """The futures that one loop resolves at its next turn."""

    __slots__ = ("_due", "_posted")

    def __init__(self) -> None:
        self._due: deque[tuple[asyncio.Future[None], BaseException | None]] = deque()
        self._posted = False

    def post(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None], error: BaseException | None) -> None:
        """Have the loop resolve a future, from any thread."""
        self._due.append((future, error))
        if not self._posted:  # else a drain will come: it clears the mark before it looks
            try:
                self._posted = True
                loop.call_soon_threadsafe(self.drain)
            except RuntimeError:  # the loop is closed, so no task awaits anything
                self._posted = False
                self._due.clear()
            except BaseException:  # a signal handler's: perhaps no drain will come, and one more does no harm
                self._posted = False
                loop.call_soon_threadsafe(self.drain)
                raise

    def drain(self) -> None:
        """Resolve what was posted, in the loop."""
        self._posted = False
        while self._due:
            _resolve(*self._due.popleft())


_wakers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Waker] = WeakKeys()


def _resolve(future: asyncio.Future[None], error: BaseException | None = None) -> None:
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


class AsyncioPause(Pause):
    """A future of the running loop."""

    __slots__ = ("_expired", "_loop", "_waker", "future")

    future: asyncio.Future[None]

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self.future, self._expired = loop, loop.create_future(), False
        waker = _wakers.get(loop)
        self._waker = waker if waker is not None else _wakers.setdefault(loop, Waker())

    def end(self, error: BaseException | None = None) -> None:
        asyncio = sys.modules["asyncio"]
        if asyncio._get_running_loop() is self._loop and asyncio.current_task(self._loop) is not None:
            # A task of this loop runs here, so the loop looks at what is ready before it sleeps. (In a signal
            # handler or a finalizer, which may run while the loop is about to sleep, no task is current.)
            _resolve(self.future, error)
        else:
            self._waker.post(self._loop, self.future, error)

    def __await__(self) -> Generator[Any, Any, None]:
        yield from self.future

    def _expire(self) -> None:
        if not self.future.done():
            self._expired = True
            self.future.set_result(None)

    async def within(self, timeout: float | None) -> bool:
        timer = None if timeout is None else self._loop.call_later(timeout, self._expire)
        try:
            await self.future
        finally:
            if timer is not None:
                timer.cancel()
        return not self._expired


class Asyncio(Framework):
    """asyncio, for the task that runs."""

    __slots__ = ()

    def runs_here(self) -> bool:
        """Return True if a task of asyncio runs in this thread."""
        asyncio = sys.modules.get("asyncio")
        loop = None if asyncio is None else asyncio._get_running_loop()
        return asyncio is not None and loop is not None and asyncio.current_task(loop) is not None

    def pause(self) -> AsyncioPause:
        return AsyncioPause(_loop())

    async def checkpoint(self) -> None:
        await sys.modules["asyncio"].sleep(0)

    async def descriptor(self, fd: int, write: bool, timeout: float | None) -> bool:
        loop = _loop()
        add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
        stop = AsyncioPause(loop)
        add(fd, stop.end)
        try:
            return await stop.within(timeout)
        finally:
            remove(fd)

    async def in_thread(self, fn: Callable[[], object]) -> None:
        over, failed = self._begun(fn)
        await over
        if failed:
            raise failed.pop()

    async def to_its_end(self, fn: Callable[[], object]) -> None:
        asyncio = sys.modules["asyncio"]
        over, failed = self._begun(fn)
        canceled: BaseException | None = None
        while not over.future.done():
            try:
                await asyncio.wait([over.future])
            except asyncio.CancelledError as e:
                canceled = e
        error = canceled or (failed[0] if failed else None)
        failed.clear()
        try:
            if error is not None:
                raise error
        finally:
            del error, canceled

    def _begun(self, fn: Callable[[], object]) -> tuple[AsyncioPause, list[BaseException]]:
        """Start a thread that calls ``fn``. Return what ends with it, and the list that gets what it raised.

        The error is not put into the future, which its traceback would keep. If no thread can be started, this thread calls ``fn``.
        """
        over = self.pause()
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


def _loop() -> asyncio.AbstractEventLoop:
    found: asyncio.AbstractEventLoop = sys.modules["asyncio"].get_running_loop()
    return found


ASYNCIO = Asyncio()
