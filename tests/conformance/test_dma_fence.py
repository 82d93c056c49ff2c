"""The kernel's own tests of fences (semantics 7.1, by name), for fences of this process and others, and semantics 3.4-3.10."""

import errno
import os
import threading
import time
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractWarning, DmaFence, Timeline
from dmabuf.core.fence.fence import _ORIGINS, wrap
from tests.support.errnos import raises_errno
from tests.support.lines import Here
from tests.support.waiting import Background

# Long enough to be "not now"; nobody waits for it to pass (seconds).
LONG = 3600.0


# -- semantics 7.1, by name


def test_sanitycheck(line: Here) -> None:
    (fence,) = line.make(1)
    fence.enable_signaling()
    line.signal(0)
    del fence


def test_signaling(line: Here) -> None:
    (fence,) = line.make(1)
    assert not fence.is_signaled()
    line.signal(0)
    assert fence.is_signaled()
    with raises_errno(errno.EINVAL):
        line.signal(0)
    assert fence.is_signaled()


def test_add_callback(line: Here) -> None:
    (fence,), seen = line.make(1), threading.Event()
    fence.add_callback(lambda *_: seen.set())
    assert not seen.is_set()
    line.signal(0)
    seen.wait()


def test_late_add_callback(line: Here) -> None:
    (fence,) = line.make(1)
    called: list[object] = []
    line.signal(0)
    with raises_errno(errno.ENOENT, FileNotFoundError):
        fence.add_callback(called.append)
    with raises_errno(errno.EINVAL):
        line.signal(0)
    assert called == []


def test_rm_callback(line: Here) -> None:
    (fence,), later = line.make(1), threading.Event()
    called: list[object] = []
    handle = fence.add_callback(called.append)
    fence.add_callback(lambda *_: later.set())
    assert fence.remove_callback(handle) is True
    line.signal(0)
    later.wait()
    assert called == []


def test_late_rm_callback(line: Here) -> None:
    (fence,), seen = line.make(1), threading.Event()
    handle = fence.add_callback(lambda *_: seen.set())
    line.signal(0)
    seen.wait()
    assert fence.remove_callback(handle) is False


def test_status(line: Here) -> None:
    (fence,) = line.make(1)
    assert fence.status == 0
    line.signal(0)
    assert fence.status == 1


def test_error(line: Here) -> None:
    (fence,) = line.make(1)
    line.set_error(0, -errno.EIO)
    assert (fence.status, fence.error) == (0, 0)
    line.signal(0)
    assert (fence.status, fence.error) == (-errno.EIO, -errno.EIO)


def test_wait(line: Here) -> None:
    (fence,) = line.make(1)
    assert fence.wait(0) == 0.0
    line.signal(0)
    assert fence.wait(0) > 0


def test_wait_timeout(line: Here) -> None:
    (fence,) = line.make(1)
    assert fence.wait(0.004) == 0.0
    with Background(lambda: fence.wait(LONG)) as job:
        job.until_blocked()
        assert not job.done
        line.signal(0)
        assert 0 < job.result() <= LONG


@pytest.mark.parametrize("before", [True, False], ids=["signal-then-add", "add-then-signal"])
def test_race_signal_callback(before: bool) -> None:
    """Two threads that each add a callback to the other's fence while it is being signalled: each that was added is called."""
    rounds = 2000
    published: list[DmaFence | None] = [None, None]
    added = [0, 0]

    def racer(me: int) -> int:
        line = Timeline(f"racer {me}")
        seen = 0
        for _ in range(rounds):
            mine = published[me] = line.fence()
            other = published[1 - me]
            called = threading.Event()
            if before:
                mine.signal()
            if other is not None:
                try:
                    other.add_callback(lambda *_, called=called: called.set())
                except FileNotFoundError:
                    pass
                else:
                    added[me] += 1
                    if not before:
                        mine.signal()
                    called.wait()
                    seen += 1
            if not mine.is_signaled():
                mine.signal()
        line.close()
        return seen

    with Background(lambda: racer(0)) as one, Background(lambda: racer(1)) as two:
        assert [one.result(), two.result()] == added
    published.clear()


# -- signalling and errors (3.4, 3.5)


def test_second_signal_changes_nothing(tl: Timeline) -> None:
    fence = tl.fence()
    fence.signal()
    stamp = fence.timestamp
    with raises_errno(errno.EINVAL):
        fence.signal(error=-errno.EIO)
    assert (fence.status, fence.timestamp) == (1, stamp)


@pytest.mark.parametrize("error", [-1, -errno.EIO, -errno.ENODATA, -errno.ECANCELED, -4095])
def test_signal_with_an_error_is_the_status(tl: Timeline, error: int) -> None:
    fence = tl.fence()
    fence.signal(error=error)
    assert fence.status == error
    assert fence.is_signaled()


@pytest.mark.parametrize("error", [0, 5, 4095, -4096, -(2**31)])
def test_set_error_outside_the_range_of_errnos_is_a_contract_warning(tl: Timeline, error: int) -> None:
    fence = tl.fence()
    with pytest.raises(ContractWarning):
        fence.set_error(error)
    # The warning came before any effect.
    fence.signal()
    assert fence.status == 1


@pytest.mark.parametrize("error", [5, 4095, -4096])
def test_signal_is_einval_and_leaves_pending_when_error_is_no_errno(tl: Timeline, error: int) -> None:
    fence = tl.fence()
    with raises_errno(errno.EINVAL):
        fence.signal(error=error)
    assert not fence.is_signaled()
    fence.signal()


def test_set_error_after_the_signal_is_a_contract_warning(tl: Timeline) -> None:
    fence = tl.fence()
    fence.signal()
    with pytest.raises(ContractWarning):
        fence.set_error(-errno.EIO)
    assert fence.status == 1


@pytest.mark.parametrize("error", ["EIO", 1.5, None])
def test_set_error_takes_an_int_only(tl: Timeline, error: Any) -> None:
    fence = tl.fence()
    with pytest.raises(TypeError):
        fence.set_error(error)
    fence.signal()
    assert fence.status == 1


# -- sequence numbers and contexts (3.10)


def test_the_first_fence_has_seqno_1_and_each_next_one_more(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(3)]
    assert [fence.seqno for fence in fences] == [1, 2, 3]
    assert {fence.context for fence in fences} == {tl.context}
    tl.close()


def test_each_timeline_has_a_context_of_its_own_and_none_is_0(tl: Timeline, other_tl: Timeline) -> None:
    assert tl.context != other_tl.context
    assert 0 not in (tl.context, other_tl.context)


def test_a_later_fence_may_be_signalled_before_an_earlier_one(tl: Timeline) -> None:
    first, second, third = (tl.fence() for _ in range(3))
    second.signal()
    assert [fence.status for fence in (first, second, third)] == [0, 1, 0]
    first.signal()
    third.signal()


# -- timestamps


def test_the_timestamp_is_the_monotonic_time_of_the_signal(tl: Timeline) -> None:
    fence = tl.fence()
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    fence.signal()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    assert before <= fence.timestamp <= after
    assert fence.timestamp == fence.timestamp


def test_timestamps_follow_the_order_of_signals(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(20)]
    for fence in reversed(fences):
        fence.signal()
    stamps = [fence.timestamp for fence in reversed(fences)]
    assert stamps == sorted(stamps)


def test_signal_timestamp_gives_the_time_and_the_error(tl: Timeline) -> None:
    fence, failed = tl.fence(), tl.fence()
    fence.signal_timestamp(12345)
    failed.signal_timestamp(23456, -errno.EIO)
    assert (fence.status, fence.timestamp) == (1, 12345)
    assert (failed.status, failed.timestamp) == (-errno.EIO, 23456)
    with raises_errno(errno.EINVAL):
        fence.signal_timestamp(5)
    assert fence.timestamp == 12345


@pytest.mark.parametrize(("timestamp", "error"), [(0, 0), (-1, 0), (5, 5), (5, -4096)])
def test_signal_timestamp_with_nonsense_is_einval_and_signals_nothing(tl: Timeline, timestamp: int, error: int) -> None:
    fence = tl.fence()
    with raises_errno(errno.EINVAL):
        fence.signal_timestamp(timestamp, error)
    assert not fence.is_signaled()
    fence.signal()


# -- callbacks (3.7)


def test_callbacks_run_in_the_order_added(tl: Timeline) -> None:
    fence, last = tl.fence(), threading.Event()
    order: list[int] = []
    for number in range(10):
        fence.add_callback(lambda *_, number=number: order.append(number))
    fence.add_callback(lambda *_: last.set())
    fence.signal()
    last.wait()
    assert order == list(range(10))


def test_a_callback_runs_once(tl: Timeline) -> None:
    fence, last = tl.fence(), threading.Event()
    calls: list[object] = []
    fence.add_callback(calls.append)
    fence.add_callback(lambda *_: last.set())
    fence.signal()
    last.wait()
    with raises_errno(errno.EINVAL):
        fence.signal()
    assert len(calls) == 1


def test_a_callback_sees_the_fence_signalled(tl: Timeline) -> None:
    fence, last = tl.fence(), threading.Event()
    seen: list[tuple[bool, int]] = []

    def look(*_: object) -> None:
        seen.append((fence.is_signaled(), fence.status))
        last.set()

    fence.add_callback(look)
    fence.signal(error=-errno.EIO)
    last.wait()
    assert seen == [(True, -errno.EIO)]


def test_a_callback_is_removed_only_once(tl: Timeline) -> None:
    fence = tl.fence()
    called: list[object] = []
    handle = fence.add_callback(called.append)
    assert fence.remove_callback(handle) is True
    assert fence.remove_callback(handle) is False
    fence.signal()
    assert called == []


def test_one_function_may_be_added_twice_and_one_of_them_removed(tl: Timeline) -> None:
    fence, last = tl.fence(), threading.Event()
    calls: list[object] = []
    handle = fence.add_callback(calls.append)
    fence.add_callback(calls.append)
    fence.add_callback(lambda *_: last.set())
    assert fence.remove_callback(handle) is True
    fence.signal()
    last.wait()
    assert len(calls) == 1


@pytest.mark.parametrize("function", [None, 1, "name"])
def test_a_callback_that_cannot_be_called_is_a_type_error(tl: Timeline, function: Any) -> None:
    fence = tl.fence()
    with pytest.raises(TypeError):
        fence.add_callback(function)
    fence.signal()


def test_enable_signaling_may_be_repeated_and_is_harmless_after_the_signal(tl: Timeline) -> None:
    fence = tl.fence()
    fence.enable_signaling()
    fence.enable_signaling()
    assert fence.status == 0
    fence.signal()
    fence.enable_signaling()
    assert fence.status == 1


# -- an end that was seen late


def test_a_failure_is_known_when_slot_and_timeline_were_used_again() -> None:
    with Timeline("failed") as failed:
        fence = failed.fence()
        fence.signal(-errno.EIO)
        domain, late = failed.domain, (fence.handle, (fence.context, fence.seqno, fence.timeline_index))
        del fence
    slot = late[0] & 0x3FFFFF
    index, reused = late[1][2] - 1, False
    timelines = []
    while not reused:  # its timeline's place ...
        timelines.append(Timeline("another"))
        reused = timelines[-1]._index == index
    seen = 0
    while seen != slot:  # ... and its own
        again = timelines[-1].fence()
        seen = again.handle & 0x3FFFFF
        again.signal()
    for timeline in timelines:
        timeline.close()
    assert wrap(domain, *late).status == -errno.EIO


def test_names_are_empty_when_timeline_slot_is_reused() -> None:
    with Timeline("gone", driver="gone") as gone:
        fence = gone.fence()
        with dmabuf.SyncFile(fence) as sf:
            fd = sf.dup()
        fence.signal()
        domain, late = gone.domain, (fence.handle, (fence.context, fence.seqno, fence.timeline_index))
    del fence
    timelines = [Timeline("another")]
    while timelines[-1]._index != gone._index:
        timelines.append(Timeline("another"))
    _ORIGINS.of(domain).clear()  # as in a process that never looked at the timeline
    found = wrap(domain, *late)
    assert domain.shm.fence_info(found.handle) is not None  # its own slot was not
    assert (found.driver_name, found.timeline_name) == ("", "")
    with dmabuf.SyncFile.from_fd(fd) as again:  # whose facts remember them
        assert [(one.driver_name, one.obj_name) for one in again.info().fences] == [("gone", "gone")]
    os.close(fd)
    for timeline in timelines:
        timeline.close()
