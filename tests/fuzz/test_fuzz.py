"""A small number of random inputs for each target; ``make fuzz`` gives a million."""

import pytest

from tests.fuzz.run import run
from tests.fuzz.targets import TARGETS
from tests.support.budget import times


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_a_million_random_inputs_leave_nothing(name: str, request: pytest.FixtureRequest) -> None:
    run(name, -(-1_000_000 // len(TARGETS)), seed=request.config.getoption("randomly_seed", 1) or 1)


@pytest.mark.parametrize("name", TARGETS)
def test_random_input_is_refused_or_accepted_and_leaves_nothing(name: str, request: pytest.FixtureRequest) -> None:
    run(name, times(quick=150, full=1500), seed=request.config.getoption("randomly_seed", 1) or 1)
