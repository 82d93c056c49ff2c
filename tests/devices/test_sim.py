"""The software DMA engine: its work, its fences, and what it waits for."""

import asyncio
import errno
import os
import random
import threading
import zlib

import pytest

import dmabuf
from dmabuf import ContractWarning, Device, Direction, DmaBuf, Domain, SgTable, Timeline, Usage, sim
from dmabuf.core.resv.ww_mutex import inject_deadlocks
from tests.support.drivers import PAGE, Bare
from tests.support.engines import SIZE, got, put, until_it_waits
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.fences import entries, key
from tests.support.waiting import Background, until

KERNEL, WRITE, READ, BOOKKEEP = Usage.KERNEL, Usage.WRITE, Usage.READ, Usage.BOOKKEEP


# ---- the work ----


def test_a_copy_has_the_bytes_of_its_source_and_says_how_many(queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf) -> None:
    data = random.Random(1).randbytes(SIZE)
    put(buf, data)
    job = queue.copy(buf, other_buf)
    assert job.wait() == SIZE
    assert job.done
    assert got(other_buf) == data


def test_a_part_of_a_buffer_is_a_target_as_it_is(engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf) -> None:
    data = random.Random(2).randbytes(SIZE)
    put(buf, data)
    assert queue.copy(buf.export_range(5, 100), other_buf.export_range(PAGE + 1, 100)).wait() == 100
    assert got(other_buf) == bytes(PAGE + 1) + data[5:105] + bytes(SIZE - PAGE - 101)
    assert queue.checksum([buf.export_range(7, 9), buf]).wait() == zlib.crc32(data, zlib.crc32(data[7:16]))
    until(lambda: engine.statistics().attached == 0)


def test_ranges_are_copied_in_their_order_whatever_their_lengths(
    engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf
) -> None:
    data = bytes(range(256)) * (SIZE // 256)
    put(buf, data)
    a, b = engine.attach(buf), engine.attach(other_buf)
    job = queue.copy([a.range(10, 100), a.range(PAGE + 1, PAGE)], [b.range(3, 50), b.range(100, PAGE), b.range(2 * PAGE, 50)])
    assert job.wait() == 100 + PAGE
    stream = data[10:110] + data[PAGE + 1 : 2 * PAGE + 1]
    expected = bytearray(SIZE)
    expected[3:53], expected[100 : 100 + PAGE], expected[2 * PAGE : 2 * PAGE + 50] = stream[:50], stream[50:-50], stream[-50:]
    assert got(other_buf) == bytes(expected)


def test_a_part_of_a_buffer_is_copied_within_the_buffer(engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf) -> None:
    put(buf, b"abcd")
    whole = engine.attach(buf)
    assert queue.copy(whole.range(0, 4), whole.range(4, 4)).wait() == 4
    assert got(buf)[:9] == b"abcdabcd\0"


def test_a_fill_sets_its_range_and_no_byte_beside_it(engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf) -> None:
    put(buf, b"\1" * SIZE)
    assert queue.fill(engine.attach(buf).range(PAGE - 1, 5), 0xA5).wait() == 5
    assert got(buf) == b"\1" * (PAGE - 1) + b"\xa5" * 5 + b"\1" * (3 * PAGE - 4)


def test_a_checksum_is_the_crc_of_all_its_targets_in_their_order(queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf) -> None:
    one, two = random.Random(2).randbytes(SIZE), random.Random(3).randbytes(SIZE)
    put(buf, one)
    put(other_buf, two)
    assert queue.checksum([buf, other_buf]).wait() == zlib.crc32(one + two)


def test_more_than_one_piece_of_work_is_done_whole(queue: sim.EngineQueue) -> None:
    size = 3 * sim.CHUNK + PAGE
    data = random.Random(4).randbytes(size)
    with dmabuf.allocate(size) as a, dmabuf.allocate(size) as b:
        put(a, data)
        queue.copy(a, b)
        assert queue.checksum(b).wait() == zlib.crc32(data)
        queue.owner.close()


class Scattered(Bare):
    """Memory whose pages lie in no order."""

    order = (2, 0, 3, 1)

    def map(self, attachment: dmabuf.DmaBufAttachment, direction: Direction) -> SgTable:
        sgt = SgTable.from_pages(self.order, max_segment=attachment.dev.max_segment, memory=self.whole)
        attachment.dev.map_sgtable(sgt, direction)
        self.tables.append(sgt)
        return sgt


@pytest.mark.parametrize("iommu", [True, False], ids=["iommu", "direct"])
def test_memory_in_pieces_is_reached_in_the_order_of_its_table(iommu: bool, buf: DmaBuf) -> None:
    exporter = Scattered(SIZE)
    data = random.Random(5).randbytes(SIZE)
    put(buf, data)
    with sim.Engine(Device("dma", max_segment=PAGE, iommu=iommu)) as engine, dmabuf.export(exporter, SIZE) as scattered:
        queue = engine.queue()
        queue.copy(buf, scattered)
        assert queue.checksum(engine.attach(scattered).range(PAGE // 2, 2 * PAGE)).wait() == zlib.crc32(data[PAGE // 2 : 5 * PAGE // 2])
        assert exporter.whole[:] == b"".join(data[i * PAGE : (i + 1) * PAGE] for i in (1, 3, 0, 2))  # page 2 holds the first, …
        engine.close()
    exporter.close()


def test_queues_of_an_engine_run_side_by_side(engine: sim.Engine, buf: DmaBuf, other_buf: DmaBuf) -> None:
    first, second = engine.queue(), engine.queue()
    stuck = first.fill(buf, hang=True)
    assert second.fill(other_buf, 1).wait() == SIZE
    assert not stuck.done


# ---- implicit synchronisation (semantics 4.11) ----

WAITS = [
    ("checksum", True, KERNEL), ("checksum", True, WRITE), ("fill", True, KERNEL), ("fill", True, WRITE), ("fill", True, READ),
    ("checksum", False, KERNEL), ("fill", False, KERNEL),
]  # fmt: skip
PASSES = [
    ("checksum", True, READ), ("checksum", True, BOOKKEEP), ("fill", True, BOOKKEEP), ("checksum", False, WRITE),
    ("checksum", False, READ), ("checksum", False, BOOKKEEP), ("fill", False, WRITE), ("fill", False, READ), ("fill", False, BOOKKEEP),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "implicit", "usage"), WAITS)
def test_a_job_waits_for_the_fences_that_the_contract_names(
    queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline, operation: str, implicit: bool, usage: Usage
) -> None:
    target = queue.owner.attach(buf, dynamic=True)  # else the core waits for KERNEL fences, at map
    fence = tl.fence()
    add(buf.resv, fence, usage)
    job = getattr(queue, operation)(target, implicit=implicit)
    until_it_waits(queue)
    assert not job.done
    put(buf, b"\7" * SIZE)
    fence.signal()
    assert job.wait() == (zlib.crc32(b"\7" * SIZE) if operation == "checksum" else SIZE)
    assert got(buf) == (b"\7" if operation == "checksum" else b"\0") * SIZE


@pytest.mark.parametrize(("operation", "implicit", "usage"), PASSES)
def test_a_job_passes_the_fences_that_the_contract_does_not_name(
    queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline, operation: str, implicit: bool, usage: Usage
) -> None:
    fence = tl.fence()
    add(buf.resv, fence, usage)
    getattr(queue, operation)(buf, implicit=implicit).wait()
    fence.signal()


@pytest.mark.parametrize("implicit", [True, False])
def test_a_static_importer_has_kernel_fences_waited_for_at_map(engine: sim.Engine, buf: DmaBuf, tl: Timeline, implicit: bool) -> None:
    fence = tl.fence()
    add(buf.resv, fence, KERNEL)
    queue = engine.queue()
    with Background(lambda: queue.fill(buf, 1, implicit=implicit)) as submission:
        submission.until_blocked()
        assert not submission.done
        fence.signal()
        assert submission.result().wait() == SIZE


@pytest.mark.parametrize(
    ("operation", "implicit", "usage"),
    [("checksum", True, READ), ("fill", True, WRITE), ("checksum", False, BOOKKEEP), ("fill", False, BOOKKEEP)],
)
def test_a_job_adds_its_fence_for_what_it_does(
    queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline, operation: str, implicit: bool, usage: Usage
) -> None:
    gate = tl.fence()
    job = getattr(queue, operation)(buf, implicit=implicit, wait=[gate])
    assert entries(buf.resv) == [(key(job.fence), usage)]
    gate.signal()
    job.wait()
    assert job.fence.status == 1


def test_a_copy_reads_one_buffer_and_writes_the_other(queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf, tl: Timeline) -> None:
    gate = tl.fence()
    job = queue.copy(buf, other_buf, wait=[gate])
    assert entries(buf.resv) == [(key(job.fence), READ)]
    assert entries(other_buf.resv) == [(key(job.fence), WRITE)]
    gate.signal()


def test_a_buffer_that_is_read_and_written_counts_as_written(queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline) -> None:
    whole = queue.owner.attach(buf)
    gate, reader = tl.fence(), tl.fence()
    add(buf.resv, reader, READ)
    job = queue.copy(whole.range(0, 4), whole.range(4, 4), wait=[gate])
    assert entries(buf.resv)[1:] == [(key(job.fence), WRITE)]
    gate.signal()
    until_it_waits(queue)
    assert not job.done  # for the reader
    reader.signal()
    assert job.wait() == 4


def test_two_buffers_of_one_reservation_object_count_as_one(engine: sim.Engine, queue: sim.EngineQueue, tl: Timeline) -> None:
    exporters, resv, gate = (Bare(SIZE), Bare(SIZE)), dmabuf.DmaResv(), tl.fence()
    exporters[0].whole[:] = b"\6" * SIZE
    with dmabuf.export(exporters[0], SIZE, resv=resv) as a, dmabuf.export(exporters[1], SIZE, resv=resv) as b:
        job = queue.copy(a, b, wait=[gate])
        assert entries(resv) == [(key(job.fence), WRITE)]
        gate.signal()
        assert job.wait() == SIZE
        engine.close()
    assert exporters[1].whole[:] == b"\6" * SIZE
    for exporter in exporters:
        exporter.close()


def test_a_map_that_waits_holds_no_lock_but_its_own_buffers(queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    add(buf.resv, fence, KERNEL)
    with Background(lambda: queue.copy(buf, other_buf)) as submission:
        submission.until_blocked()
        with other_buf.resv.locked():
            fence.signal()
        assert submission.result().wait() == SIZE


def test_a_queue_has_one_timeline_and_ends_its_jobs_in_order(queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline) -> None:
    gate = tl.fence()
    jobs = [queue.fill(buf, i, wait=[gate]) for i in range(5)]
    assert len({job.fence.context for job in jobs}) == 1
    assert [job.fence.seqno for job in jobs] == [1, 2, 3, 4, 5]
    assert (jobs[0].fence.driver_name, jobs[0].fence.timeline_name) == ("dmabuf-sim", "q")
    assert entries(buf.resv) == [(key(jobs[4].fence), WRITE)]  # the newest of a context stands for all before it
    gate.signal()
    jobs[4].fence.wait()
    assert all(job.done for job in jobs)
    assert got(buf) == b"\4" * SIZE


def test_jobs_of_two_engines_on_one_buffer_are_ordered_by_their_submission(engine: sim.Engine, buf: DmaBuf) -> None:
    with sim.Engine("dma1") as other:
        first, second = engine.queue(), other.queue()
        for i in range(50):
            (first if i % 2 else second).fill(buf, i, delay=random.Random(i).choice([0, 0.0005]))
            crc = (second if i % 2 else first).checksum(buf)
            assert i % 10 or crc.wait() == zlib.crc32(bytes([i]) * SIZE)


def test_a_job_that_waits_holds_up_those_behind_it_in_its_queue(
    queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf, tl: Timeline
) -> None:
    gate = tl.fence()
    first = queue.fill(buf, 1, wait=[gate])
    second = queue.fill(other_buf, 2)
    until_it_waits(queue)
    assert not second.done
    gate.signal()
    assert (second.wait(), first.done) == (SIZE, True)


def test_cpu_accesses_and_jobs_wait_for_each_other(queue: sim.EngineQueue, buf: DmaBuf) -> None:
    with buf.write() as view:
        job = queue.checksum(buf)
        until_it_waits(queue)
        assert not job.done
        view[:] = b"\3" * SIZE
    assert job.wait() == zlib.crc32(b"\3" * SIZE)
    queue.fill(buf, 4, delay=0.01)
    with buf.read() as view:
        assert bytes(view) == b"\4" * SIZE


def test_explicit_fences_are_waited_for_even_with_implicit_sync_off(queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline) -> None:
    first, second = tl.fence(), tl.fence()
    job = queue.checksum(buf, wait=[first, dmabuf.DmaFenceArray([first, second])], implicit=False)
    first.signal()
    until_it_waits(queue)
    assert not job.done
    put(buf, b"\1" * SIZE)
    second.signal()
    assert job.wait() == zlib.crc32(b"\1" * SIZE)


def test_a_failed_dependency_does_not_fail_the_job(queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    add(buf.resv, fence, WRITE)
    job = queue.fill(buf, 1, wait=[fence])
    fence.signal(-errno.EIO)
    assert (job.wait(), job.fence.status) == (SIZE, 1)


def test_who_holds_the_lock_of_a_buffer_can_wait_for_its_job(queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline) -> None:
    gate = tl.fence()
    job = queue.fill(buf, 1, wait=[gate])
    with buf.resv.locked():
        gate.signal()
        assert job.wait() == SIZE


def test_submission_backs_off_and_comes_through(queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf) -> None:
    put(buf, b"\5" * SIZE)
    with inject_deadlocks(1):
        assert queue.copy(buf, other_buf).wait() == SIZE
    assert got(other_buf) == b"\5" * SIZE


def test_many_threads_submit_to_one_queue_and_every_job_is_done_once(engine: sim.Engine, buf: DmaBuf, other_buf: DmaBuf) -> None:
    queue, bufs = engine.queue(), [engine.attach(buf), engine.attach(other_buf)]
    jobs: list[sim.Job] = []

    def submit(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(100):
            source, destination = rng.sample(bufs, 2)
            jobs.append(queue.copy(source, destination))

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [job.wait() for job in jobs] == [SIZE] * 400
    assert sorted(job.fence.seqno for job in jobs) == list(range(1, 401))
    assert queue.statistics().completed == 400


# ---- waiting ----


def test_a_job_is_awaited(queue: sim.EngineQueue, buf: DmaBuf) -> None:
    async def main() -> object:
        return await queue.fill(buf, 1, delay=0.001)

    assert asyncio.run(main()) == SIZE


def test_a_job_is_awaited_under_trio(queue: sim.EngineQueue, buf: DmaBuf) -> None:
    trio = pytest.importorskip("trio")

    async def main() -> object:
        return await queue.fill(buf, 1, delay=0.001)

    assert trio.run(main) == SIZE


def test_cancelling_the_await_leaves_nothing_registered_and_the_job_ends(queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline) -> None:
    gate = tl.fence()
    job = queue.fill(buf, 1, wait=[gate])

    async def main() -> None:
        async def wait() -> None:
            await job

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert job.fence.statistics().callbacks == 0
    gate.signal()
    assert job.wait() == SIZE


def test_waiting_for_a_job_times_out(queue: sim.EngineQueue, buf: DmaBuf, tl: Timeline) -> None:
    gate = tl.fence()
    job = queue.fill(buf, 1, wait=[gate])
    with raises_errno(errno.ETIMEDOUT, TimeoutError):
        job.wait(0)
    gate.signal()
    job.wait()
    assert job.wait(0) == SIZE


def test_wait_in_an_access_for_a_job_that_waits_for_it_is_edeadlk(queue: sim.EngineQueue, buf: DmaBuf) -> None:
    async def main(job: sim.Job) -> None:
        await job

    with buf.write():
        job = queue.fill(buf, 1)
        with raises_errno(errno.EDEADLK):
            job.wait()
    assert job.wait() == SIZE
    with buf.read():
        assert queue.checksum(buf).wait() == zlib.crc32(b"\1" * SIZE)


def test_wait_in_an_access_for_a_job_behind_such_a_job_is_edeadlk(queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf) -> None:
    with buf.read():
        first = queue.fill(buf, 1)
        second = queue.fill(other_buf, 1)
        with raises_errno(errno.EDEADLK):
            second.wait()
        assert queue.owner.queue().checksum(buf, implicit=False).wait() == zlib.crc32(b"\0" * SIZE)
    assert (first.wait(), second.wait()) == (SIZE, SIZE)


# ---- what can't be submitted ----


REFUSED = {
    "lengths differ": (errno.EINVAL, lambda q, a, b: q.copy(a.range(0, 4), b.range(0, 5))),
    "ranges overlap": (errno.EINVAL, lambda q, a, b: q.copy(a.range(0, 4), a.range(3, 4))),
    "destinations overlap": (errno.EINVAL, lambda q, a, b: q.copy(b.range(0, 8), [a.range(0, 4), a.range(3, 4)])),
    "no source": (errno.EINVAL, lambda q, a, b: q.copy([], b)),
    "no destination": (errno.EINVAL, lambda q, a, b: q.fill([])),
    "a value above a byte": (errno.EINVAL, lambda q, a, b: q.fill(a, 256)),
    "a negative value": (errno.EINVAL, lambda q, a, b: q.fill(a, -1)),
    "a negative delay": (errno.EINVAL, lambda q, a, b: q.fill(a, delay=-1)),
    "a delay that is no number": (errno.EINVAL, lambda q, a, b: q.fill(a, delay=float("nan"))),
    "a range that ends outside": (errno.EINVAL, lambda q, a, b: q.fill(a.range(1, SIZE))),
    "a range that begins outside": (errno.EINVAL, lambda q, a, b: q.fill(a.range(-1, 4))),
    "an empty range": (errno.EINVAL, lambda q, a, b: q.fill(a.range(4, 0))),
    "a range at the end": (errno.EINVAL, lambda q, a, b: q.fill(a.range(SIZE))),
    "a range outside of a range": (errno.EINVAL, lambda q, a, b: q.fill(a.range(0, 4).range(2, 3))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_job_that_makes_no_sense_is_refused_and_adds_nothing(
    engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf, case: str
) -> None:
    number, submit = REFUSED[case]
    a, b = engine.attach(buf), engine.attach(other_buf)
    with raises_errno(number):
        submit(queue, a, b)
    assert (entries(buf.resv), entries(other_buf.resv)) == ([], [])
    assert queue.statistics().pending == 0


WRONG_TYPES = {
    "a buffer": lambda q, b: q.fill(b.fileno()),
    "a list of them": lambda q, b: q.fill([b, 7]),
    "a fence": lambda q, b: q.fill(b, wait=[1]),
    "a value": lambda q, b: q.fill(b, 1.5),
    "an offset": lambda q, b: q.fill(q.owner.attach(b).range(1.5)),
    "a buffer to attach": lambda q, b: q.owner.attach(b.fileno()),
    "a device": lambda q, b: sim.Engine(7),
    "a fence without a list": lambda q, b: q.fill(b, wait=dmabuf.stub_fence()),
    "an option": lambda q, b: q.fill(b, implict=False),
}


@pytest.mark.parametrize("what", WRONG_TYPES)
def test_what_has_the_wrong_type_is_a_type_error(queue: sim.EngineQueue, buf: DmaBuf, what: str) -> None:
    with pytest.raises(TypeError):
        WRONG_TYPES[what](queue, buf)
    assert entries(buf.resv) == []


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0}, {"timeout": -1}, {"timeout": float("nan")}, {"delay": -1}, {"bandwidth": 0}, {"bandwidth": -1}, {"name": "x" * 64}],
)
def test_a_queue_that_makes_no_sense_is_refused(engine: sim.Engine, options: dict[str, object]) -> None:
    with raises_errno(errno.EINVAL):
        engine.queue(**options)  # type: ignore[arg-type]


def test_an_attachment_without_a_direction_is_refused(engine: sim.Engine, buf: DmaBuf) -> None:
    with raises_errno(errno.EINVAL):
        engine.attach(buf, direction=Direction.NONE)
    with raises_errno(errno.EINVAL):
        engine.attach(buf, direction=4)


def test_a_buffer_attached_to_another_engine_is_refused(queue: sim.EngineQueue, buf: DmaBuf) -> None:
    with sim.Engine("other") as other, raises_errno(errno.EINVAL):
        queue.fill(other.attach(buf))


def test_a_buffer_of_another_domain_is_refused(queue: sim.EngineQueue) -> None:
    with dmabuf.allocate(SIZE, domain=Domain.private()) as foreign, raises_errno(errno.EXDEV):
        queue.fill(foreign)


def test_an_engine_works_in_the_domain_that_it_is_made_for() -> None:
    domain = Domain.private()
    with dmabuf.allocate(SIZE, domain=domain) as buf, sim.Engine("p", domain=domain) as engine:
        assert engine.queue().fill(buf, 1).wait() == SIZE
        engine.close()


def test_a_closed_buffer_is_refused(queue: sim.EngineQueue) -> None:
    closed = dmabuf.allocate(SIZE)
    closed.close()
    with raises_errno(errno.EBADF):
        queue.fill(closed)


def test_submission_with_the_reservation_lock_held_is_refused(queue: sim.EngineQueue, buf: DmaBuf) -> None:
    attached = queue.owner.attach(buf)
    with buf.resv.locked():
        with pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
            queue.fill(attached)
        with pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
            queue.fill(buf)
        with pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
            attached.detach()
    assert entries(buf.resv) == []
    assert queue.fill(attached).wait() == SIZE


def test_a_detached_buffer_is_refused(queue: sim.EngineQueue, buf: DmaBuf) -> None:
    attached = queue.owner.attach(buf)
    attached.detach()
    attached.detach()
    with raises_errno(errno.EINVAL):
        queue.fill(attached)


def test_a_read_only_buffer_can_be_read_and_not_written(queue: sim.EngineQueue, buf: DmaBuf) -> None:
    put(buf, b"\1" * SIZE)
    fd = os.open(f"/proc/self/fd/{buf.fileno()}", os.O_RDONLY)
    with dmabuf.get(fd) as readonly:
        os.close(fd)
        assert queue.checksum(readonly).wait() == zlib.crc32(b"\1" * SIZE)
        with raises_errno(errno.EACCES):
            queue.fill(readonly)
        queue.owner.close()
    assert entries(buf.resv, BOOKKEEP)[1:] == []


def test_power_off_in_a_callback_of_a_job_is_edeadlk(engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf, other_buf: DmaBuf) -> None:
    """The queue's thread runs the callback, so the jobs that it would wait for can't end meanwhile."""
    ready, over = Timeline("ready").fence(), threading.Event()
    first = queue.copy(buf, other_buf, wait=[ready])
    second = queue.copy(buf, other_buf)

    def power_off(_: object) -> None:
        with raises_errno(errno.EDEADLK):
            engine.power_off()
        over.set()

    first.fence.add_callback(power_off)
    ready.signal()
    over.wait()
    second.fence.wait()
    assert second.fence.status == -errno.ENODEV
    engine.power_on()
