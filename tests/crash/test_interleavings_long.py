"""Random orders of the steps of two processes with longer programs: 2,000 on the full budget, a sixth of them on the quick one, drawn anew.

An order is made from its seed alone, which a failure prints: `DMABUF_TEST_SEEDS=17,18 pytest …` runs just those.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

import dmabuf
from dmabuf import Usage
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain import lives
from tests.crash.test_interleavings import Access
from tests.crash.test_interleavings_dead import AfterDeath
from tests.support.budget import seeds, times
from tests.support.fences import attach
from tests.support.scenarios import Scenario, World, step_through
from tests.support.stepper import Program

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


class Day(Program):
    """Something of everything, at every step."""

    def __init__(self, world: World, turn: int) -> None:
        self.locked = world.bufs[:: 1 - 2 * turn]
        self.bufs = world.bufs
        self.write, self.read = Access(world.bufs[0], write=True), Access(world.bufs[0], write=False)

    def ready(self) -> None:
        self.timelines = [dmabuf.Timeline(f"day {i}") for i in range(3)]

    def run(self) -> str:
        fences = [timeline.fence() for timeline in self.timelines]
        with dmabuf.lock_all(buf.resv for buf in self.locked):
            for buf, fence in zip(self.bufs[1:], fences[1:], strict=True):
                buf.resv.reserve(1)
                buf.resv.add(fence, Usage.WRITE)
        mine = int(self.write.run())
        seen = int(self.read.run())
        assert seen >= mine
        self.bufs[0].name = f"day {os.getpid()}"
        fences[0].signal()
        for fence in fences[1:]:
            fence.signal(-errno.EIO)
        made = dmabuf.allocate(4096, name="of the day")
        shm, index, gen = made.domain.shm, handle_of(made).shared.index, handle_of(made).shared.gen
        made.close()
        del made
        shm.rec_free(index, gen)
        return "done"

    def clean(self) -> None:
        self.timelines = []


class TwoDays(Scenario):
    """Locks, fences, accesses, names and records at once."""

    def programs(self) -> tuple[Program, Program]:
        return Day(self.world, 0), Day(self.world, 1)

    def check(self, results: tuple[str, str]) -> None:
        assert results == ("done", "done")
        assert all(self.world.pending(i) == [] for i in range(3))


class Crossed(Program):
    """Reads one buffer and writes the other, several times."""

    def __init__(self, read: dmabuf.DmaBuf, write: dmabuf.DmaBuf) -> None:
        self.to_read, self.to_write = read, write

    def run(self) -> int:
        for _ in range(2):
            with dmabuf.access(read=[self.to_read], write=[self.to_write]) as (source, target):
                assert source[0] == source[-1]
                target[0] = (target[0] + 1) % 256
                target[-1] = target[0]
        return 2


class BothCrossed(Scenario):
    """Accesses to two buffers at once, the wrong way round: no deadlock, nothing torn."""

    def programs(self) -> tuple[Program, Program]:
        a, b, _ = self.world.bufs
        return Crossed(a, b), Crossed(b, a)

    def prepare(self) -> None:
        self.before = [self.counter(i) for i in (0, 1)]

    def counter(self, which: int) -> int:
        with self.world.bufs[which].mmap() as mapping:
            assert mapping[0] == mapping[-1]
            return mapping[0]

    def check(self, results: tuple[str, str]) -> None:
        assert results == ("2", "2")
        assert [self.counter(i) for i in (0, 1)] == [(n + 2) % 256 for n in self.before]


class Heir(Program):
    """Takes all that a dead one held."""

    def __init__(self, world: World) -> None:
        self.world = world

    def run(self) -> str:
        a, b, c = self.world.bufs
        a.resv.wait(Usage.BOOKKEEP)
        with c.resv.locked():
            pass
        with b.write():
            pass
        with b.read():
            pass
        with dmabuf.lock_all([a.resv, b.resv, c.resv]):
            pass
        return "done"


class TwoHeirs(AfterDeath):
    """Two want all that a dead one held, and one of them reaps it."""

    def programs(self) -> tuple[Program, Program]:
        return Heir(self.world), Heir(self.world)

    def check(self, results: tuple[str, str]) -> None:
        assert results == ("done", "done")
        assert not self.world.shm.life_current(self.life)
        assert self.world.shm.rec_torn(self.world.index[1]) == 0


class Visitor(Program):
    """Joins, adds a fence and leaves with it pending, twice."""

    def __init__(self, world: World) -> None:
        self.buf = world.bufs[0]

    def ready(self) -> None:
        dmabuf.Domain.default().leave()

    def run(self) -> str:
        domain = dmabuf.Domain.default()
        for _ in range(2):
            domain.join()
            timeline = dmabuf.Timeline("visitor")
            fence = timeline.fence()
            attach(self.buf.resv, fence, Usage.WRITE)
            domain.leave()
            assert fence.status == -errno.EOWNERDEAD
        return "done"

    def clean(self) -> None:
        dmabuf.Domain.default().join()


class TwoVisitors(Scenario):
    """Joining and leaving at the same door."""

    def programs(self) -> tuple[Program, Program]:
        return Visitor(self.world), Visitor(self.world)

    def check(self, results: tuple[str, str]) -> None:
        assert results == ("done", "done")
        assert self.world.pending(0) == []
        assert lives.alive_slots(self.world.shm) == [lives.index_of(self.world.shm.life)]


class Ring(Program):
    """Signals its own fences while it waits for the other one's."""

    def __init__(self, world: World, turn: int) -> None:
        self.mine, self.theirs = (world.bufs[i].resv for i in (turn, 1 - turn))

    def ready(self) -> None:
        self.fences = [dmabuf.Timeline("ring").fence() for _ in range(3)]
        for fence in self.fences:
            attach(self.mine, fence, Usage.READ)

    def run(self) -> str:
        for fence in self.fences:
            fence.signal()
            self.theirs.wait(Usage.READ, timeout=0)
        self.theirs.wait(Usage.BOOKKEEP)
        return "done"

    def clean(self) -> None:
        self.fences = []


class TwoRings(Scenario):
    """Each signals and waits for the other."""

    def programs(self) -> tuple[Program, Program]:
        return Ring(self.world, 0), Ring(self.world, 1)

    def check(self, results: tuple[str, str]) -> None:
        assert results == ("done", "done")


# 2,000 in all; those with a death wait for ticks.
SCENARIOS: dict[type[Scenario], int] = {TwoDays: 500, BothCrossed: 600, TwoHeirs: 100, TwoVisitors: 300, TwoRings: 500}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_random_orders_of_two_processes(scenario: type[Scenario], world: World) -> None:
    made, count = scenario(world), SCENARIOS[scenario]
    chosen = seeds(count, times(quick=count // 6, full=count))
    assert step_through(made, seeds=chosen) == len(chosen)
    made.close()
