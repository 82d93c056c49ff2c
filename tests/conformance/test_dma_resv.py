"""Reservation objects in one process: the kernel's own tests (spec 7.4) and the rules of spec 4.1-4.7."""

import errno
import math
import warnings
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractError, ContractWarning, DmaFence, DmaFenceArray, DmaResv, Domain, Timeline, Usage
from tests.support.errnos import raises_errno
from tests.support.fences import attach, entries, key, keys
from tests.support.waiting import Background

USAGES = pytest.mark.parametrize("usage", list(Usage), ids=lambda usage: usage.name)
LONG = 3600.0


# -- spec 7.4, by name, for each usage


@USAGES
def test_sanitycheck(resv: DmaResv, usage: Usage) -> None:
    resv.lock()
    assert resv.is_locked()
    resv.unlock()
    assert not resv.is_locked()
    assert resv.fences(usage) == []


@USAGES
def test_signaling(resv: DmaResv, tl: Timeline, usage: Usage) -> None:
    fence = tl.fence()
    attach(resv, fence, usage)
    assert not resv.test_signaled(usage)
    fence.signal()
    assert resv.test_signaled(usage)


@USAGES
def test_for_each(resv: DmaResv, tl: Timeline, usage: Usage) -> None:
    fence = tl.fence()
    attach(resv, fence, usage)
    assert entries(resv, usage) == [(key(fence), usage)]
    fence.signal()


@USAGES
def test_for_each_unlocked(resv: DmaResv, tl: Timeline, other_tl: Timeline, usage: Usage) -> None:
    """The table grows between two steps: who starts anew at each restart ends with each fence once."""
    one, two = tl.fence(), other_tl.fence()
    attach(resv, one, usage)
    attach(resv, two, usage)
    seen: list[tuple[tuple[int, int], Usage]] = []
    for number, (fence, used, restarted) in enumerate(resv.iterate_unlocked(usage)):
        if number == 0:
            assert restarted
            with resv.locked():
                resv.reserve(300)
        if restarted:
            seen.clear()
        seen.append((key(fence), used))
    assert seen == [(key(one), usage), (key(two), usage)]
    one.signal()
    two.signal()


@USAGES
def test_get_fences(resv: DmaResv, tl: Timeline, usage: Usage) -> None:
    fence = tl.fence()
    attach(resv, fence, usage)
    assert keys(resv, usage) == [key(fence)]
    fence.signal()


# -- usage levels (4.1)


@USAGES
@pytest.mark.parametrize("level", list(Usage), ids=lambda level: f"asked-{level.name}")
def test_a_query_at_a_level_considers_that_level_and_lower_ones(resv: DmaResv, tl: Timeline, usage: Usage, level: Usage) -> None:
    seen = usage <= level
    fence = tl.fence()
    attach(resv, fence, usage)
    assert keys(resv, level) == [key(fence)] * seen
    assert resv.test_signaled(level) is not seen
    assert (resv.wait(level, 0) == 0.0) is seen
    assert entries(resv, level) == [(key(fence), usage)] * seen
    assert [(key(found), used) for found, used, _ in resv.iterate_unlocked(level)] == [(key(fence), usage)] * seen
    fence.signal()


@pytest.mark.parametrize(("name", "value"), [("KERNEL", 0), ("WRITE", 1), ("READ", 2), ("BOOKKEEP", 3)])
def test_the_levels_have_the_numbers_of_the_kernel(name: str, value: int) -> None:
    assert Usage[name] == value


@pytest.mark.parametrize(("write", "usage"), [(True, Usage.READ), (False, Usage.WRITE)])
def test_a_new_writer_waits_for_readers_and_a_new_reader_for_writers(write: bool, usage: Usage) -> None:
    assert Usage.rw(write) is usage


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


def three() -> tuple[list[Timeline], list[DmaFence]]:
    """Three timelines with a fence each."""
    lines = [Timeline(name) for name in "abc"]
    fences = [line.fence() for line in lines]
    return lines, fences


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


def test_a_signalled_place_before_that_of_the_same_context_is_taken_first(resv: DmaResv, tl: Timeline, other_tl: Timeline) -> None:
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
    """1 comes after 0xFFFFFFFF where numbers have 32 bits (spec 3.10), and replaces it."""
    line = Timeline("wraps", seqno64=seqno64)
    before, after = line.fence(seqno=0xFFFFFFFF), line.fence(seqno=1)
    attach(resv, before, Usage.WRITE)
    attach(resv, after, Usage.WRITE)
    assert keys(resv) == [key(before), key(after)][-kept:]
    line.close()


# -- one fence for all, copies, deadlines (4.7)


def test_singleton_of_nothing_is_none_and_of_one_that_fence(resv: DmaResv, tl: Timeline) -> None:
    assert resv.singleton(Usage.BOOKKEEP) is None
    fence = tl.fence()
    attach(resv, fence, Usage.READ)
    assert resv.singleton(Usage.WRITE) is None
    assert resv.singleton(Usage.READ) == fence
    fence.signal()
    assert resv.singleton(Usage.READ) is None


def test_singleton_of_several_is_an_array_that_ends_with_the_last(resv: DmaResv, tl: Timeline, other_tl: Timeline) -> None:
    fences = [tl.fence(), other_tl.fence()]
    for fence in fences:
        attach(resv, fence, Usage.READ)
    array = resv.singleton(Usage.READ)
    assert isinstance(array, DmaFenceArray)
    assert (list(array.fences), array.seqno, array.signal_on_any) == (fences, 1, False)
    fences[0].signal()
    assert array.wait(0) == 0.0
    fences[1].signal()
    assert array.status == 1


@pytest.mark.parametrize(("old", "new"), [(0, 0), (0, 3), (3, 0), (2, 5), (5, 2), (20, 40), (40, 20)])
def test_copy_takes_what_is_pending_with_its_usage_and_drops_the_rest(resv: DmaResv, old: int, new: int) -> None:
    lines = [Timeline(f"{i}") for i in range(old + new + 1)]
    fences = [line.fence() for line in lines]
    source = DmaResv()
    for fence in fences[:old]:
        attach(resv, fence, Usage.KERNEL)
    for i, fence in enumerate(fences[old:]):
        attach(source, fence, Usage(i % 4))
    fences[-1].signal()
    with resv.locked():
        resv.copy(source)
    assert entries(resv) == [(key(fence), Usage(i % 4)) for i, fence in enumerate(fences[old:-1])]
    assert keys(resv) == keys(source)
    fence = lines[-1].fence()
    attach(resv, fence, Usage.READ)
    assert len(keys(resv)) == new + 1
    for line in lines:
        line.close()


def test_copy_of_itself_drops_what_has_signalled(resv: DmaResv, tl: Timeline, other_tl: Timeline) -> None:
    first, second = tl.fence(), other_tl.fence()
    attach(resv, first, Usage.READ)
    attach(resv, second, Usage.READ)
    first.signal()
    with resv.locked():
        resv.copy(resv)
    assert entries(resv) == [(key(second), Usage.READ)]
    second.signal()


def test_copy_needs_the_lock_and_changes_nothing_without(resv: DmaResv, tl: Timeline) -> None:
    fence = tl.fence()
    attach(resv, fence, Usage.READ)
    with pytest.raises(ContractError):
        resv.copy(DmaResv())
    assert keys(resv) == [key(fence)]
    fence.signal()


def test_copy_from_another_domain_is_exdev(resv: DmaResv) -> None:
    elsewhere = DmaResv(domain=Domain.private())
    with resv.locked(), raises_errno(errno.EXDEV):
        resv.copy(elsewhere)


def test_copy_takes_reservation_objects_only(resv: DmaResv) -> None:
    source: Any = "resv"
    with resv.locked(), pytest.raises(TypeError):
        resv.copy(source)


def test_a_deadline_reaches_every_pending_fence_of_the_level(resv: DmaResv, tl: Timeline, other_tl: Timeline) -> None:
    write, read, done = tl.fence(), other_tl.fence(), other_tl.fence()
    attach(resv, write, Usage.WRITE)
    attach(resv, done, Usage.WRITE)
    attach(resv, read, Usage.READ)
    done.signal()
    resv.set_deadline(Usage.WRITE, 5000)
    assert [fence.deadline for fence in (write, read, done)] == [5000, None, None]
    resv.set_deadline(Usage.READ, 4000)
    assert [fence.deadline for fence in (write, read)] == [4000, 4000]
    tl.close()
    other_tl.close()


@pytest.mark.parametrize(("usage", "ns"), [(Usage.READ, -1), (9, 5000)])
def test_a_deadline_that_makes_no_sense_is_einval(resv: DmaResv, tl: Timeline, usage: Any, ns: int) -> None:
    fence = tl.fence()
    attach(resv, fence, Usage.READ)
    with raises_errno(errno.EINVAL):
        resv.set_deadline(usage, ns)
    fence.signal()


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


# -- iterating and asking (4.6, 4.7)


def test_iteration_under_the_lock_shows_signalled_fences_and_without_it_not(resv: DmaResv) -> None:
    lines, fences = three()
    for fence in fences:
        attach(resv, fence, Usage.READ)
    fences[1].signal()
    assert [name for name, _ in entries(resv)] == [key(fence) for fence in fences]
    pending = [key(fences[0]), key(fences[2])]
    assert [key(fence) for fence, _, _ in resv.iterate_unlocked(Usage.READ)] == pending
    assert keys(resv) == pending
    for line in lines:
        line.close()


def test_only_the_first_step_is_flagged_when_nothing_changes(resv: DmaResv) -> None:
    lines, fences = three()
    for fence in fences:
        attach(resv, fence, Usage.READ)
    assert [restarted for _, _, restarted in resv.iterate_unlocked(Usage.READ)] == [True, False, False]
    for line in lines:
        line.close()


def test_describe_is_the_text_of_the_kernel(resv: DmaResv) -> None:
    names = {Usage.KERNEL: "mover", Usage.WRITE: "camera", Usage.READ: "screen", Usage.BOOKKEEP: "tables"}
    lines = {usage: Timeline(name) for usage, name in names.items()}
    fences = {usage: line.fence() for usage, line in lines.items()}
    for usage, fence in fences.items():
        attach(resv, fence, usage)
    fences[Usage.WRITE].signal()
    with resv.locked():
        text = resv.describe()
    # Spec 3.14 and 4.7; BOOKKEEP is not shown.
    assert text == (
        "\tkernel fence:dmabuf mover seq 1 unsignalled\n"
        "\twrite fence:dmabuf camera seq 1 signalled\n"
        "\tread fence:dmabuf screen seq 1 unsignalled\n"
    )
    for line in lines.values():
        line.close()


def test_describe_of_nothing_is_empty(resv: DmaResv) -> None:
    with resv.locked():
        assert resv.describe() == ""


# -- waiting (4.7)


@USAGES
def test_wait_with_timeout_0_is_a_pure_poll(resv: DmaResv, tl: Timeline, usage: Usage) -> None:
    assert resv.wait(usage, 0) > 0
    fence = tl.fence()
    attach(resv, fence, usage)
    assert resv.wait(usage, 0) == 0.0
    fence.signal()
    assert resv.wait(usage, 0) > 0


def test_wait_without_a_timeout_is_inf(resv: DmaResv) -> None:
    assert resv.wait(Usage.BOOKKEEP) == math.inf


def test_wait_is_0_when_the_time_is_over(resv: DmaResv, tl: Timeline) -> None:
    fence = tl.fence()
    attach(resv, fence, Usage.WRITE)
    assert resv.wait(Usage.WRITE, 0.002) == 0.0
    fence.signal()


@pytest.mark.parametrize("timeout", [None, LONG])
def test_wait_ends_with_the_last_fence(resv: DmaResv, timeout: float | None) -> None:
    lines, fences = three()
    for fence in fences:
        attach(resv, fence, Usage.READ)
    with Background(lambda: resv.wait(Usage.READ, timeout)) as job:
        for fence in (fences[1], fences[0], fences[2]):
            job.until_blocked()
            assert not job.done
            fence.signal()
        assert 0 < job.result() <= (math.inf if timeout is None else timeout)
    for line in lines:
        line.close()


def test_wait_does_not_raise_the_error_of_a_fence(resv: DmaResv, tl: Timeline) -> None:
    fence = tl.fence()
    attach(resv, fence, Usage.WRITE)
    fence.signal(error=-errno.EIO)
    assert resv.wait(Usage.BOOKKEEP) == math.inf


def test_wait_is_allowed_with_the_lock_held(resv: DmaResv, tl: Timeline) -> None:
    fence = tl.fence()
    attach(resv, fence, Usage.WRITE)
    with resv.locked():
        assert resv.wait(Usage.WRITE, 0) == 0.0
        fence.signal()
        assert resv.wait(Usage.WRITE) == math.inf


@pytest.mark.parametrize("timeout", [-1, -0.001, -math.inf])
def test_wait_with_a_negative_timeout_is_einval(resv: DmaResv, timeout: float) -> None:
    with warnings.catch_warnings(), raises_errno(errno.EINVAL):
        warnings.simplefilter("ignore", ContractWarning)
        resv.wait(Usage.READ, timeout)


# -- without the lock


def calls(fence: DmaFence) -> dict[str, Any]:
    return {
        "add": lambda resv: resv.add(fence, Usage.WRITE),
        "reserve": lambda resv: resv.reserve(1),
        "replace": lambda resv: resv.replace(fence.context, fence, Usage.WRITE),
        "iterate": lambda resv: list(resv.iterate(Usage.BOOKKEEP)),
        "describe": lambda resv: resv.describe(),
    }


NEED_THE_LOCK = pytest.mark.parametrize("call", ["add", "reserve", "replace", "iterate", "describe"])


@NEED_THE_LOCK
def test_without_the_lock_it_is_a_contract_error_and_nothing_is_done(resv: DmaResv, tl: Timeline, call: str) -> None:
    first, second = tl.fence(), tl.fence()
    attach(resv, first, Usage.READ)
    with pytest.raises(ContractError):
        calls(second)[call](resv)
    assert entries(resv) == [(key(first), Usage.READ)]
    tl.close()


@NEED_THE_LOCK
def test_a_lock_of_another_thread_does_not_count(resv: DmaResv, tl: Timeline, call: str) -> None:
    first, second = tl.fence(), tl.fence()
    attach(resv, first, Usage.READ)
    with resv.locked(), Background(lambda: calls(second)[call](resv)) as job, pytest.raises(ContractError):
        job.result()
    assert entries(resv) == [(key(first), Usage.READ)]
    tl.close()


# -- bad arguments


@pytest.mark.parametrize("usage", [-1, 4, 255, 2**40])
@pytest.mark.parametrize("call", ["fences", "test_signaled", "wait", "iterate", "iterate_unlocked"])
def test_asking_at_an_unknown_level_is_einval(resv: DmaResv, call: str, usage: Any) -> None:
    with resv.locked(), raises_errno(errno.EINVAL):
        result = getattr(resv, call)(usage)
        if call.startswith("iterate"):
            list(result)


@pytest.mark.parametrize("usage", [-1, 4, 255, 2**40])
def test_adding_at_an_unknown_level_is_einval_and_adds_nothing(resv: DmaResv, tl: Timeline, usage: Any) -> None:
    fence = tl.fence()
    with resv.locked():
        resv.reserve(1)
        with raises_errno(errno.EINVAL):
            resv.add(fence, usage)
    assert keys(resv) == []


@pytest.mark.parametrize("usage", [-1, 4])
def test_replacing_at_an_unknown_level_is_einval_and_changes_nothing(resv: DmaResv, tl: Timeline, usage: Any) -> None:
    fence = tl.fence()
    attach(resv, fence, Usage.WRITE)
    with resv.locked(), raises_errno(errno.EINVAL):
        resv.replace(tl.context, fence, usage)
    assert entries(resv) == [(key(fence), Usage.WRITE)]
    fence.signal()


@pytest.mark.parametrize("thing", [None, 1, "fence"])
def test_only_a_fence_can_be_added(resv: DmaResv, thing: Any) -> None:
    with resv.locked():
        resv.reserve(1)
        with pytest.raises(TypeError):
            resv.add(thing, Usage.WRITE)
    assert keys(resv) == []


def test_two_buffers_have_two_reservations(buf: dmabuf.DmaBuf, other_buf: dmabuf.DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    assert keys(other_buf.resv) == []
    fence.signal()


def test_two_handles_of_one_buffer_have_one_reservation(buf: dmabuf.DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    with dmabuf.get(buf.fileno()) as again:
        attach(again.resv, fence, Usage.WRITE)
        assert keys(buf.resv) == [key(fence)]
        with again.resv.locked():
            assert buf.resv.is_locked()
    fence.signal()
