"""Queues of multiprocessing between processes that run out of descriptors."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from typing import Any

import pytest

import dmabuf
from dmabuf.sharing import keeping
from tests.sharing.conftest import SIZE
from tests.support.errnos import raises_errno
from tests.support.queues import ANEW, running, stamp, stamped

pytestmark = pytest.mark.usefixtures("keepers_are_reaped")


def _produce(queue: Any, count: int, limit: int, end: Any) -> None:
    if limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    for i in range(count):
        queue.put(stamped(i % 256))
    queue.put(None)
    end.wait()


def _consume(queue: Any, limit: int, answers: Any) -> None:
    """Keep what is received until no descriptor is left, then close that and go on."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    got: list[int] = []
    held: list[dmabuf.DmaBuf] = []
    errors: list[tuple[int, str]] = []
    while True:
        try:
            buf = queue.get()
        except OSError as e:
            errors.append((e.errno or 0, str(e)))
            got += map(stamp, held)
            held.clear()
            continue
        if buf is None:
            break
        held.append(buf)
    got += map(stamp, held)
    answers.put((got, errors))


@pytest.mark.parametrize(("kind", "arguments"), [("Queue", ()), ("Queue", (3,)), ("JoinableQueue", ()), ("SimpleQueue", ())])
def test_consumer_without_descriptors_is_told_and_loses_nothing(kind: str, arguments: tuple[int, ...]) -> None:
    queue, answers, end = getattr(ANEW, kind)(*arguments), ANEW.Queue(), ANEW.Event()
    with (
        running(ANEW.Process(target=_consume, args=(queue, 32, answers))),
        running(ANEW.Process(target=_produce, args=(queue, 40, 0, end))),
    ):
        got, errors = answers.get()
        assert got == list(range(40))
        assert errors
        for number, text in errors:
            assert number == errno.EMFILE
            assert "RLIMIT_NOFILE" in text
            assert "the next get() or recv() gives it again" in text
        end.set()
    queue.close()
    answers.close()


def _consume_pairs(queue: Any, answers: Any, opened: bool) -> None:
    if opened:
        dmabuf.allocate(SIZE).close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    for room in (2, 20) if opened else (0, 30):
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for fd in taken[len(taken) - room :]:
            os.close(fd)
        try:
            pair = queue.get()
        except OSError as e:
            answers.put(e.errno)
        else:
            answers.put(list(map(stamp, pair)))
        for fd in taken[: len(taken) - room]:
            os.close(fd)


@pytest.mark.parametrize("opened", [True, False])
def test_message_with_several_buffers_is_received_whole_after_emfile(opened: bool) -> None:
    queue, answers = ANEW.SimpleQueue(), ANEW.SimpleQueue()
    bufs = [stamped(i) for i in range(2)]
    with running(ANEW.Process(target=_consume_pairs, args=(queue, answers, opened))):
        queue.put(bufs)
        assert answers.get() == errno.EMFILE
        assert answers.get() == [0, 1]
    for made in (*bufs, queue, answers):
        made.close()


def _produce_without_room(queue: Any, count: int, end: Any) -> None:
    bufs = [stamped(i) for i in range(count)]
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 4  # one for the socket, and two or three to keep
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    for buf in bufs:
        queue.put(buf)
    end.wait()


def test_producer_without_descriptors_waits_for_the_consumer_and_loses_nothing() -> None:
    queue, end = ANEW.Queue(), ANEW.Event()
    with running(ANEW.Process(target=_produce_without_room, args=(queue, 20, end))):
        assert [stamp(queue.get()) for _ in range(20)] == list(range(20))
        end.set()
    queue.close()


def _produce_with_no_room(queue: Any, end: Any) -> None:
    keeping.ROOM_S = 0.1  # type: ignore[misc]
    buf = stamped(1)
    number = os.open("/dev/null", os.O_RDONLY)
    os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))
    queue.put(buf)
    end.wait()


def test_producer_that_stays_without_descriptors_tells_the_consumer() -> None:
    queue, end = ANEW.Queue(), ANEW.Event()
    with running(ANEW.Process(target=_produce_with_no_room, args=(queue, end))) as process:
        with raises_errno(errno.EMFILE) as caught:
            stamp(_without_proc(queue))
        assert f"process {process.pid} (" in str(caught.value)
        assert "RLIMIT_NOFILE" in str(caught.value)
        end.set()
    queue.close()


def _without_proc(queue: Any) -> Any:
    """What is in the queue, without the way through /proc/PID/fd of its producer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmabuf.sharing.opening.reopen", _no_way)
        return queue.get()


def _no_way(_: object) -> Any:
    raise dmabuf.DmaBufError(errno.ENOENT, "not this way")
