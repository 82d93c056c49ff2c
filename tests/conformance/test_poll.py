"""Polling a buffer (semantics 5.6): what is ready, waiting for it, and the pollable fd and awaitables made from it.

What the kernels were asked is in tests/conformance/cases.
"""

import asyncio
import errno
import itertools
import os
import select
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractWarning, DmaBuf, Timeline, Usage
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import USAGES, attach
from tests.support.partners import handed
from tests.support.steps import fork, reap
from tests.support.waiting import Background, until_asleep

IN, OUT = select.POLLIN, select.POLLOUT
BOTH = IN | OUT
LONG = 3600.0


# -- fences that ended


@USAGES
def test_a_failed_fence_counts_as_done(buf: DmaBuf, tl: Timeline, usage: Usage) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, usage)
    fence.signal(error=-errno.ENOENT)
    assert buf.poll(BOTH) == BOTH


def test_the_fences_of_a_closed_timeline_count_as_done(buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    tl.close()
    assert buf.poll(BOTH) == BOTH
    assert fence.is_signaled()


# -- every mix of usages


MIXES = [mix for size in range(5) for mix in itertools.combinations(Usage, size)]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "+".join(usage.name for usage in mix) or "none")
@pytest.mark.parametrize("asked", [IN, OUT, BOTH, 0x7FFF, 0], ids=["in", "out", "both", "all", "none"])
def test_pollin_waits_for_writes_and_pollout_for_reads_too(buf: DmaBuf, mix: tuple[Usage, ...], asked: int) -> None:
    lines = [Timeline(usage.name) for usage in mix]
    fences = [line.fence() for line in lines]
    for fence, usage in zip(fences, mix, strict=True):
        attach(buf.resv, fence, usage)
    readable = IN * (not {Usage.KERNEL, Usage.WRITE} & set(mix))
    writable = OUT * (not {Usage.KERNEL, Usage.WRITE, Usage.READ} & set(mix))
    assert buf.poll(asked) == asked & (readable | writable)
    for fence, line in zip(fences, lines, strict=True):
        fence.signal()
        line.close()
    assert buf.poll(asked) == asked & BOTH


# -- waiting


def test_a_poll_of_an_idle_buffer_returns_at_once_whatever_the_timeout(buf: DmaBuf) -> None:
    for timeout in (0, LONG, None):
        assert buf.poll(BOTH, timeout) == BOTH


def test_the_default_is_a_pure_poll(buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    assert buf.poll(BOTH) == 0
    fence.signal()


def test_pollout_waits_for_all_fences(buf: DmaBuf) -> None:
    lines = [Timeline(name) for name in "abc"]
    fences = [line.fence() for line in lines]
    for fence in fences:
        attach(buf.resv, fence, Usage.READ)
    with Background(lambda: buf.poll(OUT, timeout=LONG)) as job:
        for number in (2, 0, 1):
            job.until_blocked()
            assert not job.done
            fences[number].signal()
        assert job.result() == OUT
    for line in lines:
        line.close()


def test_asking_for_both_returns_with_the_first_that_is_ready(buf: DmaBuf, tl: Timeline, other_tl: Timeline) -> None:
    read, write = tl.fence(), other_tl.fence()
    attach(buf.resv, read, Usage.READ)
    attach(buf.resv, write, Usage.WRITE)
    with Background(lambda: buf.poll(BOTH, timeout=None)) as job:
        job.until_blocked()
        assert not job.done
        write.signal()
        assert job.result() == IN
    read.signal()


def test_a_poll_with_a_timeout_for_what_is_never_reported_is_0(buf: DmaBuf) -> None:
    before = time.monotonic()
    assert buf.poll(select.POLLPRI, timeout=0.01) == 0
    # As poll(2): the time passes, though nothing can come.
    assert time.monotonic() - before >= 0.01


@pytest.mark.parametrize("timeout", [-1, -0.001])
def test_a_negative_timeout_is_einval(buf: DmaBuf, timeout: float) -> None:
    with warnings.catch_warnings(), raises_errno(errno.EINVAL):
        warnings.simplefilter("ignore", ContractWarning)
        buf.poll(BOTH, timeout)


@pytest.mark.parametrize("call", [lambda b: b.poll(BOTH), lambda b: b.poll_fd(IN)], ids=["poll", "poll_fd"])
def test_a_closed_buffer_is_ebadf(call: Callable[[DmaBuf], Any]) -> None:
    buf = dmabuf.allocate(4096)
    buf.close()
    with raises_errno(errno.EBADF):
        call(buf)


@pytest.mark.parametrize("name", ["readable", "writable"])
def test_awaiting_a_closed_buffer_is_ebadf(name: str) -> None:
    buf = dmabuf.allocate(4096)
    buf.close()

    async def main() -> None:
        await getattr(buf, name)()

    with raises_errno(errno.EBADF):
        asyncio.run(main())


# -- poll_fd


def by_select(fd: int, timeout: float | None) -> bool:
    return bool(select.select([fd], [], [], timeout)[0])


def by_poll(fd: int, timeout: float | None) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(None if timeout is None else timeout * 1000))


def by_epoll(fd: int, timeout: float | None) -> bool:
    with select.epoll() as poller:
        poller.register(fd, select.EPOLLIN)
        return bool(poller.poll(timeout))


BY = pytest.mark.parametrize("wait", [by_select, by_poll, by_epoll])
Wait = Callable[[int, float | None], bool]


@BY
@pytest.mark.parametrize("events", [IN, OUT, BOTH])
def test_the_fd_of_an_idle_buffer_is_readable_at_once(buf: DmaBuf, wait: Wait, events: int) -> None:
    fd = buf.poll_fd(events)
    assert wait(fd, None)
    os.close(fd)


@BY
@pytest.mark.parametrize(("events", "usage"), [(IN, Usage.WRITE), (OUT, Usage.WRITE), (OUT, Usage.READ), (OUT, Usage.KERNEL)])
def test_the_fd_of_a_busy_buffer_becomes_readable_when_it_is_done(buf: DmaBuf, tl: Timeline, wait: Wait, events: int, usage: Usage) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, usage)
    fd = buf.poll_fd(events)
    assert not wait(fd, 0)
    with Background(lambda: wait(fd, None)) as job:
        job.until_blocked()
        assert not job.done
        fence.signal()
        assert job.result()
    assert buf.poll(events) == events
    os.close(fd)


@pytest.mark.parametrize("usage", [Usage.READ, Usage.BOOKKEEP])
def test_the_fd_for_reading_is_not_held_up_by_readers(buf: DmaBuf, tl: Timeline, usage: Usage) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, usage)
    fd = buf.poll_fd(IN)
    assert by_poll(fd, None)
    os.close(fd)
    fence.signal()


def test_the_fd_waits_for_all_fences(buf: DmaBuf, tl: Timeline, other_tl: Timeline) -> None:
    fences = tl.fence(), other_tl.fence()
    for fence in fences:
        attach(buf.resv, fence, Usage.READ)
    fd = buf.poll_fd(OUT)
    fences[0].signal()
    assert not by_poll(fd, 0.01)
    fences[1].signal()
    assert by_poll(fd, None)
    os.close(fd)


def test_the_fd_is_one_shot(buf: DmaBuf, tl: Timeline) -> None:
    """It says that the condition was met once; a new one is taken for what comes next."""
    fd = buf.poll_fd(OUT)
    assert by_poll(fd, None)
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    assert by_poll(fd, 0)
    again = buf.poll_fd(OUT)
    assert not by_poll(again, 0)
    fence.signal()
    assert by_poll(again, None)
    os.close(fd)
    os.close(again)


def test_the_fd_is_not_inherited(buf: DmaBuf) -> None:
    fd = buf.poll_fd(IN)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_the_fd_may_be_closed_before_it_is_readable(buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    os.close(buf.poll_fd(IN))
    # A new file of the same number must not be rung or closed instead.
    reused = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    fence.signal()
    assert not by_poll(reused, 0.01)
    os.close(reused)


@pytest.mark.parametrize("open_at_once", [1, 40])
def test_callers_that_give_up_leave_no_descriptor_and_few_callbacks(buf: DmaBuf, tl: Timeline, open_at_once: int) -> None:
    """A loop whose time is over closes its descriptors and comes back, again and again, while the fence stays pending."""
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    os.close(buf.poll_fd(IN))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(400 // open_at_once):
        fds = [buf.poll_fd(IN) for _ in range(open_at_once)]
        assert not any(by_poll(fd, 0) for fd in fds)
        for fd in fds:
            os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
    assert fence.statistics().callbacks <= 2 * max(open_at_once, 16) + 1
    kept = [buf.poll_fd(IN) for _ in range(100)]
    fence.signal()
    assert all(by_poll(fd, None) for fd in kept)
    for fd in kept:
        os.close(fd)


def test_fd_that_only_a_child_has_becomes_readable(buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    fd = buf.poll_fd(IN)
    here, there = os.pipe()
    pid = fork(lambda: (os.write(there, b"x"), os._exit(not by_poll(fd, None))))
    assert os.read(here, 1) == b"x"
    os.close(fd)
    for _ in range(100):
        os.close(buf.poll_fd(IN))
    fence.signal()
    assert reap(pid) == 0
    os.close(here)
    os.close(there)


# -- awaitables


@pytest.mark.parametrize("name", ["readable", "writable"])
def test_awaiting_an_idle_buffer_returns_at_once(buf: DmaBuf, name: str) -> None:
    async def main() -> None:
        await getattr(buf, name)()

    asyncio.run(main())


@pytest.mark.parametrize(("name", "usage"), [("readable", Usage.WRITE), ("writable", Usage.WRITE), ("writable", Usage.READ)])
def test_awaiting_a_busy_buffer_lets_the_loop_run(buf: DmaBuf, tl: Timeline, name: str, usage: Usage) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, usage)

    async def main() -> None:
        task = asyncio.ensure_future(getattr(buf, name)())
        await asyncio.sleep(0)
        assert not task.done()
        fence.signal()
        await task

    asyncio.run(main())


@pytest.mark.parametrize("usage", [Usage.READ, Usage.BOOKKEEP])
def test_readable_is_not_held_up_by_readers(buf: DmaBuf, tl: Timeline, usage: Usage) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, usage)

    async def main() -> None:
        await buf.readable()

    asyncio.run(main())
    fence.signal()


def test_many_tasks_await_one_buffer(buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)

    async def main() -> None:
        tasks = [asyncio.ensure_future(awaitable()) for awaitable in (buf.readable, buf.writable, buf.readable)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        fence.signal()
        await asyncio.gather(*tasks[1:])
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    asyncio.run(main())


# -- across processes


def signals_on_demand(parent: Parent, usage: Usage) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    line = Timeline("child")
    fence = line.fence()
    attach(buf.resv, fence, usage)
    parent.send("added")
    parent.recv()
    fence.signal()
    parent.recv()


def awaits(parent: Parent, name: str) -> str:
    (buf,) = dmabuf.recv(parent.sock)
    parent.send("waiting")

    async def main() -> None:
        await getattr(buf, name)()

    asyncio.run(main())
    return "ready"


@pytest.mark.parametrize("killed", [False, True], ids=["signals", "killed"])
@pytest.mark.parametrize("how", ["poll", "poll_fd"])
def test_waiting_for_another_process(child: Spawn, buf: DmaBuf, how: str, killed: bool) -> None:
    other = handed(child(signals_on_demand, Usage.WRITE), buf, says="added")
    fd = buf.poll_fd(IN)
    assert not by_poll(fd, 0)
    with Background(lambda: bool(buf.poll(IN, timeout=None)) if how == "poll" else by_poll(fd, None)) as job:
        job.until_blocked()
        assert not job.done
        if killed:
            other.kill()
        else:
            other.send("signal")
        assert job.result() is True
    assert by_poll(fd, None)
    os.close(fd)


@pytest.mark.parametrize("name", ["readable", "writable"])
def test_awaiting_in_another_process(child: Spawn, buf: DmaBuf, tl: Timeline, name: str) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    other = handed(child(awaits, name), buf, says="waiting")
    until_asleep(other.pid)
    fence.signal()
    assert other.result() == "ready"
