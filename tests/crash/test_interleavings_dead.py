"""Every order of the steps (up to seven each) of two processes that clean up after a dead one.

Two forked children live as long as their test and run the same pair of programs once for each order; see tests/support/scenarios.py.
After each order: both have ended, every lock is free, no fence is lost, and the record table is what it was.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

import dmabuf
from dmabuf import Usage, _native
from dmabuf.domain import lives
from tests.crash.test_interleavings import Access
from tests.support.scenarios import Scenario, World, step_through
from tests.support.stepper import Program

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


# ---- the dead ----


class Reap(Program):
    """Reaps whoever is dead."""

    interesting = frozenset({"reap_locked", "reap_torn", "fence_signaled", "reap_contexts_done", "reap_clean"})

    def run(self) -> int:
        return dmabuf.Domain.default().reap_dead()


class Rejoin(Program):
    """A newcomer's way in (it left while getting ready)."""

    interesting = frozenset({"reap_locked", "reap_clean", "life_locked", "life_alive", "life_chunk"})

    def ready(self) -> None:
        dmabuf.Domain.default().leave()

    def run(self) -> int:
        return dmabuf.Domain.default().join().life


class AfterDeath(Scenario):
    """A life has died that held a lock, a fence in a list and an access while writing."""

    by_the_dead = (2,)

    def prepared(self) -> None:
        world, ghost = self.world, self.world.ghost
        shm, (index, torn, locked) = ghost.shm, world.index
        self.life = ghost.live()
        context = shm.ctx_open(ghost.chunk * _native.CTX_PER + _native.CTX_FIRST_IN_LIFE, 1, False, 1)
        self.fence = shm.fence_alloc(0, 1 << 40, 1, 0, 0, 0)
        with world.bufs[0].resv.locked():
            world.bufs[0].resv.reserve(1)
            shm.resv_add(index, self.fence, Usage.WRITE, 1)
        flags = _native.FF_ACCESS | _native.FF_WRITE
        self.access = shm.fence_alloc(0, 1 << 41, 1, flags, context, torn + 1)
        with world.bufs[1].resv.locked():
            world.bufs[1].resv.reserve(1)
            shm.resv_add(torn, self.access, Usage.WRITE, 1)
        assert shm.access_grant(self.access, torn, True) == 0
        assert shm.resv_lock(locked, context, 0, False, False, -1) == 0
        self.slot = lives.index_of(self.life)
        ghost.die()

    def check(self, results: tuple[str, str]) -> None:
        shm = self.world.shm
        assert not shm.life_current(self.life)
        assert not shm.fence_pending(self.fence)
        left = shm.fence_info(self.fence)  # None when its slot is in use again
        assert left is None or left["error"] == -errno.EOWNERDEAD
        assert not shm.fence_pending(self.access)
        assert shm.rec_torn(self.world.index[1]) == errno.EOWNERDEAD
        assert shm.resv_owner(self.world.index[2]) == 0
        assert shm.chunks_of(self.life) == []

    def settle(self) -> None:
        with self.world.bufs[1].write():
            pass
        with self.world.bufs[2].resv.locked():  # takes the word of the dead away
            pass


class ReapAgainstReap(AfterDeath):
    """Of two reapers one reaps, once."""

    symmetric = True

    def programs(self) -> tuple[Program, Program]:
        return Reap(), Reap()

    def check(self, results: tuple[str, str]) -> None:
        super().check(results)
        assert sorted(results) == ["0", "1"]


class ReapAgainstJoin(AfterDeath):
    """A newcomer gets a slot of its own while the dead one's is being cleaned, and reaps it if nobody does."""

    def programs(self) -> tuple[Program, Program]:
        return Reap(), Rejoin()

    def check(self, results: tuple[str, str]) -> None:
        super().check(results)
        life = int(results[1])
        assert self.world.shm.life_current(life)
        assert [kind for _, kind in self.world.shm.chunks_of(life)] == [_native.CH_LIFE]

    def settle(self) -> None:
        super().settle()
        self.world.alive = lives.alive_slots(self.world.shm)
        assert len(self.world.alive) == 3
        assert all(lives.is_alive(self.world.domain.shm, i) for i in self.world.alive if i != lives.index_of(self.world.shm.life))


class ReapBriefly(Reap):
    """With fewer stops: who wants the lock of the dead finds out at a tick, once an order."""

    interesting = frozenset({"reap_locked", "reap_contexts_done", "reap_clean"})


class LockDead(Program):
    """Takes a lock whose owner is dead."""

    interesting = frozenset({"resv_locked", "resv_stolen", "resv_unlocked", "resv_next"})

    def __init__(self, resv: dmabuf.DmaResv) -> None:
        self.resv = resv

    def run(self) -> None:
        with self.resv.locked():
            pass


class ReapAgainstLock(AfterDeath):
    """A lock whose owner is dead is taken as soon as its context is reaped."""

    def programs(self) -> tuple[Program, Program]:
        return ReapBriefly(), LockDead(self.world.bufs[2].resv)


class BothLockDead(AfterDeath):
    """Two want the lock of a dead one, whom one of them reaps at a tick."""

    symmetric = True

    def programs(self) -> tuple[Program, Program]:
        return LockDead(self.world.bufs[2].resv), LockDead(self.world.bufs[2].resv)


class WaitForDead(Program):
    """Waits for a dead one's fence."""

    interesting = frozenset({"look", "waited"})

    def __init__(self, resv: dmabuf.DmaResv) -> None:
        self.resv = resv

    def run(self) -> list[int]:
        _native.step("look")
        self.resv.wait(Usage.BOOKKEEP)
        _native.step("waited")
        return [fence.status for fence in self.resv.fences(Usage.BOOKKEEP)]


class ReapAgainstWait(AfterDeath):
    """A wait for a dead one's fence ends."""

    def programs(self) -> tuple[Program, Program]:
        return Reap(), WaitForDead(self.world.bufs[0].resv)


class ReapAgainstRead(AfterDeath):
    """A reader of what a dead one was writing always gets EOWNERDEAD: the mark is there before the fence ends."""

    def programs(self) -> tuple[Program, Program]:
        return Reap(), Access(self.world.bufs[1], write=False)

    def check(self, results: tuple[str, str]) -> None:
        super().check(results)
        assert results[1] == "EOWNERDEAD"


SCENARIOS: list[type[Scenario]] = [
    ReapAgainstReap, ReapAgainstJoin, ReapAgainstLock, BothLockDead, ReapAgainstWait, ReapAgainstRead,
]  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_every_order_after_a_death(scenario: type[Scenario], world: World) -> None:
    made = scenario(world)
    assert step_through(made) > 1
    made.close()
