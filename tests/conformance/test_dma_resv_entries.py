"""Entries of a reservation object: adding, reserving, replacing (semantics 4.3-4.5)."""

import errno

import pytest

from dmabuf import ContractError, DmaResv, Timeline, Usage
from tests.support.errnos import raises_errno
from tests.support.fences import USAGES, attach, entries, key, keys, three

# -- adding (4.4)


@USAGES
def test_a_later_fence_of_the_same_context_replaces_the_earlier(resv: DmaResv, tl: Timeline, usage: Usage) -> None:
    first, second = tl.fence(), tl.fence()
    attach(resv, first, usage)
    attach(resv, second, usage)
    assert entries(resv) == [(key(second), usage)]
    tl.close()


@pytest.mark.parametrize("old", list(Usage), ids=lambda old: f"over-{old.name}")
@pytest.mark.parametrize("new", list(Usage), ids=lambda new: f"add-{new.name}")
def test_a_later_fence_replaces_that_of_its_context_unless_it_is_weaker(resv: DmaResv, tl: Timeline, old: Usage, new: Usage) -> None:
    first, second = tl.fence(), tl.fence()
    attach(resv, first, old)
    attach(resv, second, new)
    kept = [] if old >= new else [(key(first), old)]
    assert entries(resv) == [*kept, (key(second), new)]
    tl.close()


@pytest.mark.parametrize("old", list(Usage), ids=lambda old: f"over-{old.name}")
@pytest.mark.parametrize("new", list(Usage), ids=lambda new: f"add-{new.name}")
def test_the_same_fence_again_is_promoted_and_never_weakened(resv: DmaResv, tl: Timeline, old: Usage, new: Usage) -> None:
    fence = tl.fence()
    attach(resv, fence, old)
    attach(resv, fence, new)
    kept = [] if old >= new else [(key(fence), old)]
    assert entries(resv) == [*kept, (key(fence), new)]
    tl.close()


@USAGES
def test_an_earlier_fence_of_the_same_context_is_appended(resv: DmaResv, tl: Timeline, usage: Usage) -> None:
    first, second = tl.fence(), tl.fence()
    attach(resv, second, usage)
    attach(resv, first, usage)
    assert entries(resv) == [(key(second), usage), (key(first), usage)]
    tl.close()


@USAGES
def test_fences_of_different_contexts_are_all_kept(resv: DmaResv, usage: Usage) -> None:
    lines = [Timeline(f"line {number}") for number in range(6)]
    fences = [line.fence() for line in lines]
    for fence in fences:
        attach(resv, fence, usage)
    assert entries(resv) == [(key(fence), usage) for fence in fences]
    for line in lines:
        line.close()


@USAGES
def test_a_new_fence_takes_the_place_of_the_first_signalled_one(resv: DmaResv, usage: Usage) -> None:
    lines, (one, two, new) = three()
    attach(resv, one, Usage.KERNEL)
    attach(resv, two, Usage.READ)
    one.signal()
    attach(resv, new, usage)
    assert entries(resv) == [(key(new), usage), (key(two), Usage.READ)]
    for line in lines:
        line.close()


def test_only_one_place_is_taken_at_a_time(resv: DmaResv) -> None:
    lines, (one, two, new) = three()
    attach(resv, one, Usage.READ)
    attach(resv, two, Usage.READ)
    one.signal()
    two.signal()
    attach(resv, new, Usage.WRITE)
    assert entries(resv) == [(key(new), Usage.WRITE), (key(two), Usage.READ)]
    for line in lines:
        line.close()


def test_add_reuses_signaled_entry_before_one_of_the_same_context(resv: DmaResv, tl: Timeline, other_tl: Timeline) -> None:
    done, first, second = other_tl.fence(), tl.fence(), tl.fence()
    attach(resv, done, Usage.READ)
    attach(resv, first, Usage.READ)
    done.signal()
    attach(resv, second, Usage.READ)
    assert entries(resv) == [(key(second), Usage.READ), (key(first), Usage.READ)]
    tl.close()


def test_a_signalled_fence_may_be_added(resv: DmaResv, tl: Timeline) -> None:
    fence = tl.fence()
    fence.signal()
    attach(resv, fence, Usage.WRITE)
    assert resv.test_signaled(Usage.BOOKKEEP)
    assert entries(resv) == [(key(fence), Usage.WRITE)]


def test_one_timeline_added_many_times_takes_one_place(resv: DmaResv, tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(200)]
    for fence in fences:
        attach(resv, fence, Usage.WRITE)
    assert entries(resv) == [(key(fences[-1]), Usage.WRITE)]
    tl.close()


# -- reserving (4.3)


@pytest.mark.parametrize("count", [1, 4, 5, 64, 300])
def test_as_many_as_reserved_can_be_added(resv: DmaResv, count: int) -> None:
    lines = [Timeline(f"line {number}") for number in range(count)]
    fences = [line.fence() for line in lines]
    with resv.locked():
        resv.reserve(count)
        for fence in fences:
            resv.add(fence, Usage.READ)
    assert keys(resv) == [key(fence) for fence in fences]
    for line in lines:
        line.close()


def test_add_without_reserve_is_a_contract_error(resv: DmaResv, tl: Timeline) -> None:
    fence = tl.fence()
    with resv.locked(), pytest.raises(ContractError):
        resv.add(fence, Usage.WRITE)
    assert keys(resv) == []


def test_a_reservation_ends_with_the_lock(resv: DmaResv, tl: Timeline) -> None:
    fence = tl.fence()
    with resv.locked():
        resv.reserve(1)
    with resv.locked(), pytest.raises(ContractError):
        resv.add(fence, Usage.WRITE)
    assert keys(resv) == []


def test_an_add_that_replaces_needs_no_reservation(resv: DmaResv, tl: Timeline) -> None:
    first, second = tl.fence(), tl.fence()
    attach(resv, first, Usage.WRITE)
    with resv.locked():
        resv.add(second, Usage.WRITE)
    assert keys(resv) == [key(second)]
    tl.close()


@pytest.mark.parametrize("count", [2**31, 2**62])
def test_reserving_more_than_there_can_be_is_enomem_and_changes_nothing(resv: DmaResv, tl: Timeline, count: int) -> None:
    fence = tl.fence()
    attach(resv, fence, Usage.READ)
    with resv.locked(), raises_errno(errno.ENOMEM):
        resv.reserve(count)
    assert keys(resv) == [key(fence)]
    fence.signal()


def test_reserving_a_negative_number_is_einval(resv: DmaResv) -> None:
    with resv.locked(), raises_errno(errno.EINVAL):
        resv.reserve(-1)


@USAGES
def test_reserving_nothing_reserves_nothing(resv: DmaResv, tl: Timeline, usage: Usage) -> None:
    """As in Linux 6.8; from 6.12 on it is EINVAL."""
    fence = tl.fence()
    with resv.locked():
        resv.reserve(0)
        with pytest.raises(ContractError):
            resv.add(fence, usage)
        resv.reserve(1)
        resv.reserve(0)
        resv.add(fence, usage)
    fence.signal()


@pytest.mark.parametrize(("seqno64", "kept"), [(False, 1), (True, 2)], ids=["32 bits wrap", "64 bits don't"])
def test_later_is_by_the_width_of_the_timelines_numbers(resv: DmaResv, seqno64: bool, kept: int) -> None:
    """1 comes after 0xFFFFFFFF where numbers have 32 bits (semantics 3.10), and replaces it."""
    line = Timeline("wraps", seqno64=seqno64)
    before, after = line.fence(seqno=0xFFFFFFFF), line.fence(seqno=1)
    attach(resv, before, Usage.WRITE)
    attach(resv, after, Usage.WRITE)
    assert keys(resv) == [key(before), key(after)][-kept:]
    line.close()


# -- replacing (4.5)


@USAGES
def test_replace_changes_every_entry_of_the_context(resv: DmaResv, tl: Timeline, other_tl: Timeline, usage: Usage) -> None:
    write, read, replacement = tl.fence(), tl.fence(), other_tl.fence()
    attach(resv, write, Usage.WRITE)
    attach(resv, read, Usage.READ)
    with resv.locked():
        resv.replace(tl.context, replacement, usage)
    assert entries(resv) == [(key(replacement), usage)] * 2
    tl.close()
    replacement.signal()


def test_replace_leaves_other_contexts_alone(resv: DmaResv) -> None:
    lines, (one, two, replacement) = three()
    attach(resv, one, Usage.WRITE)
    attach(resv, two, Usage.READ)
    with resv.locked():
        resv.replace(lines[0].context, replacement, Usage.BOOKKEEP)
    assert entries(resv) == [(key(replacement), Usage.BOOKKEEP), (key(two), Usage.READ)]
    for line in lines:
        line.close()


def test_replace_in_an_empty_table_does_nothing(resv: DmaResv, tl: Timeline) -> None:
    replacement = tl.fence()
    with resv.locked():
        resv.replace(tl.context, replacement, Usage.WRITE)
    assert entries(resv) == []
    # Nobody holds it: no warning.
    del replacement
