"""Buffers in the queues and proxies of multiprocessing's managers, whose connections carry calls and answers."""

import contextlib
import errno
import multiprocessing
import os
import resource
from multiprocessing.managers import RemoteError, SyncManager
from typing import Any

import pytest

import dmabuf
from tests.support.errnos import raises_errno
from tests.support.queues import ANEW, METHODS, hoard, leave_room, running, stamp, stamped

pytestmark = pytest.mark.usefixtures("keepers_are_reaped")


def _limited() -> None:
    """Leave a manager the descriptors of its connections, and a few for buffers."""
    dmabuf.allocate(4096).close()
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def _produce(queue: Any, how: str, end: Any) -> None:
    for i in range(3):
        buf = stamped(i)
        queue.put(buf.give() if how == "given" else buf)
        buf.close()
    end.set()
    if how == "killed":
        multiprocessing.Event().wait()


@pytest.mark.parametrize("how", ["given", "closed", "killed"])
@pytest.mark.parametrize("method", METHODS)
def test_buffers_in_a_managed_queue_arrive_however_their_producer_ends(method: str, how: str) -> None:
    context = multiprocessing.get_context(method)
    with context.Manager() as manager:
        queue, end = manager.Queue(), context.Event()
        with running(context.Process(target=_produce, args=(queue, how, end))) as process:
            end.wait()
            if how == "killed":
                process.kill()
        assert [stamp(queue.get()) for _ in range(3)] == [0, 1, 2]
        assert queue.qsize() == 0


def test_closed_buffer_is_told_to_the_producer_and_the_queue_goes_on() -> None:
    with ANEW.Manager() as manager:
        queue = manager.Queue()
        with stamped(1) as buf:
            pass
        with raises_errno(errno.EBADF) as caught:
            queue.put(buf)
        assert "closed before it was pickled" in str(caught.value)
        assert "pass buf.give()" in str(caught.value)
        queue.put(stamped(2).give())
        assert stamp(queue.get()) == 2


def test_manager_without_descriptors_passes_buffers_on() -> None:
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))  # a fork server's children have other descriptors open
    manager.start(_limited)
    with manager:
        queue = manager.Queue()
        bufs = [stamped(i) for i in range(20)]
        for i, buf in enumerate(bufs):
            queue.put(buf)
            assert queue.qsize() == i + 1  # each call has its own answer
        got: list[int] = []
        for i in range(20):
            # What the manager has open it has to duplicate, for which there is no room at first.
            with contextlib.suppress(RemoteError):
                got.append(stamp(queue.get()))
            assert queue.qsize() == 19 - i
        assert set(range(12, 20)) <= set(got)
        for buf in bufs:
            buf.close()


def _consume(queue: Any, answers: Any) -> None:
    queue.qsize()
    hoard()
    got = [queue.get() for _ in range(2)]
    try:
        got[0].fileno()
    except OSError as e:
        answers.send(e.errno)
    leave_room()
    answers.send((queue.qsize(), [stamp(buf) for buf in got], queue.get()))
    answers.close()


def test_consumer_without_descriptors_has_each_answer_for_its_call() -> None:
    with ANEW.Manager() as manager:
        queue = manager.Queue()
        for i in range(2):
            queue.put(stamped(i).give())
        queue.put("last")
        here, there = ANEW.Pipe()
        with running(ANEW.Process(target=_consume, args=(queue, there))):
            there.close()
            assert here.recv() == errno.EMFILE
            assert here.recv() == (1, [0, 1], "last")
        here.close()
