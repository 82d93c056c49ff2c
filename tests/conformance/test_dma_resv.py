"""Reservation objects in one process: the kernel's own tests (semantics 7.4) and the rules of semantics 4.1, 4.6, 4.7."""

import errno
import math
import warnings
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractError, ContractWarning, DmaFence, DmaFenceArray, DmaResv, Domain, Timeline, Usage
from tests.support.errnos import raises_errno
from tests.support.fences import USAGES, attach, entries, key, keys, three
from tests.support.waiting import Background

LONG = 3600.0


# -- semantics 7.4, by name, for each usage


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


# -- iterating and asking (4.6, 4.7)


def test_iterate_yields_signaled_fences_and_iterate_unlocked_does_not(resv: DmaResv) -> None:
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
    # Semantics 3.14 and 4.7; BOOKKEEP is not shown.
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
