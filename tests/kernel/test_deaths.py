"""A process that is killed at any named step of what it does with a real dma-buf: others go on, nothing of it is left (as tests/crash)."""

import itertools
from collections.abc import Callable, Iterator

import pytest

import dmabuf
from tests.crash import test_steps as crash
from tests.crash.test_steps import Scene
from tests.support.kernel_homes import SIZE, made
from tests.support.steps import Held


def allocate_udmabuf(_: Scene) -> None:
    with dmabuf.allocate(SIZE, heap="udmabuf", name="doomed") as buf, buf.write() as view:
        view[:1] = b"x"


SCENARIOS: list[Callable[[Scene], None]] = [
    allocate_udmabuf,
    crash.write_and_raise,
    crash.access_both,
]


@pytest.fixture
def scene() -> Iterator[Scene]:
    both = Scene(made("udmabuf"), made("imported"))
    yield both
    for buf in both:
        buf.close()


@pytest.mark.long
@pytest.mark.crash
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
def test_death_at_every_step_is_repaired_by_whoever_comes_next(scenario: Callable[[Scene], None], scene: Scene) -> None:
    assert crash.die_at_every_step(scenario, scene) >= 5, "a scenario without steps proves nothing"


@pytest.mark.crash
@pytest.mark.parametrize("heap", ["udmabuf", "dma_heap:system"])
def test_a_death_while_allocating_leaves_no_memory(heap: str) -> None:
    def doomed_allocation() -> None:
        dmabuf.allocate(SIZE, heap=heap, name="doomed").close()

    def objects() -> str:
        with open("/sys/kernel/debug/dma_buf/bufinfo", encoding="utf-8") as f:
            return f.read().splitlines()[-1]

    before = objects()
    for nth in itertools.count(1):
        with Held(doomed_allocation) as doomed:
            if doomed.run_to_nth(nth) is None:
                break
            doomed.kill()
        assert dmabuf.buffers() == []
        assert objects() == before
    assert nth > 2
