"""A wait is ended by a wake, and not only by the next tick, which would hide that the wake is missing.

A tick calls ``Shm.tick`` in the waiting process. So a wait that ends without such a call was woken. On a loaded machine a tick may come
between the wake and the end of the wait: then the test waits again, and a missing wake lets each of these waits end by a tick.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dmabuf
from tests.support.children import Parent, Spawn
from tests.support.steps import Held
from tests.support.waiting import Background, until_others_sleep

ROUNDS = 100


@contextmanager
def counting_ticks() -> Iterator[list[int]]:
    """Every tick of a wait of this process, while the block lasts."""
    shm = dmabuf.Domain.default().join()
    before, ticks = shm.tick, list[int]()

    def tick(kind: int, value: int) -> None:
        ticks.append(kind)
        if before is not None:
            before(kind, value)

    shm.tick = tick
    try:
        yield ticks
    finally:
        shm.tick = before


def woken(once: Callable[[list[int]], int]) -> bool:
    """Whether a wait ends without a tick. ``once`` waits once, and returns the number of ticks that came before the wait was seen."""
    with counting_ticks() as ticks:
        return any(once(ticks) == len(ticks) for _ in range(ROUNDS))


def ended(wait: Callable[[], object], by: Callable[[], object], ticks: list[int]) -> int:
    """Let a thread wait, and end the wait. Return the number of ticks that came before the thread was seen to sleep.

    One that comes later counts as the end of the wait: the thread may still be busy with it, and look once more before it sleeps again.
    """
    with Background(wait) as job:
        before = len(ticks)
        job.until_blocked()
        by()
        job.result()
    return before


def signals(parent: Parent) -> None:
    """Signal a fence of this process for each message."""
    with dmabuf.Timeline("signals") as timeline:
        while True:
            fence = timeline.fence()
            dmabuf.send(parent.sock, fence)
            parent.recv()
            fence.signal()


def test_waiter_is_woken_by_the_signal_of_its_own_process() -> None:
    with dmabuf.Timeline("test") as timeline:

        def once(ticks: list[int]) -> int:
            fence = timeline.fence()
            return ended(fence.wait, fence.signal, ticks)

        assert woken(once)


def test_waiter_is_woken_by_the_signal_of_another_process(child: Spawn) -> None:
    other = child(signals)

    def once(ticks: list[int]) -> int:
        (fence,) = dmabuf.recv(other.sock)
        return ended(fence.wait, other.send, ticks)

    assert woken(once)


def test_dispatcher_is_woken_by_the_signal_of_another_process(child: Spawn) -> None:
    other = child(signals)

    def once(ticks: list[int]) -> int:
        (fence,) = dmabuf.recv(other.sock)
        called = threading.Event()
        fence.add_callback(lambda _: called.set())
        before = len(ticks)  # as in `ended`
        until_others_sleep()
        other.send()
        called.wait()
        return before

    assert woken(once)


def test_waiter_for_a_reservation_lock_is_woken_by_the_unlock() -> None:
    resv = dmabuf.DmaResv()

    def locks() -> None:
        with resv.locked():
            pass

    def once(ticks: list[int]) -> int:
        resv.lock()
        return ended(locks, resv.unlock, ticks)

    assert woken(once)


def test_waiter_for_the_table_is_woken_by_the_unlock() -> None:
    def allocates() -> None:
        dmabuf.allocate(4096).close()

    def once(ticks: list[int]) -> int:
        with Held(allocates, only="rec_filled") as other:
            assert other.run_to("rec_filled"), "the table is locked there"
            before = ended(allocates, other.go_on, ticks)
            other.release()
            return before

    assert woken(once)


def test_waiter_for_a_point_is_woken_by_the_signal() -> None:
    points = itertools.count(2)
    with dmabuf.TimelineSemaphore() as sem:
        sem.signal(1)  # from here on nothing of it is pending, and it is a number in a word

        def once(ticks: list[int]) -> int:
            point = next(points)
            return ended(lambda: sem.wait(point, for_submit=True), lambda: sem.signal(point), ticks)

        assert woken(once)


def test_waiter_for_a_point_is_woken_when_the_number_leaves_its_word() -> None:
    points = itertools.count(2)
    with dmabuf.TimelineSemaphore() as sem, dmabuf.Timeline("test") as timeline:
        sem.signal(1)

        def once(ticks: list[int]) -> int:
            point, fence = next(points), timeline.fence()

            def puts() -> None:
                sem.import_fence(fence, point)  # the waiter goes on with the fence
                fence.signal()

            before = ended(lambda: sem.wait(point, for_submit=True), puts, ticks)
            sem.signal(next(points))
            return before

        assert woken(once)
