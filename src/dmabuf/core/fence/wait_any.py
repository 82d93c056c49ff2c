"""``wait_any``: wait for the first of several fences (semantics 3.9)."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable

from dmabuf._native import OFF_CONTEXT, Fence
from dmabuf.core.base.clock import monotonic_deadline, seconds_left
from dmabuf.core.fence.container import Container, check_callbacks
from dmabuf.core.fence.fence import DmaFence, flagged, unbound_timeline
from dmabuf.domain import slow_waits
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import finished
from dmabuf.errors import contract_warning, fail


def wait_any(fences: Iterable[DmaFence], timeout: float | None = None, *, interruptible: bool = False) -> tuple[int | None, float]:
    """Wait until one of several fences is signaled. It sleeps once, however many there are. A fence's own error is not raised.

    Args:
        fences: Fences of this or other processes, and of any domains.
        timeout: Seconds; 0 polls, None waits without a limit.
        interruptible: Let a signal end the wait.

    Returns:
        The index of the first fence in the list that is signaled, and the seconds left (more than 0; inf without a timeout). (None, 0.0)
        when the time is over.

    Raises:
        InvalidError: There are no fences, with a ``ContractWarning``, or the timeout is negative (EINVAL).
        InterruptedWaitError: A signal arrived (EINTR).
        NoSpaceError: The domain is full (ENOSPC).

    Kernel: dma_fence_wait_any_timeout.
    """
    if isinstance(fences, DmaFence):
        raise TypeError("wait_any: fences is a list of fences, as [a, b], not one DmaFence: that is fence.wait()")
    if not isinstance(fences, Iterable):
        raise TypeError(f"wait_any: fences is a list of fences, as [a, b], not {type(fences).__name__}")
    found = tuple(fences)
    if not found:
        contract_warning("wait_any: no fences; pass at least one", 2)
        raise fail(errno.EINVAL, "wait_any", "fences", "pass at least one", what="there are none")
    for fence in found:
        if not isinstance(fence, DmaFence):
            raise TypeError(f"wait_any: a DmaFence is expected, not {type(fence).__name__}")
    until = monotonic_deadline(timeout, "wait_any", f"{len(found)} fences")
    if timeout == 0:
        index = next((i for i, fence in enumerate(found) if fence.is_signaled()), None)
        return index, 0.0 if index is None else 1e-9
    index = wait_until(found, until, interruptible)
    return (None, 0.0) if index is None else (index, seconds_left(until))


def wait_until(found: tuple[DmaFence, ...], until: int, interruptible: bool, go_on: Callable[[], bool] | None = None) -> int | None:
    """Wait as :func:`wait_any` does, until a CLOCK_MONOTONIC time in ns (-1: no limit). Return the index, None when the time is over.

    ``go_on``: called at each tick of the wait, which ends when it returns False. It may raise.
    """
    check_callbacks(found, found[0].domain, "wait_any", f"{len(found)} fences")
    index, answer = None, 1
    while index is None and answer > 0:  # again if this process has left the domain meanwhile, which ends the fence that it sleeps on
        index, answer = _sleep(found, until, interruptible, go_on)
    if answer < 0 and index is None:
        raise fail(errno.EINTR, "wait_any", f"{len(found)} fences", "wait again", what="interrupted by a signal")
    return index


def _sleep(found: tuple[DmaFence, ...], until: int, interruptible: bool, go_on: Callable[[], bool] | None) -> tuple[int | None, int]:
    """Return the index of the first fence that is signaled, if one is, and what ``Shm.fence_wait`` returned."""
    # It sleeps on a fence of this process, which whichever of the others comes first signals. So the sleep is one futex, and everything
    # that ends a sleep ends this one.
    domain: Domain = found[0].domain
    shm = domain.join()
    # It goes, and its slot is free, with the last of the callbacks.
    first = Fence.made(shm, unbound_timeline(domain, "wait_any"), shm.add64(OFF_CONTEXT, 1), 1, 0)
    watched: list[tuple[DmaFence, int | None]] = []
    stands_for = domain.id, first.handle

    def wake(_: int) -> None:
        shm.fence_signal(first.handle, 0, False)

    try:
        slow_waits.STANDS_FOR[stands_for] = [fence.handle for fence in found if fence.domain is domain]
        ended = _listen(found, wake, watched)
        if ended is not None:
            return ended, 1
        answer = _sleep_on(first, until, interruptible, go_on)
    finally:
        _forget(watched, stands_for)
    return next((i for i, fence in enumerate(found) if answer and _signaled(fence)), None), answer


def _sleep_on(first: Fence, until: int, interruptible: bool, go_on: Callable[[], bool] | None) -> int:
    # Not in the caller's ``try``: some compilers leave the jump of such a loop out of it, and a signal handler may raise there.
    answer = first.shm.fence_wait(first.handle, until, interruptible, go_on is not None)
    while not answer and go_on is not None and (until < 0 or time.monotonic_ns() < until) and go_on():
        answer = first.shm.fence_wait(first.handle, until, interruptible, True)
    return answer


def _listen(found: tuple[DmaFence, ...], wake: Callable[[int], None], watched: list[tuple[DmaFence, int | None]]) -> int | None:
    """Listen to the fences. Return the index of the first that is signaled already, and leave out the rest then."""
    for index, fence in enumerate(found):
        # In one call, so that a signal handler can't raise between a callback and its note.
        watched.extend(zip((fence,), map(fence.listen, (wake,)), strict=True))
        if watched[-1][1] is None:
            return index
    return None


@finished
def _forget(watched: list[tuple[DmaFence, int | None]], stands_for: tuple[str, int]) -> None:
    slow_waits.STANDS_FOR.pop(stands_for, None)
    while watched:
        fence, token = watched[-1]
        if token is not None:
            fence.remove_callback(token)
        del watched[-1:]


def _signaled(fence: DmaFence) -> bool:
    """Return True if what was listened to is signaled. For a container inherited by a fork that is not its own slot."""
    return fence.is_signaled() if isinstance(fence, Container) else flagged(fence)
