"""Pairs of programs that are stepped through their orders, and the world in which they meet.

A `Scenario` names two programs (tests/support/stepper.py) and what the parent does around each order. `step_through` runs every order
(with the quick budget a quarter of them, drawn at random), or one for each of some seeds; a failure says which order it was.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence

import dmabuf
from dmabuf import Usage, _native
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain import lives
from dmabuf.domain.domain import _shm_of
from tests.support.budget import some_of
from tests.support.stepper import Pair, Program, all_orders, random_order

FEW = 24  # orders that take no time worth saving


class Ghost:
    """A life without a process: it dies by letting go of its page, as a killed process does."""

    def __init__(self, domain: dmabuf.Domain) -> None:
        self.domain = domain
        self.shm = _shm_of(_native.owned(os.dup, domain.fileno()))

    def live(self) -> int:
        self.chunk = lives.begin(self.shm)
        return self.shm.life

    def die(self) -> None:
        """The life ends with the last reference to the mapping that it had."""
        self.shm = _shm_of(_native.owned(os.dup, self.domain.fileno()))


class World:
    """What the children inherit, and how the parent looks at it."""

    def __init__(self) -> None:
        self.domain = dmabuf.Domain.default()
        self.shm = self.domain.join()
        self.bufs = [dmabuf.allocate(4096, name=name) for name in ("first", "second", "third")]
        self.ghost = Ghost(self.domain)
        self.index = [handle_of(buf).shared.index for buf in self.bufs]
        self._resv = self._find_resv()
        self.alive: list[int] = []
        self.records: set[int] = set()

    def _find_resv(self) -> int:
        """The offset of the lock word in a record: the word that is 0, and has the owner while the lock is held."""
        at = self._record(0)
        free = struct.unpack("<64Q", self.shm.read(at, 512))
        with self.bufs[0].resv.locked():
            owner = self.shm.resv_owner(self.index[0])
            held = struct.unpack("<64Q", self.shm.read(at, 512))
        return 8 * next(i for i in range(64) if free[i] == 0 and held[i] == owner)

    def _record(self, which: int) -> int:
        chunk, slot = divmod(self.index[which], _native.RECS_PER)
        return _native.HEADER_BYTES + chunk * _native.CHUNK_BYTES + slot * 512

    def words(self, which: int) -> tuple[int, int]:
        """The lock word and the next-in-line word of a buffer's reservation."""
        at = self._record(which) + self._resv
        return self.shm.load64(at), self.shm.load64(at + 8)

    def pending(self, which: int) -> list[int]:
        return sorted(self.shm.resv_pending(self.index[which], Usage.BOOKKEEP, 0))

    def remember(self) -> None:
        """What stays the same from order to order."""
        self.alive = lives.alive_slots(self.shm)
        self.records = set(self.shm.rec_list())

    def check(self, by_the_dead: tuple[int, ...] = ()) -> None:
        """After every order, before anybody cleans up: every lock word is free, or names somebody dead."""
        for which in range(len(self.bufs)):
            lock, following = self.words(which)
            assert self.shm.resv_owner(self.index[which]) == 0
            assert lock == 0 or which in by_the_dead, f"buffer {which} is locked by {lock:#x}"
            assert following == 0, f"{following:#x} is still in line for buffer {which}"
        assert self.shm.load32(_native.OFF_TABLE_LOCK) == 0

    def settled(self) -> None:
        """After the cleaning."""
        for which in range(len(self.bufs)):
            assert self.pending(which) == []
        assert lives.alive_slots(self.shm) == self.alive
        # Fewer, when somebody's tick swept away what an earlier test had left.
        assert set(self.index) <= set(self.shm.rec_list()) <= self.records

    def close(self) -> None:
        for buf in self.bufs:
            buf.close()
        del self.ghost  # the test keeps this object until after the look for leaks


class Scenario:
    """A pair of programs, and what the parent does around each order."""

    # Swapping the processes gives the same orders: half of them do.
    symmetric = False
    # Buffers whose lock word may go on naming somebody dead, which is as good as free.
    by_the_dead: tuple[int, ...] = ()

    def __init__(self, world: World) -> None:
        self.world = world

    def programs(self) -> tuple[Program, Program]:
        raise NotImplementedError

    def prepare(self) -> None:
        """Before both get ready."""

    def prepared(self) -> None:
        """After both got ready."""

    def check(self, results: tuple[str, str]) -> None:
        """Before they clean up."""

    def settle(self) -> None:
        """After they cleaned up."""

    def close(self) -> None:
        """After the last order."""


def step_through(scenario: Scenario, *, seeds: Sequence[int] = ()) -> int:
    """Run every order (see `some_orders`), or one for each seed; how many there were.

    As many turns a side as it has stops when it goes first, or second; what it has beyond that, because somebody is in its way, comes
    after. The first stop is before the program begins.
    """
    world = scenario.world
    first, second = scenario.programs()
    with Pair(first, second) as pair:
        world.remember()
        n, m = map(max, zip(_stops(pair, scenario, 0), _stops(pair, scenario, 1), strict=True))
        assert min(n, m) > 1, "a program without steps proves nothing"
        orders: Iterable[tuple[tuple[int, ...], str]] = ((random_order(n, m, seed), f"seed {seed}, ") for seed in seeds)
        if not seeds:
            assert max(n, m) <= 7, f"{n} + {m} steps are too many for every order"
            orders = ((o, "") for o in some_orders([o for o in all_orders(n, m) if not (scenario.symmetric and o[0])]))
        count = 0
        for order, seed in orders:
            count += 1
            try:
                _one(pair, scenario, order)
            except BaseException as e:
                passed = [side.passed for side in pair.sides]
                e.add_note(f"{type(scenario).__name__}: {seed}order {''.join(map(str, order))}; passed: {passed}")
                raise
    return count


def some_orders(orders: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """All of them with the full budget. An eighth, drawn at random, with the quick one: what is wrong is wrong in many orders."""
    return [orders[n - 1] for n in some_of(len(orders), quick=max(FEW, len(orders) // 8))]


def _stops(pair: Pair, scenario: Scenario, first: int) -> tuple[int, int]:
    """How many stops each side has when the first one goes to its end before the other one begins."""
    _one(pair, scenario, (first,) * 1000)
    a, b = (sum(step[0] != "~" for step in side.passed) for side in pair.sides)
    return a, b


def _one(pair: Pair, scenario: Scenario, order: tuple[int, ...]) -> None:
    scenario.prepare()
    pair.both(b"p")
    scenario.prepared()
    results = pair.run_order(order)
    assert not any(r.startswith("failed") for r in results), results
    scenario.world.check(scenario.by_the_dead)
    scenario.check(results)
    pair.both(b"c")
    scenario.settle()
    scenario.world.settled()
