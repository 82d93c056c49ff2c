"""A copy of fences that is killed half-way loses none: the list holds all of the old ones or all of the new ones, without a hole."""

import itertools

import pytest

from dmabuf import DmaResv, Timeline, Usage
from tests.support.apart import Apart
from tests.support.fences import attach, key, keys
from tests.support.steps import Held, fork, reap
from tests.support.waiting import until_asleep

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]


def die_at_every_step(old: int, new: int) -> int:
    """Check the list after each death. Return how many there were."""
    lines = [Timeline(f"{i}") for i in range(old + new)]
    fences = [line.fence() for line in lines]
    source, extra = DmaResv(), Timeline("extra").fence()
    for fence in fences[old:]:
        attach(source, fence, Usage.WRITE)
    before, after = {key(f) for f in fences[:old]}, {key(f) for f in fences[old:]}
    for nth in itertools.count(1):
        target = DmaResv()
        for fence in fences[:old]:
            attach(target, fence, Usage.READ)

        def copy(target: DmaResv = target) -> None:
            with target.locked():
                target.copy(source)

        def wait(target: DmaResv = target) -> None:
            with target.locked():
                pass

        with Held(copy) as doomed:
            step = doomed.run_to_nth(nth)
            if step is None:
                assert set(keys(target)) == after
                break
            waiter = fork(wait)  # somebody who waits for the lock gets it, and with it a whole list
            until_asleep(waiter)
            doomed.kill()
        assert reap(waiter) == 0
        found = keys(target)
        assert before <= set(found) or after <= set(found), f"after a death at {step}"
        assert len(found) <= old + new
        attach(target, extra, Usage.BOOKKEEP)  # and what was cut off does not come back
        assert sorted(keys(target)) == sorted([*found, key(extra)])
    extra.signal()
    for line in lines:
        line.close()
    return nth - 1


@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3), (3, 0), (0, 3), (17, 18)])
def test_death_at_every_step_of_a_copy_leaves_all_old_or_all_new_fences(apart: Apart, old: int, new: int) -> None:
    assert apart(die_at_every_step, old, new) >= 1
