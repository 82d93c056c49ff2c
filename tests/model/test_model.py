"""The models of the shared memory's protocol hold, and each of their controls fails.

Spin and gcc must be installed, else these tests are skipped. See README.md beside this file.
"""

import pytest

from tests.model import run

lacking = run.missing()
pytestmark = pytest.mark.skipif(bool(lacking), reason=f"{' and '.join(lacking)} not installed: apt-get install {' '.join(lacking)}")


def surprises(runs: list[run.Run]) -> list[str]:
    return [str(outcome) for outcome in run.check_all(runs) if not outcome.as_expected]


@pytest.mark.model
@pytest.mark.timeout(run.RUN_S)
@pytest.mark.parametrize("model", run.MODELS)
def test_model_holds(model: str) -> None:
    assert not surprises([each for each in run.RUNS if each.model == model and not each.finds and not each.long])


@pytest.mark.model
@pytest.mark.timeout(run.RUN_S)
@pytest.mark.parametrize("model", run.MODELS)
def test_model_fails_with_a_step_left_out(model: str) -> None:
    controls = [each for each in run.RUNS if each.model == model and each.finds and not each.long]
    assert controls
    assert not surprises(controls)


@pytest.mark.long
@pytest.mark.timeout(run.LONG_RUN_S)
@pytest.mark.parametrize("model", [model for model in run.MODELS if any(each.long for each in run.RUNS if each.model == model)])
def test_model_holds_in_long_searches(model: str) -> None:
    assert not surprises([each for each in run.RUNS if each.model == model and each.long])
