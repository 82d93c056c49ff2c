"""Awaiting frames and slots, in a task of asyncio or trio."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Final

from dmabuf._native import SW_NEWS, SW_SPACE, Frame
from dmabuf.core.task import waiting
from dmabuf.domain.dispatcher import dispatcher
from dmabuf.errors import fail
from dmabuf.stream.refusals import failed

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmabuf._native import FrameMaking
    from dmabuf.stream.parts import Part

LOOK_S: Final = 1.0  # a wake-up that was lost with the process that died before it: look again


async def _until(part: Part, operation: str, word: int, timeout: float | None, ask: Callable[[], Frame | None]) -> Frame:
    """Return what ``ask`` returns once that is a frame; it is tried at each change of a word of the stream."""
    if timeout is not None and not timeout >= 0:
        raise fail(errno.EINVAL, operation, part, "pass seconds >= 0, or None to wait forever", what=f"timeout is {timeout}")
    until = None if timeout is None else time.monotonic() + timeout
    while True:
        if (frame := ask()) is not None:
            return frame
        ring = part.ring
        fence = part.waits_for or ring.domain.shm.stream_await(ring.stream, ring.gen, word)
        if (frame := ask()) is not None:  # what changed before the word was looked at wakes nobody
            return frame
        left = LOOK_S if until is None else min(LOOK_S, until - time.monotonic())
        if left <= 0:
            failed(part, operation, errno.ETIMEDOUT)
        await _ended(part, fence, left)


async def _ended(part: Part, fence: int, seconds: float) -> None:
    """Stop the task until a fence ends, or for so long."""
    pause, watcher = waiting.pause(), dispatcher(part.domain)

    def done(_: int) -> None:
        pause.end()

    token = watcher.watch(fence, done, foreign=True)
    if token is None:
        await waiting.checkpoint()
        return
    try:
        await pause.within(seconds)
    finally:
        watcher.unwatch(fence, token)


async def next_frame(part: Part, timeout: float | None) -> Frame:
    """Return the next frame."""
    return await _until(part, "next", SW_NEWS, timeout, part.attempt)


async def enter(making: FrameMaking) -> Frame:
    """Enter the block of a frame that is made."""
    return await _until(making.port, "produce", SW_SPACE, making.timeout, making.attempt)
