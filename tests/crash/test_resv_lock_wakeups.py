"""A waiter for the lock of a reservation object is woken by whoever unlocks it, not by the next tick."""

import pytest

from dmabuf import DmaResv
from tests.support.steps import Held

pytestmark = pytest.mark.crash


def test_waiter_locks_without_a_sleep_when_the_next_one_came_and_went() -> None:
    resv = DmaResv()

    def lock() -> None:
        with resv.locked():
            pass

    resv.lock()
    with Held(lock) as older:
        assert older.run_to("resv_next")
        resv.unlock()
        # The lock is free, and the younger one is about to wait because the older one is next.
        with Held(lock) as younger:
            assert younger.run_to("resv_looked")
            older.go_on()
            older.release()
            assert older.code == 0
            younger.go_on()
            assert younger.next_step() == "resv_locked"
            younger.go_on()
            younger.release()
            assert younger.code == 0
