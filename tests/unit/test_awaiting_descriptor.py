"""A coroutine that waits for a descriptor, under asyncio and trio."""

import os
from collections.abc import Iterator

import pytest

from dmabuf.core.task import waiting as awaiting

anyio = pytest.importorskip("anyio")
pytest.importorskip("trio")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.mark.parametrize("framework", ["asyncio", "trio"])
def test_it_ends_when_the_descriptor_is_ready_and_not_before(pipe: tuple[int, int], framework: str) -> None:
    order: list[str] = []

    async def reader() -> None:
        assert await awaiting.descriptor(pipe[0], False, None)
        order.append("readable")

    async def main() -> None:
        assert not await awaiting.descriptor(pipe[0], False, 0.01)
        assert await awaiting.descriptor(pipe[1], True, 60)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reader)
            await anyio.lowlevel.checkpoint()
            order.append("written")
            os.write(pipe[1], b"x")

    anyio.run(main, backend=framework)
    assert order == ["written", "readable"]


@pytest.mark.parametrize("framework", ["asyncio", "trio"])
def test_a_cancelled_wait_leaves_the_descriptor_to_others(pipe: tuple[int, int], framework: str) -> None:
    async def main() -> bool:
        with anyio.move_on_after(0.01) as scope:
            await awaiting.descriptor(pipe[0], False, None)
        assert scope.cancelled_caught
        os.write(pipe[1], b"x")
        return await awaiting.descriptor(pipe[0], False, 60)

    assert anyio.run(main, backend=framework)


def test_outside_of_a_framework_it_says_so(pipe: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match="no event loop"):
        awaiting.descriptor(pipe[0], False, None).send(None)
