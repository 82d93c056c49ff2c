"""Access in asyncio: a task is an owner, and waiting never stops the loop."""

import asyncio
import errno
from collections.abc import Sequence
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf
from tests.support.errnos import raises_errno
from tests.support.fences import keys


class Mishap(Exception):
    """What goes wrong inside a block."""


@pytest.mark.parametrize(("first", "second"), [("write", "read"), ("write", "write"), ("read", "write")])
def test_a_task_waits_for_another_without_stopping_the_loop(buf: DmaBuf, first: str, second: str) -> None:
    order: list[str] = []

    async def main() -> None:
        async def wait() -> None:
            async with getattr(buf, second)():
                order.append("second")

        async with getattr(buf, first)():
            task = asyncio.create_task(wait())
            while len(keys(buf.resv)) < 2:
                await asyncio.sleep(0)
            assert not task.done()
            order.append("first")
        await task

    asyncio.run(main())
    assert order == ["first", "second"]


def test_reading_tasks_overlap(buf: DmaBuf) -> None:
    async def main() -> None:
        both = asyncio.Barrier(3)

        async def read() -> None:
            async with buf.read():
                await both.wait()

        await asyncio.gather(read(), read(), read())

    asyncio.run(main())


def test_the_own_access_of_a_task_is_edeadlk(buf: DmaBuf) -> None:
    async def main() -> None:
        async with buf.write():
            with raises_errno(errno.EDEADLK):
                async with buf.read():
                    pass
        async with buf.read():
            pass

    asyncio.run(main())


def test_a_task_that_raises_while_writing_tears(buf: DmaBuf) -> None:
    async def main() -> None:
        async with buf.write():
            raise Mishap

    with pytest.raises(Mishap):
        asyncio.run(main())
    with raises_errno(errno.ECANCELED), buf.read():
        pass


def test_a_cancelled_wait_has_added_nothing(buf: DmaBuf) -> None:
    async def main() -> None:
        async def wait() -> None:
            async with buf.write():
                pass

        async with buf.read():
            task = asyncio.create_task(wait())
            while len(keys(buf.resv)) < 2:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(keys(buf.resv)) == 1
        async with buf.read(timeout=0):
            pass

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [0, 0.002])
def test_a_task_times_out(buf: DmaBuf, timeout: float) -> None:
    async def main() -> None:
        async def wait() -> None:
            async with buf.read(timeout=timeout):
                pass

        async with buf.write():
            with raises_errno(errno.ETIMEDOUT, TimeoutError):
                await asyncio.create_task(wait())

    asyncio.run(main())
    assert keys(buf.resv) == []


def test_two_tasks_that_wait_for_each_other_get_edeadlk(buf: DmaBuf, other_buf: DmaBuf) -> None:
    async def main() -> Sequence[Any]:
        both = asyncio.Barrier(2)

        async def cross(first: DmaBuf, second: DmaBuf) -> str:
            async with first.write():
                await both.wait()
                async with second.write():
                    return "in"

        return await asyncio.gather(cross(buf, other_buf), cross(other_buf, buf), return_exceptions=True)

    outcomes = asyncio.run(main())
    assert "in" in outcomes
    (error,) = [outcome for outcome in outcomes if outcome != "in"]
    assert error.errno == errno.EDEADLK


def test_access_in_a_task_waits_without_stopping_the_loop(buf: DmaBuf, other_buf: DmaBuf) -> None:
    async def main() -> None:
        async def wait() -> None:
            async with dmabuf.access(read=[buf], write=[other_buf]) as views:
                assert len(views) == 2

        async with buf.write():
            task = asyncio.create_task(wait())
            while len(keys(buf.resv)) < 2:
                await asyncio.sleep(0)
            assert not task.done()
        await task

    asyncio.run(main())
