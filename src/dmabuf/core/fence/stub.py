"""``stub_fence`` and ``private_stub``: fences that were signalled from the start (spec 3.13)."""

from __future__ import annotations

import errno

from dmabuf.core.fence.fence import DmaFence, register, unbound_timeline
from dmabuf.domain.domain import Domain
from dmabuf.domain.local import Local
from dmabuf.errors import fail

_STUB: Local[DmaFence] = Local(lambda domain: private_stub(0, domain=domain))


def stub_fence(*, domain: Domain | None = None) -> DmaFence:
    """The fence that was always signalled: context 0, seqno 0, names "stub"; one a process. Kernel: dma_fence_get_stub."""
    domain = domain or Domain.default()
    domain.join()
    return _STUB.of(domain)


def private_stub(timestamp: int, *, error: int = 0, domain: Domain | None = None) -> DmaFence:
    """A new signalled fence with this time of signalling, CLOCK_MONOTONIC ns, 0 for now.

    ``error``: the negative errno that it ended with. Errors: EINVAL a negative time; ENOSPC the domain is full.
    Kernel: dma_fence_allocate_private_stub.
    """
    if timestamp < 0:
        raise fail(errno.EINVAL, "private_stub", f"timestamp {timestamp}", "a timestamp is CLOCK_MONOTONIC nanoseconds")
    domain = domain or Domain.default()
    shm = domain.join()
    handle = shm.fence_alloc(unbound_timeline(domain, "stub"), 0, 0, 0, 0, 0)
    shm.fence_signal(handle, error, False, timestamp)
    fence = DmaFence(shm, handle, True)
    register(fence, domain, None)
    return fence
