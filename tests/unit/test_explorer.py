"""The explorer finds races, always the same way for a seed, and finds none where there is none."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence

import pytest

from tests.support.apart import Apart
from tests.support.budget import times
from tests.support.explorer import Program, explore, may_switch, outcome

SEEDS = range(times(quick=20, full=40))


class _Here(Program):
    """The points are in this file."""

    code = __file__
    limit_s = 1.0

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0

    def check(self) -> None:
        assert self.count == 2


class LosesCounts(_Here):
    def bodies(self) -> Sequence[Callable[[], object]]:
        return [self.add] * 2

    def add(self) -> None:
        self.count = self.count + 1


class Counts(LosesCounts):
    def add(self) -> None:
        with self.lock:
            super().add()


class WaitsForOther(_Here):
    """One waits for the other, whoever begins; a third thread of the program's own takes part."""

    def bodies(self) -> Sequence[Callable[[], object]]:
        begun = threading.Event()

        def waits() -> None:
            begun.wait()
            thread = threading.Thread(target=self.add)
            thread.start()
            thread.join()

        def begins() -> None:
            self.add()
            begun.set()

        return [waits, begins]

    def add(self) -> None:
        with self.lock:
            may_switch()
            self.count += 1


class Deadlocks(_Here):
    def bodies(self) -> Sequence[Callable[[], object]]:
        other = threading.Lock()

        def takes(first: threading.Lock, second: threading.Lock) -> None:
            with first:
                may_switch()
                with second:
                    self.count += 1

        return [lambda: takes(self.lock, other), lambda: takes(other, self.lock)]


class Forks(_Here):
    """A forked child goes on in its one thread."""

    def bodies(self) -> Sequence[Callable[[], object]]:
        return [self.fork, lambda: None]

    def fork(self) -> None:
        pid = os.fork()
        self.count += 2
        if not pid:
            os._exit(self.count)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2


class Raises(_Here):
    def bodies(self) -> Sequence[Callable[[], object]]:
        return [lambda: 1 / 0]


class Dies(_Here):
    def bodies(self) -> Sequence[Callable[[], object]]:
        return [lambda: os.kill(os.getpid(), signal.SIGKILL)]


def found(program: Callable[[], Program]) -> list[int]:
    return [seed for seed in SEEDS if outcome(program, seed)]


def test_race_is_found_by_the_same_seeds_again(apart: Apart) -> None:
    seeds = apart(found, LosesCounts)
    assert 0 < len(seeds) < len(SEEDS)
    assert apart(found, LosesCounts) == seeds


@pytest.mark.parametrize("program", [Counts, WaitsForOther, Forks])
def test_nothing_is_found_in_a_sound_program(apart: Apart, program: Callable[[], Program]) -> None:
    apart(explore, program, SEEDS)


def test_deadlock_is_found_and_the_stacks_are_shown(apart: Apart) -> None:
    with pytest.raises(AssertionError, match=r"(?s)seed \d+ of Deadlocks: .*Stuck.*in takes"):
        apart(explore, Deadlocks, SEEDS)


@pytest.mark.parametrize(("program", "says"), [(Raises, "ZeroDivisionError"), (Dies, "has died: exit status -9")])
def test_failure_names_the_seed_and_what_happened(program: Callable[[], Program], says: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)seed 7 of {program.__name__}: .*{says}"):  # type: ignore[attr-defined]
        explore(program, [7])
