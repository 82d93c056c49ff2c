"""Chains: the kernel's own tests (semantics 7.2, by their names) and the rules of semantics 3.16."""

import contextlib
import errno
import gc
import math
import random
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractWarning, DmaFenceArray, DmaFenceChain, Timeline
from tests.support.errnos import raises_errno
from tests.support.lines import Here, There
from tests.support.waiting import Background

POINTS = 64
LONG_CHAIN = 4096


class Chain:
    """A chain as the kernel's tests make it: point i has seqno ``step * (i + 1)`` and contains fence i."""

    def __init__(self, line: Here | Timeline, count: int, step: int = 1) -> None:
        self.fences = line.make(count) if isinstance(line, Here) else [line.fence() for _ in range(count)]
        self.points: list[DmaFenceChain] = []
        for i, fence in enumerate(self.fences):
            self.points.append(DmaFenceChain(self.points[-1] if i else None, fence, step * (i + 1)))
        self.tail = self.points[-1]


# -- semantics 7.2, by name


def test_sanitycheck(line: Here) -> None:
    chain = DmaFenceChain(None, line.make(1)[0], 1)
    chain.enable_signaling()
    line.signal(0)
    assert chain.wait() == math.inf
    assert chain.status == 1


def test_find_seqno(line: Here) -> None:
    chain = Chain(line, POINTS)
    assert chain.tail.find_seqno(0) is chain.tail
    for i in range(POINTS):
        assert chain.tail.find_seqno(i + 1) is chain.points[i]
        assert chain.points[i].find_seqno(i + 1) is chain.points[i]
        with raises_errno(errno.EINVAL):
            chain.points[i].find_seqno(i + 2)
        if i:
            assert chain.points[i].find_seqno(i) is chain.points[i - 1]


def test_find_signaled(line: Here) -> None:
    chain = Chain(line, 2)
    line.signal(0)
    assert chain.tail.find_seqno(1) in (None, chain.points[0])
    line.signal(1)


def test_find_out_of_order(line: Here) -> None:
    chain = Chain(line, 3)
    line.signal(1)
    assert chain.tail.find_seqno(2) is chain.points[0]


def test_find_gap(line: Here) -> None:
    chain = Chain(line, POINTS, step=2)
    for i in range(POINTS):
        assert chain.tail.find_seqno(2 * i + 1) is chain.points[i]
        assert chain.points[i].find_seqno(2 * i + 2) is chain.points[i]


def test_find_race(line: Here) -> None:
    """Threads look for points while others signal: a look never fails, and a point finds itself."""
    count, rounds = 512, 1500
    chain = Chain(line, count)

    def racer(seed: int) -> int:
        order, looks = random.Random(seed), 0
        for _ in range(rounds):
            seqno = order.randrange(count) + 1
            found = chain.tail.find_seqno(seqno)
            if found is not None:
                assert found.seqno <= seqno
                assert isinstance(found, DmaFenceChain)
                assert found.find_seqno(found.seqno) is found
            looks += 1
            if not isinstance(line, There):
                with contextlib.suppress(OSError):  # another thread was first
                    chain.fences[order.randrange(count)].signal()
        return looks

    with Background(lambda: racer(1)) as one, Background(lambda: racer(2)) as two, Background(lambda: racer(3)) as three:
        if isinstance(line, There):
            order = list(range(count))
            random.Random(4).shuffle(order)
            for i in order[: count // 2]:
                line.signal(i)
        assert [one.result(), two.result(), three.result()] == [rounds] * 3


def test_signal_forward(line: Here) -> None:
    chain = Chain(line, POINTS)
    for i in range(POINTS):
        line.signal(i)
        assert chain.points[i].is_signaled()
        if i + 1 < POINTS:
            assert not chain.points[i + 1].is_signaled()


def test_signal_backward(line: Here) -> None:
    chain = Chain(line, POINTS)
    for i in reversed(range(POINTS)):
        line.signal(i)
        if i:
            assert not chain.points[i].is_signaled()
    assert all(point.is_signaled() for point in chain.points)


def waits(line: Here, order: list[int]) -> None:
    """A thread waits for the newest point of 4,096 while their fences are signalled in some order."""
    chain = Chain(line, LONG_CHAIN)
    with Background(lambda: chain.tail.wait(None)) as job:
        job.until_blocked()
        line.signal(*order[:-1])
        assert not job.done
        line.signal(order[-1])
        assert job.result() == math.inf
    assert chain.tail.status == 1


def test_wait_forward(line: Here) -> None:
    waits(line, list(range(LONG_CHAIN)))


def test_wait_backward(line: Here) -> None:
    waits(line, list(range(LONG_CHAIN))[::-1])


def test_wait_random(line: Here) -> None:
    order = list(range(LONG_CHAIN))
    random.Random(7).shuffle(order)
    waits(line, order)


# -- making a point (3.16)


def test_a_first_point_begins_a_context_with_prev_seqno_0(tl: Timeline, other_tl: Timeline) -> None:
    chain = DmaFenceChain(None, tl.fence(), 7)
    assert (chain.seqno, chain.prev_seqno, chain.prev) == (7, 0, None)
    assert chain.context not in (0, tl.context, other_tl.context)
    tl.close()


def test_a_higher_number_goes_on_in_the_context_of_its_predecessor(tl: Timeline) -> None:
    first = DmaFenceChain(None, tl.fence(), 3)
    second = DmaFenceChain(first, tl.fence(), 8)
    assert (second.context, second.seqno, second.prev_seqno, second.prev) == (first.context, 8, 3, first)
    tl.close()


@pytest.mark.parametrize("seqno", [0, 4, 5])
def test_chain_point_with_lower_number_begins_a_context(tl: Timeline, seqno: int) -> None:
    first = DmaFenceChain(None, tl.fence(), 5)
    second = DmaFenceChain(first, tl.fence(), seqno)
    assert second.context != first.context
    assert (second.seqno, second.prev_seqno, second.prev) == (5, 0, first)
    tl.close()


def test_a_plain_fence_before_a_chain_belongs_to_it(tl: Timeline) -> None:
    before, inside = tl.fence(), tl.fence()
    chain = DmaFenceChain(before, inside, 1)
    assert (chain.seqno, chain.prev_seqno) == (1, 0)
    inside.signal()
    assert not chain.is_signaled()
    before.signal()
    assert chain.is_signaled()


def test_a_chain_inside_of_a_chain_is_a_contract_warning(tl: Timeline) -> None:
    inner = DmaFenceChain(None, tl.fence(), 1)
    with pytest.raises(ContractWarning):
        DmaFenceChain(None, inner, 1)
    tl.close()


def test_an_array_may_be_inside_of_a_chain(tl: Timeline) -> None:
    one, two = tl.fence(), tl.fence()
    chain = DmaFenceChain(None, DmaFenceArray([one, two]), 1)
    chain.enable_signaling()
    one.signal()
    assert not chain.is_signaled()
    two.signal()
    assert chain.is_signaled()


@pytest.mark.parametrize("seqno", [-1, 1 << 64])
def test_a_number_outside_of_64_bits_is_einval(tl: Timeline, seqno: int) -> None:
    with raises_errno(errno.EINVAL):
        DmaFenceChain(None, tl.fence(), seqno)
    tl.close()


@pytest.mark.parametrize("wrong", ["prev", "fence"])
def test_a_chain_takes_fences_only(tl: Timeline, wrong: str) -> None:
    make: Any = DmaFenceChain
    with pytest.raises(TypeError):
        make("x", tl.fence(), 1) if wrong == "prev" else make(None, "x", 1)
    tl.close()


def test_a_chain_of_fences_of_two_domains_is_exdev(tl: Timeline) -> None:
    elsewhere = dmabuf.Domain.private()
    line = Timeline("elsewhere", domain=elsewhere)
    with raises_errno(errno.EXDEV):
        DmaFenceChain(line.fence(), tl.fence(), 1)
    line.close()
    tl.close()


def test_a_chain_has_the_names_of_the_kernels(tl: Timeline) -> None:
    chain = DmaFenceChain(None, tl.fence(), 12)
    assert chain.describe() == "dma_fence_chain unbound seq 12 unsignalled\n"
    tl.close()


# -- walking


def test_walking_goes_back_from_the_newest_and_unlinks_what_has_signalled(tl: Timeline) -> None:
    chain = Chain(tl, 5)
    assert list(chain.tail) == chain.points[::-1]
    for i in (0, 2, 3):
        chain.fences[i].signal()
    assert list(chain.tail) == [chain.points[4], chain.points[1]]
    assert chain.tail.prev is chain.points[1]
    assert chain.points[1].prev is None
    tl.close()


def test_walking_keeps_a_plain_fence_at_the_end_while_it_is_pending(tl: Timeline) -> None:
    before, inside = tl.fence(), tl.fence()
    chain = DmaFenceChain(before, inside, 1)
    assert list(chain) == [chain, before]
    before.signal()
    assert list(chain) == [chain]
    inside.signal()


def test_unlinked_points_are_released(tl: Timeline) -> None:
    chain = Chain(tl, 3)
    tail, fences = chain.tail, chain.fences
    del chain
    fences[0].signal()
    fences[1].signal()
    assert [point.seqno for point in tail] == [3]
    assert tail.prev is None
    fences[2].signal()


def test_find_seqno_of_another_fence_is_einval_but_for_0(tl: Timeline) -> None:
    from dmabuf.core.fence.chain import find_seqno

    fence = tl.fence()
    assert find_seqno(fence, 0) is fence
    with raises_errno(errno.EINVAL):
        find_seqno(fence, 1)
    with raises_errno(errno.EINVAL):
        find_seqno(None, 1)
    tl.close()


def test_find_seqno_is_none_when_everything_up_to_there_has_signalled(tl: Timeline) -> None:
    chain = Chain(tl, 3)
    chain.fences[0].signal()
    chain.fences[1].signal()
    assert chain.tail.find_seqno(2) is None
    assert chain.tail.find_seqno(3) is chain.tail
    chain.fences[2].signal()


def test_find_seqno_stops_where_the_context_changes(tl: Timeline) -> None:
    first = DmaFenceChain(None, tl.fence(), 5)
    second = DmaFenceChain(first, tl.fence(), 5)
    third = DmaFenceChain(second, tl.fence(), 6)
    assert third.find_seqno(2) is second
    assert third.find_seqno(5) is second
    tl.close()


def test_find_seqno_stops_at_another_context_behind_what_was_unlinked(tl: Timeline) -> None:
    zeroth = DmaFenceChain(None, tl.fence(), 3)
    first = DmaFenceChain(zeroth, tl.fence(), 5)
    inside = tl.fence()
    second = DmaFenceChain(first, inside, 5)  # begins a context
    third = DmaFenceChain(second, tl.fence(), 6)
    inside.signal()
    assert third.find_seqno(2) is first
    tl.close()


# -- signalling


def test_enabled_chain_is_signaled_after_callbacks_of_last_fence(tl: Timeline) -> None:
    chain = Chain(tl, 3)
    order: list[str] = []
    chain.tail.add_callback(lambda _: order.append("chain"))
    chain.fences[2].add_callback(lambda _: order.append("fence"))
    for fence in chain.fences:
        fence.signal()
    assert order == ["fence", "chain"]


def test_a_chain_ends_without_an_error(tl: Timeline) -> None:
    chain = Chain(tl, 2)
    chain.tail.enable_signaling()
    for fence in chain.fences:
        fence.signal(error=-errno.EIO)
    assert chain.tail.status == 1


def test_a_deadline_reaches_every_pending_fence_of_a_chain(tl: Timeline) -> None:
    chain = Chain(tl, 3)
    chain.fences[1].signal()
    chain.tail.set_deadline(5000)
    assert [fence.deadline for fence in chain.fences] == [5000, None, 5000]
    tl.close()


@pytest.mark.parametrize("enabled", [False, True])
def test_a_chain_of_100_000_points_is_walked_signalled_and_released(tl: Timeline, enabled: bool) -> None:
    """No recursion: the interpreter's own limit is a hundredth of that."""
    count = 100_000
    fence = tl.fence()
    tail: DmaFenceChain | None = None
    for i in range(count):
        tail = DmaFenceChain(tail, fence, i + 1)
    assert tail is not None
    assert sum(1 for _ in tail) == count
    if enabled:
        tail.enable_signaling()
        fence.signal()
        assert tail.is_signaled()
        assert tail.prev is None
    del tail
    gc.collect()
    assert fence.is_signaled() == enabled
    if not enabled:
        fence.signal()
