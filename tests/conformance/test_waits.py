"""Every wait of the package: its time is over, a signal comes, it is cancelled, or the owner of what it waits for dies.

A row of the table names a wait and what is in its way: a fence of another process on a buffer, or that process's hold of the lock. After
each of the four the wait is over as its contract says, and has left nothing behind: no callback, no fence, no lock.
"""

import asyncio
import errno
import math
import select
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest

import dmabuf
from dmabuf import Direction, DmaBuf, DmaFence, DmaFenceArray, DmaFenceChain, Usage
from dmabuf.domain.dispatcher import dispatcher
from tests.support.children import Child, Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import attach, the_fence
from tests.support.interrupts import ended_by_a_signal
from tests.support.partners import handed
from tests.support.signals import Stop, interrupt_when_asleep, on_signal, raise_stop
from tests.support.waiting import Background, until, until_asleep

SHORT = 0.002  # seconds: over soon


class World(NamedTuple):
    """A buffer, and the fence of the other process on it."""

    buf: DmaBuf
    fence: DmaFence | None

    @property
    def theirs(self) -> DmaFence:
        assert self.fence is not None
        return self.fence


class Row(NamedTuple):
    """A wait; ``blocked_by``: "fence" or "lock"; ``over``: what it gives when its time is over, an errno as a positive number."""

    call: Callable[..., Any]
    blocked_by: str = "fence"
    over: Any = None
    interruptible: bool = False
    timed: bool = True


def inside(block: AbstractContextManager[Any]) -> str:
    with block:
        return "in"


ROWS = {
    "fence.wait": Row(lambda w, t=None, **k: w.theirs.wait(t, **k), over=0.0, interruptible=True),
    "array.wait": Row(lambda w, t=None, **k: DmaFenceArray([w.theirs]).wait(t, **k), over=0.0, interruptible=True),
    "chain.wait": Row(lambda w, t=None, **k: DmaFenceChain(None, w.theirs, 1).wait(t, **k), over=0.0, interruptible=True),
    "merge.wait": Row(lambda w, t=None, **k: dmabuf.merge(w.theirs, dmabuf.stub_fence()).wait(t, **k), over=0.0, interruptible=True),
    "wait_any": Row(lambda w, t=None, **k: dmabuf.wait_any([w.theirs], t, **k), over=(None, 0.0), interruptible=True),
    "resv.wait": Row(lambda w, t=None, **k: w.buf.resv.wait(Usage.READ, t, **k), over=0.0, interruptible=True),
    "poll": Row(lambda w, t=None: w.buf.poll(select.POLLIN, t), over=0),
    "read": Row(lambda w, t=None: inside(w.buf.read(timeout=t)), over=errno.ETIMEDOUT),
    "write": Row(lambda w, t=None: inside(w.buf.write(timeout=t)), over=errno.ETIMEDOUT),
    "access": Row(lambda w, t=None: inside(dmabuf.access(read=[w.buf], timeout=t)), over=errno.ETIMEDOUT),
    "begin_cpu_access": Row(lambda w: w.buf.begin_cpu_access(Direction.FROM_DEVICE), timed=False),
    "lock": Row(lambda w: inside(w.buf.resv.locked()), "lock", timed=False),
    "lock_interruptible": Row(lambda w, **k: locked_interruptibly(w), "lock", interruptible=True, timed=False),
    "lock_all": Row(lambda w: inside(dmabuf.lock_all([w.buf.resv])), "lock", timed=False),
    "read against a lock": Row(lambda w, t=None: inside(w.buf.read(timeout=t)), "lock", over=errno.ETIMEDOUT),
}


def locked_interruptibly(world: World) -> None:
    world.buf.resv.lock_interruptible()
    world.buf.resv.unlock()


async def entered(block: Any) -> str:
    async with block:
        return "in"


async def of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


ASYNC: dict[str, tuple[str, Callable[[World], Awaitable[Any]]]] = {
    "await fence": ("fence", lambda w: of(w.theirs)),
    "await array": ("fence", lambda w: of(DmaFenceArray([w.theirs]))),
    "await chain": ("fence", lambda w: of(DmaFenceChain(None, w.theirs, 1))),
    "readable": ("fence", lambda w: of(w.buf.readable())),
    "writable": ("fence", lambda w: of(w.buf.writable())),
    "async read": ("fence", lambda w: entered(w.buf.read())),
    "async write": ("fence", lambda w: entered(w.buf.write())),
    "async access": ("fence", lambda w: entered(dmabuf.access(write=[w.buf]))),
    "async read against a lock": ("lock", lambda w: entered(w.buf.read())),
}


def in_the_way(parent: Parent, how: str) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    if how == "lock":
        with buf.resv.locked():
            parent.send("there")
            parent.recv()
        return
    line = dmabuf.Timeline("theirs")
    fence = line.fence()
    attach(buf.resv, fence, Usage.WRITE)
    parent.send("there")
    parent.recv()
    fence.signal()


def world(child: Spawn, buf: DmaBuf, how: str) -> tuple[World, Child]:
    other = handed(child(in_the_way, how), buf, says="there")
    return World(buf, the_fence(buf) if how == "fence" else None), other


def left_nothing(made: World, pending: int) -> None:
    """``pending``: fences that are still in the way; nothing of the wait itself is there."""
    # What is still registered for a fence of another process goes when the dispatcher's thread hears of its end.
    until(lambda: dispatcher(made.buf.domain).watching == 0)
    assert len(made.buf.resv.fences(Usage.BOOKKEEP)) == pending


def still_in_the_way(made: World) -> int:
    return int(made.fence is not None and not made.fence.is_signaled())


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.timed])
def test_a_wait_whose_time_is_over_says_so(child: Spawn, buf: DmaBuf, name: str) -> None:
    row = ROWS[name]
    made, other = world(child, buf, row.blocked_by)
    if isinstance(row.over, int) and row.over > 0:
        with raises_errno(row.over, TimeoutError):
            row.call(made, SHORT)
    else:
        assert row.call(made, SHORT) == row.over
    # An enabled container watches its members until they end, and a direction that was polled its fence (semantics 5.6).
    if name not in ("array.wait", "chain.wait", "merge.wait", "poll"):
        left_nothing(made, still_in_the_way(made))
    other.send("go")
    other.result()
    row.call(made)
    left_nothing(made, 0)


@pytest.mark.parametrize("name", ROWS)
def test_a_wait_ends_when_a_signal_handler_raises(child: Spawn, buf: DmaBuf, name: str) -> None:
    row = ROWS[name]
    made, other = world(child, buf, row.blocked_by)
    with on_signal(raise_stop), Background(lambda: interrupt_when_asleep(1)), pytest.raises(Stop):
        row.call(made)
    assert made.fence is None or made.fence.status == 0
    other.send("go")
    other.result()
    row.call(made)
    left_nothing(made, 0)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "lock_interruptible"])
def test_a_wait_goes_on_when_a_signal_handler_returns(child: Spawn, buf: DmaBuf, name: str) -> None:
    row = ROWS[name]
    made, other = world(child, buf, row.blocked_by)
    handled: list[int] = []
    with on_signal(lambda number, _: handled.append(number)):
        with Background(lambda: interrupt_when_asleep(2, after=lambda: other.send("go"))):
            row.call(made)
    # Two that come in the instant before it sleeps are handled as one.
    assert 1 <= len(handled) <= 2
    other.result()
    left_nothing(made, 0)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.interruptible])
def test_an_interruptible_wait_is_eintr_when_a_signal_handler_returns(child: Spawn, buf: DmaBuf, name: str) -> None:
    row = ROWS[name]
    made, other = world(child, buf, row.blocked_by)
    ended_by_a_signal(lambda: row.call(made, interruptible=True))
    other.send("go")
    other.result()
    left_nothing(made, 0)


@pytest.mark.parametrize("name", ROWS)
def test_a_wait_ends_when_the_owner_dies(child: Spawn, buf: DmaBuf, name: str) -> None:
    row = ROWS[name]
    made, other = world(child, buf, row.blocked_by)
    with Background(lambda: row.call(made)) as job:
        job.until_blocked()
        assert not job.done
        other.kill()
        result = job.result()
    if name.endswith(".wait"):
        assert result == math.inf
    elif name == "wait_any":
        assert result == (0, math.inf)
    if made.fence is not None:
        assert made.fence.status == -errno.EOWNERDEAD
    left_nothing(made, 0)


@pytest.mark.parametrize("name", ASYNC)
def test_an_await_that_is_cancelled_leaves_nothing(child: Spawn, buf: DmaBuf, name: str) -> None:
    how, call = ASYNC[name]
    made, other = world(child, buf, how)

    async def main() -> None:
        task = asyncio.ensure_future(call(made))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    if name not in ("await array", "await chain"):
        left_nothing(made, still_in_the_way(made))
    other.send("go")
    other.result()
    asyncio.run(of(call(made)))
    left_nothing(made, 0)


@pytest.mark.parametrize("name", ASYNC)
def test_an_await_ends_when_the_owner_dies(child: Spawn, buf: DmaBuf, name: str) -> None:
    how, call = ASYNC[name]
    made, other = world(child, buf, how)
    with Background(lambda: asyncio.run(of(call(made)))) as job:
        job.until_blocked()
        assert not job.done
        other.kill()
        job.result()
    left_nothing(made, 0)


@pytest.mark.parametrize("name", ASYNC)
def test_an_await_goes_on_when_a_signal_handler_returns(child: Spawn, buf: DmaBuf, name: str) -> None:
    how, call = ASYNC[name]
    made, other = world(child, buf, how)
    handled: list[int] = []
    with on_signal(lambda number, _: handled.append(number)):
        with Background(lambda: interrupt_when_asleep(1, after=lambda: other.send("go"))):
            asyncio.run(of(call(made)))
    assert len(handled) == 1
    other.result()
    left_nothing(made, 0)


@pytest.mark.parametrize("name", ["async read", "async write", "async access", "async read against a lock"])
def test_an_async_access_times_out(child: Spawn, buf: DmaBuf, name: str) -> None:
    made, other = world(child, buf, ASYNC[name][0])
    block = {
        "async read": lambda: buf.read(timeout=SHORT),
        "async write": lambda: buf.write(timeout=SHORT),
        "async access": lambda: dmabuf.access(write=[buf], timeout=SHORT),
        "async read against a lock": lambda: buf.read(timeout=SHORT),
    }[name]
    with raises_errno(errno.ETIMEDOUT, TimeoutError):
        asyncio.run(entered(block()))
    left_nothing(made, still_in_the_way(made))
    other.send("go")
    other.result()


def test_a_child_that_waits_is_asleep(child: Spawn, buf: DmaBuf) -> None:
    """No wait spins: what blocks is asleep as the kernel sees it."""
    made, other = world(child, buf, "fence")
    waiter = handed(child(waits_for_all), buf, says="waiting")
    until_asleep(waiter.pid)
    other.send("go")
    other.result()
    assert waiter.result() == 1
    left_nothing(made, 0)


def waits_for_all(parent: Parent) -> int:
    (buf,) = dmabuf.recv(parent.sock)
    fence = the_fence(buf)
    parent.send("waiting")
    index, _ = dmabuf.wait_any([fence, DmaFenceArray([fence])])
    assert index is not None
    return fence.status
