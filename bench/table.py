"""Rows of the table: what is measured, beside what, and how the rows are chosen, run and printed."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

Measure = Callable[[], float]


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

    def line(self) -> str:
        bound = "" if self.bound is None else f"≤ {self.bound}"
        return f"| {self.what:<75} | {self.us:>8} | {self.limit_us:>8} | {self.ratio:>5} | {bound:>5} |"


HEAD = f"| {'what':<75} | {'ours':>8} | {'limit':>8} | ratio | bound |\n| --- | ---: | ---: | ---: | ---: |"


def measured(spec: Spec, repeats: int) -> Row:
    """Both measured in turn, several times; the median of the pairs' ratios."""
    pairs = [(spec.ours(), spec.limit()) for _ in range(repeats)]
    return Row(
        spec.what,
        round(statistics.median(a for a, _ in pairs), 2),
        round(statistics.median(b for _, b in pairs), 2),
        spec.unit,
        round(statistics.median(a / b for a, b in pairs), 2),
        spec.bound,
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
