"""Sync files between processes: passed on in every way, and rung whoever has died meanwhile."""

import asyncio
import errno
import multiprocessing
import os
import random
import select
import signal
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaFence, DmaFenceArray, SyncFile, Timeline
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.steps import fork, reap
from tests.support.sync_files import FIRST, open_in_domain, scribble
from tests.support.ways import WAYS, bare, received, sent


def readable(fd: Any) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def two_fences(error: int = 0) -> tuple[SyncFile, DmaFence, DmaFence]:
    a, b = Timeline("a").fence(), Timeline("b").fence()
    return SyncFile(DmaFenceArray([a, b]), "both"), a, b


pytestmark = pytest.mark.usefixtures("sharer_ends")


# ---- passing on ----


def waits_in_every_way(parent: Parent, way: str) -> list[Any]:
    sf = received(parent, SyncFile, way)
    seen: list[Any] = [sf.info(), readable(sf)]
    parent.send("has it")
    select.select([sf], [], [])
    seen += [sf.wait() > 0, asyncio.run(_awaited(sf)), sf.info()]
    sf.close()
    return seen


async def _awaited(sf: SyncFile) -> int:
    return await sf


@WAYS
@pytest.mark.parametrize("error", [0, -errno.EIO], ids=["signalled", "failed"])
def test_receiver_waits_for_the_same_fences(child: Spawn, way: str, error: int) -> None:
    sf, a, b = two_fences()
    other = child(waits_in_every_way, way)
    sent(other, sf, way)
    before = sf.info()
    assert other.recv() == "has it"
    b.signal(error)
    a.signal()
    assert other.result() == [before, False, True, error or 1, sf.info()]
    sf.close()


@WAYS
def test_received_sync_file_has_results_of_signaled_fences(child: Spawn, way: str) -> None:
    sf, a, b = two_fences()
    sf.fileno()
    a.signal(-errno.EIO)
    b.signal()
    other = child(waits_in_every_way, way)
    sent(other, sf, way)
    assert other.recv() == "has it"
    assert other.result() == [sf.info(), True, True, -errno.EIO, sf.info()]
    sf.close()


def sends_on(parent: Parent) -> None:
    (sf,) = dmabuf.recv(parent.sock)
    dmabuf.send(parent.sock, sf)


def test_it_comes_back_as_the_same_fence(child: Spawn, tl: Timeline) -> None:
    fence = tl.fence()
    with SyncFile(fence, "round") as sf:
        other = child(sends_on)
        dmabuf.send(other.sock, sf)
        (back,) = dmabuf.recv(other.sock)
        assert (back.fence is fence, back.name) == (True, "round")
        back.close()
        fence.signal()


@pytest.mark.parametrize("leaves", [1, 2, 40])
def test_in_a_private_domain_it_travels_with_its_fences(leaves: int) -> None:
    domain = dmabuf.Domain.private()
    timelines = [Timeline(f"t{i}", domain=domain) for i in range(leaves)]
    fences = [timeline.fence() for timeline in timelines]
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, SyncFile(DmaFenceArray(fences), "private") as sf:
        dmabuf.send(here, domain, sf)
        _, got = dmabuf.recv(there)
        with got:
            assert (got.name, got.info()) == ("private", sf.info())
            for fence in fences:
                assert not readable(got)
                fence.signal()
            assert readable(got)


def test_in_a_private_domain_too_many_fences_are_refused() -> None:
    domain = dmabuf.Domain.private()
    fences = [Timeline(f"t{i}", domain=domain).fence() for i in range(200)]
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, SyncFile(DmaFenceArray(fences)) as sf, raises_errno(errno.EMSGSIZE):
        dmabuf.send(here, sf)
    for fence in fences:
        fence.signal()


def test_what_does_not_become_one_is_closed(tl: Timeline) -> None:
    """The slots of the sync file are gone bad: the message is refused, and nothing of it is left open."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fence = tl.fence()
    with here, there, SyncFile(fence) as sf:
        dmabuf.send(here, sf)
        scribble(sf.fileno(), False, FIRST, 0)
        with raises_errno(errno.EUCLEAN):
            dmabuf.recv(there)
        fence.signal()


def _in_a_process(line: "Connection[Any, Any]", sf: SyncFile) -> None:
    line.send(sf.info().status)
    select.select([sf], [], [])
    line.send(sf.status)
    sf.close()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_it_is_an_argument_of_a_process(method: str, tl: Timeline) -> None:
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    fence = tl.fence()
    with SyncFile(fence) as sf, here, there:
        process = context.Process(target=_in_a_process, args=(there, sf))  # type: ignore[attr-defined]
        process.start()
        assert here.recv() == 0
        fence.signal()
        assert here.recv() == 1
        process.join()
        process.close()


def test_forked_child_waits_and_its_close_leaves_the_parents_usable(tl: Timeline) -> None:
    fence = tl.fence()
    with SyncFile(fence) as sf:
        fd = sf.fileno()

        def look() -> None:
            select.select([fd], [], [])
            assert sf.wait() > 0
            sf.close()

        pid = fork(look)
        fence.signal()
        assert reap(pid) == 0
        assert readable(sf)
        assert sf.status == 1


def test_a_forked_child_makes_the_descriptor(tl: Timeline) -> None:
    fence = tl.fence()
    here, there = socket.socketpair()
    with SyncFile(fence) as sf, here, there:
        pid = fork(lambda: socket.send_fds(there, [b"x"], [sf.fileno()]))
        _, (fd,), _, _ = socket.recv_fds(here, 1, 1)
        assert reap(pid) == 0
        assert not readable(fd)
        fence.signal()
        assert readable(fd)
        os.close(fd)


# ---- deaths ----


def makes(parent: Parent, way: str) -> None:
    """A sync file of a fence that it receives, sent back; until killed."""
    (fence,) = dmabuf.recv(parent.sock)
    sf = SyncFile(fence, "made elsewhere")
    sent(parent, sf, way)
    parent.recv()


@WAYS
def test_it_works_after_its_maker_was_killed(child: Spawn, tl: Timeline, way: str) -> None:
    fence = tl.fence()
    maker = child(makes, way)
    dmabuf.send(maker.sock, fence)
    sf = received(maker, SyncFile, way)
    maker.kill()
    assert (readable(sf), sf.name) == (False, "made elsewhere")
    fence.signal()
    assert readable(sf)
    sf.close()


def test_descriptor_of_killed_maker_is_readable_when_signaled(child: Spawn, tl: Timeline) -> None:
    fence = tl.fence()
    maker = child(makes, "bare descriptor")
    dmabuf.send(maker.sock, fence)
    fd = bare(maker)
    maker.kill()
    assert not readable(fd)
    fence.signal()
    assert readable(fd)
    os.close(fd)


def owns(parent: Parent, way: str) -> None:
    """A sync file of its own fence, sent; signals when told, or is killed."""
    fence = Timeline("owner").fence()
    sf = SyncFile(fence)
    sent(parent, sf, way)
    parent.recv()
    fence.signal(-errno.EIO)
    parent.recv()


@WAYS
def test_descriptor_is_readable_when_signaler_dies(child: Spawn, way: str) -> None:
    owner = child(owns, way)
    sf = received(owner, SyncFile, way)
    sf.fileno()
    assert not readable(sf)
    owner.kill()
    select.select([sf], [], [])  # no wait of ours looks after the dead
    assert sf.status == -errno.EOWNERDEAD
    sf.close()


def test_descriptor_is_readable_when_signaler_is_reaped(child: Spawn) -> None:
    owner = child(owns, "bare descriptor")
    fd = bare(owner)
    assert not readable(fd)
    owner.kill()
    dmabuf.Domain.default().sweep()
    select.select([fd], [], [])
    with SyncFile.from_fd(fd) as sf:
        assert sf.status == -errno.EOWNERDEAD
    os.close(fd)


def test_a_merge_of_a_dead_and_a_living_ones_fences_waits_for_the_living(child: Spawn, tl: Timeline) -> None:
    owner = child(owns, "dmabuf.send")
    theirs = received(owner, SyncFile, "dmabuf.send")
    fence = tl.fence()
    with SyncFile(fence) as ours, theirs.merge(ours) as merged:
        fd = merged.dup()
        owner.kill()
        theirs.wait()
        assert not readable(fd)
        fence.signal()
        assert readable(fd)
        assert merged.status == -errno.EOWNERDEAD
        os.close(fd)
    theirs.close()


def holds_and_passes(parent: Parent) -> None:
    """Receives a sync file, and holds it until killed."""
    (sf,) = dmabuf.recv(parent.sock)
    parent.send("holds it")
    parent.recv()
    sf.close()


def test_a_killed_holder_changes_nothing_for_the_others(child: Spawn, tl: Timeline) -> None:
    fence = tl.fence()
    with SyncFile(fence) as sf:
        holder = child(holds_and_passes)
        dmabuf.send(holder.sock, sf)
        assert holder.recv() == "holds it"
        holder.kill()
        assert not readable(sf)
        fence.signal()
        assert readable(sf)


def test_one_that_is_only_in_flight_stays(child: Spawn, tl: Timeline) -> None:
    fence = tl.fence()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        sf = SyncFile(fence)
        dmabuf.send(here, sf)
        sf.close()
        dmabuf.Domain.default().sweep()
        fence.signal()
        (got,) = dmabuf.recv(there)
        assert (readable(got), got.status) == (True, 1)
        got.close()


def test_sync_file_lost_in_flight_is_gone(tl: Timeline) -> None:
    fence = tl.fence()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with SyncFile(fence) as sf:
        dmabuf.send(here, sf)
    here.close()
    there.close()
    assert open_in_domain() == 0
    fence.signal()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return tmp_path / "domain"


# ---- a domain that everybody leaves ----


def alone(parent: Parent, path: Path) -> None:
    """Two sync files in a domain that nobody else lives in, sent as bare descriptors."""
    domain = dmabuf.Domain.open(path)
    pending, ended = Timeline("alone", domain=domain).fence(), Timeline("alone", domain=domain).fence()
    with SyncFile(pending) as one, SyncFile(ended) as two:
        socket.send_fds(parent.sock, [b"x"], [one.fileno()])
        socket.send_fds(parent.sock, [b"x"], [two.fileno()])
        ended.signal()
        parent.send("signalled")
        parent.recv()
    pending.signal()


def alone_to_the_end(parent: Parent, path: Path) -> None:
    domain = dmabuf.Domain.open(path)
    fence = Timeline("alone", domain=domain).fence()
    sf = SyncFile(fence)
    socket.send_fds(parent.sock, [b"x"], [sf.dup()])
    parent.recv()
    domain.leave()


def test_last_process_to_leave_makes_readable(child: Spawn, elsewhere: Path) -> None:
    last = child(alone_to_the_end, elsewhere)
    fd = bare(last)
    assert not readable(fd)
    last.send("leave")
    last.result()
    assert readable(fd)
    assert os.listdir(elsewhere) == [dmabuf.domain.place.FILE]
    os.close(fd)


def test_next_opener_makes_readable_after_last_was_killed(child: Spawn, elsewhere: Path) -> None:
    last = child(alone, elsewhere)
    pending, ended = bare(last), bare(last)
    assert last.recv() == "signalled"
    last.kill()
    assert (readable(pending), readable(ended)) == (False, True)
    next_one = child(opens, elsewhere)
    assert next_one.result() <= 2  # 0 in a file that began again
    assert (readable(pending), readable(ended)) == (True, True)
    assert os.listdir(elsewhere) == [dmabuf.domain.place.FILE]
    os.close(ended)
    os.close(pending)


def opens(parent: Parent, path: Path) -> int:
    return open_in_domain(dmabuf.Domain.open(path))


def status_in(parent: Parent, path: Path) -> int:
    fd = bare(parent)
    with SyncFile.from_fd(fd, domain=dmabuf.Domain.open(path)) as sf:
        return sf.status


def test_sync_file_of_a_restarted_domain_is_owner_dead(child: Spawn, elsewhere: Path) -> None:
    last = child(alone_to_the_end, elsewhere)
    fd = bare(last)
    last.send("leave")
    last.result()
    asks = child(status_in, elsewhere)
    socket.send_fds(asks.sock, [b"x"], [fd])
    assert asks.result() == -errno.EOWNERDEAD
    os.close(fd)


def test_one_of_a_domain_that_we_do_not_have_is_refused(child: Spawn, elsewhere: Path) -> None:
    other = child(alone, elsewhere)
    fds = bare(other), bare(other)
    with raises_errno(errno.EXDEV):
        SyncFile.from_fd(fds[0])
    other.send("end")
    other.result()
    for fd in fds:
        os.close(fd)


# ---- a signal while one waits for it in another process ----


def waits_interruptibly(parent: Parent) -> str:
    (sf,) = dmabuf.recv(parent.sock)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    parent.send("waiting")
    try:
        sf.wait(interruptible=True)
    except InterruptedError:
        return "EINTR"
    finally:
        sf.close()
    return "ended"


def test_a_wait_elsewhere_is_interrupted(child: Spawn, tl: Timeline) -> None:
    from tests.support.waiting import until_asleep

    fence = tl.fence()
    with SyncFile(fence) as sf:
        other = child(waits_interruptibly)
        dmabuf.send(other.sock, sf)
        assert other.recv() == "waiting"
        # Again while it is on its way to the wait: what comes there ends nothing.
        while not other.has_sent():
            until_asleep(other.pid, over=other.has_sent)
            os.kill(other.pid, signal.SIGUSR1)
        assert other.result() == "EINTR"
        fence.signal()


# ---- many at once ----


def signals_when_told(parent: Parent, rounds: int) -> None:
    """A fence a round, sent; all of the others are signalled at the same moment."""
    timeline = Timeline("one of many")
    for _ in range(rounds):
        fence = timeline.fence()
        dmabuf.send(parent.sock, fence)
        parent.sock.recv(1)
        fence.signal()


@pytest.mark.parametrize("rounds", [15, pytest.param(2000, marks=pytest.mark.long)])
def test_last_signaler_of_many_makes_readable(child: Spawn, rounds: int) -> None:
    others = [child(signals_when_told, rounds) for _ in range(4)]
    for _ in range(rounds):
        fences = [dmabuf.recv(other.sock)[0] for other in others]
        sf = SyncFile(DmaFenceArray(fences))
        fd = sf.dup()
        sf.close()  # nobody is left who has the SyncFile: only those who signal can ring
        for other in others:
            other.sock.send(b"g")
        select.select([fd], [], [])
        with SyncFile.from_fd(fd) as late:
            assert late.info().status == 1
        os.close(fd)
        del fences, sf
    for other in others:
        other.result()
    assert open_in_domain() == 0


def makes_and_passes(parent: Parent, rounds: int, seed: int) -> None:
    """Sync files of its own fence and the last ones it was sent, passed on as bare descriptors; killed at any moment."""
    chance = random.Random(seed)
    timeline = Timeline("killed")
    kept: list[DmaFence] = []
    for _ in range(rounds):
        fence = timeline.fence()
        kept.append(fence)
        sf = SyncFile(DmaFenceArray(chance.sample(kept, min(len(kept), 3))))
        socket.send_fds(parent.sock, [b"x"], [sf.fileno()])
        if chance.random() < 0.7:
            kept.pop(chance.randrange(len(kept))).signal()
        if chance.random() < 0.5:
            sf.close()
    parent.recv()


@pytest.mark.crash
@pytest.mark.parametrize("kills", [6, pytest.param(300, marks=pytest.mark.long)])
def test_random_kills_leave_every_descriptor_readable_and_no_slot_in_use(child: Spawn, kills: int) -> None:
    chance = random.Random(7)
    for seed in range(kills):
        other = child(makes_and_passes, 10_000, seed)
        fds = [bare(other) for _ in range(chance.randrange(1, 40))]
        other.kill()
        dmabuf.Domain.default().sweep()
        assert [fd for fd in fds if not readable(fd)] == []
        for fd in fds:
            with SyncFile.from_fd(fd) as sf:
                assert sf.status in (1, -errno.EOWNERDEAD)
            os.close(fd)
        other.sock.close()
        assert open_in_domain() == 0
