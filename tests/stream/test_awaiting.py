"""Frames in asyncio and trio."""

import contextlib
import errno

import pytest

from dmabuf import Stream
from tests.stream.conftest import SIZE, Make, content, put
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.loops import Run

anyio = pytest.importorskip("anyio")


def test_async_for_has_every_frame_and_ends(run: Run, make: Make, name: str) -> None:
    stream = make(name)

    async def main() -> list[int]:
        with Stream.open(name) as other, other.reader() as reader:
            async with anyio.create_task_group() as tasks:

                async def produce() -> None:
                    for number in range(20):
                        async with stream.produce() as frame:
                            frame.view[0] = number
                    stream.close()

                tasks.start_soon(produce)
                seen = [content(frame) async for frame in reader]
        return seen

    assert run(main) == list(range(20))


def test_async_for_over_the_stream_itself(run: Run, stream: Stream) -> None:
    put(stream, 4)

    async def main() -> int:
        async for frame in stream:
            return content(frame)
        return -1

    assert run(main) == 4


def test_anext_times_out(run: Run, stream: Stream) -> None:
    async def main() -> None:
        with stream.reader() as reader:
            for timeout in (0, 0.01):
                with raises_errno(errno.ETIMEDOUT, TimeoutError):
                    await reader.anext(timeout=timeout)
            with raises_errno(errno.EINVAL):
                await reader.anext(timeout=-1)
            put(stream, 1)
            assert content(await reader.anext(timeout=0)) == 1

    run(main)


def test_anext_that_is_canceled_loses_no_frame(run: Run, stream: Stream) -> None:
    async def main() -> None:
        with stream.reader() as reader:
            with anyio.move_on_after(0.01):
                await reader.anext()
            put(stream, 1)
            assert content(await reader.anext(timeout=5)) == 1

    run(main)


def test_async_produce_waits_for_a_slot(run: Run, stream: Stream) -> None:
    async def main() -> list[str]:
        order = []
        with stream.reader() as reader:
            for number in range(4):
                put(stream, number)
            with raises_errno(errno.ETIMEDOUT, TimeoutError):
                async with stream.produce(timeout=0.01):
                    pass
            with anyio.move_on_after(0.01):
                async with stream.produce():
                    order.append("never")
            async with anyio.create_task_group() as tasks:

                async def produce() -> None:
                    async with stream.produce() as frame:
                        order.append(f"got {frame.seq}")

                tasks.start_soon(produce)
                await anyio.wait_all_tasks_blocked()
                order.append("released")
                reader.next(timeout=0).release()
        return order

    assert run(main) == ["released", "got 5"]


def test_async_produce_discards_when_its_block_raises(run: Run, stream: Stream) -> None:
    async def main() -> None:
        with stream.reader() as reader:
            with contextlib.suppress(KeyError):
                async with stream.produce() as frame:
                    frame.view[0] = 3
                    raise KeyError
            async with stream.produce() as frame:
                frame.view[0] = 4
            got = await reader.anext(timeout=5)
            assert (got.seq, content(got)) == (1, 4)

    run(main)


def test_two_tasks_with_a_reader_each(run: Run, stream: Stream) -> None:
    async def main() -> list[list[int]]:
        seen: list[list[int]] = [[], []]

        async def read(at: int) -> None:
            with stream.reader() as reader:
                for _ in range(10):
                    seen[at].append(content(await reader.anext(timeout=20)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, 0)
            tasks.start_soon(read, 1)
            await anyio.wait_all_tasks_blocked()
            for number in range(10):
                async with stream.produce(timeout=20) as frame:
                    frame.view[0] = number
        return seen

    assert run(main) == [list(range(10))] * 2


def far_producer(parent: Parent, name: str) -> None:
    with Stream.open(name) as stream:
        for number in iter(parent.recv, None):
            with stream.produce() as frame:
                frame.view[:] = bytes([number]) * SIZE
        parent.send("at the end")
        parent.recv()


def test_task_hears_of_frames_and_of_the_death_of_another_process(run: Run, make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = child(far_producer, name)

    async def main() -> None:
        with stream.reader() as reader:
            async with anyio.create_task_group() as tasks:
                got: list[int] = []

                async def read() -> None:
                    got.extend([content(await reader.anext(timeout=30)), content(await reader.anext(timeout=30))])
                    with raises_errno(errno.EOWNERDEAD):
                        await reader.anext(timeout=30)
                    got.append(-1)

                tasks.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                process.send(5)
                process.send(6)
                process.send(None)
                assert await anyio.to_thread.run_sync(process.recv) == "at the end"
                await anyio.wait_all_tasks_blocked()
                process.kill()
            assert got == [5, 6, -1]

    run(main)


def far_reader(parent: Parent, name: str) -> None:
    with Stream.open(name) as stream, stream.reader() as reader:
        parent.send("here")
        for _ in iter(parent.recv, None):
            reader.next().release()


def test_task_that_produces_goes_on_after_the_death_of_a_reader(run: Run, make: Make, name: str, child: Spawn) -> None:
    stream = make(name)
    process = child(far_reader, name)
    assert process.recv() == "here"
    for number in range(4):
        put(stream, number)

    async def main() -> int:
        async with anyio.create_task_group() as tasks:
            got: list[int] = []

            async def produce() -> None:
                for _ in range(2):
                    async with stream.produce(timeout=30) as frame:
                        got.append(frame.seq)

            tasks.start_soon(produce)
            await anyio.wait_all_tasks_blocked()
            process.send("give one back")
            while len(got) < 1:
                await anyio.sleep(0.001)
            process.kill()
        return got[-1]

    assert run(main) == 6


def test_wrong_uses_are_refused(run: Run, stream: Stream) -> None:
    async def main() -> None:
        making = stream.produce()
        async with making:
            with pytest.raises(ValueError, match="entered already"):
                await making.__aenter__()
            with raises_errno(errno.EINPROGRESS):
                async with stream.produce():
                    pass
        with stream.reader() as reader:
            reader.close()
            with raises_errno(errno.EBADF):
                await reader.anext()

    run(main)
