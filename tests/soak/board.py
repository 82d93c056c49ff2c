"""What the workers tell the supervisor: counters in memory that both map, so that a killed worker's counts stay.

Each worker has a line of its own: how often it went round, what it is doing now, and how often each operation ended well or with each error
that is expected of it.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import Counter
from dataclasses import dataclass
from typing import Final

ROUNDS, DOING = 0, 1
_FIRST: Final = 2
_WORDS: Final = 1024  # of a line


@dataclass(frozen=True)
class Outcome:
    """How an operation ended: 0, or the errno of an expected error."""

    operation: str
    number: int

    def __str__(self) -> str:
        return f"{self.operation} {errno.errorcode[self.number]}" if self.number else self.operation


class Board:
    """The lines of all workers. ``outcomes``: all that can be counted, in the same order in every process."""

    def __init__(self, lines: int, outcomes: list[Outcome], fd: int | None = None) -> None:
        assert len(outcomes) + _FIRST <= _WORDS, "make the lines longer"
        size = lines * _WORDS * 8
        self.fd = os.memfd_create("dmabuf-soak-board") if fd is None else fd
        if fd is None:
            os.truncate(self.fd, size)
        self.outcomes = outcomes
        self._at = {outcome: _FIRST + i for i, outcome in enumerate(outcomes)}
        self._lines = lines
        self._words = memoryview(mmap.mmap(self.fd, size)).cast("Q")

    def line(self, number: int) -> Line:
        return Line(self._words[number * _WORDS : (number + 1) * _WORDS], self._at)

    def total(self) -> Counter[Outcome]:
        """What all workers have done together."""
        return Counter({outcome: sum(self._words[at::_WORDS]) for outcome, at in self._at.items()})


class Line:
    """One worker's counters."""

    def __init__(self, words: memoryview, at: dict[Outcome, int]) -> None:
        self._words, self._at = words, at

    def begins(self, number: int) -> None:
        """The worker begins its operation number so and so."""
        self._words[DOING] = number
        self._words[ROUNDS] += 1

    def ended(self, operation: str, number: int = 0) -> None:
        self._words[self._at[Outcome(operation, number)]] += 1

    @property
    def rounds(self) -> int:
        return int(self._words[ROUNDS])

    @property
    def doing(self) -> int:
        return int(self._words[DOING])
