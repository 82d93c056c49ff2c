"""Fences in reservations, the way most tests want them."""

import pytest

from dmabuf import DmaBuf, DmaFence, DmaResv, Timeline, Usage

USAGES = pytest.mark.parametrize("usage", list(Usage), ids=lambda usage: usage.name)


def attach(resv: DmaResv, fence: DmaFence, usage: Usage) -> None:
    """Add one fence, with all that it needs around it."""
    with resv.locked():
        resv.reserve(1)
        resv.add(fence, usage)


def key(fence: DmaFence) -> tuple[int, int]:
    """What names a fence in every process."""
    return fence.context, fence.seqno


def keys(resv: DmaResv, usage: Usage = Usage.BOOKKEEP) -> list[tuple[int, int]]:
    """The pending fences by name."""
    return [key(fence) for fence in resv.fences(usage)]


def entries(resv: DmaResv, usage: Usage = Usage.BOOKKEEP) -> list[tuple[tuple[int, int], Usage]]:
    """All entries by name in their order, signalled ones too."""
    with resv.locked():
        return [(key(fence), used) for fence, used in resv.iterate(usage)]


def the_fence(buf: DmaBuf, usage: Usage = Usage.BOOKKEEP) -> DmaFence:
    """The only pending fence of a buffer."""
    (fence,) = buf.resv.fences(usage)
    return fence


def three() -> tuple[list[Timeline], list[DmaFence]]:
    """Three timelines with a fence each."""
    lines = [Timeline(name) for name in "abc"]
    return lines, [line.fence() for line in lines]
