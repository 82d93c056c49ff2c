"""Waiting for fences in one process, deadlines, and the end of fences that nobody signals (semantics 3.2, 3.9, 3.12)."""

import asyncio
import ctypes
import errno
import gc
import math
import os
import signal
import sys
import threading
import time
import warnings
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractWarning, DmaResv, Timeline, Usage
from tests.support.errnos import raises_errno
from tests.support.facts import FACTS
from tests.support.fences import attach, entries, key
from tests.support.interrupts import ended_by_a_signal
from tests.support.signals import Stop, interrupt_when_asleep, on_signal, raise_stop
from tests.support.waiting import Background, until_asleep

# Long enough to be "not now"; nobody waits for it to pass (seconds).
LONG = 3600.0


# -- waiting (3.9)


def test_wait_without_a_timeout_is_inf_when_the_fence_is_signalled(tl: Timeline) -> None:
    fence = tl.fence()
    fence.signal()
    assert fence.wait() == math.inf
    assert fence.wait(None) == math.inf


def test_wait_gives_the_remaining_seconds(tl: Timeline) -> None:
    fence = tl.fence()
    fence.signal()
    assert 0 < fence.wait(LONG) <= LONG


def test_wait_is_0_when_the_time_is_over(tl: Timeline) -> None:
    fence = tl.fence()
    remaining = fence.wait(0.001)
    assert isinstance(remaining, float)
    assert remaining == 0.0
    assert not fence.is_signaled()
    fence.signal()


@pytest.mark.parametrize("timeout", [-1, -0.001, -math.inf, math.nan])
@pytest.mark.parametrize("signalled", [False, True])
def test_wait_with_a_negative_timeout_is_einval(tl: Timeline, timeout: float, signalled: bool) -> None:
    fence = tl.fence()
    if signalled:
        fence.signal()
    with warnings.catch_warnings(), raises_errno(errno.EINVAL):
        warnings.simplefilter("ignore", ContractWarning)
        fence.wait(timeout)
    tl.close()


def test_wait_takes_numbers_only(tl: Timeline) -> None:
    fence: Any = tl.fence()
    with pytest.raises(TypeError):
        fence.wait("1")
    tl.close()


def test_wait_any_of_one_fence_without_a_list_is_a_typeerror(tl: Timeline) -> None:
    fence: Any = tl.fence()
    with pytest.raises(TypeError, match="wait_any: fences is a list of fences"):
        dmabuf.wait_any(fence)
    tl.close()


@pytest.mark.parametrize("timeout", [None, 0, LONG])
def test_wait_never_raises_the_error_of_the_fence(tl: Timeline, timeout: float | None) -> None:
    fence = tl.fence()
    fence.signal(error=-errno.EIO)
    assert fence.wait(timeout) > 0


def test_all_waiters_of_one_fence_are_woken(tl: Timeline) -> None:
    fence = tl.fence()
    with Background(fence.wait) as one, Background(fence.wait) as two, Background(fence.wait) as three:
        jobs = (one, two, three)
        for job in jobs:
            job.until_blocked()
        assert not any(job.done for job in jobs)
        fence.signal()
        assert [job.result() for job in jobs] == [math.inf] * 3


def test_a_wait_ends_when_the_signal_handler_raises(tl: Timeline) -> None:
    fence = tl.fence()
    with on_signal(raise_stop), Background(lambda: interrupt_when_asleep(1)), pytest.raises(Stop):
        fence.wait()
    assert fence.status == 0
    fence.signal()


def test_a_wait_goes_on_when_the_signal_handler_returns(tl: Timeline) -> None:
    fence, handled = tl.fence(), []
    with on_signal(lambda *_: handled.append(fence.status)), Background(lambda: interrupt_when_asleep(2, after=fence.signal)):
        assert fence.wait() == math.inf
    assert handled[0] == 0


def test_an_interruptible_wait_is_eintr_when_the_signal_handler_returns(tl: Timeline) -> None:
    fence = tl.fence()
    ended_by_a_signal(lambda: fence.wait(interruptible=True))
    fence.signal()


def test_wait_is_eintr_when_signal_arrives_while_it_waits_for_the_gil(tl: Timeline) -> None:
    fence, main = tl.fence(), threading.main_thread()
    # Functions of libc that keep the interpreter's lock.
    pread = ctypes.PyDLL(None).pread
    text = ctypes.create_string_buffer(8192)
    status = os.open(f"/proc/self/task/{main.native_id}/status", os.O_RDONLY)

    def sleeps_and_switches() -> tuple[bool, bytes]:
        size = pread(status, text, len(text), 0)
        got = text.raw[:size]
        return b"\nState:\tS" in got, got.rpartition(b"\nvoluntary_ctxt_switches:")[2].split()[0]

    def hold_the_lock_and_poke() -> None:
        until_asleep(os.getpid(), main.native_id)
        _, before = sleeps_and_switches()
        # The tick wakes it, and all it can do is to sleep again, for the lock. It may do so already: then nothing changes any more.
        asleep, switches, enough = False, before, time.monotonic() + 0.5
        while (not asleep or switches == before) and time.monotonic() < enough:
            asleep, switches = sleeps_and_switches()
        sure = asleep and switches != before
        signal.pthread_kill(main.ident or 0, signal.SIGUSR1)
        while not sure and not over:
            until_asleep(os.getpid(), main.native_id, over=lambda: bool(over))
            signal.pthread_kill(main.ident or 0, signal.SIGUSR1)

    over: list[bool] = []
    interval = sys.getswitchinterval()
    try:
        with on_signal(lambda *_: None), Background(hold_the_lock_and_poke) as job:
            sys.setswitchinterval(600)
            try:
                with raises_errno(errno.EINTR, InterruptedError):
                    fence.wait(interruptible=True)
            finally:
                over.append(True)
                sys.setswitchinterval(interval)
            job.result()
    finally:
        os.close(status)
    fence.signal()


# -- await


@pytest.mark.parametrize("error", [0, -errno.EIO])
def test_await_gives_the_status_of_a_signalled_fence(tl: Timeline, error: int) -> None:
    fence = tl.fence()
    fence.signal(error=error)

    async def main() -> int:
        return await fence

    assert asyncio.run(main()) == (error or 1)


@pytest.mark.parametrize("error", [0, -errno.EIO])
def test_await_lets_the_loop_run_and_gives_the_status(tl: Timeline, error: int) -> None:
    fence = tl.fence()

    async def main() -> int:
        async def wait() -> int:
            return await fence

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        assert not task.done()
        fence.signal(error=error)
        return await task

    assert asyncio.run(main()) == (error or 1)


def test_await_is_woken_by_another_thread(tl: Timeline) -> None:
    fence = tl.fence()

    async def main() -> int:
        return await fence

    with Background(lambda: asyncio.run(main())) as job:
        job.until_blocked()
        assert not job.done
        fence.signal()
        assert job.result() == 1


def test_a_cancelled_await_leaves_the_fence_as_it_was(tl: Timeline) -> None:
    fence = tl.fence()

    async def main() -> None:
        async def wait() -> int:
            return await fence

        task, other = asyncio.create_task(wait()), asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fence.status == 0
        fence.signal()
        assert await other == 1

    asyncio.run(main())


# -- deadlines (3.12)


def test_the_earliest_deadline_is_kept(tl: Timeline) -> None:
    # The kernel's own numbers: SET_DEADLINE 5000, 9000 -> 5000; then 3000 -> 3000.
    first, second = FACTS["swsync/deadline-min"].ret
    fence = tl.fence()
    assert fence.deadline is None
    fence.set_deadline(5000)
    fence.set_deadline(9000)
    assert fence.deadline == first
    fence.set_deadline(3000)
    assert fence.deadline == second
    assert fence.status == 0
    fence.signal()


def test_a_deadline_after_the_signal_is_ignored(tl: Timeline) -> None:
    fence = tl.fence()
    fence.signal()
    fence.set_deadline(5000)
    assert fence.deadline is None


# -- the end of a timeline, and of a fence nobody holds (3.2)


def test_closing_the_timeline_ends_what_is_pending_with_enoent(tl: Timeline) -> None:
    done, pending = tl.fence(), tl.fence()
    done.signal()
    tl.close()
    assert done.status == 1
    assert pending.status == FACTS["swsync/close-tl"].ret["status"]
    assert pending.wait() == math.inf


def test_close_of_timeline_wakes_the_waiters(tl: Timeline) -> None:
    fence = tl.fence()
    with Background(fence.wait) as job:
        job.until_blocked()
        assert not job.done
        tl.close()
        assert job.result() == math.inf


def test_closing_the_timeline_runs_callbacks(tl: Timeline) -> None:
    fence, seen = tl.fence(), threading.Event()
    fence.add_callback(lambda *_: seen.set())
    tl.close()
    seen.wait()


def test_closing_a_timeline_twice_is_harmless(tl: Timeline) -> None:
    tl.close()
    tl.close()


def test_a_closed_timeline_makes_no_fences(tl: Timeline) -> None:
    tl.close()
    with raises_errno(errno.EBADF):
        tl.fence()


def test_drop_of_unwaited_pending_fence_is_silent(tl: Timeline) -> None:
    fence = tl.fence()
    del fence
    gc.collect()


def test_drop_of_pending_fence_on_reservation_signals_it_with_edeadlk(tl: Timeline, resv: DmaResv) -> None:
    fence = tl.fence()
    name = key(fence)
    attach(resv, fence, Usage.BOOKKEEP)
    with pytest.warns(ResourceWarning):
        del fence
    assert resv.test_signaled(Usage.BOOKKEEP)
    with resv.locked():
        assert [(key(fence), fence.status) for fence, _ in resv.iterate(Usage.BOOKKEEP)] == [(name, -errno.EDEADLK)]
    assert entries(resv) == [(name, Usage.BOOKKEEP)]


def test_dropping_a_pending_fence_with_a_callback_calls_it(tl: Timeline) -> None:
    seen = threading.Event()
    fence = tl.fence()
    fence.add_callback(lambda *_: seen.set())
    with pytest.warns(ResourceWarning):
        del fence
    seen.wait()


def test_a_fence_is_made_by_a_timeline_only() -> None:
    with pytest.raises(TypeError):
        dmabuf.DmaFence()  # type: ignore[call-arg]
