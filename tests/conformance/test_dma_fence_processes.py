"""Fences across processes: one process signals, others find the fence in a reservation, wait, and are called."""

import asyncio
import errno
import gc
import math
import os
import random
import threading

import pytest

import dmabuf
from dmabuf import DmaBuf, Timeline, Usage
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import attach, the_fence
from tests.support.partners import handed
from tests.support.waiting import Background, until_asleep

ERRORS = pytest.mark.parametrize("error", [0, -errno.EIO, -4095])


def found(parent: Parent) -> tuple[DmaBuf, dmabuf.DmaFence]:
    """The buffer that the test sent, and the fence in it."""
    (buf,) = dmabuf.recv(parent.sock)
    return buf, the_fence(buf)


def waits(parent: Parent) -> tuple[int, float, int, int]:
    _, fence = found(parent)
    before = fence.status
    parent.send("waiting")
    remaining = fence.wait()
    return before, remaining, fence.status, fence.timestamp


def awaits(parent: Parent) -> int:
    _, fence = found(parent)
    parent.send("waiting")

    async def main() -> int:
        return await fence

    return asyncio.run(main())


def adds_callbacks(parent: Parent) -> list[object]:
    _, fence = found(parent)
    seen: list[object] = []
    last = threading.Event()
    removed = fence.add_callback(lambda *_: seen.append("removed"))
    fence.add_callback(lambda *_: seen.append("first"))
    fence.add_callback(lambda *_: seen.append(fence.status))
    fence.add_callback(lambda *_: last.set())
    assert fence.remove_callback(removed) is True
    parent.send("added")
    last.wait()
    return seen


def adds_a_late_callback(parent: Parent) -> list[object]:
    _, fence = found(parent)
    called: list[object] = []
    parent.send("found")
    parent.recv()
    with raises_errno(errno.ENOENT, FileNotFoundError):
        fence.add_callback(called.append)
    return called


def meddles(parent: Parent, what: str) -> tuple[int | None, int]:
    _, fence = found(parent)
    try:
        fence.signal() if what == "signal" else fence.set_error(-errno.EIO)
    except OSError as error:
        return error.errno, fence.status
    return None, fence.status


def looks_later(parent: Parent) -> tuple[int, float]:
    _, fence = found(parent)
    parent.send("found")
    parent.recv()
    return fence.status, fence.wait(0)


def sets_a_deadline(parent: Parent, deadline: int) -> int | None:
    _, fence = found(parent)
    fence.set_deadline(deadline)
    return fence.deadline


def makes_a_timeline(parent: Parent) -> int:
    return dmabuf.Timeline("of a child").context


def races(parent: Parent) -> tuple[int, int]:
    (buf,) = dmabuf.recv(parent.sock)
    added = seen = 0
    parent.send("ready")
    while parent.recv() == "go":
        for fence in buf.resv.fences(Usage.BOOKKEEP):
            called = threading.Event()
            try:
                fence.add_callback(lambda *_, called=called: called.set())
            except FileNotFoundError:
                continue
            added += 1
            called.wait()
            seen += 1
        parent.send("done")
    return added, seen


def lets_a_fork_signal(parent: Parent) -> tuple[int, int, int]:
    line = dmabuf.Timeline("forked")
    fence = line.fence()
    pid = os.fork()
    if pid == 0:
        try:
            fence.signal()
        except OSError as error:
            os._exit(error.errno or 255)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    inherited = fence.status
    fence.signal()
    line.close()
    return os.waitstatus_to_exitcode(status), inherited, fence.status


@ERRORS
def test_a_signal_wakes_another_process_which_sees_status_and_timestamp(child: Spawn, buf: DmaBuf, tl: Timeline, error: int) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.BOOKKEEP)
    other = handed(child(waits), buf, says="waiting")
    until_asleep(other.pid)
    fence.signal(error=error)
    assert other.result() == (0, math.inf, error or 1, fence.timestamp)


def test_many_processes_wait_for_one_fence(child: Spawn, buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.BOOKKEEP)
    others = [child(waits) for _ in range(3)]
    for other in others:
        dmabuf.send(other.sock, buf)
        assert other.recv() == "waiting"
        until_asleep(other.pid)
    fence.signal()
    assert [other.result()[2] for other in others] == [1, 1, 1]


@ERRORS
def test_another_process_awaits_the_status(child: Spawn, buf: DmaBuf, tl: Timeline, error: int) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.BOOKKEEP)
    other = handed(child(awaits), buf, says="waiting")
    until_asleep(other.pid)
    fence.signal(error=error)
    assert other.result() == (error or 1)


@ERRORS
def test_callbacks_of_another_process_run_there_in_order(child: Spawn, buf: DmaBuf, tl: Timeline, error: int) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.BOOKKEEP)
    other = handed(child(adds_callbacks), buf, says="added")
    fence.signal(error=error)
    assert other.result() == ["first", error or 1]


def test_a_late_callback_of_another_process_is_enoent_and_never_called(child: Spawn, buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.BOOKKEEP)
    other = handed(child(adds_a_late_callback), buf, says="found")
    fence.signal()
    other.send("signalled")
    assert other.result() == []


@pytest.mark.parametrize("what", ["signal", "set_error"])
def test_only_the_process_of_the_timeline_may_signal(child: Spawn, buf: DmaBuf, tl: Timeline, what: str) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.BOOKKEEP)
    other = handed(child(meddles, what), buf)
    assert other.result() == (errno.EPERM, 0)
    fence.signal()
    assert fence.status == 1


def test_a_fork_cannot_signal_what_it_inherited(child: Spawn) -> None:
    assert child(lets_a_fork_signal).result() == (errno.EPERM, 0, 1)


@pytest.mark.parametrize("more", [0, 10])
def test_late_process_still_sees_the_error(child: Spawn, buf: DmaBuf, tl: Timeline, more: int) -> None:
    """Also when the owner has let go of the fence, and made others since."""
    fence = tl.fence()
    attach(buf.resv, fence, Usage.BOOKKEEP)
    other = handed(child(looks_later), buf, says="found")
    fence.signal(error=-errno.EIO)
    del fence
    gc.collect()
    for _ in range(more):
        tl.fence().signal()
    other.send("look")
    status, remaining = other.result()
    assert status == -errno.EIO
    assert remaining > 0


def test_closing_the_timeline_ends_the_wait_of_another_process_with_enoent(child: Spawn, buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.BOOKKEEP)
    other = handed(child(waits), buf, says="waiting")
    until_asleep(other.pid)
    tl.close()
    assert other.result()[:3] == (0, math.inf, -errno.ENOENT)


def test_dropping_a_fence_ends_the_wait_of_another_process_with_edeadlk(child: Spawn, buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.BOOKKEEP)
    other = handed(child(waits), buf, says="waiting")
    until_asleep(other.pid)
    with pytest.warns(ResourceWarning):
        del fence
    assert other.result()[:3] == (0, math.inf, -errno.EDEADLK)


def test_a_deadline_of_another_process_reaches_the_owner(child: Spawn, buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.BOOKKEEP)
    for deadline, earliest in ((9000, 9000), (5000, 5000), (7000, 5000)):
        other = handed(child(sets_a_deadline, deadline), buf)
        assert other.result() == earliest
        assert fence.deadline == earliest
    fence.signal()


def test_contexts_are_not_shared_between_processes(child: Spawn, tl: Timeline) -> None:
    contexts = [child(makes_a_timeline).result() for _ in range(3)]
    assert len({tl.context, *contexts}) == 4


def test_race_signal_callback(child: Spawn, buf: DmaBuf, tl: Timeline) -> None:
    """Another process adds callbacks while the fence is being signalled: each that was added is called."""
    order = random.Random(1)
    other = handed(child(races), buf, says="ready")
    for _ in range(300):
        fence = tl.fence()
        attach(buf.resv, fence, Usage.BOOKKEEP)
        other.send("go")
        for _ in range(order.randrange(200)):
            os.sched_yield()
        fence.signal()
        assert other.recv() == "done"
    other.send("end")
    added, seen = other.result()
    assert seen == added


def test_first_callback_runs_when_owner_dies(child: Spawn, buf: DmaBuf) -> None:
    """Watching nothing, the dispatcher sleeps without ticks; a death is found at a tick."""
    for dies in (False, True):
        other = handed(child(signals_on_demand), buf, says="added")
        fence, called = the_fence(buf), threading.Event()
        fence.add_callback(lambda *_, called=called: called.set())
        if dies:
            other.kill()
        else:
            other.send("signal")
        called.wait()
        until_asleep(os.getpid(), next(t.native_id for t in threading.enumerate() if t.name == "dmabuf-dispatcher"))
    assert fence.status == -errno.EOWNERDEAD


def test_signals_in_both_directions(child: Spawn, buf: DmaBuf, tl: Timeline) -> None:
    """Each side waits for the other's next fence, many times over: a signal is never lost."""
    rounds = 500
    other = handed(child(answers, rounds), buf, says="ready")
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    for _ in range(rounds):
        other.send("mine is there")
        assert other.recv() == "mine too"
        (theirs,) = [found for found in buf.resv.fences(Usage.BOOKKEEP) if found.context != tl.context]
        following = tl.fence()
        fence.signal()
        assert theirs.wait() == math.inf
        attach(buf.resv, following, Usage.WRITE)
        fence = following
    fence.signal()
    assert other.result() == rounds


def answers(parent: Parent, rounds: int) -> int:
    (buf,) = dmabuf.recv(parent.sock)
    line = dmabuf.Timeline("answer")
    parent.send("ready")
    for _ in range(rounds):
        parent.recv()
        (theirs,) = [found for found in buf.resv.fences(Usage.BOOKKEEP) if found.context != line.context]
        mine = line.fence()
        attach(buf.resv, mine, Usage.READ)
        parent.send("mine too")
        theirs.wait()
        mine.signal()
    line.close()
    return rounds


def test_waiting_in_a_thread_for_another_process(child: Spawn, buf: DmaBuf) -> None:
    other = handed(child(signals_on_demand), buf, says="added")
    fence = the_fence(buf)
    with Background(fence.wait) as job:
        job.until_blocked()
        assert not job.done
        other.send("signal")
        assert job.result() == math.inf
    assert fence.status == 1


def signals_on_demand(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    fence = dmabuf.Timeline("child").fence()
    attach(buf.resv, fence, Usage.WRITE)
    parent.send("added")
    parent.recv()
    fence.signal()
