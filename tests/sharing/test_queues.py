"""Buffers in the queues and pipes of multiprocessing: each arrives, or its receiver is told what happened."""

from __future__ import annotations

import concurrent.futures
import errno
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import dmabuf
from dmabuf.sharing import keeping
from tests.sharing.conftest import SIZE
from tests.support.errnos import raises_errno
from tests.support.queues import ANEW, METHODS, running, stamp, stamped
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("keepers_are_reaped")


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> Any:
    return multiprocessing.get_context(request.param)


@pytest.fixture
def queue() -> Iterator[Any]:
    made = multiprocessing.Queue()
    yield made
    made.close()
    made.join_thread()
    keeping.TABLE.drop()


# ---- closed before it is pickled ----


def _put_and_close(queue: Any, count: int, end: Any) -> None:
    for i in range(count):
        with stamped(i) as buf:
            queue.put(buf)
    end.wait()


def _got(queue: Any) -> int | OSError:
    try:
        return stamp(queue.get())
    except OSError as e:
        return e


def test_put_then_close_arrives_or_is_told_for_each(context: Any) -> None:
    queue, end = context.Queue(), context.Event()
    with running(context.Process(target=_put_and_close, args=(queue, 5, end))):
        for i in range(5):
            got = _got(queue)
            assert got == i or "put buf.give() into the queue instead of buf" in str(got)
        end.set()
    queue.close()


@pytest.mark.parametrize("wrapped", [False, True])
def test_closed_buffer_in_a_queue_raises_in_get(queue: Any, wrapped: bool) -> None:
    buf = dmabuf.allocate(SIZE)
    ino = buf.ino
    buf.close()
    queue.put((1, {"buf": buf}) if wrapped else buf)
    with raises_errno(errno.EBADF) as caught:
        queue.get()
    assert f"inode {ino} " in str(caught.value)
    assert f"process {os.getpid()} (MainProcess) closed it before the thread of its queue had pickled it" in str(caught.value)


def test_closed_buffer_that_another_handle_has_open_arrives(queue: Any, buf: dmabuf.DmaBuf) -> None:
    closed = dmabuf.get(buf.fileno())
    closed.close()
    queue.put(closed)
    with queue.get() as got:
        assert got == buf


def test_closed_timeline_in_a_queue_raises_in_get(queue: Any) -> None:
    tl = dmabuf.Timeline()
    tl.close()
    queue.put(tl)
    with raises_errno(errno.EBADF) as caught:
        queue.get()
    assert "could not pickle it: the timeline is closed" in str(caught.value)


def test_closed_buffer_for_an_executor_raises_in_its_caller() -> None:
    buf = dmabuf.allocate(SIZE)
    buf.close()
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=ANEW) as pool:
        with raises_errno(errno.EBADF):
            pool.submit(stamp, buf).result()
        assert pool.submit(stamp, stamped(3).give()).result() == 3


# ---- given away ----


def _give(queue: Any) -> None:
    for i in range(3):
        with stamped(i, f"given {i}") as buf:
            queue.put(buf.give())


def test_given_buffers_arrive_when_their_producer_has_ended(context: Any) -> None:
    queue = context.Queue()
    with running(context.Process(target=_give, args=(queue,))):
        pass
    for i in range(3):
        buf = queue.get()
        assert (buf.name, stamp(buf)) == (f"given {i}", i)
    queue.close()


def test_give_closes_the_handle_and_pickling_closes_the_given_one(queue: Any) -> None:
    buf = stamped(7, "given")
    given = buf.give()
    assert buf.closed
    assert not given.closed
    queue.put(given)
    got = queue.get()
    assert given.closed
    assert (got.name, stamp(got)) == ("given", 7)


def test_given_buffer_that_is_dropped_goes(queue: Any) -> None:
    given = dmabuf.allocate(SIZE).give()
    ref = given.ref()
    del given
    with raises_errno(errno.ENOENT):
        dmabuf.open(ref)


def _is_gone(token: dmabuf.BufferRef) -> bool:
    try:
        dmabuf.open(token).close()
    except OSError as e:
        return e.errno == errno.ENOENT
    return False


def test_given_buffer_in_two_queues_is_told_to_the_second(queue: Any) -> None:
    given = dmabuf.allocate(SIZE).give()
    token = given.ref()
    queue.put(given)
    queue.get().close()
    until(lambda: _is_gone(token))  # who kept it on the way closes it a moment later, and until then it would arrive
    queue.put(given)
    with raises_errno(errno.EBADF):
        queue.get()


def test_give_in_a_block_is_busy_and_changes_nothing(buf: dmabuf.DmaBuf) -> None:
    with buf.read(), raises_errno(errno.EBUSY):
        buf.give()
    assert not buf.closed
    closed = dmabuf.get(buf.fileno())
    closed.close()
    with raises_errno(errno.EBADF):
        closed.give()


def test_given_buffer_as_an_argument_arrives(context: Any) -> None:
    answers = context.SimpleQueue()
    with running(context.Process(target=_answer, args=(stamped(5).give(), answers))):
        assert answers.get() == 5
    answers.close()


def _answer(buf: dmabuf.DmaBuf, answers: Any) -> None:
    answers.put(stamp(buf))


# ---- killed, interrupted, without an end ----


def _put_and_wait(queue: Any, end: Any) -> None:
    buf = stamped(9, "late")
    queue.put(buf)
    end.wait()


def test_killed_producer_is_named_to_the_consumer(context: Any) -> None:
    queue, end = context.SimpleQueue(), context.Event()
    with running(context.Process(target=_put_and_wait, args=(queue, end), name="camera")) as process:
        until(lambda: not queue.empty())
        process.kill()
        process.join()
        with raises_errno(errno.EOWNERDEAD) as caught:
            queue.get()
        assert f"process {process.pid} (camera), which sent it, ended before it was received" in str(caught.value)
        assert "'late'" in str(caught.value)
    queue.close()


class _Interrupted(Exception):
    pass


def _interrupt(_: int, __: FrameType | None) -> None:
    raise _Interrupted


@pytest.mark.parametrize("kind", ["Queue", "SimpleQueue", "Pipe"])
def test_get_that_a_handler_interrupts_loses_nothing(kind: str) -> None:
    end = ANEW.Event()
    if kind == "Pipe":
        here, there = ANEW.Pipe()
        get, put, ready = here.recv, there, here.poll
    else:
        queue: Any = getattr(ANEW, kind)()
        get, put, ready = queue.get, queue, lambda: not queue.empty()
    with running(ANEW.Process(target=_put_or_send, args=(put, end))) as process:
        until(ready)
        os.kill(process.pid, signal.SIGSTOP)
        until(
            lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in Path(f"/proc/{process.pid}/task").glob("*/stat"))
        )
        before = signal.signal(signal.SIGALRM, _interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(_Interrupted):
                get()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            os.kill(process.pid, signal.SIGCONT)
        assert ready()
        assert stamp(get()) == 9
        end.set()
    if kind == "Pipe":
        here.close()
        there.close()
    else:
        queue.close()


def _put_or_send(queue: Any, end: Any) -> None:
    buf = stamped(9)
    (queue.send if hasattr(queue, "send") else queue.put)(buf)
    end.wait()


# ---- two programs ----

_PROGRAM = """
import sys, dmabuf
from multiprocessing.connection import Client, Listener
if sys.argv[1] == "listen":
    with Listener(authkey=b"both know it") as listener:
        print(listener.address, flush=True)
        with listener.accept() as connection, connection.recv() as buf:
            with buf.read() as view:
                print(bytes(view[:5]).decode(), buf.name, flush=True)
            connection.send(None)
else:
    with Client(sys.argv[2], authkey=b"both know it") as connection, dmabuf.allocate(4096, name="sent") as buf:
        with buf.write() as view:
            view[:5] = b"hello"
        connection.send(buf)
        connection.recv()
"""


def test_listener_and_client_of_two_programs_pass_buffers() -> None:
    command = [sys.executable, "-c", _PROGRAM]
    with subprocess.Popen([*command, "listen"], stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        address = listener.stdout.readline().strip()
        subprocess.run([*command, "connect", address], check=True)
        assert listener.stdout.read() == "hello sent\n"
    assert not listener.returncode


# ---- other libraries ----


def test_forking_pickler_that_another_library_drives(buf: dmabuf.DmaBuf) -> None:
    file = io.BytesIO()
    ForkingPickler(file, pickle.HIGHEST_PROTOCOL).dump([buf, buf])  # as torch.multiprocessing does it
    one, two = pickle.loads(file.getvalue())
    assert one is two
    assert one == buf
    one.close()


# ---- everything else that has a descriptor ----


def test_every_kind_with_a_descriptor_arrives_through_a_queue(queue: Any, buf: dmabuf.DmaBuf, tl: dmabuf.Timeline) -> None:
    domain = dmabuf.Domain.private()
    fence = tl.fence()
    things = [
        buf.export_range(0, 10),
        dmabuf.SwSync("sw"),
        dmabuf.TimelineSemaphore(),
        dmabuf.SyncFile(fence, "sync"),
        dmabuf.allocate(SIZE, name="secret", domain=domain),
        domain,
    ]
    queue.put(things)
    part, sw, semaphore, sync_file, secret, same = queue.get()
    assert (part.buf, part.length, sw.name, semaphore.query(), sync_file.name) == (buf, 10, "sw", 0, "sync")
    assert (secret, same) == (things[4], domain)
    fence.signal()
    assert sync_file.status == 1
    for one in (part.buf, sw, semaphore, sync_file, secret, *things[1:5]):
        one.close()
