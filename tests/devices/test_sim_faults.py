"""The software DMA engine misbehaving: slow, hanging, without power, at addresses that are gone, over memory that moves."""

import contextlib
import errno
import os
import random
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Direction, DmaBuf, Timeline, Usage, sim
from dmabuf.core.attach.attachment import moving
from dmabuf.errors import NoDeviceError
from dmabuf.heap.spill import SpillHeap
from tests.support.drivers import Bare, Dynamic, Static
from tests.support.engines import SIZE, got, until_it_waits
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.fences import entries, the_fence
from tests.support.waiting import Background, until, until_asleep

HOUR = 3600.0  # seconds: for ever, as tests go


class Clock:
    """What queues tell the time by, put forward by the test: so no job is late because the machine had other things to do."""

    def __init__(self) -> None:
        self.ahead = 0  # ns

    def monotonic_ns(self) -> int:
        return time.monotonic_ns() + self.ahead

    def forward(self, seconds: float, *queues: sim.EngineQueue) -> None:
        self.ahead += int(seconds * 1e9)
        for queue in queues:
            queue.wake()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("dmabuf.devices.queue.time", made)
    return made


# ---- slow ----


def test_a_slow_job_takes_at_least_its_delay(engine: sim.Engine, buf: DmaBuf) -> None:
    for queue, delay in ((engine.queue(delay=0.03), None), (engine.queue(), 0.03)):
        before = time.monotonic_ns()
        job = queue.fill(buf, 1, delay=delay)
        job.wait()
        assert job.fence.timestamp - before >= 30_000_000


def test_a_bandwidth_is_kept_to(engine: sim.Engine) -> None:
    with dmabuf.allocate(4 * sim.CHUNK) as buf:
        before = time.monotonic_ns()
        job = engine.queue(bandwidth=4 * sim.CHUNK / 0.04).fill(buf, 1)
        assert job.wait() == 4 * sim.CHUNK
        assert job.fence.timestamp - before >= 40_000_000
        engine.close()


def test_a_slow_job_is_cancelled_between_two_pieces(engine: sim.Engine) -> None:
    with dmabuf.allocate(4 * sim.CHUNK) as buf:
        queue = engine.queue(bandwidth=1)
        job = queue.fill(buf, 1)
        until(lambda: job.moved == sim.CHUNK)
        until_it_waits(queue)
        engine.close(cancel=True)
        assert (job.fence.status, job.moved) == (-errno.ECANCELED, sim.CHUNK)
        assert bytes(got(buf)[: sim.CHUNK + 1]) == b"\1" * sim.CHUNK + b"\0"


# ---- hanging ----


def test_a_job_that_hangs_ends_with_etime_and_the_queue_goes_on(engine: sim.Engine, buf: DmaBuf, clock: Clock) -> None:
    queue = engine.queue(timeout=HOUR)
    hung, after = queue.fill(buf, 1, hang=True), queue.fill(buf, 2)
    until(lambda: hung._begun)
    clock.forward(HOUR, queue)
    with raises_errno(errno.ETIME):
        hung.wait()
    assert (after.wait(), got(buf)) == (SIZE, b"\2" * SIZE)
    assert (hung.fence.status, after.fence.status) == (-errno.ETIME, 1)
    stats = queue.statistics()
    assert (stats.completed, stats.failed, stats.resets, stats.pending) == (1, 1, 1, 0)


def test_a_job_too_slow_for_the_timeout_ends_with_etime(engine: sim.Engine, buf: DmaBuf) -> None:
    job = engine.queue(timeout=0.01).fill(buf, 1, delay=HOUR)
    with raises_errno(errno.ETIME):
        job.wait()
    assert got(buf) == b"\0" * SIZE


def test_the_timeout_begins_with_the_job_not_with_its_submission(engine: sim.Engine, buf: DmaBuf, tl: Timeline, clock: Clock) -> None:
    gate, queue = tl.fence(), engine.queue(timeout=HOUR)
    job = queue.fill(buf, 1, wait=[gate])
    until_it_waits(queue)
    clock.forward(2 * HOUR, queue)
    until_it_waits(queue)
    assert not job.done
    gate.signal()
    assert job.wait() == SIZE


def test_a_job_that_hangs_for_ever_is_cancelled_by_closing(engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf) -> None:
    jobs = [queue.fill(buf, 1, hang=True), queue.fill(buf, 2)]
    queue.close(cancel=True)
    assert [job.fence.status for job in jobs] == [-errno.ECANCELED] * 2
    with raises_errno(errno.ECANCELED):
        jobs[1].wait()
    with raises_errno(errno.EBADF):
        queue.fill(buf)
    assert engine.queue().fill(buf, 3).wait() == SIZE


def test_a_block_left_by_an_exception_cancels_and_one_left_well_waits(buf: DmaBuf) -> None:
    with sim.Engine("a") as engine, engine.queue() as queue:
        job = queue.fill(buf, 1, delay=0.01)
    assert job.fence.status == 1
    with contextlib.suppress(KeyError), sim.Engine("b") as engine:
        job = engine.queue().fill(buf, 1, hang=True)
        raise KeyError
    assert job.fence.status == -errno.ECANCELED


def test_closing_waits_for_what_was_submitted_and_refuses_the_rest(buf: DmaBuf, tl: Timeline) -> None:
    engine = sim.Engine("dma0")
    queue, gate = engine.queue(), tl.fence()
    job = queue.fill(buf, 1, wait=[gate])
    with Background(engine.close) as closing:
        closing.until_blocked()
        assert not closing.done
        gate.signal()
        closing.result()
    assert job.fence.status == 1
    engine.close()
    for refused in (lambda: queue.fill(buf), engine.queue, lambda: engine.attach(buf), engine.power_off, engine.power_on):
        with raises_errno(errno.EBADF):
            refused()


# ---- power ----


def test_losing_power_ends_everything_pending_with_enodev(engine: sim.Engine, buf: DmaBuf, other_buf: DmaBuf, tl: Timeline) -> None:
    first, second, gate = engine.queue(), engine.queue(), tl.fence()
    add(other_buf.resv, gate, Usage.WRITE)
    jobs = [
        first.fill(buf, 1, hang=True),
        first.fill(buf, 2),
        second.fill(other_buf, 3),  # waits for the fence in its way
        second.fill(other_buf, 4),
    ]
    until_it_waits(second)
    engine.power_off()
    assert [job.fence.status for job in jobs] == [-errno.ENODEV] * 4
    with raises_errno(errno.ENODEV):
        jobs[2].wait()
    assert not engine.statistics().powered
    assert gate.statistics().callbacks == 0
    gate.signal()
    assert (got(buf), got(other_buf)) == (b"\0" * SIZE, b"\0" * SIZE)


def test_without_power_nothing_is_accepted_and_with_it_all_works_again(engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf) -> None:
    attached = engine.attach(buf)
    engine.power_off()
    engine.power_off()
    with raises_errno(errno.ENODEV):
        queue.fill(attached)
    assert entries(buf.resv) == []
    engine.power_on()
    assert queue.fill(attached, 1).wait() == SIZE


def test_power_that_comes_and_goes_under_submitters_loses_no_job(engine: sim.Engine, buf: DmaBuf, other_buf: DmaBuf) -> None:
    queues, bufs = [engine.queue(), engine.queue()], [engine.attach(buf), engine.attach(other_buf)]
    jobs: list[sim.Job] = []
    refused = [0, 0]
    stop = threading.Event()

    def submit(me: int) -> None:
        rng = random.Random(me)
        while not stop.is_set():
            try:
                jobs.append(queues[me].copy(*rng.sample(bufs, 2), delay=rng.choice([0, 0, 0.0002])))
            except NoDeviceError:
                refused[me] += 1

    threads = [threading.Thread(target=submit, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            seen, turned_away = len(jobs), sum(refused)
            until(lambda seen=seen: len(jobs) > seen)
            engine.power_off()
            until(lambda turned_away=turned_away: sum(refused) > turned_away)
            assert all(job.done for job in list(jobs))
            engine.power_on()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    engine.close()
    ended = [job.fence.status for job in jobs]
    assert set(ended) <= {1, -errno.ENODEV}
    stats = [queue.statistics() for queue in queues]
    assert sum(s.completed for s in stats) == ended.count(1)
    assert sum(s.failed for s in stats) == ended.count(-errno.ENODEV)


# ---- faults ----


def test_a_job_against_the_direction_of_its_mapping_faults(engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf) -> None:
    job = queue.fill(engine.attach(buf, direction=Direction.TO_DEVICE), 1)
    with raises_errno(errno.EFAULT):
        job.wait()
    assert (job.fence.status, got(buf), engine.device.statistics().faults) == (-errno.EFAULT, b"\0" * SIZE, 1)
    assert queue.fill(buf, 1).wait() == SIZE


def test_a_buffer_unplugged_under_a_job_faults(engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline) -> None:
    attached, gate = engine.attach(buf), tl.fence()
    job = queue.fill(attached, 1, wait=[gate])
    attached.detach(wait=False)
    gate.signal()
    with raises_errno(errno.EFAULT):
        job.wait()
    assert (job.fence.status, got(buf)) == (-errno.EFAULT, b"\0" * SIZE)


def test_detaching_waits_for_the_jobs_of_the_buffer(engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline) -> None:
    attached, gate = engine.attach(buf), tl.fence()
    job = queue.fill(attached, 1, wait=[gate])
    with Background(attached.detach) as detaching:
        detaching.until_blocked()
        assert not detaching.done
        gate.signal()
        detaching.result()
    assert job.fence.status == 1
    assert engine.device.statistics().mapped == 0


def test_a_mistake_in_the_device_ends_the_job_with_eio_and_is_told(
    queue: sim.EngineQueue, buf: DmaBuf, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: told.append(info.exc_type))
    monkeypatch.setattr(queue.owner.device, "write", lambda *_: 1 // 0)
    with raises_errno(errno.EIO):
        queue.fill(buf).wait()
    monkeypatch.undo()
    assert told == [ZeroDivisionError]
    assert queue.fill(buf).wait() == SIZE


def test_a_mapping_that_fails_adds_nothing_and_leaves_nothing(engine: sim.Engine, queue: sim.EngineQueue, other_buf: DmaBuf) -> None:
    exporter = Bare(SIZE)
    exporter.fails["map"] = errno.EBUSY
    with dmabuf.export(exporter, SIZE) as buf:
        with raises_errno(errno.EBUSY):
            queue.copy(other_buf, buf)
        assert (entries(buf.resv), entries(other_buf.resv)) == ([], [])
        assert (buf.statistics().attachments, other_buf.statistics().attachments) == (0, 0)
        del exporter.fails["map"]
        assert queue.copy(other_buf, buf).wait() == SIZE
        engine.close()
    exporter.close()


def test_without_room_for_a_fence_nothing_is_added(
    queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = queue.owner.attach(other_buf)
    queue.fill(whole).wait()
    with monkeypatch.context() as patch:
        patch.setattr(dmabuf.DmaResv, "reserve", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOMEM, "no room")))
        with raises_errno(errno.ENOMEM):
            queue.copy(whole, buf)
    assert (queue.statistics().pending, whole.statistics().jobs, buf.statistics().attachments) == (0, 0, 0)
    assert entries(buf.resv) == []
    whole.detach()


@pytest.mark.parametrize("op", ["unmap", "detach"])
def test_a_buffer_whose_exporter_fails_at_the_end_is_given_up_all_the_same(op: str) -> None:
    exporter = Static(SIZE)
    engine = sim.Engine("e")
    with dmabuf.export(exporter, SIZE) as buf:
        attached = engine.attach(buf)
        engine.queue().fill(attached).wait()
        exporter.fails[op] = errno.EIO
        with raises_errno(errno.EIO):
            engine.close()
        assert (buf.statistics().attachments, engine.statistics().attached) == (0, 0)
    engine.close()
    assert exporter.count("release") == 1
    for table in list(exporter.tables):
        exporter.tables.remove(table)
        engine.device.unmap_sgtable(table, Direction.BIDIRECTIONAL)
    exporter.close()


def test_closing_with_the_lock_of_a_buffer_held_is_refused(engine: sim.Engine, buf: DmaBuf) -> None:
    engine.attach(buf)
    with buf.resv.locked(), pytest.warns(dmabuf.ContractWarning), raises_errno(errno.EDEADLK):
        engine.close()
    assert engine.queue().fill(buf).wait() == SIZE


def test_buffers_that_spill_are_worked_on_one_after_the_other(tmp_path: Path) -> None:
    """Ten times the budget: a buffer is in memory while a job has it mapped, and may go afterwards."""
    heap = SpillHeap(budget=3 * SIZE, directory=tmp_path)
    with sim.Engine("e") as engine, dmabuf.allocate(SIZE) as plain:
        queue = engine.queue()
        bufs = [heap.allocate(SIZE) for _ in range(30)]
        attached = [engine.attach(buf) for buf in bufs[:2]]
        for i, buf in enumerate([*attached, *bufs[2:]]):
            queue.fill(plain, i)
            queue.copy(plain, buf).wait()
        assert heap.statistics().moves_out >= 27
        for i, buf in reversed(list(enumerate([*attached, *bufs[2:]]))):
            assert queue.checksum(buf).wait() == zlib.crc32(bytes([i]) * SIZE)
        assert attached[0].statistics().maps >= 2
        engine.close()
        for buf in bufs:
            buf.close()
    heap.close()


def test_submission_without_a_thread_adds_nothing_and_next_one_works(
    engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = engine.attach(buf)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError):
            queue.fill(attached, 1)
    assert (entries(buf.resv), queue.statistics().pending, attached.statistics().jobs) == ([], 0, 0)
    assert queue.fill(attached, 2).wait() == SIZE
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
        assert queue.fill(buf, 3).wait() == SIZE  # its attachment has to wait for the close
        assert queue.fill(attached, 4).wait() == SIZE
    engine.close()
    assert (buf.statistics().attachments, got(buf)) == (0, b"\4" * SIZE)


def test_a_close_that_a_signal_breaks_off_is_done_by_the_next(buf: DmaBuf) -> None:
    def handler(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        engine = sim.Engine("e")
        engine.attach(buf)
        job = engine.queue().fill(buf, 1, hang=True)
        me = threading.get_native_id()

        def knock() -> None:
            until(lambda: engine.closed)
            until_asleep(os.getpid(), me)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        with Background(knock), pytest.raises(InterruptedError):
            engine.close()
        with raises_errno(errno.EBADF):
            engine.attach(buf)
        engine.close(cancel=True)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (job.fence.status, buf.statistics().attachments) == (-errno.ECANCELED, 0)


def test_a_submission_broken_off_in_the_middle_ends_its_job_in_its_turn(
    queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tl.fence()
    first = queue.fill(buf, 1, wait=[gate])

    def signal_handler(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dmabuf.DmaResv, "add", signal_handler)
        with pytest.raises(KeyboardInterrupt):
            queue.fill(buf, 2)
    assert queue.statistics().pending == 2
    assert the_fence(buf) is first.fence
    gate.signal()
    assert (first.wait(), queue.fill(buf, 3).wait(), got(buf)) == (SIZE, SIZE, b"\3" * SIZE)
    assert queue.statistics().failed == 1


# ---- memory that moves ----


def test_after_a_move_the_next_job_maps_anew(engine: sim.Engine, queue: sim.EngineQueue, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        attached = engine.attach(buf)
        queue.fill(attached, 1).wait()
        (old,) = dynamic.tables
        with buf.resv.locked():
            buf.move_notify()
        until(lambda: not dynamic.tables)  # given back without another job
        assert queue.checksum(attached).wait() == zlib.crc32(b"\1" * SIZE)
        assert (attached.statistics().maps, attached.statistics().moves) == (2, 1)
        assert dynamic.tables != [old]
        assert dynamic.pins == 0
        engine.close()
    assert dynamic.tables == []


def test_a_job_under_way_keeps_the_old_place_until_it_ends(
    engine: sim.Engine, queue: sim.EngineQueue, dynamic: Dynamic, tl: Timeline
) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        attached, gate = engine.attach(buf), tl.fence()
        before = queue.fill(attached, 1, wait=[gate])
        with buf.resv.locked():
            buf.move_notify()
        after = queue.fill(attached, 2)
        assert len(dynamic.tables) == 2
        with buf.resv.locked():  # what an exporter does before it moves
            gate.signal()
            buf.resv.wait(Usage.BOOKKEEP)
        assert (before.fence.status, after.fence.status) == (1, 1)
        until(lambda: len(dynamic.tables) == 1)
        engine.close()


def test_without_move_notify_the_memory_is_pinned_while_mapped(engine: sim.Engine, queue: sim.EngineQueue, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, moving(False):
        attached = engine.attach(buf)
        assert dynamic.pins == 0
        queue.fill(attached, 1).wait()
        assert dynamic.pins == 1
        with buf.resv.locked():
            buf.move_notify()
        until(lambda: dynamic.pins == 0)
        queue.fill(attached, 1).wait()
        attached.detach()
        assert (dynamic.pins, dynamic.tables) == (0, [])


def test_as_a_static_importer_it_pins_from_attach_to_detach(engine: sim.Engine, queue: sim.EngineQueue, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        attached = engine.attach(buf, dynamic=False)
        assert dynamic.pins == 1
        assert queue.fill(attached, 1).wait() == SIZE
        attached.detach()
        assert (dynamic.pins, dynamic.tables) == (0, [])


def test_a_buffer_attached_for_one_job_is_given_back_after_it(engine: sim.Engine, queue: sim.EngineQueue, dynamic: Dynamic) -> None:
    buf = dmabuf.export(dynamic, SIZE)
    queue.fill(buf, 1).wait()
    buf.close()
    until(lambda: dynamic.count("release") and not engine.statistics().attached)
    assert (dynamic.tables, dynamic.pins) == ([], 0)


# ---- what can't be waited for ----


class Unwilling(dmabuf.FenceOps):
    """Operations with a mistake."""

    def enable_signaling(self, fence: dmabuf.DmaFence) -> bool:
        raise ValueError("a mistake")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_dependency_that_raises_fails_its_job_and_no_other(queue: sim.EngineQueue, buf: DmaBuf) -> None:
    gate = Timeline("gate").fence(ops=Unwilling())
    job = queue.fill(buf, 1, wait=[gate])
    after = queue.fill(buf, 2)
    with raises_errno(errno.EIO):
        job.wait()
    after.wait()
    assert got(buf) == b"\2" * SIZE
    gate.signal()
