"""A wait that keeps its thread from doing what it waits for: EDEADLK at once, and circles through such a thread end too."""

import asyncio
import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf
from tests.support.errnos import raises_errno
from tests.support.fences import keys
from tests.support.waiting import Background, until

SIZE = 4096


@pytest.fixture
def bufs() -> Iterator[list[DmaBuf]]:
    made = [dmabuf.allocate(SIZE) for _ in range(3)]
    yield made
    for buf in made:
        buf.close()


def beside(engine: str, hold: Callable[[], AbstractContextManager[Any]], call: Callable[[], object]) -> None:
    """Call in one task of a loop while another one is in a block and awaits."""

    async def in_asyncio() -> None:
        inside, leave = asyncio.Event(), asyncio.Event()

        async def holder() -> None:
            with hold():
                inside.set()
                await leave.wait()

        task = asyncio.create_task(holder())
        await inside.wait()
        try:
            call()
        finally:
            leave.set()
            await task

    async def in_trio() -> None:
        trio = sys.modules["trio"]
        inside, leave = trio.Event(), trio.Event()

        async def holder() -> None:
            with hold():
                inside.set()
                await leave.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(holder)
            await inside.wait()
            try:
                call()
            finally:
                leave.set()

    if engine == "trio":
        pytest.importorskip("trio").run(in_trio)
    else:
        asyncio.run(in_asyncio())


def enter(block: AbstractContextManager[Any]) -> None:
    with block:
        pass


BESIDE_A_BLOCK: list[tuple[str, Callable[[DmaBuf, DmaBuf], object]]] = [
    ("read", lambda buf, _: enter(buf.read())),
    ("write", lambda buf, _: enter(buf.write())),
    ("with a timeout", lambda buf, _: enter(buf.read(timeout=30))),
    ("access", lambda buf, other: enter(dmabuf.access(read=[other, buf]))),
    ("range", lambda buf, _: enter(dmabuf.BufferRange(buf, 16, 16).write())),
]


@pytest.mark.parametrize("engine", ["asyncio", "trio"])
@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in BESIDE_A_BLOCK])
def test_access_beside_a_block_of_another_task_is_edeadlk(bufs: list[DmaBuf], engine: str, call: Callable[..., object]) -> None:
    """Without `async` it would stop the loop, and with it the task that it waits for."""

    def waits() -> None:
        with raises_errno(errno.EDEADLK) as caught:
            call(bufs[0], bufs[1])
        assert "another task or greenlet of this thread" in str(caught.value)
        assert "async with" in str(caught.value)

    beside(engine, bufs[0].write, waits)
    assert keys(bufs[0].resv) == keys(bufs[1].resv) == []
    enter(bufs[0].write())


def test_access_beside_a_block_around_the_loop_is_edeadlk(bufs: list[DmaBuf]) -> None:
    """The block belongs to the thread, which runs the loop inside it."""

    async def main() -> None:
        with raises_errno(errno.EDEADLK), bufs[0].write():
            pass

    with bufs[0].read():
        asyncio.run(main())


def test_access_beside_a_block_of_another_loop_waits_for_it(bufs: list[DmaBuf]) -> None:
    """That loop runs in another thread, so the task there goes on."""

    async def holder() -> None:
        async with bufs[0].write():
            inside.set()
            while len(keys(bufs[0].resv)) < 2:  # until the other one waits
                await asyncio.sleep(0)

    async def reader() -> None:
        with bufs[0].read():
            pass

    inside = threading.Event()
    with Background(lambda: asyncio.run(holder())):
        inside.wait()
        asyncio.run(reader())


LOCKED: list[tuple[str, Callable[[DmaBuf, DmaBuf], object]]] = [
    ("lock", lambda buf, _: buf.resv.lock()),
    ("interruptible", lambda buf, _: buf.resv.lock_interruptible()),
    ("context", lambda buf, _: buf.resv.lock(dmabuf.WwAcquireContext())),
    ("lock_all", lambda buf, other: enter(dmabuf.lock_all([other.resv, buf.resv]))),
    ("read", lambda buf, _: enter(buf.read())),
    ("access", lambda buf, other: enter(dmabuf.access(write=[other, buf]))),
]


@pytest.mark.parametrize("engine", ["asyncio", "trio"])
@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in LOCKED])
def test_lock_that_another_task_of_the_thread_holds_is_edeadlk(bufs: list[DmaBuf], engine: str, call: Callable[..., object]) -> None:
    def waits() -> None:
        with raises_errno(errno.EDEADLK) as caught:
            call(bufs[0], bufs[1])
        assert "another task of this thread" in str(caught.value)
        assert not bufs[0].resv.trylock()

    beside(engine, bufs[0].resv.locked, waits)
    assert not bufs[0].resv.is_locked()
    assert not bufs[1].resv.is_locked()


def crossing(first: Callable[[], object], second: Callable[[], object]) -> list[object]:
    """What two threads get that wait for each other: an errno, or what the call returns."""

    def ends(call: Callable[[], object]) -> object:
        try:
            return call()
        except OSError as e:
            return e.errno

    with Background(lambda: ends(first)) as job:
        mine = ends(second)
    return sorted([job.result(), mine], key=str)


def nested(both: threading.Barrier, outer: DmaBuf, inner: DmaBuf) -> str:
    with outer.write():
        both.wait()
        with inner.write():
            return "both"


def test_circle_through_an_access_without_async_in_a_task_ends(bufs: list[DmaBuf]) -> None:
    both = threading.Barrier(2)

    async def task() -> None:
        with bufs[0].write():
            both.wait()
            until(lambda: len(keys(bufs[0].resv)) == 2)
            with raises_errno(errno.EDEADLK), bufs[1].write():  # the last one that begins to wait
                pass

    with Background(lambda: nested(both, bufs[1], bufs[0])) as job:
        asyncio.run(task())
        assert job.result() == "both"


def held_and_waited_for(both: threading.Barrier, held: DmaBuf, wanted: DmaBuf) -> str:
    """One task of a loop holds a buffer, and another one stops the loop to wait for the other buffer."""

    async def main() -> str:
        leave, inside = asyncio.Event(), asyncio.Event()

        async def holder() -> None:
            async with held.write():
                inside.set()
                await leave.wait()

        task = asyncio.create_task(holder())
        await inside.wait()
        both.wait()
        try:
            with wanted.write():
                return "both"
        finally:
            leave.set()
            await task

    return asyncio.run(main())


def test_circle_through_a_thread_that_one_of_its_tasks_stops_ends(bufs: list[DmaBuf]) -> None:
    both = threading.Barrier(2)
    ends = crossing(lambda: held_and_waited_for(both, bufs[0], bufs[1]), lambda: nested(both, bufs[1], bufs[0]))
    assert ends == [errno.EDEADLK, "both"]


def test_circle_through_two_threads_that_tasks_stop_ends(bufs: list[DmaBuf]) -> None:
    both = threading.Barrier(2)
    ends = crossing(lambda: held_and_waited_for(both, bufs[0], bufs[1]), lambda: held_and_waited_for(both, bufs[1], bufs[0]))
    assert ends == [errno.EDEADLK, "both"]


GREENLETS = """
import gevent.monkey

if {patched}:
    gevent.monkey.patch_all()
import errno

import dmabuf
import gevent

buf = dmabuf.allocate(4096)


def first():
    with buf.{outer}():
        inside.set()
        gevent.sleep(0.1)


def second():
    inside.wait()
    try:
        with buf.{inner}({timeout}):
            return "ok"
    except OSError as e:
        return "EDEADLK" if e.errno == errno.EDEADLK else str(e)


inside = gevent.event.Event() if hasattr(gevent, "event") else __import__("gevent.event").event.Event()
jobs = [gevent.spawn(first), gevent.spawn(second)]
gevent.joinall(jobs)
with buf.write():
    print(jobs[1].value)
"""


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize(("outer", "inner", "timeout"), [("write", "read", ""), ("read", "write", ""), ("write", "write", "timeout=60")])
def test_access_beside_a_block_of_another_greenlet_is_edeadlk(outer: str, inner: str, timeout: str, patched: bool) -> None:
    pytest.importorskip("gevent")
    code = GREENLETS.format(outer=outer, inner=inner, timeout=timeout, patched=patched)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.stdout == "EDEADLK\n", done.stderr


CALLBACK = """
import gevent.monkey

gevent.monkey.patch_all()
import socket

import dmabuf
import gevent.event

sock = socket.socket(fileno={fd})
gevent.socket.wait_read(sock.fileno())
(fence,) = dmabuf.recv(sock)
ended = gevent.event.Event()
fence.add_callback(lambda _: ended.set())
sock.send(b"waits")
ended.wait(3600)  # with a limit: gevent takes a wait that only another thread can end for one without an end
print("called")
"""


def test_callback_of_a_foreign_fence_comes_in_gevent() -> None:
    """The thread that waits for it sleeps in C. As a greenlet it would stop the others of its thread."""
    pytest.importorskip("gevent")
    fence = dmabuf.Timeline("work").fence()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        here,
        there,
        subprocess.Popen(
            [sys.executable, "-c", CALLBACK.format(fd=there.fileno())], pass_fds=[there.fileno()], stdout=subprocess.PIPE, text=True
        ) as program,
    ):
        dmabuf.send(here, fence)
        assert here.recv(16) == b"waits"
        fence.signal()
        assert program.communicate()[0] == "called\n"
