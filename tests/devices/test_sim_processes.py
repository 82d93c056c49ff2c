"""Two devices in two processes on one buffer, writer then reader, ordered by implicit synchronisation alone.

The processes tell each other that a job is *submitted*, so that both have the same order of jobs; nobody waits for one to be done but to
keep their number small. What orders the work is the fences on the reservation object. Round k fills the buffer with the byte k; the
reader's checksum of round k must be that of this byte, no other.
"""

import random
import zlib

import pytest

import dmabuf
from dmabuf import Timeline, sim
from tests.support.budget import times
from tests.support.children import Parent, Spawn
from tests.support.drivers import PAGE
from tests.support.partners import give, take

SIZE = 2 * PAGE
CRC = [zlib.crc32(bytes([value]) * SIZE) for value in range(251)]
DEPTH = 16  # jobs of one process under way at a time
NO_ROUND = -1


def delay(rng: random.Random) -> float:
    """Seconds: often none, at most a third of a millisecond."""
    return rng.choice((0.0, 0.0, rng.random() / 3000))


def reader(parent: Parent, rounds: int, seed: int, without: int) -> list[int]:
    """The rounds in which a checksum was not the writer's."""
    rng, stale, jobs = random.Random(seed), [], []
    with take(parent) as buf, sim.Engine("reader") as engine, engine.queue() as queue:
        attached = engine.attach(buf)
        for k in range(rounds):
            parent.sock.recv(1)
            jobs.append(queue.checksum(attached, delay=delay(rng)))
            if k == without:
                jobs[k].wait()  # it must not need the writer, who has not begun
            parent.sock.send(b"r")
            if k >= DEPTH:
                jobs[k - DEPTH].wait()
        stale = [k for k, job in enumerate(jobs) if job.wait() != CRC[k % 251]]
    return stale


def stale_rounds(child: Spawn, rounds: int, *, seed: int = 1, without: int = NO_ROUND) -> list[int]:
    """Run the rounds; in round ``without`` the writer's fence is not on the reservation object for others to wait for."""
    rng, jobs = random.Random(seed), []
    other = child(reader, rounds, seed + 1, without)
    with dmabuf.allocate(SIZE) as buf, sim.Engine("writer") as engine, engine.queue() as queue, Timeline("gate") as line:
        give(other, buf)
        attached = engine.attach(buf)
        for k in range(rounds):
            if k == without:
                gate = line.fence()
                jobs.append(queue.fill(attached, k % 251, implicit=False, wait=[gate, jobs[k - 1].fence]))
            else:
                jobs.append(queue.fill(attached, k % 251, delay=delay(rng)))
            other.sock.send(b"w")
            other.sock.recv(1)
            if k == without:
                gate.signal()
            if k >= DEPTH:
                jobs[k - DEPTH].wait()
        found: list[int] = other.result()
        assert [job.wait() for job in jobs] == [SIZE] * rounds
        engine.close()
    return found


@pytest.mark.parametrize("part", range(4))  # 10,000 rounds altogether, 2,000 with the quick budget
def test_implicit_sync_orders_writer_and_reader_of_two_processes(child: Spawn, part: int) -> None:
    assert stale_rounds(child, times(quick=500, full=2_500), seed=1 + 2 * part) == []


def test_with_one_fence_missing_the_reader_sees_stale_bytes(child: Spawn) -> None:
    assert stale_rounds(child, 100, without=60) == [60]
