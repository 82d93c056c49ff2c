"""What a framework of tasks gives to this package: stops of a task, and calls in threads that a task waits for.

``on_asyncio`` and ``on_trio`` implement it, each for its framework; ``waiting`` picks the one whose task runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any


class Pause(ABC):
    """One stop of one task: ``await pause`` sleeps until some thread calls :meth:`end`. An end before the sleep is kept.

    Canceling wakes the task as its framework does. The code that registered the pause somewhere removes it there.
    """

    __slots__ = ()

    @abstractmethod
    def end(self, error: BaseException | None = None) -> None:
        """Let the task continue, or raise ``error`` in it. Callable from any thread, at any time; only the first call counts."""

    @abstractmethod
    def __await__(self) -> Generator[Any, Any, None]: ...

    @abstractmethod
    async def within(self, timeout: float | None) -> bool:
        """Sleep at most this many seconds. Return False when the time was over first."""


class Framework(ABC):
    """What a running task can do by its framework."""

    __slots__ = ()

    @abstractmethod
    def pause(self) -> Pause:
        """Return a stop of the running task."""

    @abstractmethod
    async def checkpoint(self) -> None:
        """Let other tasks run."""

    @abstractmethod
    async def descriptor(self, fd: int, write: bool, timeout: float | None) -> bool:
        """Sleep until a descriptor is readable or writable; see :func:`waiting.descriptor`."""

    @abstractmethod
    async def in_thread(self, fn: Callable[[], object]) -> None:
        """Call a blocking function in a thread that a canceled task leaves behind; see :func:`waiting.in_thread`."""

    @abstractmethod
    async def to_its_end(self, fn: Callable[[], object]) -> None:
        """Call a blocking function in a thread that a canceled task waits for; see :func:`waiting.to_its_end`."""
