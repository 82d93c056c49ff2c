"""What becomes of an engine and its jobs when a process ends, is killed, or forks; and what is left after many."""

import errno
import gc
import multiprocessing
import multiprocessing.connection
import os
import random
import subprocess
import sys
import zlib

import pytest

import dmabuf
from dmabuf import DmaBuf, Usage, sim
from tests.support.budget import times
from tests.support.children import Child, Parent, Spawn
from tests.support.engines import SIZE, put, until_it_waits
from tests.support.errnos import raises_errno
from tests.support.fences import entries, the_fence
from tests.support.partners import give, take

# ---- processes that end ----


def hangs(parent: Parent) -> None:
    with take(parent) as buf:
        engine = sim.Engine("doomed")
        job = engine.queue("doomed").fill(buf, 1, hang=True)
        parent.send(job.fence.seqno)
        parent.recv()
        del engine


def test_a_job_of_a_process_that_is_killed_ends_with_eownerdead(child: Spawn, queue: sim.EngineQueue, buf: DmaBuf) -> None:
    other = child(hangs)
    give(other, buf)
    other.recv()
    fence = the_fence(buf)
    job = queue.fill(buf, 2)
    until_it_waits(queue)
    assert not job.done
    other.kill()
    assert job.wait() == SIZE
    assert fence.status == -errno.EOWNERDEAD


def test_a_process_that_ends_with_jobs_pending_cancels_them(child: Spawn, buf: DmaBuf) -> None:
    other = child(hangs)
    give(other, buf)
    other.recv()
    fence = the_fence(buf)
    other.send("end")
    other.result()
    fence.wait()
    assert fence.status == -errno.ECANCELED


def hangs_and_returns(buf: DmaBuf, line: "multiprocessing.connection.Connection[object, object]") -> None:
    engine = sim.Engine("child")
    engine.queue("child").fill(buf, 1, hang=True)
    line.send("there")
    line.recv()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_multiprocessing_child_that_ends_with_jobs_pending_cancels_them(method: str, buf: DmaBuf) -> None:
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=hangs_and_returns, args=(buf, there))
    process.start()
    there.close()
    here.recv()
    fence = the_fence(buf)
    here.send("end")
    fence.wait()
    assert fence.status == -errno.ECANCELED
    process.join()
    assert process.exitcode == 0
    process.close()
    here.close()


def works(parent: Parent, seed: int) -> None:
    """Random jobs on the buffers that it is given, until it is killed."""
    rng = random.Random(seed)
    bufs = [take(parent) for _ in range(3)]
    engine = sim.Engine(f"worker{seed}")
    queues, attached = [engine.queue() for _ in range(2)], [engine.attach(buf) for buf in bufs]
    parent.send("there")
    while True:
        source, destination = rng.sample(attached, 2)
        queue = rng.choice(queues)
        jobs = [
            queue.copy(source, destination, delay=rng.choice([0, 0.001])),
            queue.fill(source, rng.randrange(256)),
            queue.checksum(source),
        ]
        if rng.random() < 0.1:
            jobs[-1].wait()


def kills(child: Spawn, engine: sim.Engine, count: int, seed: int = 9) -> None:
    """Kill workers at random moments, and see that their fences end and the others go on."""
    rng = random.Random(seed)
    bufs = [dmabuf.allocate(SIZE) for _ in range(3)]

    def started(seed: int) -> Child:
        other = child(works, seed)
        for buf in bufs:
            give(other, buf)
        assert other.recv() == "there"
        return other

    queue, workers = engine.queue(), [started(0), started(1)]
    for i in range(count):
        queue.fill(bufs[0], delay=rng.random() / 100).wait()
        workers.pop(0).kill()
        queue.copy(bufs[0], bufs[1]).wait()
        assert queue.checksum(bufs[1:]).wait() is not None
        workers.append(started(i + 2))
    for worker in workers:
        worker.kill()
    for buf in bufs:
        assert buf.resv.wait(Usage.BOOKKEEP)
    queue.fill(bufs, 7).wait()
    assert queue.checksum(bufs).wait() == zlib.crc32(b"\7" * SIZE * 3)
    engine.close()
    for buf in bufs:
        buf.close()


@pytest.mark.crash
@pytest.mark.parametrize("seed", range(3))
def test_devices_killed_at_random_hold_up_nobody(child: Spawn, engine: sim.Engine, seed: int) -> None:
    kills(child, engine, times(quick=1, full=3), seed)


@pytest.mark.crash
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_devices_killed_at_random_hold_up_nobody_for_long(child: Spawn, engine: sim.Engine) -> None:
    kills(child, engine, 500)


SCRIPT = """
import dmabuf
from dmabuf import sim
engine, buf, line = sim.Engine("e"), dmabuf.allocate(1 << 20), dmabuf.Timeline("never")
gate = line.fence()
hung = engine.queue().fill(buf, 1, hang=True)
waits = engine.queue().checksum(buf)
explicit = engine.queue().fill(dmabuf.allocate(1), wait=[gate])
slow = engine.queue(bandwidth=1).fill(dmabuf.allocate(1 << 20), 1)
print("end")
"""


def test_the_interpreter_ends_whatever_is_pending() -> None:
    done = subprocess.run([sys.executable, "-X", "dev", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_in_a_forked_child_an_engine_is_inert(engine: sim.Engine, queue: sim.EngineQueue, buf: DmaBuf) -> None:
    attached = engine.attach(buf)
    queue.fill(attached, 1).wait()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for refused in (lambda: queue.fill(attached), engine.queue, lambda: engine.attach(buf), engine.power_off):
                with raises_errno(errno.EPERM):
                    refused()
            queue.close()
            engine.close()
            with sim.Engine("mine") as mine:
                assert mine.queue().fill(buf, 2).wait() == SIZE
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert queue.checksum(attached).wait() == zlib.crc32(b"\2" * SIZE)


def test_nothing_of_an_engine_is_left_after_many_jobs(engine: sim.Engine, buf: DmaBuf) -> None:
    queue = engine.queue()
    put(buf, b"\1")
    for _ in range(200):
        queue.fill(buf, 1)
    queue.close()
    engine.close()
    gc.collect()
    assert buf.statistics().attachments == 0
    assert entries(buf.resv)[1:] == []
    assert engine.device.statistics().windows == 0
