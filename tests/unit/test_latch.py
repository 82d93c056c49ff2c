"""``Latch``: every thread that waits is woken, once and for all."""

from dmabuf.domain.latch import Latch
from tests.support.waiting import Background


def test_latch_that_is_set_lets_everybody_through() -> None:
    latch = Latch()
    latch.set()
    latch.set()
    latch.wait()
    assert latch.is_set


def test_latch_wakes_every_thread_that_waits() -> None:
    latch = Latch()
    with Background(latch.wait) as one, Background(latch.wait) as other:
        one.until_blocked()
        other.until_blocked()
        assert not latch.is_set
        latch.set()
        one.result()
        other.result()


def test_waiter_comes_through_although_its_wake_up_went_to_another_thread() -> None:
    latch = Latch()
    with Background(latch.wait) as waiting:
        waiting.until_blocked()
        latch.is_set = True  # as if a signal handler had ended the other waiter before it woke this one
        waiting.result()
