"""One software timeline in several processes: every holder moves it on, and holders die in every state."""

import errno
import math
import multiprocessing
import os
import select
import signal
import socket
from typing import Any

import pytest

import dmabuf
from dmabuf import SwSync
from dmabuf._native import TICK_FENCE
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.steps import Held, fork, killed_at, reap, trace
from tests.support.waiting import Background, until, until_asleep
from tests.support.ways import WAYS, received, sent

pytestmark = pytest.mark.usefixtures("sharer_ends")


def increments(parent: Parent, way: str, n: int) -> tuple[str, int, int]:
    with received(parent, SwSync, way) as sw:
        sw.inc(n)
        return sw.name, sw.context, sw.value


@WAYS
def test_sync_busy_fork_unixsocket(child: Spawn, way: str) -> None:
    """IGT sw_sync: the timeline's descriptor passed over a socket; what the child moves on ends the parent's fence."""
    with SwSync("shared") as sw, sw.create_fence(3) as sf:
        fd = sf.fileno()
        other = child(increments, way, 2)
        sent(other, sw, way)
        assert other.result() == ("shared", sw.context, 2)
        assert (sf.status, select.select([fd], [], [], 0)[0]) == (0, [])
        other = child(increments, way, 1)
        sent(other, sw, way)
        assert other.result() == ("shared", sw.context, 3)
        assert (sf.status, select.select([fd], [], [], 0)[0]) == (1, [fd])


def waits_for(parent: Parent) -> tuple[float, int, bool]:
    (sf,) = dmabuf.recv(parent.sock)
    with sf:
        fd = sf.fileno()
        parent.send("waiting")
        left = sf.wait()
        return left, sf.info().status, select.select([fd], [], [])[0] == [fd]  # rung after the sleepers were woken


def test_timeline_closed(child: Spawn) -> None:
    """IGT sw_sync, the wait being another process's: it returns, and the status says why."""
    with SwSync() as sw, sw.create_fence(1) as sf:
        other = child(waits_for)
        dmabuf.send(other.sock, sf)
        assert other.recv() == "waiting"
        until_asleep(other.pid)
        sw.close()
        assert other.result() == (math.inf, -errno.ENOENT, True)


def merges_with_nonsense(parent: Parent) -> list[int | None]:
    (sf,) = dmabuf.recv(parent.sock)
    found: list[int | None] = []
    with sf, open("/dev/null") as device, open(__file__) as plain:
        for other in (-1, device.fileno(), plain.fileno()):
            try:
                sf.merge(other)
            except OSError as e:
                found.append(e.errno)
    return found


def test_sync_merge_invalid(child: Spawn) -> None:
    """IGT sw_sync, by who received the sync file."""
    with SwSync() as sw, sw.create_fence(1) as sf:
        other = child(merges_with_nonsense)
        dmabuf.send(other.sock, sf)
        assert other.result() == [errno.ENOENT] * 3


def test_a_forked_child_moves_it_on() -> None:
    with SwSync() as sw, sw.create_fence(1) as sf:
        assert reap(fork(sw.inc)) == 0
        assert (sf.status, sw.value) == (1, 1)


def test_a_forked_child_that_closes_it_ends_nothing() -> None:
    with SwSync() as sw, sw.create_fence(1) as sf:
        assert reap(fork(sw.close)) == 0
        assert sf.status == 0
        sw.inc()
        assert sf.status == 1


def test_a_forked_child_makes_fences_of_its_own() -> None:
    with SwSync() as sw:

        def make() -> None:
            with sw.create_fence(1) as sf:
                assert sf.status == 0
                sw.inc()
                assert sf.status == 1

        assert reap(fork(make)) == 0
        assert sw.value == 1


def _in_a_process(sw: SwSync) -> None:
    sw.inc(2)
    sw.close()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_it_is_an_argument_of_a_process(method: str) -> None:
    with SwSync() as sw, sw.create_fence(2) as sf:
        process: Any = multiprocessing.get_context(method).Process(target=_in_a_process, args=(sw,))  # type: ignore[attr-defined]
        process.start()
        process.join()
        process.close()
        assert sf.status == 1


# ---- fences of several holders ----


def makes(parent: Parent, value: int) -> int:
    """Makes a fence, sends its sync file, and goes on as told."""
    with received(parent, SwSync, "dmabuf.send") as sw:
        sf = sw.create_fence(value)
        dmabuf.send(parent.sock, sf)
        parent.recv()
        return sf.wait() > 0


def test_inc_signals_fences_of_another_holder(child: Spawn) -> None:
    with SwSync() as sw:
        other = child(makes, 2)
        dmabuf.send(other.sock, sw)
        (theirs,) = dmabuf.recv(other.sock)
        ours = sw.create_fence(1)
        sw.inc(1)
        assert (ours.status, theirs.status) == (1, 0)
        sw.inc(1)
        assert theirs.status == 1  # before inc() returns
        other.send("go on")
        assert other.result() is True
        theirs.close()


def test_the_same_pending_value_is_one_fence_in_every_process(child: Spawn) -> None:
    with SwSync() as sw:
        other = child(makes, 7)
        dmabuf.send(other.sock, sw)
        (theirs,) = dmabuf.recv(other.sock)
        with sw.create_fence(7) as ours, ours.merge(theirs) as both:
            assert ours.fence == theirs.fence
            assert both.info().num_fences == 1
        theirs.close()
        other.send("go on")
        sw.inc(7)
        other.result()


def test_callbacks_run_where_they_were_added(child: Spawn) -> None:
    with SwSync() as sw, sw.create_fence(1) as sf:
        import threading

        called = threading.Event()
        sf.fence.add_callback(lambda _: called.set())
        other = child(increments, "dmabuf.send", 1)
        dmabuf.send(other.sock, sw)
        called.wait()
        other.result()


def test_waiter_is_woken_by_inc_of_another_holder(child: Spawn) -> None:
    with SwSync() as sw, sw.create_fence(1) as sf, Background(sf.wait) as job:
        job.until_blocked()
        other = child(increments, "dmabuf.send", 1)
        dmabuf.send(other.sock, sw)
        assert job.result() > 0
        other.result()


def test_await_is_woken_by_the_inc_of_another_holder(child: Spawn) -> None:
    import asyncio

    async def main() -> int:
        return await sf

    with SwSync() as sw, sw.create_fence(1) as sf:
        other = child(increments, "dmabuf.send", 1)
        dmabuf.send(other.sock, sw)
        assert asyncio.run(main()) == 1
        other.result()


# ---- ends and deaths ----


def holds(parent: Parent) -> None:
    sw = received(parent, SwSync, "dmabuf.send")
    parent.send("holds")
    if parent.recv() == "close":
        sw.close()
        parent.send("closed")
        parent.recv()


def test_close_signals_nothing_while_another_process_has_it(child: Spawn) -> None:
    sw = SwSync()
    sf = sw.create_fence(1)
    other = child(holds)
    dmabuf.send(other.sock, sw)
    assert other.recv() == "holds"
    sw.close()
    assert sf.status == 0
    other.send("close")
    assert other.recv() == "closed"
    assert sf.status == -errno.ENOENT
    other.send("end")
    other.result()
    sf.close()


@pytest.mark.parametrize("how", ["wait", "select"])
def test_death_of_last_holder_signals_own_fences(child: Spawn, how: str) -> None:
    sw = SwSync()
    sf = sw.create_fence(1)
    fd = sf.fileno()
    other = child(holds)
    dmabuf.send(other.sock, sw)
    assert other.recv() == "holds"
    sw.close()
    other.kill()
    if how == "wait":
        assert sf.wait() > 0
    else:
        select.select([fd], [], [])
    assert sf.status == -errno.ENOENT
    sf.close()
    del sw
    until(lambda: not any(name.startswith("SwSync ") for name in dmabuf.Domain.default().tick_hooks))


def test_last_holder_dies_while_a_fence_of_a_closed_timeline_is_signaled(child: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread looks which fences are pending while another finds that nobody holds the timeline any more."""
    sw = SwSync()
    files = [sw.create_fence(value) for value in (1, 2)]
    other = child(holds)
    dmabuf.send(other.sock, sw)
    assert other.recv() == "holds"
    look, ticked = SwSync._own_pending, []

    def look_while_another_ticks(timeline: SwSync) -> list[int]:
        if not ticked:
            ticked.append(True)
            other.kill()
            with Background(lambda: dmabuf.Domain.default().tick_hooks(TICK_FENCE, 0)):
                pass
        return look(timeline)

    sw.close()
    (name,) = (name for name in dmabuf.Domain.default().tick_hooks if name.startswith("SwSync "))
    monkeypatch.setattr(SwSync, "_own_pending", look_while_another_ticks)
    guard = dmabuf.Domain.default().tick_hooks.get(name).__self__  # type: ignore[attr-defined]
    guard.next(0)
    assert ticked
    for file in files:
        file.wait()
        assert file.status == -errno.ENOENT
        file.close()
    until(lambda: name not in dmabuf.Domain.default().tick_hooks)


def test_the_death_of_another_holder_changes_nothing(child: Spawn) -> None:
    with SwSync() as sw, sw.create_fence(1) as sf:
        other = child(holds)
        dmabuf.send(other.sock, sw)
        assert other.recv() == "holds"
        other.kill()
        dmabuf.Domain.default().sweep()
        assert sf.status == 0
        sw.inc()
        assert sf.status == 1


def test_a_fence_ends_with_the_process_that_made_it(child: Spawn) -> None:
    with SwSync() as sw:
        other = child(makes, 5)
        dmabuf.send(other.sock, sw)
        (theirs,) = dmabuf.recv(other.sock)
        other.kill()
        assert theirs.wait() > 0
        assert theirs.status == -errno.EOWNERDEAD
        with sw.create_fence(5) as ours:  # a fence of our own: the old one is not shared any more
            assert ours.status == 0
            sw.inc(5)
            assert ours.status == 1
        theirs.close()


def exits_with_it(parent: Parent) -> None:
    sw = SwSync()
    sf = sw.create_fence(1)
    dmabuf.send(parent.sock, sf)
    parent.recv()
    parent.keep = (sw, sf)  # type: ignore[attr-defined]


def test_an_exit_closes_it(child: Spawn) -> None:
    other = child(exits_with_it)
    (sf,) = dmabuf.recv(other.sock)
    other.send("exit")
    other.result()
    assert sf.wait() > 0
    assert sf.status in (-errno.ENOENT, -errno.EOWNERDEAD)
    sf.close()


def test_in_a_private_domain_it_travels_with_its_domain() -> None:
    domain = dmabuf.Domain.private()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, SwSync("private", domain=domain) as sw, sw.create_fence(1) as sf:
        dmabuf.send(here, domain, sw)
        _, again = dmabuf.recv(there)
        with again:
            again.inc()
        assert (sf.status, again.closed) == (1, True)


# ---- killed at every step ----


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_wherever_an_inc_is_killed_the_count_and_the_fences_agree() -> None:
    def action() -> None:
        sw.inc(4)

    with SwSync() as sw:
        files = [sw.create_fence(value) for value in (1, 2, 4)]
        steps = trace(action)
        assert {"sw_counted", "sw_ended"} <= set(steps)
    for count in range(1, len(steps) + 1):
        with SwSync() as sw:
            files = [sw.create_fence(value) for value in (1, 2, 4, 9)]
            assert killed_at(action, count) == -signal.SIGKILL
            value = sw.value
            ended = [value_ for value_, sf in zip((1, 2, 4, 9), files, strict=True) if sf.status == 1]
            assert all(at <= value for at in ended)
            # At most the one that the dead was about to end is due and pending; the next step ends it.
            assert len([at for at in (1, 2, 4, 9) if at <= value and at not in ended]) <= 1
            sw.inc(0)
            assert [sf.status for sf in files] == [int(at <= value) for at in (1, 2, 4, 9)]
            sw.inc(9 - value)
            assert [sf.status for sf in files] == [1] * 4


@pytest.mark.crash
@pytest.mark.parametrize("step", ["sw_counted", "fence_signaled", "fence_dispatchers_woken", "sync_done", "sync_readable", "sw_ended"])
def test_an_inc_that_is_killed_leaves_no_bare_descriptor_to_the_next_one(step: str) -> None:
    with SwSync() as sw:
        with sw.create_fence(1) as sf:
            fd = sf.dup()
        with Held(sw.inc, only=step) as other:
            assert other.run_to(step)
            other.kill()
        sw.inc()
        assert select.select([fd], [], [], 0)[0] == [fd]
        os.close(fd)


@pytest.mark.crash
def test_owner_poll_makes_readable_after_inc_was_killed_before_it() -> None:
    with SwSync() as sw, sw.create_fence(1) as sf:
        fd = sf.fileno()
        with Held(sw.inc, only="fence_signaled") as other:
            assert other.run_to("fence_signaled")
            other.kill()
        assert select.select([fd], [], [])[0] == [fd]


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_others_continue_wherever_maker_of_fence_is_killed() -> None:
    def action() -> None:
        for sf in [sw.create_fence(value) for value in (30, 31)]:
            sf.close()

    with SwSync() as sw:
        steps = trace(action)
        assert "sw_entered" in steps
    for count in range(1, len(steps) + 1):
        with SwSync() as sw, sw.create_fence(5) as ours:
            killed_at(action, count)
            dmabuf.Domain.default().sweep()
            with sw.create_fence(30) as later:
                sw.inc(5)
                assert (ours.status, later.status) == (1, 0)
                sw.inc(25)
                assert later.status == 1


@pytest.mark.crash
def test_who_is_killed_with_the_lock_leaves_it_free() -> None:
    with SwSync() as sw, sw.create_fence(1) as sf:
        with Held(sw.inc, only="sw_counted") as other:
            assert other.run_to("sw_counted")
            with Background(lambda: sw.create_fence(9)) as job:
                job.until_blocked()
                assert not job.done
                other.kill()
                job.result().close()
        sw.inc()
        assert sf.status == 1


@pytest.mark.crash
def test_compacted_list_loses_nothing_when_killed() -> None:
    def action() -> None:
        sw.create_fence(2_000_000).close()

    with SwSync() as sw, sw.create_fence(1_000_000) as first:
        ended = [sw.create_fence(value) for value in range(1, 100)]
        with sw.create_fence(1_500_000) as last:
            sw.inc(200)
            assert killed_at(action, 1) == -signal.SIGKILL
            for count in range(1, len(trace(action)) + 1):
                killed_at(action, count)
                assert sw.statistics().pending >= 2
            sw.inc(1_500_000)
            assert (first.status, last.status) == (1, 1)
        del ended


def test_a_call_in_the_middle_of_a_call_is_refused() -> None:
    with SwSync() as sw, sw._file.locked(), raises_errno(errno.EDEADLK):
        sw.inc()
