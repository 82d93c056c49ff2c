"""A signal handler that raises leaves nothing held, wherever it interrupts an operation; see tests/support/every_stop.py."""

from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import DmaFence, DmaFenceArray, DmaFenceChain, DmaResv, FenceOps, Timeline, Usage, WwAcquireContext, wait_any
from dmabuf.core.resv.ww_mutex import inject_deadlocks
from tests.support.budget import times
from tests.support.every_stop import at_every_stop

Operation = Callable[[], object]


def check(operation: Operation, after: Operation = lambda: None) -> None:
    stops, faults = at_every_stop(operation, after, step=times(quick=3, full=1))
    assert stops > 2
    assert not faults, "\n".join(faults)


# -- locks and contexts


RESVS: list[DmaResv] = []
KEPT: list[DmaFence] = []  # a fence that others wait for is not dropped


@pytest.fixture(autouse=True)
def resvs() -> object:
    RESVS[:] = [DmaResv() for _ in range(3)]
    yield
    RESVS.clear()


def lock() -> None:
    RESVS[0].lock()
    RESVS[0].unlock()


def trylock() -> None:
    if RESVS[0].trylock():
        RESVS[0].unlock()


def locked() -> None:
    with RESVS[0].locked():
        pass


def locked_under_a_context() -> None:
    with WwAcquireContext() as ctx, RESVS[0].locked(ctx), RESVS[1].locked(ctx):
        ctx.done()


def lock_all() -> None:
    with dmabuf.lock_all(RESVS):
        pass


def lock_all_with_back_off() -> None:
    with inject_deadlocks(2), dmabuf.lock_all(RESVS):
        pass


def add_a_fence() -> None:
    KEPT.append(TIMELINE[0].fence())
    with RESVS[0].locked():
        RESVS[0].reserve(1)
        RESVS[0].add(KEPT[-1], Usage.READ)


def nobody_holds() -> None:
    while KEPT:
        left = KEPT.pop()
        if not left.is_signaled():
            left.signal()
    assert not any(resv.is_locked() for resv in RESVS)
    with dmabuf.lock_all(RESVS):
        pass
    with WwAcquireContext():  # a second open one of this thread would be a ContractWarning
        pass


@pytest.mark.parametrize(
    "operation", [lock, trylock, locked, locked_under_a_context, lock_all, lock_all_with_back_off, add_a_fence], ids=lambda f: f.__name__
)
def test_interrupted_locking_leaves_no_lock_or_context(operation: Operation) -> None:
    check(operation, nobody_holds)


# -- fences and timelines


TIMELINE: list[Timeline] = []


@pytest.fixture(autouse=True)
def timeline() -> object:
    with Timeline("interrupted") as made:
        TIMELINE[:] = [made]
        yield
    TIMELINE.clear()


class Ops(FenceOps):
    """Operations of which each is the default."""


def fence() -> None:
    TIMELINE[0].fence().signal()


def custom_fence() -> None:
    made = TIMELINE[0].fence(ops=Ops())
    made.enable_signaling()
    made.signal()


def dropped_fence() -> None:
    TIMELINE[0].fence()


def timeline_with_a_fence() -> None:
    with Timeline("other") as other:
        other.fence()


def array() -> None:
    first, second = TIMELINE[0].fence(), TIMELINE[0].fence()
    made = DmaFenceArray([first, second])
    made.enable_signaling()
    first.signal()
    second.signal()


def chain() -> None:
    first, second = TIMELINE[0].fence(), TIMELINE[0].fence()
    made = DmaFenceChain(DmaFenceChain(None, first, 1), second, 2)
    first.signal()
    second.signal()
    made.is_signaled()


def wait_for_any() -> None:
    first, second = TIMELINE[0].fence(), TIMELINE[0].fence()
    second.signal()
    wait_any([first, second])
    first.signal()


def signal_what_is_pending() -> None:
    """Signal what an interrupted operation has not: an enabled array keeps its members."""
    for left in TIMELINE[0].pending():
        left.signal()


@pytest.mark.parametrize(
    "operation", [fence, custom_fence, dropped_fence, timeline_with_a_fence, array, chain, wait_for_any], ids=lambda f: f.__name__
)
def test_interrupted_fence_leaves_no_fence_or_timeline(operation: Operation) -> None:
    check(operation, signal_what_is_pending)
