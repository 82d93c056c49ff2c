"""Awaiting under asyncio and trio, both as anyio runs them: the same results, nothing left, the loop never stands still."""

import asyncio
import errno
import threading
from collections.abc import Awaitable
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, DmaFenceArray, Timeline, Usage
from dmabuf.domain.dispatcher import dispatcher
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import attach, keys, the_fence
from tests.support.loops import Run
from tests.support.waiting import Background

anyio = pytest.importorskip("anyio")


@pytest.mark.parametrize("error", [0, -errno.EIO])
def test_await_gives_the_status(run: Run, tl: Timeline, error: int) -> None:
    done, fence = tl.fence(), tl.fence()
    done.signal(error=error)

    async def main() -> tuple[int, int]:
        assert await done == (error or 1)
        async with anyio.create_task_group() as tasks:
            results: list[int] = []

            async def wait() -> None:
                results.append(await fence)

            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert fence.statistics().callbacks == 1
            fence.signal(error=error)
        return results[0], fence.statistics().callbacks

    assert run(main) == (error or 1, 0)


def test_await_is_woken_from_another_thread(run: Run, tl: Timeline) -> None:
    fence = tl.fence()

    async def main() -> int:
        return await fence

    with Background(lambda: run(main)) as job:
        job.until_blocked()
        assert not job.done
        fence.signal()
        assert job.result() == 1


def test_a_container_is_awaited(run: Run, tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(3)]
    array = DmaFenceArray(fences)

    async def main() -> int:
        async with anyio.create_task_group() as tasks:

            async def signal() -> None:
                for fence in fences:
                    await anyio.lowlevel.checkpoint()
                    fence.signal()

            tasks.start_soon(signal)
            return await array

    assert run(main) == 1


def test_a_cancelled_await_leaves_nothing_registered(run: Run, tl: Timeline) -> None:
    fence = tl.fence()

    async def main() -> None:
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                await fence

            tasks.start_soon(wait)
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert fence.statistics().callbacks == 2
            tasks.cancel_scope.cancel()
        assert fence.statistics().callbacks == 0
        with anyio.move_on_after(0.001) as scope:
            await fence
        assert scope.cancelled_caught
        assert fence.statistics().callbacks == 0

    run(main)
    assert fence.status == 0
    fence.signal()


def test_a_signal_and_a_cancel_at_once_lose_neither(run: Run, tl: Timeline) -> None:
    """Whichever counts, the task ends, and the next await works."""
    fences = [tl.fence() for _ in range(50)]

    async def main() -> int:
        ended = 0
        for fence in fences:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:

                    async def wait(fence: dmabuf.DmaFence = fence, scope: Any = scope) -> None:
                        thread = threading.Thread(target=fence.signal)
                        thread.start()
                        scope.cancel()
                        try:
                            await fence
                        finally:
                            thread.join()

                    tasks.start_soon(wait)
            ended += await fence
        return ended

    assert run(main) == len(fences)


def test_thousands_of_awaits_all_end(run: Run, tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(2000)]
    ended: list[int] = []

    async def main() -> None:
        async with anyio.create_task_group() as tasks:

            async def wait(i: int) -> None:
                await fences[i]
                ended.append(i)

            for i in range(len(fences)):
                tasks.start_soon(wait, i)
            await anyio.wait_all_tasks_blocked()
            thread = threading.Thread(target=lambda: [fence.signal() for fence in fences])
            thread.start()
        thread.join()

    run(main)
    assert sorted(ended) == list(range(len(fences)))


def test_a_burst_of_signals_wakes_an_asyncio_loop_once(tl: Timeline) -> None:
    """However many fences end before the loop turns again, one call goes to it."""
    import asyncio

    fences = [tl.fence() for _ in range(1000)]
    calls: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        tasks = [asyncio.ensure_future(_of(fence)) for fence in fences]
        while dispatcher(fences[0].domain).watching < len(fences):
            await asyncio.sleep(0)
        plain = loop.call_soon_threadsafe

        def counted(*args: Any, **keywords: Any) -> Any:
            calls.append(args)
            return plain(*args, **keywords)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        with Background(lambda: [fence.signal() for fence in fences]) as job:
            job.result()  # the loop stands still meanwhile
        assert await asyncio.gather(*tasks) == [1] * len(fences)

    asyncio.run(main())
    assert len(calls) == 1


async def _of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


@pytest.mark.parametrize("event", ["readable", "writable"])
def test_readable_and_writable(run: Run, buf: DmaBuf, tl: Timeline, event: str) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    order: list[str] = []

    async def main() -> None:
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                await getattr(buf, event)()
                order.append("ready")

            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            order.append("signal")
            fence.signal()

    run(main)
    assert order == ["signal", "ready"]


@pytest.mark.parametrize(("first", "second"), [("write", "read"), ("write", "write"), ("read", "write")])
def test_an_access_waits_without_stopping_the_loop(run: Run, buf: DmaBuf, first: str, second: str) -> None:
    order: list[str] = []

    async def main() -> None:
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                async with getattr(buf, second)():
                    order.append("second")

            async with getattr(buf, first)():
                tasks.start_soon(wait)
                while len(keys(buf.resv)) < 2:
                    await anyio.lowlevel.checkpoint()
                order.append("first")

    run(main)
    assert order == ["first", "second"]


def test_two_buffers_at_once(run: Run, buf: DmaBuf, other_buf: DmaBuf) -> None:
    async def main() -> int:
        async with dmabuf.access(read=[buf], write=[other_buf]) as views:
            return len(views)

    assert run(main) == 2


@pytest.mark.parametrize("timeout", [0, 0.002])
def test_an_access_times_out(run: Run, buf: DmaBuf, timeout: float) -> None:
    async def main() -> None:
        async def late() -> None:
            with raises_errno(errno.ETIMEDOUT, TimeoutError):
                async with buf.read(timeout=timeout):
                    pass

        async with buf.write(), anyio.create_task_group() as tasks:
            tasks.start_soon(late)

    run(main)
    assert keys(buf.resv) == []


def test_a_cancelled_access_has_added_nothing(run: Run, buf: DmaBuf) -> None:
    async def main() -> None:
        async def wait() -> None:
            async with buf.write():
                pass

        async with buf.read():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                while len(keys(buf.resv)) < 2:
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            assert len(keys(buf.resv)) == 1

    run(main)
    assert keys(buf.resv) == []


def test_the_own_access_of_a_task_is_edeadlk_and_anothers_is_not(run: Run, buf: DmaBuf) -> None:
    """So a task is an owner, under trio as under asyncio."""

    async def main() -> None:
        async with buf.write():
            with raises_errno(errno.EDEADLK):
                async with buf.read():
                    pass
            async with anyio.create_task_group() as tasks:

                async def other() -> None:
                    with raises_errno(errno.ETIMEDOUT, TimeoutError):
                        async with buf.read(timeout=0):
                            pass

                tasks.start_soon(other)

    run(main)


def test_two_tasks_that_wait_for_each_other_get_edeadlk(run: Run, buf: DmaBuf, other_buf: DmaBuf) -> None:
    outcomes: list[Any] = []

    async def main() -> None:
        inside: list[object] = []

        async def cross(first: DmaBuf, second: DmaBuf) -> None:
            async with first.write():
                inside.append(first)
                while len(inside) < 2:
                    await anyio.lowlevel.checkpoint()
                try:
                    async with second.write():
                        outcomes.append("in")
                except OSError as error:
                    outcomes.append(error.errno)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cross, buf, other_buf)
            tasks.start_soon(cross, other_buf, buf)

    run(main)
    assert sorted(outcomes, key=str) == [errno.EDEADLK, "in"]


def test_a_lock_that_is_held_does_not_stop_the_loop(run: Run, buf: DmaBuf) -> None:
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with buf.resv.locked():
            held.set()
            let_go.wait()

    async def main() -> None:
        async with anyio.create_task_group() as tasks:

            async def enter() -> None:
                async with buf.read():
                    assert let_go.is_set()

            tasks.start_soon(enter)
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            let_go.set()

    with Background(hold):
        held.wait()
        run(main)


@pytest.mark.parametrize("dies", [False, True])
def test_another_processs_fence_is_awaited(child: Spawn, run: Run, buf: DmaBuf, dies: bool) -> None:
    other = child(adds_a_fence)
    dmabuf.send(other.sock, buf)
    assert other.recv() == "added"
    fence = the_fence(buf)

    async def main() -> int:
        return await fence

    with Background(lambda: run(main)) as job:
        job.until_blocked()
        assert not job.done
        if dies:
            other.kill()
        else:
            other.send("signal")
        assert job.result() == (-errno.EOWNERDEAD if dies else -errno.EIO)


def adds_a_fence(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    line = dmabuf.Timeline("child")
    fence = line.fence()
    attach(buf.resv, fence, Usage.WRITE)
    parent.send("added")
    parent.recv()
    fence.signal(error=-errno.EIO)


def test_an_await_outside_of_a_loop_says_what_it_needs(tl: Timeline) -> None:
    fence = tl.fence()
    with pytest.raises(RuntimeError, match=r"dmabuf\[async\]"):
        fence.__await__().send(None)
    assert fence.statistics().callbacks == 0
    fence.signal()


async def in_the_frameworks_pool() -> None:
    """Have one of the threads that the framework keeps for everybody."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        import trio

        await trio.to_thread.run_sync(int)
    else:
        await loop.run_in_executor(None, int)


def test_tasks_that_wait_for_a_lock_use_no_thread_of_the_pool(run: Run, buf: DmaBuf) -> None:
    many = 50  # more than either framework's pool has
    begun: list[int] = []
    entered: list[int] = []

    async def reads(held: Any) -> None:
        await held.wait()
        begun.append(1)
        async with buf.read():
            entered.append(1)

    async def main() -> None:
        held = anyio.Event()
        async with anyio.create_task_group() as tasks:
            for _ in range(many):
                tasks.start_soon(reads, held)
            with buf.resv.locked():
                held.set()
                while len(begun) < many:
                    await anyio.sleep(0)
                for _ in range(many):
                    await anyio.sleep(0)
                await in_the_frameworks_pool()
                assert not entered

    run(main)
    assert len(entered) == many
