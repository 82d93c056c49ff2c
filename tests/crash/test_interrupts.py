"""Signals at random moments of every public operation but accesses, each with a handler that raises: nothing is left, and each arrives."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from dmabuf import Domain
from tests.support.budget import times
from tests.support.every_stop import Raised, holdings, left, nothing_unraisable
from tests.support.interrupted_world import OPERATIONS, World, lock, trylock
from tests.support.leaks import rest

pytestmark = pytest.mark.crash
LONGEST_S = 3e-4  # until the signal; most operations take 10 to 300 µs
AUDIT_EVERY = 250
UNPAIRED = (lock, trylock)  # without a block


class Alarm:
    """A timer whose signal's handler raises. ``handled``, ``arrived``: how many did, and how many of them came out of an operation."""

    def __init__(self) -> None:
        self.handled = self.arrived = 0

    def _handler(self, *_: object) -> None:
        self.handled += 1
        raise Raised

    @contextmanager
    def armed(self) -> Iterator[None]:
        # What a handler raises in a callback of the garbage collector is lost: hypothesis has such a callback, this library has none.
        callbacks, gc.callbacks[:] = gc.callbacks[:], []
        before = signal.signal(signal.SIGALRM, self._handler)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            gc.callbacks[:] = callbacks


def _spin() -> FrameType | None:
    for _ in range(100):  # what a finalizer has put off comes at the next call or jump
        pass
    return None


def _repeat(operation: Callable[[World], None], world: World, alarm: Alarm, seen: int) -> None:
    """Until a signal arrives. Not in the caller's ``try``: some compilers leave the jump of such a loop out of it."""
    while alarm.handled == seen:
        operation(world)


def soak(count: int, seed: int) -> Alarm:
    """Interrupt random operations ``count`` times."""
    world, alarm = World(), Alarm()
    try:
        _interrupt(world, alarm, count, seed)
    finally:
        world.close()  # also of a soak that failed, so that the tests after it find nothing of it
    return alarm


def _interrupt(world: World, alarm: Alarm, count: int, seed: int) -> None:
    choose, domain = random.Random(seed), Domain.default()
    for operation in OPERATIONS:
        operation(world)
    world.settle()
    gc.collect()
    before = holdings(domain)
    done: list[str] = []
    with nothing_unraisable() as unraisable, alarm.armed():
        while alarm.handled < count:
            seen, operation = alarm.handled, choose.choice(OPERATIONS)
            done.append(operation.__name__)
            try:
                signal.setitimer(signal.ITIMER_REAL, choose.uniform(1e-6, LONGEST_S))
                _repeat(operation, world, alarm, seen)
                _spin()
            except Raised:
                alarm.arrived += 1
            world.drain()
            if operation in UNPAIRED and world.resvs[0].held_here():
                world.resvs[0].unlock()  # the handler ran when lock() had returned: the caller has the lock
            assert alarm.arrived == alarm.handled, f"an exception was lost in {operation.__name__}, seed {seed}: {unraisable}"
            if alarm.handled % AUDIT_EVERY == 0:
                world.settle()
                gc.collect()
                lost = left(before, holdings(domain))
                if lost:  # unless another thread is in the middle of giving it back
                    rest()
                    lost = left(before, holdings(domain))
                assert not lost, f"seed {seed}: {alarm.handled} signals: {lost} after {', '.join(done)}"
                assert not unraisable, f"seed {seed}: {unraisable}"
                done.clear()


def test_signals_at_random_moments_leave_nothing_and_all_arrive() -> None:
    seed = int(os.environ.get("DMABUF_TEST_SEED", random.randrange(1 << 32)))
    count = times(quick=500, full=5_000)
    assert soak(count, seed).arrived == count


@pytest.mark.long
@pytest.mark.timeout(7_000)
def test_hundred_thousand_signals_leave_nothing_and_all_arrive() -> None:
    seed = int(os.environ.get("DMABUF_TEST_SEED", random.randrange(1 << 32)))
    alarm = soak(100_000, seed)
    print(f"seed {seed}: {alarm.handled} signals, {alarm.arrived} exceptions arrived, nothing left")
    assert alarm.arrived == 100_000
