"""A signal handler that raises at every place of an access leaves none held; see tests/support/every_stop.py."""

import re
from collections.abc import Callable

import pytest

from tests.support.access_kinds import BACKINGS, KINDS, Bench
from tests.support.budget import times
from tests.support.children import Spawn
from tests.support.every_stop import at_every_stop

CONNECTION = re.compile(r"left descriptors: socket:\[\d+\] \(1\)$")


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_interrupted_access_is_not_held(backing: str, kind: Callable[[Bench], None], child: Spawn) -> None:
    with BACKINGS[backing](child) as on:

        def check() -> None:
            assert not on.held()
            on.settle()
            assert not on.held()

        kind(on)
        stops, faults = at_every_stop(lambda: kind(on), check, step=times(quick=37, full=1))
    assert stops >= 1
    # The connection of a call that was cut short is closed, and the next call makes another.
    faults = [fault for fault in faults if not CONNECTION.search(fault)]
    assert not faults, "\n".join(faults)
