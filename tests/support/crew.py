"""A crew: processes that each do a job until they are killed at a random moment, and replaced.

Each has words in shared memory: the first counts its rounds, so that a test sees who goes on, and the others are the job's. Whatever is
random follows from the crew's seed, except how the processes interleave.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.support.steps import fork, reap
from tests.support.waiting import until

WORDS = 8  # of each place
LIMIT_S = 30.0  # for the next rounds of everybody; nobody asks for waits of more than moments
ROUNDS = 2  # of everybody after a kill

Work = Callable[[str, memoryview, str], None]


@dataclass
class Place:
    """A place in the crew: what its process does, its words, and the process that has it now; 0 if it is dead."""

    job: str
    words: memoryview
    pid: int = 0

    @property
    def rounds(self) -> int:
        """Rounds of all processes that had the place."""
        return int(self.words[0])


class Crew:
    """The processes.

    Args:
        jobs: A place for each.
        work: What a process does: called with its job, its words and a seed of its own.
        seed: Of all choices.
        left: What else to tell when somebody doesn't go on.
    """

    def __init__(self, jobs: Sequence[str], work: Work, seed: str, left: Callable[[], object] = lambda: "") -> None:
        self.seed, self.started, self.killed, self.longest = seed, 0, 0, 0.0
        self.rng = random.Random(seed)
        self._work, self._left = work, left
        self._memory = mmap.mmap(-1, len(jobs) * WORDS * 8)
        self._all = memoryview(self._memory).cast("Q")
        self.places = [Place(job, self._all[at * WORDS : (at + 1) * WORDS]) for at, job in enumerate(jobs)]
        for place in self.places:
            self.start(place)

    def start(self, place: Place) -> None:
        """Put a process into a place."""
        self.started += 1
        seed = f"{self.seed} {self.started}"
        place.pid = fork(lambda: self._work(place.job, place.words, seed))

    def any_place(self) -> Place:
        """Return one, drawn at random."""
        return self.rng.choice(self.places)

    def behind(self, wanted: Sequence[int]) -> list[str]:
        """Return the jobs of those who have not done so many rounds. One that ended by itself has failed."""
        for place in self.places:
            pid, status = os.waitpid(place.pid, os.WNOHANG)
            if pid:
                place.pid = 0
                raise AssertionError(f"seed {self.seed}: {place.job} ended by itself: {os.waitstatus_to_exitcode(status)}")
        return [place.job for place, least in zip(self.places, wanted, strict=True) if place.rounds < least]

    def progress(self) -> None:
        """Return when everybody has done some more rounds."""
        start = time.monotonic()
        wanted = [place.rounds + ROUNDS for place in self.places]
        until(lambda: not self.behind(wanted), left=lambda: (self.behind(wanted), self._left()), limit_s=LIMIT_S)
        self.longest = max(self.longest, time.monotonic() - start)

    def a_moment(self) -> None:
        """Return at a moment that no clock decides: after a random number of rounds of somebody, and a fraction of a round."""
        watched = self.any_place()
        target = watched.rounds + self.rng.randint(0, 3)
        until(lambda: watched.rounds >= target, left=lambda: (watched.job, self._left()), limit_s=LIMIT_S)
        self.a_fraction()

    def a_fraction(self) -> None:
        """Return after a random fraction of a round."""
        for _ in range(self.rng.randint(0, 2000)):
            pass

    def kill(self, place: Place) -> None:
        """End the process of a place."""
        os.kill(place.pid, signal.SIGKILL)
        assert reap(place.pid) == -signal.SIGKILL, f"{place.job} ended by itself"
        place.pid = 0
        self.killed += 1

    def stop(self, place: Place) -> None:
        """Stop the process of a place, wherever it is."""
        os.kill(place.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, place.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self, place: Place) -> None:
        """Let a stopped process go on."""
        os.kill(place.pid, signal.SIGCONT)

    def end(self) -> None:
        """End all."""
        for place in self.places:
            if place.pid:
                os.kill(place.pid, signal.SIGKILL)
                reap(place.pid)
                place.pid = 0

    def close(self) -> None:
        """End all, and unmap their words."""
        self.end()
        for place in self.places:
            place.words.release()
        self._all.release()
        self._memory.close()
