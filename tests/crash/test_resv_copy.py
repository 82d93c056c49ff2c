"""A copy of fences that is killed half-way loses none: the list holds all of the old ones or all of the new ones, without a hole."""

import pytest

from dmabuf import DmaResv, Timeline, Usage
from tests.support.apart import Apart
from tests.support.fences import attach, key, keys
from tests.support.steps import Held, fork, numbers, reap
from tests.support.waiting import until_asleep

FEW = 6  # deaths of a copy with the quick budget

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]


def die_at_every_step(old: int, new: int) -> int:
    """Check the list after each death. Return how many there were."""
    lines = [Timeline(f"{i}") for i in range(old + new)]
    fences = [line.fence() for line in lines]
    source, extra = DmaResv(), Timeline("extra").fence()
    for fence in fences[old:]:
        attach(source, fence, Usage.WRITE)
    before, after = {key(f) for f in fences[:old]}, {key(f) for f in fences[old:]}
    count = 0

    def listed() -> DmaResv:
        made = DmaResv()
        for fence in fences[:old]:
            attach(made, fence, Usage.READ)
        return made

    whole = listed()

    def copy_whole() -> None:
        with whole.locked():
            whole.copy(source)

    for nth in numbers(copy_whole, quick=FEW):
        target = listed()

        def copy(target: DmaResv = target) -> None:
            with target.locked():
                target.copy(source)

        def wait(target: DmaResv = target) -> None:
            with target.locked():
                pass

        with Held(copy) as doomed:
            step = doomed.run_to_nth(nth)
            if step is None:
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
        count += 1
    copy_whole()
    assert set(keys(whole)) == after
    extra.signal()
    for line in lines:
        line.close()
    return count


@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3), (3, 0), (0, 3), (17, 18)])
def test_death_at_every_step_of_a_copy_leaves_all_old_or_all_new_fences(apart: Apart, old: int, new: int) -> None:
    assert apart(die_at_every_step, old, new) >= 1
