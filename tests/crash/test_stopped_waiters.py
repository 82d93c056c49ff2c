"""Nobody's progress depends on one waiter: a process that is stopped while it is the next for a lock keeps nobody from a free one."""

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaResv, WwAcquireContext, _native
from dmabuf.core.resv.lock import record_of
from tests.support.children import Child, Spawn
from tests.support.errnos import raises_errno
from tests.support.waiting import Background, until_asleep

pytestmark = pytest.mark.crash


def waits(parent: Any) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    parent.send("ready")
    with buf.resv.locked():
        pass
    parent.send("had it")


@pytest.fixture
def buf() -> Iterator[dmabuf.DmaBuf]:
    with dmabuf.allocate(4096) as buf:
        yield buf


def stopped(child: Spawn, buf: dmabuf.DmaBuf) -> Child:
    """A process that waits for the lock, older than everyone who comes later, and is stopped. The lock is free afterwards."""
    other = child(waits)
    with buf.resv.locked():
        dmabuf.send(other.sock, buf)
        assert other.recv() == "ready"
        until_asleep(other.pid)
        other.stop()
    return other


def younger(function: Callable[[], object]) -> None:
    """Call a function in a thread that has waited for nothing before, so that it is younger than the stopped process."""
    with Background(function) as job:
        job.result()


def test_younger_thread_locks_a_free_lock_past_a_stopped_next(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = stopped(child, buf)

    def lock() -> None:
        with buf.resv.locked():
            assert not named_next(buf.resv)  # so that the others after it don't wait
        with WwAcquireContext() as ctx, buf.resv.locked(ctx):
            pass

    younger(lock)
    other.resume()
    assert other.recv() == "had it"


@pytest.mark.parametrize("verb", ["read", "write"])
def test_access_is_granted_past_a_stopped_next(child: Spawn, buf: dmabuf.DmaBuf, verb: str) -> None:
    other = stopped(child, buf)

    def access() -> None:
        with getattr(buf, verb)():
            pass

    younger(access)
    other.resume()
    assert other.recv() == "had it"


def test_lock_all_gets_through_past_a_stopped_next(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = stopped(child, buf)

    def lock() -> None:
        with dmabuf.lock_all([DmaResv(), buf.resv]):
            pass

    younger(lock)
    other.resume()
    assert other.recv() == "had it"


def test_overtaken_next_waits_again_when_it_is_resumed(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = stopped(child, buf)

    def hold() -> None:
        with buf.resv.locked():
            other.resume()
            while not named_next(buf.resv):
                os.sched_yield()

    younger(hold)
    assert other.recv() == "had it"


def test_tasks_access_past_a_stopped_next(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = stopped(child, buf)

    async def main() -> None:
        async with buf.write():
            pass
        async with dmabuf.access(read=[buf]):
            pass

    asyncio.run(main())
    other.resume()
    assert other.recv() == "had it"


def holds(parent: Any) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    with buf.resv.locked():
        parent.send("holds")
        parent.recv()


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_loop_goes_on_while_a_stopped_process_holds_the_lock(
    child: Spawn, buf: dmabuf.DmaBuf, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is free when the task looks, and held by a stopped process when it takes it."""
    other = child(holds)
    dmabuf.send(other.sock, buf)
    assert other.recv() == "holds"
    other.stop()
    looks: list[bool] = []
    is_locked = DmaResv.is_locked

    def seen(resv: DmaResv) -> bool:
        looks.append(is_locked(resv))
        return looks[-1] and len(looks) > 1

    monkeypatch.setattr(DmaResv, "is_locked", seen)

    async def main() -> None:
        async def access() -> None:
            async with dmabuf.access(write=[buf]) if many else buf.write():
                pass

        task = asyncio.create_task(access())
        while len(looks) < 2:  # it has tried, and waits without stopping the loop
            await asyncio.sleep(0)
        assert not task.done()
        other.resume()
        other.send()
        await task

    asyncio.run(main())
    other.result()


def test_access_of_several_times_out_while_one_lock_is_held(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = child(holds)
    dmabuf.send(other.sock, buf)
    assert other.recv() == "holds"
    other.stop()
    with raises_errno(errno.ETIMEDOUT), dmabuf.access(read=[buf], timeout=0.1):
        pass
    other.resume()
    other.send()
    other.result()


def test_name_of_a_dead_next_is_removed(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = stopped(child, buf)
    assert named_next(buf.resv)
    other.kill()
    buf.domain.sweep()
    with buf.resv.locked():
        pass
    assert not named_next(buf.resv)


RESV, NEXT = 256, 8  # docs/layout.md: the reservation object in a record, and the word in it that names the next waiter


def named_next(resv: DmaResv) -> int:
    """The word ``next`` of the lock, read where docs/layout.md says."""
    record = record_of(resv)
    chunk, slot = divmod(record.index, _native.RECS_PER)
    at = _native.HEADER_BYTES + chunk * _native.CHUNK_BYTES + slot * (_native.CHUNK_BYTES // _native.RECS_PER)
    return record.shm.load64(at + RESV + NEXT)
