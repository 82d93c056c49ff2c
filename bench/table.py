"""Rows of the table: what is measured, beside what, and how the rows are chosen, run and printed."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Self

Measure = Callable[[], float]


class Timing(float):
    """A median in µs, with the mean and the tails of the same samples."""

    mean: float
    p99: float
    p999: float

    @classmethod
    def of(cls, samples: list[int]) -> Self:
        """Return the figures of samples in ns."""
        ordered = sorted(samples)
        made = cls(statistics.median(ordered) / 1000)
        made.mean = statistics.fmean(ordered) / 1000
        made.p99, made.p999 = (ordered[int(len(ordered) * part)] / 1000 for part in (0.99, 0.999))
        return made


@dataclass(frozen=True)
class Tails:
    """What a median doesn't show, of ours and of the limit, in µs."""

    mean: float
    p99: float
    p999: float


@dataclass(frozen=True)
class Spec:
    """One row before it is measured: our function and the limit's, which both return µs."""

    what: str
    ours: Measure
    limit: Measure
    unit: str  # what the limit is
    bound: float | None = None  # of the ratio


@dataclass(frozen=True)
class Group:
    """Rows that are measured in the same surroundings, which are set up only if one of them is chosen."""

    rows: list[Spec]
    setup: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    what: str
    us: float
    limit_us: float
    limit: str
    ratio: float
    bound: float | None
    tails: tuple[Tails, Tails] | None = None

    def line(self) -> str:
        bound = "" if self.bound is None else f"≤ {self.bound}"
        return f"| {self.what:<75} | {self.us:>8} | {self.limit_us:>8} | {self.ratio:>5} | {bound:>5} |"

    def line_of_tails(self) -> str:
        """The line of the second table."""
        assert self.tails is not None
        ours, limit = self.tails
        cells = [f"{value:>8}" for pair in zip(vars(ours).values(), vars(limit).values(), strict=True) for value in pair]
        return f"| {self.what:<75} | {' | '.join(cells)} |"


HEAD = f"| {'what':<75} | {'ours':>8} | {'limit':>8} | ratio | bound |\n| --- | ---: | ---: | ---: | ---: |"

HEAD_OF_TAILS = (
    f"| {'tails of the same rows':<75} | {'mean':>8} | {'limit':>8} | {'p99':>8} | {'limit':>8} | {'p99.9':>8} | {'limit':>8} |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def _tails(found: list[float]) -> Tails | None:
    timings = [value for value in found if isinstance(value, Timing)]
    if len(timings) < len(found):
        return None
    return Tails(*(round(statistics.median(getattr(timing, name) for timing in timings), 2) for name in ("mean", "p99", "p999")))


def measured(spec: Spec, repeats: int) -> Row:
    """Both measured in turn, several times; the median of the pairs' ratios."""
    pairs = [(spec.ours(), spec.limit()) for _ in range(repeats)]
    ours, limit = _tails([a for a, _ in pairs]), _tails([b for _, b in pairs])
    return Row(
        spec.what,
        round(statistics.median(a for a, _ in pairs), 2),
        round(statistics.median(b for _, b in pairs), 2),
        spec.unit,
        round(statistics.median(a / b for a, b in pairs), 2),
        spec.bound,
        None if ours is None or limit is None else (ours, limit),
    )


def run(groups: list[Group], chosen: str, repeats: int) -> Iterator[Row]:
    """Measure the rows whose name the regular expression is found in."""
    wanted = re.compile(chosen, re.IGNORECASE)
    for group in groups:
        rows = [spec for spec in group.rows if wanted.search(spec.what)]
        if rows:
            with group.setup():
                for spec in rows:
                    yield measured(spec, repeats)


def as_json(rows: list[Row]) -> list[dict[str, object]]:
    """The rows for programs."""
    return [asdict(row) for row in rows]
