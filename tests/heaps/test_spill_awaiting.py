"""``async with`` on buffers that are away: the event loop goes on while they are brought back."""

import errno
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, SpillHeap, Usage
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.spilling import ROOM, give, given, holds, is_here, pattern, use

anyio = pytest.importorskip("anyio")
pytest.importorskip("trio")
pytestmark = pytest.mark.parametrize("framework", ["asyncio", "trio"])


def run(framework: str, main: Callable[[], Awaitable[Any]]) -> Any:
    return anyio.run(main, backend=framework)


WAYS: dict[str, Callable[[DmaBuf], Any]] = {
    "read": lambda buf: buf.read(),
    "write": lambda buf: buf.write(),
    "access": lambda buf: dmabuf.access(write=[buf]),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_tasks_run_while_memory_is_waited_for_and_can_give_it(heap: SpillHeap, bufs: list[DmaBuf], framework: str, way: str) -> None:
    mappings = [buf.mmap() for buf in bufs[:ROOM]]
    waited = bufs[ROOM]

    async def uses() -> None:
        async with WAYS[way](waited) as shown:
            (view,) = shown if way == "access" else (shown,)
            assert is_here(waited)
            assert bytes(view) == pattern(ROOM, len(view))

    async def gives() -> None:
        while not waited.resv.fences(Usage.BOOKKEEP):  # its access, granted: only memory is missing
            await anyio.sleep(0)
        mappings.pop().close()

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(uses)
            group.start_soon(gives)

    run(framework, main)
    for mapping in mappings:
        mapping.close()
    assert heap.statistics().pinned == 0
    assert holds(waited, ROOM)


def test_a_task_that_is_cancelled_meanwhile_leaves_nothing(heap: SpillHeap, bufs: list[DmaBuf], framework: str) -> None:
    mappings = [buf.mmap() for buf in bufs[:ROOM]]
    waited = bufs[ROOM]
    entered = []

    async def uses() -> None:
        async with waited.write():
            entered.append(1)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(uses)
            while not waited.resv.fences(Usage.BOOKKEEP):
                await anyio.sleep(0)
            group.cancel_scope.cancel()
            mappings.pop().close()

    run(framework, main)
    for mapping in mappings:
        mapping.close()
    assert not entered
    assert waited.resv.test_signaled(Usage.BOOKKEEP)
    assert heap.statistics().pinned == 0
    assert holds(waited, ROOM), "not torn: nobody was let in"


def test_memory_held_by_the_tasks_own_accesses_is_enomem_at_once(heap: SpillHeap, bufs: list[DmaBuf], framework: str) -> None:
    async def main() -> None:
        async with dmabuf.access(read=bufs[:ROOM]):
            with raises_errno(errno.ENOMEM):  # and not after the heap's memory_timeout
                async with bufs[ROOM].write():
                    pass
        with raises_errno(errno.ENOMEM):
            async with dmabuf.access(read=bufs[: ROOM + 1]):
                pass

    heap._resident_set.memory_timeout = 10_000
    run(framework, main)
    assert all(buf.resv.test_signaled(Usage.BOOKKEEP) for buf in bufs)
    assert heap.statistics().pinned == 0
    assert holds(bufs[ROOM], ROOM)


def test_a_buffer_that_is_here_is_entered_without_a_thread(
    heap: SpillHeap, bufs: list[DmaBuf], framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(bufs[:1])
    monkeypatch.setattr(dmabuf.core.task.waiting, "to_its_end", None)

    async def main() -> None:
        async with bufs[0].read() as view:
            assert bytes(view) == pattern(0, len(view))

    run(framework, main)


def uses_it(parent: Parent, framework: str) -> bool:
    """Another task gives the word for the memory to become free, while this one waits for it."""
    (buf,) = given(parent)

    async def uses() -> bool:
        async with buf.read() as view:
            return bytes(view) == pattern(ROOM, len(view))

    async def asks() -> None:
        while not buf.resv.fences(Usage.BOOKKEEP):
            await anyio.sleep(0)
        parent.send("give")

    async def main() -> bool:
        async with anyio.create_task_group() as group:
            group.start_soon(asks)
            found = await uses()
        return found

    found: bool = run(framework, main)
    buf.close()
    return found


def test_the_loop_of_another_process_goes_on_too(heap: SpillHeap, bufs: list[DmaBuf], child: Spawn, framework: str) -> None:
    mappings = [buf.mmap() for buf in bufs[:ROOM]]
    other = child(uses_it, framework)
    give(other, bufs[ROOM : ROOM + 1])
    assert other.recv() == "give"
    for mapping in mappings:
        mapping.close()
    assert other.result() is True
