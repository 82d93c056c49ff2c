"""Custom fences: when their operations are called, the two notions of "signalled", waits of their own (semantics 3.1, 3.6-3.9, 3.12)."""

import asyncio
import errno
import gc
import math
import threading
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractWarning, DmaFence, DmaResv, FenceOps, Timeline, Usage, wait_any
from tests.support.errnos import raises_errno
from tests.support.fences import attach, keys
from tests.support.waiting import Background, until


class Ops(FenceOps):
    """Everything overridden but the wait; writes down what is called."""

    def __init__(self, going: bool = True) -> None:
        self.calls: list[Any] = []
        self.going, self.done, self.error = going, False, 0

    def enable_signaling(self, fence: DmaFence) -> bool:
        self.calls.append("enable")
        if not self.going and self.error:
            fence.set_error(self.error)
        return self.going

    def signaled(self, fence: DmaFence) -> bool:
        if self.done and self.error:
            fence.set_error(self.error)
        return self.done

    def set_deadline(self, fence: DmaFence, ns: int) -> None:
        self.calls.append(ns)

    def release(self, fence: DmaFence) -> None:
        self.calls.append(("release", fence.seqno, fence.status))


class Polled(FenceOps):
    """Only says whether it is done."""

    done = False

    def signaled(self, fence: DmaFence) -> bool:
        return self.done


class OwnWait(FenceOps):
    """A wait that answers as it is told."""

    def __init__(self, answer: float) -> None:
        self.answer = answer
        self.asked: list[Any] = []

    def wait(self, fence: DmaFence, interruptible: bool, timeout: float | None) -> float:
        self.asked.append((interruptible, timeout))
        return self.answer


# -- enable_signaling (3.8)


async def awaited(fence: DmaFence) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await fence


ENABLING = {
    "wait": lambda fence: fence.wait(0),
    "add_callback": lambda fence: fence.remove_callback(fence.add_callback(lambda _: None)),
    "enable_signaling": lambda fence: fence.enable_signaling(),
    "await": lambda fence: asyncio.run(awaited(fence)),
    "wait_any": lambda fence: wait_any([fence], 0.001),
    "array": lambda fence: dmabuf.DmaFenceArray([fence]).enable_signaling(),
    "chain": lambda fence: dmabuf.DmaFenceChain(None, fence, 1).enable_signaling(),
    "resv.add": lambda fence: attach(DmaResv(), fence, Usage.READ),
}


@pytest.mark.parametrize("how", ENABLING)
def test_what_waits_enables_once(tl: Timeline, how: str) -> None:
    ops = Ops()
    fence = tl.fence(ops=ops)
    ENABLING[how](fence)
    assert ops.calls == ["enable"]
    ENABLING[how](fence)
    assert ops.calls == ["enable"]
    fence.signal()


LOOKING = {
    "is_signaled": lambda fence: fence.is_signaled(),
    "status": lambda fence: fence.status,
    "describe": lambda fence: fence.describe(),
    "repr": repr,
    "wait_any without time": lambda fence: wait_any([fence], 0),
    "unwrap": lambda fence: list(dmabuf.unwrap(fence)),
    "merge": lambda fence: dmabuf.merge(fence, dmabuf.stub_fence()),
    "set_deadline": lambda fence: dmabuf.DmaFenceArray([fence]),
    "array": lambda fence: dmabuf.DmaFenceArray([fence]).is_signaled(),
}


@pytest.mark.parametrize("how", LOOKING)
def test_polling_enables_nothing(tl: Timeline, how: str) -> None:
    ops = Ops()
    fence = tl.fence(ops=ops)
    LOOKING[how](fence)
    assert ops.calls == []
    fence.signal()


@pytest.mark.parametrize("error", [0, -errno.EIO])
def test_a_fence_that_cannot_be_enabled_is_signalled_at_once(tl: Timeline, error: int) -> None:
    ops = Ops(going=False)
    ops.error = error
    fence = tl.fence(ops=ops)
    with raises_errno(errno.ENOENT, FileNotFoundError):
        fence.add_callback(lambda _: None)
    assert fence.status == (error or 1)
    assert ops.calls == ["enable"]


def test_a_signalled_fence_is_not_enabled(tl: Timeline) -> None:
    ops = Ops()
    fence = tl.fence(ops=ops)
    fence.signal()
    fence.enable_signaling()
    assert fence.wait() == math.inf
    assert ops.calls == []


def test_an_enable_that_raises_is_raised_and_tried_again(tl: Timeline) -> None:
    class Failing(Ops):
        def enable_signaling(self, fence: DmaFence) -> bool:
            super().enable_signaling(fence)
            if len(self.calls) == 1:
                raise KeyError("no hardware")
            return True

    ops = Failing()
    fence = tl.fence(ops=ops)
    with pytest.raises(KeyError):
        fence.wait(0)
    assert fence.wait(0) == 0.0
    assert ops.calls == ["enable", "enable"]
    fence.signal()


def test_one_of_many_threads_enables(tl: Timeline) -> None:
    ops = Ops()
    fence = tl.fence(ops=ops)
    jobs = [Background(fence.wait) for _ in range(4)]
    for job in jobs:
        job.__enter__()
        job.until_blocked()
    fence.signal()
    for job in jobs:
        assert job.result() == math.inf
        job.__exit__(None)
    assert ops.calls == ["enable"]


# -- the two notions of "signalled" (3.6, 3.7)


@pytest.mark.parametrize("error", [0, -errno.EIO])
def test_asking_signals_a_fence_that_is_done_and_runs_its_callbacks(tl: Timeline, error: int) -> None:
    ops = Ops()
    fence = tl.fence(ops=ops)
    seen: list[int] = []
    fence.add_callback(lambda f: seen.append(f.status))
    assert not fence.is_signaled()
    ops.done, ops.error = True, error
    assert seen == []
    assert fence.is_signaled()
    assert seen == [error or 1]
    assert fence.status == (error or 1)


def test_a_callback_and_a_wait_go_by_the_flag_alone(tl: Timeline) -> None:
    ops = Polled()
    fence = tl.fence(ops=ops)
    ops.done = True
    token = fence.add_callback(lambda _: None)
    assert fence.wait(0.001) == 0.0
    assert fence.remove_callback(token)
    assert fence.status == 1
    assert fence.wait() == math.inf


@pytest.mark.parametrize("look", ["test_signaled", "fences", "wait", "iterate_unlocked", "poll", "read", "add"])
def test_a_reservation_object_asks(buf: dmabuf.DmaBuf, tl: Timeline, look: str) -> None:
    ops = Polled()
    fence = tl.fence(ops=ops)
    attach(buf.resv, fence, Usage.WRITE)
    assert not buf.resv.test_signaled(Usage.READ)
    ops.done = True
    if look == "test_signaled":
        assert buf.resv.test_signaled(Usage.READ)
    elif look == "fences":
        assert buf.resv.fences(Usage.READ) == []
    elif look == "wait":
        assert buf.resv.wait(Usage.READ) == math.inf
    elif look == "iterate_unlocked":
        assert list(buf.resv.iterate_unlocked(Usage.READ)) == []
    elif look == "poll":
        import select

        assert buf.poll(select.POLLIN) == select.POLLIN
    elif look == "read":
        with buf.read():
            pass
    else:
        other = dmabuf.Timeline("other")
        another = other.fence()
        with buf.resv.locked():
            buf.resv.reserve(1)
            buf.resv.add(another, Usage.READ)
            assert len(list(buf.resv.iterate(Usage.BOOKKEEP))) == 1
        other.close()
    assert fence.is_signaled()


# -- wait (3.9; semantics 7.1 by name: its mock fences wait with -ETIME)


@pytest.mark.parametrize(
    ("timeout", "answer", "left"), [(2.0, 1.5, 1.5), (None, 1.0, math.inf), (1.0, 0.0, 0.0), (0, -errno.ETIME, -errno.ETIME)]
)
def test_wait(tl: Timeline, timeout: float | None, answer: float, left: float) -> None:
    ops = OwnWait(answer)
    fence = tl.fence(ops=ops)
    assert fence.wait(timeout, interruptible=True) == left
    assert ops.asked == [(True, timeout)]
    fence.signal()


def test_a_negative_timeout_does_not_reach_the_fences_own_wait(tl: Timeline) -> None:
    ops = OwnWait(1.0)
    fence = tl.fence(ops=ops)
    with raises_errno(errno.EINVAL):
        fence.wait(-1)
    assert ops.asked == []
    fence.signal()


@pytest.mark.parametrize(("answer", "left"), [(1.5, math.inf), (0.0, 0.0), (-errno.ETIME, -errno.ETIME)])
def test_a_reservation_object_uses_the_fences_own_wait(tl: Timeline, answer: float, left: float) -> None:
    """Any result that is not positive is given at once, as the kernel gives it."""
    ops, resv = OwnWait(answer), DmaResv()
    fence = tl.fence(ops=ops)
    attach(resv, fence, Usage.READ)
    assert resv.wait(Usage.READ) == left
    assert ops.asked == [(False, None)]
    fence.signal()


# -- set_deadline, release


def test_deadlines_reach_the_fence_while_it_is_pending(tl: Timeline) -> None:
    ops = Ops()
    fence = tl.fence(ops=ops)
    fence.set_deadline(9000)
    fence.set_deadline(5000)
    fence.set_deadline(7000)
    assert ops.calls == [9000, 5000, 7000]
    assert fence.deadline == 5000
    fence.signal()
    fence.set_deadline(1000)
    assert ops.calls == [9000, 5000, 7000]


def test_a_deadline_of_a_done_fence_does_not_reach_it(tl: Timeline) -> None:
    ops = Ops()
    fence = tl.fence(ops=ops)
    ops.done = True
    fence.set_deadline(9000)
    assert ops.calls == []
    assert fence.is_signaled()


@pytest.mark.parametrize("how", ["array", "chain", "resv"])
def test_deadlines_go_through_containers(tl: Timeline, how: str) -> None:
    ops = Ops()
    fence = tl.fence(ops=ops)
    if how == "array":
        dmabuf.DmaFenceArray([tl.fence(), fence]).set_deadline(5000)
    elif how == "chain":
        dmabuf.DmaFenceChain(fence, dmabuf.stub_fence(), 1).set_deadline(5000)
    else:
        resv = DmaResv()
        attach(resv, fence, Usage.READ)
        resv.set_deadline(Usage.READ, 5000)
    assert 5000 in ops.calls
    tl.close()


def test_release_comes_once_after_the_last_reference(tl: Timeline) -> None:
    ops = Ops()
    fence = tl.fence(ops=ops)
    other = fence
    fence.signal()
    del fence
    assert ops.calls == []
    del other
    gc.collect()
    assert ops.calls == [("release", 1, 1)]


def test_release_of_a_fence_that_was_dropped_pending_sees_its_end(tl: Timeline) -> None:
    ops, resv = Ops(), DmaResv()
    fence = tl.fence(ops=ops)
    attach(resv, fence, Usage.READ)
    with pytest.warns(ResourceWarning):
        del fence
    assert ops.calls == ["enable", ("release", 1, -errno.EDEADLK)]
    assert keys(resv) == []


def test_release_that_raises_goes_to_unraisablehook(tl: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(FenceOps):
        def release(self, fence: DmaFence) -> None:
            raise KeyError("late")

    told: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", told.append)
    fence = tl.fence(ops=Failing())
    fence.signal()
    del fence
    assert [type(each.exc_value) for each in told] == [KeyError]
    told.clear()


def test_fence_takes_operations_only(tl: Timeline) -> None:
    ops: Any = object()
    with pytest.raises(TypeError):
        tl.fence(ops=ops)


@pytest.mark.parametrize(("seqno64", "seqno"), [(True, -1), (True, 1 << 64), (False, 1 << 32)])
def test_a_number_that_the_timeline_has_no_room_for_is_einval(seqno64: bool, seqno: int) -> None:
    with Timeline("narrow", seqno64=seqno64) as line, raises_errno(errno.EINVAL):
        line.fence(seqno=seqno)


# -- numbers (3.10)


@pytest.mark.parametrize(
    ("a", "b", "narrow", "wide"),
    [(2, 1, True, True), (1, 2, False, False), (1, 1, False, False), (1, 0xFFFFFFFF, True, False), (0xFFFFFFFF, 1, False, True)],
)
def test_is_later(a: int, b: int, narrow: bool, wide: bool) -> None:
    for seqno64, expected in ((False, narrow), (True, wide)):
        with Timeline("order", seqno64=seqno64) as line:
            one, two = line.fence(seqno=a), line.fence(seqno=b)
            assert one.is_later(two) is expected
            assert one.is_later_or_same(two) is expected
            assert one.is_later_or_same(one)
            assert one.later(two) is (one if expected else two)


def test_the_later_of_two_is_none_when_it_has_signalled(tl: Timeline) -> None:
    one, two = tl.fence(), tl.fence()
    one.signal()
    assert one.later(two) is two
    two.signal()
    assert one.later(two) is None


@pytest.mark.parametrize("call", ["is_later", "is_later_or_same", "later"])
def test_fences_of_two_contexts_have_no_order(tl: Timeline, other_tl: Timeline, call: str) -> None:
    one, two = tl.fence(), other_tl.fence()
    with pytest.raises(ContractWarning):
        getattr(one, call)(two)
    with pytest.warns(ContractWarning):
        assert not getattr(one, call)(two)
    tl.close()
    other_tl.close()


# -- wait_any (3.9)


def test_wait_any_gives_the_lowest_index_of_what_has_signalled(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(4)]
    assert wait_any(fences, 0) == (None, 0.0)
    assert wait_any(fences, 0.001) == (None, 0.0)
    fences[3].signal()
    fences[1].signal(error=-errno.EIO)
    for timeout in (0, None):
        index, left = wait_any(fences, timeout)
        assert index == 1
        assert left > 0
    assert 0 < wait_any(fences, 60)[1] <= 60
    tl.close()


def test_wait_any_is_woken_by_any_and_leaves_nothing_registered(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(100)]
    with Background(lambda: wait_any(fences)) as job:
        until(lambda: {fence.statistics().callbacks for fence in fences} == {1})
        job.until_blocked()
        assert not job.done
        fences[77].signal()
        assert job.result() == (77, math.inf)
    assert {fence.statistics().callbacks for fence in fences} == {0}
    tl.close()


def test_wait_any_of_nothing_is_einval_and_a_contract_warning() -> None:
    with pytest.raises(ContractWarning):
        wait_any([], 0)
    with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        wait_any([], 0)


@pytest.mark.parametrize("timeout", [-1, -math.inf, math.nan])
def test_wait_any_with_a_negative_timeout_is_einval(tl: Timeline, timeout: float) -> None:
    with raises_errno(errno.EINVAL):
        wait_any([tl.fence()], timeout)


def test_wait_any_takes_fences_only(tl: Timeline) -> None:
    wrong: Any = [tl.fence(), None]
    with pytest.raises(TypeError):
        wait_any(wrong, 0)


def test_wait_any_waits_for_a_container_and_its_parts(tl: Timeline) -> None:
    one, two = tl.fence(), tl.fence()
    array = dmabuf.DmaFenceArray([one, two])
    timer = threading.Thread(target=one.signal)
    timer.start()
    assert wait_any([array, one, two])[0] == 1
    timer.join()
    two.signal()
    assert wait_any([array], None) == (0, math.inf)
