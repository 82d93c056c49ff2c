"""A small number of random inputs for each target; ``make fuzz`` gives a million."""

import random

import pytest

from tests.fuzz.run import run
from tests.fuzz.targets import TARGETS, opened
from tests.support.budget import times


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_a_million_random_inputs_leave_nothing(name: str, request: pytest.FixtureRequest) -> None:
    run(name, -(-1_000_000 // len(TARGETS)), seed=request.config.getoption("randomly_seed", 1) or 1)


@pytest.mark.parametrize("name", TARGETS)
def test_random_input_is_refused_or_accepted_and_leaves_nothing(name: str, request: pytest.FixtureRequest) -> None:
    run(name, times(quick=150, full=1500), seed=request.config.getoption("randomly_seed", 1) or 1)


@pytest.mark.parametrize(("name", "found"), [("sw_sync", 2026029284)])
def test_input_that_once_did_something_else_is_refused(name: str, found: int) -> None:
    with opened(name) as (_, target):
        target(random.Random(found))
