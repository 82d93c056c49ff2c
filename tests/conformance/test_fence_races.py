"""What another thread, a signal handler or a failure in the middle of a call must not spoil: fences, sync files, timelines, semaphores."""

import errno
import gc
import math
import os
import select
import sys
import threading
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaFence, DmaFenceArray, FenceOps, SwSync, SyncFile, Timeline, TimelineSemaphore, Usage, merge, wait_any
from dmabuf.core.sync import kernel_fences as kernel_sync
from dmabuf.core.sync.semaphore import EVENTS
from dmabuf.core.task.on_asyncio import Waker
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import attach, the_fence
from tests.support.interrupts import Interrupt
from tests.support.steps import Held
from tests.support.waiting import Background, until

# ---- containers ----


class FailsOnce(FenceOps):
    def __init__(self) -> None:
        self.asked = 0

    def enable_signaling(self, fence: DmaFence) -> bool:
        self.asked += 1
        if self.asked == 1:
            raise Interrupt
        return True


@pytest.mark.parametrize("any_", [False, True])
def test_array_counts_members_once_after_enabling_failed_partway(tl: Timeline, any_: bool) -> None:
    first, second = tl.fence(), tl.fence(ops=FailsOnce())
    array = DmaFenceArray([first, second], signal_on_any=any_)
    with pytest.raises(Interrupt):
        array.enable_signaling()
    array.enable_signaling()
    first.signal()
    assert array.is_signaled() is any_
    second.signal()
    assert array.status == 1


def waits_for_any_in_a_fork(parent: Parent) -> tuple[int, int | None]:
    line = Timeline("forked")
    fence, other = line.fence(), line.fence()
    array = DmaFenceArray([fence])
    ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(ready[1], b"r")
            assert wait_any([other, array]) == (1, math.inf)
            assert [each.statistics().callbacks for each in (other, fence)] == [0, 0]
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.read(ready[0], 1)
    fence.signal()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for fd in ready:
        os.close(fd)
    line.close()
    return code, wait_any([array])[0]


def test_a_forked_child_waits_for_any_of_what_it_inherited(child: Spawn) -> None:
    assert child(waits_for_any_in_a_fork).result() == (0, 0)


# ---- sync files ----


def test_descriptor_is_closed_once_when_from_fd_raises(sf: SyncFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: SyncFile) -> None:
        raise Interrupt

    fd = sf.fileno()
    with monkeypatch.context() as patched:
        patched.setattr(SyncFile, "_watch_foreign", fails)
        with pytest.raises(Interrupt):
            SyncFile.from_fd(fd)
        ends = os.pipe()  # has the number now
        gc.collect()
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("call", ["fileno", "dup"])
def test_fileno_makes_no_descriptor_while_another_thread_closes(sf: SyncFile, call: str) -> None:
    begin = threading.Event()
    with Background(lambda: (begin.wait(), getattr(sf, call)())) as job:
        with sf._lock:
            begin.set()
            job.until_blocked()
            sf.close()
        with raises_errno(errno.EBADF):
            job.result()


@pytest.mark.crash
def test_last_fence_makes_readable_while_earlier_signaler_is_stopped(buf: dmabuf.DmaBuf) -> None:
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()

    def signals() -> None:
        fence = Timeline("slow").fence()
        attach(buf.resv, fence, Usage.WRITE)
        os.write(theirs_out, b"there")
        os.read(theirs_in, 1)
        fence.signal()

    with Held(signals, "fence_signaled") as slow:
        os.read(ours_in, 5)
        theirs, line = the_fence(buf), Timeline("last")
        mine = line.fence()
        with SyncFile(merge(theirs, mine)) as sf:
            fd = sf.fileno()
            os.write(ours_out, b"x")
            assert slow.run_to("fence_signaled")
            until(lambda: sf._watch is None)
            assert not select.select([fd], [], [], 0)[0]
            mine.signal()
            assert select.select([fd], [], [])[0] == [fd]
        slow.go_on()
        assert slow.wait() == 0
        line.close()
    for end in (theirs_in, ours_out, ours_in, theirs_out):
        os.close(end)


# ---- timelines ----


def test_close_inside_a_call_signals_the_fences_afterwards() -> None:
    sw = SwSync()
    with sw.create_fence(1) as sf:
        with sw._file.locked():  # as a signal handler comes
            sw.close()
            assert sf.status == 0
        assert sf.wait() == math.inf
        assert sf.status == -errno.ENOENT
    until(lambda: sw._file._own.number < 0)


# ---- semaphores ----


def test_an_array_of_which_any_member_counts_is_reached_with_the_first(sem: TimelineSemaphore, tl: Timeline) -> None:
    first, second = tl.fence(), tl.fence()
    sem.import_fence(DmaFenceArray([first, second], signal_on_any=True), 1)
    assert sem.query() == 0
    second.signal()
    assert sem.query() == 1
    first.signal()


class AnotherThread:
    """The domain's shared memory for one question, during which another thread waits for the submission of another semaphore."""

    def __init__(self, domain: dmabuf.Domain, mine: set[int]) -> None:
        self.domain, self.shm, self.mine = domain, domain.shm, mine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shm, name)

    def fence_pending(self, handle: int) -> bool:
        self.domain.shm = self.shm
        self.mine.add(1)  # no fence at all, so it has ended
        return self.shm.fence_pending(handle)


def test_threads_wait_for_the_submission_of_several_semaphores_at_once(sem: TimelineSemaphore) -> None:
    with TimelineSemaphore() as other, other._file.locked(), sem._file.locked():
        first = other._submission()
        domain, mine = sem.domain, EVENTS.of(sem.domain)
        domain.shm = AnotherThread(domain, mine)  # type: ignore[assignment]
        second = sem._submission()
        assert mine == {1, first.handle, second.handle}
        mine.discard(1)


@pytest.mark.parametrize("what", ["reached", "pending", "closed"])
def test_canceled_eventfd_is_not_written_by_another_thread(
    sem: TimelineSemaphore, fence: DmaFence, event: int, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def looks(self: TimelineSemaphore, *_: object, **__: object) -> DmaFence | None:
        self.close()  # by another thread
        if what == "closed":
            self._check("eventfd")
        return fence if what == "pending" else None

    def told(error: Any) -> None:
        raise AssertionError(error)

    monkeypatch.setattr(TimelineSemaphore, "_blocking", looks)
    monkeypatch.setattr(sys, "unraisablehook", told)
    sem.eventfd(event, 1)
    with raises_errno(errno.EAGAIN):
        os.eventfd_read(event)
    assert fence.statistics().callbacks == 0


# ---- waiting in a loop, and for the kernel ----


class Loop:
    """Of asyncio's: what another thread schedules."""

    def __init__(self) -> None:
        self.scheduled: list[Any] = []
        self.interrupts = True

    def call_soon_threadsafe(self, call: Any) -> None:
        if self.interrupts:
            self.interrupts = False
            raise Interrupt
        self.scheduled.append(call)


class Future:
    def __init__(self) -> None:
        self.result: list[None] = []

    def done(self) -> bool:
        return bool(self.result)

    def set_result(self, value: None) -> None:
        self.result.append(value)


def test_a_wake_that_a_signal_handler_interrupts_is_made_up_for() -> None:
    waker, loop, first, second = Waker(), Loop(), Future(), Future()
    with pytest.raises(Interrupt):
        waker.post(loop, first, None)
    for call in loop.scheduled:
        call()
    assert first.done()
    loop.scheduled.clear()
    waker.post(loop, second, None)
    for call in loop.scheduled:
        call()
    assert second.done()


def test_a_descriptor_is_watched_in_the_middle_of_watching_another() -> None:
    ends = os.pipe()
    seen = threading.Event()
    with kernel_sync._poller.lock:  # as a signal handler or a finaliser comes
        kernel_sync.watch(ends[0], lambda _: seen.set())
    os.write(ends[1], b"x")
    seen.wait()
    until(lambda: kernel_sync._poller.wake < 0)
    for end in ends:
        os.close(end)
