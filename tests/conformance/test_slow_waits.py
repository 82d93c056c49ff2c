"""A wait that lasts long is logged once, with the process that is in the way. Here a wait is long after two ticks."""

import asyncio
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator

import pytest

import dmabuf
from dmabuf import DmaBuf, Domain
from dmabuf.domain import slow_waits
from tests.support.children import Parent, Spawn
from tests.support.logs import Log, logged
from tests.support.waiting import Background, until

LONG_NS = 80_000_000


@pytest.fixture
def log() -> Iterator[Log]:
    shm = Domain.default().join()
    before, shm.slow_ns = shm.slow_ns, LONG_NS
    with logged() as found:
        yield found
    shm.slow_ns = before


def told(log: Log, call: Callable[[], object], end: Callable[[], object]) -> str:
    """The text of a wait that ``end`` ends a while after it was logged."""
    with Background(call) as job:
        until(lambda: bool(log.texts))
        never = threading.Event()
        never.wait(4 * LONG_NS / 1e9)  # it isn't logged again
        assert not job.done
        texts = list(log.texts)  # on a busy machine what ends the wait may wait too
        end()
    (text,) = texts
    assert log.threads[:1] == ["dmabuf-log"]
    assert text.startswith("a wait has lasted 0.08 s: thread ")
    return text


def writes(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    with buf.write():
        parent.send("inside")
        parent.recv()
    buf.close()


def locks(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    with buf.resv.locked():
        parent.send("inside")
        parent.recv()
    buf.close()


def test_a_wait_is_long_after_10_s() -> None:
    assert Domain.private().shm.slow_ns == 10_000_000_000


@pytest.fixture
def named() -> Iterator[DmaBuf]:
    with dmabuf.allocate(4096, name="frame") as buf:
        yield buf


def test_long_wait_for_an_access_names_process_and_buffer(child: Spawn, log: Log, named: DmaBuf) -> None:
    other = child(writes)
    dmabuf.send(other.sock, named)
    assert other.recv() == "inside"
    with open(f"/proc/{other.pid}/comm") as f:
        comm = f.read().strip()

    def read() -> None:
        with named.read():
            pass

    text = told(log, read, lambda: (other.send("leave"), other.result()))
    assert f"the write() block of thread {other.pid} of process {other.pid} ({comm})" in text
    assert f"of buffer 'frame' ino {named.ino}" in text


def test_long_wait_for_a_stopped_process_says_so(child: Spawn, log: Log, named: DmaBuf) -> None:
    other = child(writes)
    dmabuf.send(other.sock, named)
    assert other.recv() == "inside"
    other.stop()

    def wait() -> None:
        named.resv.wait(dmabuf.Usage.READ)

    text = told(log, wait, lambda: (other.resume(), other.send("leave"), other.result()))
    assert ", which is stopped)" in text


def test_long_await_of_an_access_is_logged(child: Spawn, log: Log, named: DmaBuf) -> None:
    other = child(writes)
    dmabuf.send(other.sock, named)
    assert other.recv() == "inside"

    async def read() -> None:
        async with named.read():
            pass

    text = told(log, lambda: asyncio.run(read()), lambda: (other.send("leave"), other.result()))
    assert f"the write() block of thread {other.pid} of process {other.pid}" in text


@pytest.mark.parametrize("in_a_task", [False, True])
def test_long_wait_for_a_lock_names_the_holder(child: Spawn, log: Log, named: DmaBuf, in_a_task: bool) -> None:
    other = child(locks)
    dmabuf.send(other.sock, named)
    assert other.recv() == "inside"

    def lock() -> None:
        with named.resv.locked():
            pass

    async def read() -> None:
        async with named.read():
            pass

    text = told(log, lambda: asyncio.run(read()) if in_a_task else lock(), lambda: (other.send("leave"), other.result()))
    assert f"a reservation lock that thread {other.pid} of process {other.pid} (" in text


@pytest.mark.parametrize("several", [False, True])
def test_long_wait_for_a_fence_names_its_timeline(log: Log, several: bool) -> None:
    timeline, other = dmabuf.Timeline("work"), dmabuf.Timeline("other work")
    fence, second = timeline.fence(), other.fence()
    call = (lambda: dmabuf.wait_any([fence, second])) if several else fence.wait
    text = told(log, call, fence.signal)
    assert f"fence {fence.context}:{fence.seqno} of timeline 'work' of this process ({os.getpid()})" in text
    assert ("one of 2 fences, the first of which is fence" in text) is several
    second.signal()


def test_long_wait_for_a_submission_is_logged(log: Log) -> None:
    with dmabuf.TimelineSemaphore() as semaphore:
        text = told(log, lambda: semaphore.wait(1, for_submit=True), lambda: semaphore.signal(1))
        assert "waits for somebody to submit a point to <dmabuf.TimelineSemaphore" in text


def test_log_handler_may_use_what_the_waiter_waits_for(log: Log, named: DmaBuf) -> None:
    """It runs in a thread of its own, so it may even end the wait, or take the lock that the waiting thread holds."""
    fence = dmabuf.Timeline("work").fence()
    log.emit = lambda record: fence.signal()  # type: ignore[method-assign]
    with named.resv.locked():
        fence.wait()


def test_log_handler_that_raises_doesnt_end_the_wait(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    fence, called = dmabuf.Timeline("work").fence(), threading.Event()

    def broken(record: logging.LogRecord) -> None:
        called.set()
        raise OSError(errno.ENOSPC, "no room")

    def handled(record: logging.LogRecord) -> None:
        try:
            broken(record)
        except OSError:
            log.handleError(record)

    monkeypatch.setattr(logging, "raiseExceptions", False)
    log.emit = handled  # type: ignore[method-assign]
    with Background(fence.wait) as job:
        called.wait()
        assert not job.done
        fence.signal()


def test_wait_goes_on_though_no_thread_can_be_started_to_log_it(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log then has nothing of it."""
    tried = threading.Event()

    def start(*_: object, **__: object) -> None:
        tried.set()
        raise RuntimeError("can't start new thread")

    fence = dmabuf.Timeline("work").fence()
    with Background(fence.wait) as job:
        monkeypatch.setattr(slow_waits.threading, "Thread", start)
        tried.wait()
        monkeypatch.undo()
        assert not job.done
        fence.signal()
    assert log.texts == []


def test_words_for_what_is_gone(log: Log) -> None:
    domain = Domain.default()
    fence = dmabuf.Timeline("work").fence()
    handle = fence.handle + (1 << 24)  # a generation that never was
    fence.signal()
    assert slow_waits.fence(domain, handle) == "a fence that has just been signaled"
    assert slow_waits.process(domain, 1 << 30) == "a process that has ended"
