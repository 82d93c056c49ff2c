"""``stub_fence`` and ``private_stub``: fences that were signaled from the start (semantics 3.13)."""

from __future__ import annotations

import errno

from dmabuf.core.fence.fence import DmaFence, register, unbound_timeline
from dmabuf.domain.domain import Domain
from dmabuf.domain.local import Local
from dmabuf.errors import fail

_STUB: Local[DmaFence] = Local(lambda domain: private_stub(0, domain=domain))


def stub_fence(*, domain: Domain | None = None) -> DmaFence:
    """Return the fence that was always signaled: context 0, seqno 0, names "stub". A process has one in each domain.

    Args:
        domain: The domain; None means the user's default domain.

    Raises:
        NoSpaceError: The domain is full (ENOSPC).

    Kernel: dma_fence_get_stub.
    """
    domain = domain or Domain.default()
    domain.join()
    return _STUB.of(domain)


def private_stub(timestamp: int, *, error: int = 0, domain: Domain | None = None) -> DmaFence:
    """Return a new signaled fence.

    Args:
        timestamp: When it was signaled, in CLOCK_MONOTONIC ns; 0 for now.
        error: The negative errno that it was signaled with, or 0.
        domain: The domain; None means the user's default domain.

    Raises:
        InvalidError: The time is negative (EINVAL).
        NoSpaceError: The domain is full (ENOSPC).

    Kernel: dma_fence_allocate_private_stub.
    """
    if timestamp < 0:
        raise fail(errno.EINVAL, "private_stub", f"timestamp {timestamp}", "pass CLOCK_MONOTONIC ns, or 0 for now", what="it is negative")
    domain = domain or Domain.default()
    shm = domain.join()
    fence = DmaFence.made(shm, unbound_timeline(domain, "stub"), 0, 0, 0)
    register(fence, domain, None)
    shm.fence_signal(fence.handle, error, False, timestamp)
    return fence
