"""SIGKILL at random moments of a random workload.

A few workers take locks with contexts, signal and wait for fences, read and write, allocate, rename and hand buffers to each other. Again
and again a random one is killed and replaced, and every survivor must complete further rounds. A pattern that every write counts up shows
whether a reader ever saw half of one without an error. At the end nothing of anybody is left.

The seed is printed with every failure: `DMABUF_TEST_SEED=… pytest …` makes the same choices again (not the same timing). The long test
kills 10,000, or as many as `DMABUF_TEST_KILLS` says, and prints the count.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import traceback
from collections.abc import Callable, Iterator

import pytest

import dmabuf
from dmabuf import Usage, _native
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain import lives, records
from tests.support.budget import times
from tests.support.crew import Crew
from tests.support.waiting import until

pytestmark = [pytest.mark.crash]

WORKERS = 4
TORN = (errno.EOWNERDEAD, errno.ECANCELED)


class Worker:
    """What one process does, by a seed of its own, until it is killed. `rounds` is a counter in shared memory."""

    def __init__(self, bufs: list[dmabuf.DmaBuf], counter: memoryview, seed: str) -> None:
        self.bufs, self.counter = bufs, counter
        self.rng = random.Random(seed)
        self.timelines = [dmabuf.Timeline(f"worker {os.getpid()}") for _ in range(2)]

    def run(self) -> None:
        jobs = (self.lock, self.fences, self.write, self.read, self.both, self.record, self.rename, self.raises, self.send, self.wait)
        while True:
            self.rng.choice(jobs)()
            self.counter[0] += 1

    def lock(self) -> None:
        with dmabuf.lock_all(self.rng.sample([b.resv for b in self.bufs], self.rng.randint(1, len(self.bufs)))):
            pass

    def fences(self) -> None:
        made = [timeline.fence() for timeline in self.timelines]
        with dmabuf.lock_all(b.resv for b in self.bufs):
            for buf in self.bufs:
                buf.resv.reserve(len(made))
                for fence in made:
                    buf.resv.add(fence, self.rng.choice((Usage.WRITE, Usage.READ, Usage.BOOKKEEP)))
        for fence in made:
            fence.signal(self.rng.choice((0, 0, -errno.EIO)))

    def write(self) -> None:
        with self.rng.choice(self.bufs).write() as view:
            count_up(view)

    def read(self) -> None:
        try:
            with self.rng.choice(self.bufs).read() as view:
                check_pattern(view)
        except OSError as e:
            if e.errno not in TORN:
                raise

    def both(self) -> None:
        a, b = self.rng.sample(self.bufs, 2)
        try:
            with dmabuf.access(read=[a], write=[b]) as (source, target):
                check_pattern(source)
                count_up(target)
        except OSError as e:
            if e.errno not in TORN:
                raise

    def raises(self) -> None:
        with contextlib.suppress(KeyError), self.rng.choice(self.bufs).write() as view:
            view[0] ^= 0xFF
            raise KeyError

    def record(self) -> None:
        with dmabuf.allocate(4096 * self.rng.randint(1, 4), name="short-lived") as buf, buf.write() as view:
            view[0] = 1

    def rename(self) -> None:
        buf = self.rng.choice(self.bufs)
        buf.name = f"name {os.getpid()}"
        name = buf.name
        assert name is not None
        assert name.startswith("name ")

    def send(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with here, there:
            dmabuf.send(here, self.rng.choice(self.bufs))
            if self.rng.random() < 0.8:  # or it is lost in flight
                (got,) = dmabuf.recv(there)
                got.close()

    def wait(self) -> None:
        self.rng.choice(self.bufs).resv.wait(Usage.BOOKKEEP)


def count_up(view: dmabuf.View) -> None:
    """A new number in every word of the buffer, one after the other."""
    number = (struct.unpack_from("<Q", view)[0] + 1) & 0x00FFFFFFFFFFFFFF
    for at in range(0, len(view), 512):
        struct.pack_into("<Q", view, at, number)


def check_pattern(view: dmabuf.View) -> None:
    seen = {struct.unpack_from("<Q", view, at)[0] for at in range(0, len(view), 512)}
    assert len(seen) == 1, f"a torn read without an error: {seen}"


class Workload:
    def __init__(self, seed: str) -> None:
        self.bufs = [dmabuf.allocate(4096, name=f"name {i}") for i in range(3)]
        self.crew = Crew(["works"] * WORKERS, lambda _, words, seed: Worker(self.bufs, words, seed).run(), seed)

    def kill_one(self) -> None:
        """At a moment that no clock decides: after a random number of rounds of somebody, and wherever the victim is then."""
        self.crew.a_moment()
        victim = self.crew.any_place()
        self.crew.kill(victim)
        self.crew.start(victim)
        self.crew.progress()

    def check_clean(self) -> None:
        """Nothing of the dead is left, and all of it can be used."""
        domain = dmabuf.Domain.default()
        shm = domain.shm
        domain.sweep()
        assert lives.alive_slots(shm) == [lives.index_of(shm.life)]
        for buf in self.bufs:
            assert not buf.resv.is_locked()
            assert buf.resv.fences(Usage.BOOKKEEP) == []
            with buf.write() as view:
                view[:] = bytes(len(view))
            with buf.read() as view:
                check_pattern(view)
        until(lambda: not records.sweep(domain) and not shm.rec_orphans())
        mine = {handle_of(b).shared.index for b in self.bufs}
        assert mine <= set(records.present(domain))
        owned = {chunk for chunk, _ in shm.chunks_of(shm.life)}
        for chunk in range(shm.load32(_native.OFF_NCHUNKS)):
            assert shm.load64(_native.OFF_CHUNKTAB + 8 * chunk) >> 32 == 0 or chunk in owned
        assert shm.load32(_native.OFF_TABLE_LOCK) == 0

    def close(self) -> None:
        self.crew.close()
        for buf in self.bufs:
            buf.close()


@contextlib.contextmanager
def workload() -> Iterator[Workload]:
    # pytest-randomly, where it is installed, seeds this generator from the seed that it prints.
    seed = os.environ.get("DMABUF_TEST_SEED") or f"{random.getrandbits(32):08x}"
    made = Workload(seed)
    try:
        yield made
    except BaseException as e:
        e.add_note(f"seed {seed}, {made.crew.started} workers so far")
        traceback.print_exc()
        raise
    finally:
        made.close()


def kill(count: int, tell: Callable[[str], None] = lambda _: None) -> None:
    """Kill so many. ``tell``: called with how many it were, every thousand and at the end."""
    with workload() as work:
        for done in range(1, count + 1):
            work.kill_one()
            if done % 1000 == 0:
                tell(f"{done} random kills, seed {work.crew.seed}")
        work.crew.end()
        work.check_clean()
        tell(f"{count} random kills, nothing found, seed {work.crew.seed}")


@pytest.mark.timeout(600)
def test_survivors_of_random_kills_go_on() -> None:
    kill(times(quick=20, full=200))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_survivors_of_10_000_random_kills_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def tell(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    kill(int(os.environ.get("DMABUF_TEST_KILLS", "10000")), tell)
