"""``unwrap`` and ``merge``: the plain fences inside of containers, and one fence that stands for several (semantics 3.17)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.chain import DmaFenceChain, contained, walk
from dmabuf.core.fence.container import one_domain
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.stub import private_stub
from dmabuf.domain.domain import Domain


def unwrap(fence: DmaFence | None) -> Iterator[DmaFence]:
    """Yield the plain fences in a chain of arrays, newest point first. A plain fence yields itself, and None yields nothing.

    Signaled fences are among them, except points of a chain that were unlinked.

    Kernel: dma_fence_unwrap_for_each, dma_fence_unwrap_first, dma_fence_unwrap_next.
    """
    point = fence
    while point is not None:
        inside = contained(point)
        if isinstance(inside, DmaFenceArray):
            yield from inside.fences
        else:
            yield inside
        point = walk(point)


def leaves_of(fence: DmaFence) -> tuple[DmaFence, ...]:
    """Return the fences that must all be signaled: the plain ones, or a container that may be signaled before them."""
    points = fence if isinstance(fence, DmaFenceChain) else (fence,)
    if any(isinstance(inside, DmaFenceArray) and inside.signal_on_any for inside in map(contained, points)):
        return (fence,)
    return tuple(unwrap(fence))


def merge(*fences: DmaFence, domain: Domain | None = None) -> DmaFence:
    """Return one fence that is signaled when all of the fences are.

    Containers are taken apart, and signaled fences left out. The inputs are merged by the order of their contexts, and where two come to
    the same context at once, only the later one is kept. So duplicates go if each input is ordered by context, as results of merge() are;
    Linux 6.13 and later always drop them.

    Args:
        fences: Fences of one domain.
        domain: Where to make the stub if there are no fences; None means the user's default domain.

    Returns:
        The only pending fence, an array with a fresh context for several, or a private stub with the latest time of a signal for none.

    Raises:
        CrossDomainError: The fences belong to several domains (EXDEV).
        NoSpaceError: The domain is full (ENOSPC).

    Kernel: dma_fence_unwrap_merge.
    """
    if not fences:
        return private_stub(0, domain=domain)
    common = one_domain(fences, "merge")
    pending, latest = 0, 0
    for leaf in itertools.chain.from_iterable(map(unwrap, fences)):
        if leaf.is_signaled():
            latest = max(latest, leaf.timestamp)
        else:
            pending += 1
    if not pending:
        return private_stub(latest, domain=common)
    found = _merged([unwrap(fence) for fence in fences])
    if not found:  # the last ones were signaled while it looked
        return private_stub(0, domain=common)
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
