"""Tasks of trio. Never imports trio: where no task of it can run, nothing in this module is called."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from dmabuf.core.task.pause import Framework, Pause

if TYPE_CHECKING:
    import trio


class TrioPause(Pause):
    """A task that trio reschedules."""

    __slots__ = ("_asleep", "_error", "_over", "_task", "_token", "_trio")

    _task: trio.lowlevel.Task
    _token: trio.lowlevel.TrioToken

    def __init__(self) -> None:
        self._trio = sys.modules["trio"]
        self._task, self._token = self._trio.lowlevel.current_task(), self._trio.lowlevel.current_trio_token()
        self._asleep = self._over = False
        self._error: BaseException | None = None

    def end(self, error: BaseException | None = None) -> None:
        try:
            self._token.run_sync_soon(self._wake, error)
        except self._trio.RunFinishedError:
            pass  # the run is over, so no task awaits anything

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


class Trio(Framework):
    """trio, for the task that runs."""

    __slots__ = ()

    def runs_here(self) -> bool:
        """Return True if a task of trio runs in this thread."""
        trio = sys.modules.get("trio")
        return trio is not None and bool(trio.lowlevel.in_trio_task())

    def pause(self) -> TrioPause:
        return TrioPause()

    async def checkpoint(self) -> None:
        await sys.modules["trio"].lowlevel.checkpoint()

    async def descriptor(self, fd: int, write: bool, timeout: float | None) -> bool:
        trio = sys.modules["trio"]
        wait = trio.lowlevel.wait_writable if write else trio.lowlevel.wait_readable
        with trio.move_on_after(math.inf if timeout is None else timeout) as scope:
            await wait(fd)
        return not scope.cancelled_caught

    async def in_thread(self, fn: Callable[[], object]) -> None:
        trio = sys.modules["trio"]
        await trio.to_thread.run_sync(fn, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True)

    async def to_its_end(self, fn: Callable[[], object]) -> None:
        trio = sys.modules["trio"]
        await trio.to_thread.run_sync(fn, limiter=trio.CapacityLimiter(1))
        await trio.lowlevel.checkpoint_if_cancelled()


TRIO = Trio()
