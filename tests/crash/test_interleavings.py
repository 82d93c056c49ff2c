"""Every order of the steps (up to seven each) of two processes that lock, add, signal, wait and access.

Two forked children live as long as their test and run the same pair of programs once for each order; see tests/support/scenarios.py.
After each order: both have ended, every lock is free, no fence is lost, and the record table is what it was.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import Usage, _native
from tests.support.fences import attach
from tests.support.scenarios import Scenario, World, step_through
from tests.support.stepper import Program

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]

FENCE_STEPS = frozenset({"fence_stamped", "fence_signaled", "fence_woken"})
LOCK_STEPS = frozenset({"resv_locked", "resv_added", "resv_unlocked", "resv_stolen"})


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


# ---- locks and lists ----


class Adder(Program):
    """`rounds` times lock, add a fence, unlock; the fences stay pending, on timelines of their own or on one."""

    interesting = LOCK_STEPS

    def __init__(self, resv: dmabuf.DmaResv, rounds: int, *, one_timeline: bool = False, signal: bool = False) -> None:
        self.resv, self.rounds, self.one_timeline, self.signal = resv, rounds, one_timeline, signal
        self.fences: list[dmabuf.DmaFence] = []
        if signal:
            self.interesting = LOCK_STEPS | FENCE_STEPS

    def ready(self) -> None:
        timeline = dmabuf.Timeline("one")
        self.fences = [(timeline if self.one_timeline else dmabuf.Timeline("each")).fence() for _ in range(self.rounds)]

    def run(self) -> str:
        for fence in self.fences:
            attach(self.resv, fence, Usage.READ)
            if self.signal:
                fence.signal()
        left = [] if self.signal else self.fences[-1:] if self.one_timeline else self.fences
        return " ".join(str(f.handle) for f in left)

    def clean(self) -> None:
        for fence in self.fences:
            if not fence.is_signaled():
                fence.signal()
        self.fences.clear()


class BothAdd(Scenario):
    """lock + add + unlock, twice, against the same: all four fences are found."""

    symmetric = True

    def programs(self) -> tuple[Program, Program]:
        resv = self.world.bufs[0].resv
        return Adder(resv, 2), Adder(resv, 2)

    def check(self, results: tuple[str, str]) -> None:
        assert self.world.pending(0) == sorted(map(int, " ".join(results).split()))


class BothReplace(BothAdd):
    """A later fence of the same timeline takes the place of the earlier one, whoever else adds meanwhile."""

    def programs(self) -> tuple[Program, Program]:
        resv = self.world.bufs[0].resv
        return Adder(resv, 2, one_timeline=True), Adder(resv, 2, one_timeline=True)


class BothAddAndSignal(BothAdd):
    """lock + add + unlock + signal against the same: 7 + 7 steps; nothing is pending, and no list grows."""

    def programs(self) -> tuple[Program, Program]:
        resv = self.world.bufs[0].resv
        return Adder(resv, 1, signal=True), Adder(resv, 1, signal=True)

    def check(self, results: tuple[str, str]) -> None:
        super().check(results)
        assert len(self.world.shm.resv_entries(self.world.index[0], Usage.BOOKKEEP, False)) <= 4


class Signaller(Program):
    """Signals fences that are in the reservation already, the second with an error."""

    interesting = frozenset({"fence_error", "fence_stamped", "fence_signaled"})

    def __init__(self, resv: dmabuf.DmaResv) -> None:
        self.resv = resv
        self.fences: list[dmabuf.DmaFence] = []

    def ready(self) -> None:
        self.fences = [dmabuf.Timeline("signalled").fence() for _ in range(2)]
        for fence in self.fences:
            attach(self.resv, fence, Usage.WRITE)

    def run(self) -> None:
        for fence, error in zip(self.fences, (0, -errno.EIO), strict=True):
            fence.signal(error)

    def clean(self) -> None:
        self.fences.clear()


class AddAgainstSignal(Scenario):
    """Adding overwrites what is signalled, and only that."""

    def programs(self) -> tuple[Program, Program]:
        resv = self.world.bufs[0].resv
        return Adder(resv, 2), Signaller(resv)

    def check(self, results: tuple[str, str]) -> None:
        assert self.world.pending(0) == sorted(map(int, results[0].split()))


class Waiter(Program):
    """Waits for each fence it found at the start, and says what they ended with."""

    interesting = frozenset({"look", "waited"})

    def __init__(self, resv: dmabuf.DmaResv) -> None:
        self.resv = resv
        self.found: list[dmabuf.DmaFence] = []

    def run(self) -> list[int]:
        for fence in self.found:
            _native.step("look")
            fence.wait()
            _native.step("waited")
        return [fence.status for fence in self.found]


class LateWaiter(Waiter):
    """Looks for the fences only when the other one has added them."""

    def ready(self) -> None:
        self.found = []

    def clean(self) -> None:
        self.found = []


class WaitAgainstSignal(Scenario):
    """A wait ends, and sees the error, whenever the signal comes."""

    def programs(self) -> tuple[Program, Program]:
        resv = self.world.bufs[0].resv
        self.waiter = Waiter(resv)
        return _WaiterOf(resv), Signaller(resv)

    def check(self, results: tuple[str, str]) -> None:
        assert results[0] == str([1, -errno.EIO])


class _WaiterOf(Waiter):
    """A waiter that is told after both got ready (the signaller gets ready second), so it looks at its first step."""

    interesting = frozenset({"begun", "look", "waited"})

    def run(self) -> list[int]:
        # All pending ones, by the list of the reservation: signalled ones too, for the order in which the waiter comes last.
        with self.resv.locked():
            self.found = [fence for fence, _ in self.resv.iterate(Usage.BOOKKEEP)][-2:]
        return super().run()

    def clean(self) -> None:
        self.found.clear()


class Listener(_WaiterOf):
    """Registers a callback on each fence: it runs once, or the registration says that the fence has ended."""

    interesting = frozenset({"look", "registered"})

    def run(self) -> int:
        with self.resv.locked():
            self.found = [fence for fence, _ in self.resv.iterate(Usage.BOOKKEEP)][-2:]
        self.called: list[int] = []
        self.events = []
        for fence in self.found:
            event = threading.Event()
            _native.step("look")
            try:
                fence.add_callback(lambda f, event=event: (self.called.append(f.handle), event.set()))  # type: ignore[misc]
                self.events.append(event)
            except FileNotFoundError:
                pass  # ENOENT: signalled already
            _native.step("registered")
        return len(self.found)

    def clean(self) -> None:
        for event in getattr(self, "events", []):
            event.wait()
        assert len(getattr(self, "called", [])) == len(getattr(self, "events", []))
        self.found.clear()


class CallbackAgainstSignal(Scenario):
    """A registered callback is called once, whenever the signal comes; the cleaning waits for it."""

    def programs(self) -> tuple[Program, Program]:
        resv = self.world.bufs[0].resv
        return Listener(resv), Signaller(resv)

    def check(self, results: tuple[str, str]) -> None:
        assert results[0] == "2"


class LockAll(Program):
    """The back-off loop over several reservations."""

    interesting = frozenset({"resv_locked", "resv_unlocked", "resv_stolen"})

    def __init__(self, resvs: list[dmabuf.DmaResv]) -> None:
        self.resvs = resvs

    def run(self) -> None:
        with dmabuf.lock_all(self.resvs):
            pass


class LockAllInOppositeOrders(Scenario):
    """Wait-die between two contexts that would deadlock."""

    def programs(self) -> tuple[Program, Program]:
        resvs = [buf.resv for buf in self.world.bufs]
        return LockAll(resvs), LockAll(resvs[::-1])


class LockAllAgainstAdd(Scenario):
    """A context with several locks against short sections without one."""

    def programs(self) -> tuple[Program, Program]:
        resvs = [buf.resv for buf in self.world.bufs]
        return LockAll(resvs[:2]), Adder(resvs[1], 2)

    def check(self, results: tuple[str, str]) -> None:
        assert self.world.pending(1) == sorted(map(int, results[1].split()))


# ---- access ----


class Access(Program):
    """One access; a write counts in both ends of the buffer, a read sees the same number in both."""

    interesting = frozenset({"access_added", "resv_unlocked", "access_waiting", "access_granted", "fence_signaled", "access_ended"})

    def __init__(self, buf: dmabuf.DmaBuf, *, write: bool, fail: bool = False) -> None:
        self.buf, self.writes, self.fail = buf, write, fail

    def run(self) -> Any:
        if not self.writes:
            try:
                with self.buf.read() as view:
                    first = bytes(view[:8])
                    _native.step("inside")
                    assert bytes(view[-8:]) == first
                    return int.from_bytes(first, "little")
            except OSError as e:
                return errno.errorcode[e.errno]
        try:
            with self.buf.write() as view:
                count = int.from_bytes(view[:8], "little") + 1
                view[:8] = count.to_bytes(8, "little")
                _native.step("inside")
                assert int.from_bytes(view[-8:], "little") == count - 1
                view[-8:] = count.to_bytes(8, "little")
                if self.fail:
                    raise KeyError
                return count
        except KeyError:
            return "raised"


class _Accesses(Scenario):
    def counter(self) -> int:
        with self.world.bufs[0].mmap() as mapping:
            first = int.from_bytes(mapping[:8], "little")
            assert int.from_bytes(mapping[-8:], "little") == first
            return first

    def prepare(self) -> None:
        self.before = self.counter()

    def check(self, results: tuple[str, str]) -> None:
        after = self.counter()
        writes = sum(p.writes for p in self.pair if isinstance(p, Access))
        assert after == self.before + writes
        for program, result in zip(self.pair, results, strict=True):
            assert isinstance(program, Access)
            assert program.fail or self.before + program.writes <= int(result) <= after
        assert self.world.pending(0) == []

    def programs(self) -> tuple[Program, Program]:
        self.pair = self.make(self.world.bufs[0])
        return self.pair

    def make(self, buf: dmabuf.DmaBuf) -> tuple[Program, Program]:
        raise NotImplementedError


class WriteAgainstRead(_Accesses):
    """A reader sees the state before a write or after it."""

    def make(self, buf: dmabuf.DmaBuf) -> tuple[Program, Program]:
        return Access(buf, write=True), Access(buf, write=False)


class WriteAgainstWrite(_Accesses):
    """No write is lost."""

    symmetric = True

    def make(self, buf: dmabuf.DmaBuf) -> tuple[Program, Program]:
        return Access(buf, write=True), Access(buf, write=True)


class FailedWriteAgainstRead(_Accesses):
    """A reader sees the whole state before, or ECANCELED."""

    def make(self, buf: dmabuf.DmaBuf) -> tuple[Program, Program]:
        return Access(buf, write=True, fail=True), Access(buf, write=False)

    def check(self, results: tuple[str, str]) -> None:
        assert results[0] == "raised"
        assert results[1] in ("ECANCELED", str(self.before))
        assert self.world.shm.rec_torn(self.world.index[0]) == errno.ECANCELED

    def settle(self) -> None:
        with self.world.bufs[0].write():
            pass


SCENARIOS: list[type[Scenario]] = [
    BothAdd, BothReplace, BothAddAndSignal, AddAgainstSignal, WaitAgainstSignal, CallbackAgainstSignal, LockAllInOppositeOrders,
    LockAllAgainstAdd, WriteAgainstRead, WriteAgainstWrite, FailedWriteAgainstRead,
]  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_every_order_of_two_processes(scenario: type[Scenario], world: World) -> None:
    made = scenario(world)
    assert step_through(made) > 1
    made.close()
