"""A signal handler that raises leaves nothing held, wherever it interrupts an operation; see tests/support/every_stop.py."""

import warnings
from collections.abc import Callable, Iterator

import pytest

from tests.support.budget import times
from tests.support.every_stop import at_every_stop
from tests.support.interrupted_world import BLOCKS, FENCES, LOCKS, OBJECTS, World, dropped_fence_with_a_callback

Operation = Callable[[World], None]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def check(world: World, operation: Operation) -> None:
    # Whoever looks for a buffer that an interrupted call has just closed looks at every process of the machine, with a stop at each.
    full = 11 if named(operation).startswith("open") else 1
    stops, faults = at_every_stop(lambda: operation(world), world.settle, step=times(quick=19, full=full))
    assert stops > 2
    assert not faults, "\n".join(faults)


def named(operation: Operation) -> str:
    return operation.__name__


@pytest.mark.parametrize("operation", LOCKS, ids=named)
def test_interrupted_locking_leaves_no_lock_or_context(world: World, operation: Operation) -> None:
    check(world, operation)


@pytest.mark.parametrize("operation", FENCES, ids=named)
def test_interrupted_fence_leaves_no_fence_or_timeline(world: World, operation: Operation) -> None:
    check(world, operation)


@pytest.mark.parametrize("operation", OBJECTS, ids=named)
def test_interrupted_operation_leaves_no_descriptor_or_record(world: World, operation: Operation) -> None:
    check(world, operation)


def test_interrupted_drop_of_a_watched_fence_leaves_no_fence(world: World) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the drop is told
        check(world, dropped_fence_with_a_callback)


@pytest.mark.parametrize("operation", BLOCKS, ids=named)
def test_interrupted_block_of_python_ends(world: World, operation: Operation) -> None:
    check(world, operation)
