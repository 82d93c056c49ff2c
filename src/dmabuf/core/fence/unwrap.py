"""``unwrap`` and ``merge``: the plain fences inside of containers, and one fence that stands for several (spec 3.17)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.chain import contained, walk
from dmabuf.core.fence.container import one_domain
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.stub import private_stub
from dmabuf.domain.domain import Domain


def unwrap(fence: DmaFence | None) -> Iterator[DmaFence]:
    """The plain fences in a chain of arrays, newest point first; a plain fence yields itself, None nothing.

    Signalled ones too, but for points of a chain that have been unlinked.

    Kernel: dma_fence_unwrap_for_each, dma_fence_unwrap_first, dma_fence_unwrap_next.
    """
    here = fence
    while here is not None:
        inside = contained(here)
        if isinstance(inside, DmaFenceArray):
            yield from inside.fences
        else:
            yield inside
        here = walk(here)


def merge(*fences: DmaFence, domain: Domain | None = None) -> DmaFence:
    """One fence that is signalled when all of them are.

    Containers are taken apart and signalled fences left out. Nothing pending: a private stub with the latest time of signalling; one
    fence pending: that fence; else an array with a fresh context. ``domain``: of a stub for no fences at all.

    The inputs are merged by the order of their contexts, and where two come to the same context at once only the later one is kept. So
    duplicates are dropped if each input is ordered by context, which results of merge() are; Linux 6.13 and later drop them always.

    Errors: EXDEV fences of several domains; ENOSPC the domain is full. Kernel: dma_fence_unwrap_merge.
    """
    if not fences:
        return private_stub(0, domain=domain)
    home = one_domain(fences, "merge")
    pending, latest = 0, 0
    for leaf in itertools.chain.from_iterable(map(unwrap, fences)):
        if leaf.is_signaled():
            latest = max(latest, leaf.timestamp)
        else:
            pending += 1
    if not pending:
        return private_stub(latest, domain=home)
    found = _merged([unwrap(fence) for fence in fences])
    if not found:  # the last ones signalled while we looked
        return private_stub(0, domain=home)
    return found[0] if len(found) == 1 else DmaFenceArray(found)


def _merged(inputs: list[Iterator[DmaFence]]) -> list[DmaFence]:
    heads: list[tuple[int, int, DmaFence]] = []

    def advance(at: int) -> None:
        for leaf in inputs[at]:
            if not leaf.is_signaled():
                heapq.heappush(heads, (leaf.context, at, leaf))
                return

    for at in range(len(inputs)):
        advance(at)
    found: list[DmaFence] = []
    while heads:
        context, at, leaf = heapq.heappop(heads)
        while heads and heads[0][0] == context and not leaf.is_signaled():
            _, other_at, other = heapq.heappop(heads)
            if leaf.is_later(other):
                advance(other_at)
            else:
                advance(at)
                at, leaf = other_at, other
        if not leaf.is_signaled():
            found.append(leaf)
        advance(at)
    return found
