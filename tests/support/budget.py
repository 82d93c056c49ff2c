"""How often a test repeats what it does.

``DMABUF_TEST_BUDGET=quick`` is for the run after each change, and the default. ``full`` is for CI. Both run the same tests, and each must
find what it is there to find with the quick number too (`make mutants` proves it for the worst faults); the full one finds rarer ones.
"""

import os
from typing import Literal, cast

Budget = Literal["quick", "full"]

_VARIABLE = "DMABUF_TEST_BUDGET"


def budget() -> Budget:
    """The budget of this run."""
    given = os.environ.get(_VARIABLE, "quick")
    if given not in ("quick", "full"):
        raise ValueError(f"{_VARIABLE}={given}: not a budget; set quick or full")
    return cast("Budget", given)


def times(*, quick: int, full: int) -> int:
    """The number of repetitions in this run."""
    return {"quick": quick, "full": full}[budget()]
