"""``wait_any``: wait for the first of several fences (spec 3.9)."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from dmabuf._native import OFF_CONTEXT
from dmabuf.core.base.clock import monotonic_deadline, seconds_left
from dmabuf.core.fence.container import Container
from dmabuf.core.fence.fence import DmaFence, flagged, unbound_timeline
from dmabuf.domain.domain import Domain
from dmabuf.errors import contract_warning, fail


def wait_any(fences: Iterable[DmaFence], timeout: float | None = None, *, interruptible: bool = False) -> tuple[int | None, float]:
    """Wait until one of the fences is signalled: (its index, the seconds left), the lowest index if there are several; (None, 0.0) when
    the time is over. Seconds left are > 0, inf for None. Fences of other processes, and of several domains, may be among them.

    ``timeout`` 0 polls. A fence's own error is not raised. One sleep, however many fences there are.

    Errors: EINVAL no fences (with a ``ContractWarning``) or a negative timeout; EINTR a signal, if ``interruptible``; TypeError no fence;
    ENOSPC the domain is full. Kernel: dma_fence_wait_any_timeout.
    """
    if isinstance(fences, DmaFence):
        raise TypeError("wait_any: fences is a list of fences, as [a, b], not one DmaFence: that is fence.wait()")
    found = tuple(fences)
    if not found:
        contract_warning("wait_any: no fences", 2)
        raise fail(errno.EINVAL, "wait_any", "no fences", "name at least one")
    for fence in found:
        if not isinstance(fence, DmaFence):
            raise TypeError(f"wait_any: a DmaFence is expected, not {type(fence).__name__}")
    until = monotonic_deadline(timeout, "wait_any", f"{len(found)} fences")
    if timeout == 0:
        index = next((i for i, fence in enumerate(found) if fence.is_signaled()), None)
        return index, 0.0 if index is None else 1e-9
    # What is slept on is a fence of this process, ended by whichever of the others comes first: so the sleep is one futex, and all that
    # ends a sleep ends this one.
    domain: Domain = found[0].domain
    shm = domain.join()
    bell = shm.fence_alloc(unbound_timeline(domain, "wait_any"), shm.add64(OFF_CONTEXT, 1), 1, 0, 0, 0)
    watched: list[tuple[DmaFence, int]] = []
    try:
        for index, fence in enumerate(found):
            token = fence.listen(lambda _: shm.fence_signal(bell, 0, False))
            if token is None:
                return index, seconds_left(until)
            watched.append((fence, token))
        answer = shm.fence_wait(bell, until, interruptible)
    finally:
        for fence, token in watched:
            fence.remove_callback(token)
        shm.fence_signal(bell, 0, True)
    index = next((i for i, fence in enumerate(found) if _over(fence)), None)
    if index is not None and answer:
        return index, seconds_left(until)
    if answer < 0:
        raise fail(errno.EINTR, "wait_any", f"{len(found)} fences", "a signal arrived; wait again")
    return None, 0.0


def _over(fence: DmaFence) -> bool:
    """Has what was listened to ended? Of a container that a fork inherited that is not its own slot."""
    return fence.is_signaled() if isinstance(fence, Container) else flagged(fence)
