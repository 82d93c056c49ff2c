"""How often a test repeats what it does.

``DMABUF_TEST_BUDGET=quick`` is for the run after each change, and the default. ``full`` is for CI. Both run the same tests, and each must
find what it is there to find with the quick number too (`make mutants` proves it for the worst faults); the full one finds rarer ones.
"""

import os
import random
from collections.abc import Sequence
from typing import Literal, cast

Budget = Literal["quick", "full"]

_VARIABLE, _SEEDS = "DMABUF_TEST_BUDGET", "DMABUF_TEST_SEEDS"


def budget() -> Budget:
    """The budget of this run."""
    given = os.environ.get(_VARIABLE, "quick")
    if given not in ("quick", "full"):
        raise ValueError(f"{_VARIABLE}={given}: not a budget; set quick or full")
    return cast("Budget", given)


def times(*, quick: int, full: int) -> int:
    """The number of repetitions in this run."""
    return {"quick": quick, "full": full}[budget()]


def some_of(count: int, *, quick: int) -> Sequence[int]:
    """Return the numbers from 1 to ``count`` with the full budget, and ``quick`` of them, drawn at random, with the quick one."""
    return random.sample(range(1, count + 1), min(times(quick=quick, full=count), count))


def seeds(count: int, drawn: int) -> Sequence[int]:
    """Return the seeds of this run: ``drawn`` of those below ``count``, or the ones that ``DMABUF_TEST_SEEDS=17,18`` names."""
    given = os.environ.get(_SEEDS)
    return [int(seed) for seed in given.split(",")] if given else random.sample(range(count), drawn)
