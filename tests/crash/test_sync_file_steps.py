"""SIGKILL at every step of making a sync file's descriptor, ringing it and closing it, while a program waits for the bare descriptor."""

import errno
import os
import select
import signal
import socket
from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import DmaFence, DmaFenceArray, SyncFile, Timeline
from dmabuf.domain.sync_files import place_of, slots_of
from tests.support.steps import Held, fork, killed_at, reap, trace
from tests.support.sync_files import open_in_domain

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]

Action = Callable[[], None]


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def received(sock: socket.socket) -> list[int]:
    """The descriptors that came before the end."""
    fds: list[int] = []
    while True:
        text, some, _, _ = socket.recv_fds(sock, 1, 8)
        if not text:
            return fds
        fds += some


def makes_and_signals(there: socket.socket) -> None:
    """Everything in one process: the fences, the descriptor, the end of both fences."""
    a, b = Timeline("a").fence(), Timeline("b").fence()
    sf = SyncFile(DmaFenceArray([a, b]))
    socket.send_fds(there, [b"x"], [sf.fileno()])
    a.signal()
    b.signal()
    sf.close()


def ends_the_first(there: socket.socket, theirs: DmaFence) -> None:
    """Its own fence ends, one of the test's is still pending."""
    own = Timeline("own").fence()
    sf = SyncFile(DmaFenceArray([own, theirs]))
    socket.send_fds(there, [b"x"], [sf.fileno()])
    own.signal()


def closes(there: socket.socket, theirs: DmaFence) -> None:
    sf = SyncFile(theirs)
    socket.send_fds(there, [b"x"], [sf.fileno()])
    sf.close()


def killed_everywhere(action: Callable[[socket.socket], None], after: Callable[[list[int], int], None]) -> None:
    """Run the action once for every step of it; `after` gets the descriptors that were sent, and the step's number."""

    def run(kill: Callable[[Action], int]) -> list[int]:
        here, there = socket.socketpair()

        def child() -> None:
            here.close()
            action(there)

        with here:
            kill(child)
            there.close()
            return received(here)

    steps: list[str] = []

    def reaped(child: Action) -> int:
        return reap(fork(child))

    def traced(child: Action) -> int:
        steps.extend(trace(child))
        return 0

    for child in (reaped, traced):  # once before, so that every chunk is there: the steps of making one come only once
        dmabuf.Domain.default().sweep()  # what the one before has left is not among the steps of the next
        for fd in run(child):
            os.close(fd)
    assert {"sync_bound", "sync_written", "sync_registered", "sync_marked"} <= set(steps)
    dmabuf.Domain.default().sweep()
    for count in range(1, len(steps) + 1):
        codes: list[int] = []

        def kill(child: Action, count: int = count, codes: list[int] = codes) -> int:
            codes.append(killed_at(child, count))
            return 0

        fds = run(kill)
        # The traced run may have passed steps of its own, as it was the first to need a chunk.
        assert codes[0] == -signal.SIGKILL or (codes[0] == 0 and count > len(steps) - 8), steps[count - 1]
        after(fds, count)
        for fd in fds:
            os.close(fd)
        assert open_in_domain() == 0, steps[count - 1]


def test_wherever_who_made_and_signals_dies_it_is_rung_and_nothing_is_left() -> None:
    def after(fds: list[int], _: int) -> None:
        dmabuf.Domain.default().sweep()
        assert all(map(readable, fds))
        for fd in fds:
            with SyncFile.from_fd(fd) as sf:
                assert sf.status in (1, -errno.EOWNERDEAD)

    killed_everywhere(makes_and_signals, after)


def test_wherever_one_of_two_signallers_dies_the_other_rings() -> None:
    timeline = Timeline("test")
    left: list[DmaFence] = [timeline.fence()]

    def after(fds: list[int], _: int) -> None:
        dmabuf.Domain.default().sweep()
        assert not any(map(readable, fds))
        left[0].signal()
        assert all(map(readable, fds))
        left[0] = timeline.fence()

    killed_everywhere(lambda there: ends_the_first(there, left[0]), after)
    left[0].signal()


def test_wherever_who_closes_dies_the_descriptor_goes_on() -> None:
    timeline = Timeline("test")
    left: list[DmaFence] = [timeline.fence()]

    def after(fds: list[int], _: int) -> None:
        assert not any(map(readable, fds))
        left[0].signal()
        assert all(map(readable, fds))
        left[0] = timeline.fence()

    killed_everywhere(lambda there: closes(there, left[0]), after)
    left[0].signal()


@pytest.mark.parametrize("step", ["sync_moved", "sync_done", "sync_readable", "sync_over"])
def test_two_who_go_on_at_once_ring_once(step: str) -> None:
    """The signaller stands in the middle while another process goes on with the same sync file, and then it goes on itself."""
    here, there = socket.socketpair()
    with here, Held(lambda: makes_and_signals(there), only=step) as other:
        there.close()
        assert other.run_to(step)
        (fd,) = socket.recv_fds(here, 1, 1)[1]
        assert dmabuf.Domain.default().wake_sync_files()
        assert readable(fd) is (step != "sync_moved")
        other.go_on()
        other.release()
        assert other.wait() == 0
        assert readable(fd)
        with SyncFile.from_fd(fd) as sf:
            assert sf.info().status == 1
        os.close(fd)
    assert open_in_domain() == 0


def next_in(slot: int, fences: list[DmaFence]) -> SyncFile:
    """Make sync files until one gets this slot, whichever others are free."""
    slots_of(dmabuf.Domain.default())._heads.clear()  # those of this process that were closed before are left
    others = []
    while True:
        made = SyncFile(DmaFenceArray(fences))
        found = place_of(made.fileno())
        if found is not None and found[1].slot == slot:
            break
        others.append(made)
    for other in others:
        other.close()
    return made


@pytest.mark.parametrize("step", ["fence_dispatchers_woken", "sync_moved", "sync_marked", "sync_done", "sync_readable"])
def test_signaler_that_stopped_does_nothing_to_the_next_use_of_the_slot(step: str) -> None:
    """It stands in the middle of an old sync file, while its slots become those of another one, which waits for another fence."""
    fences = [Timeline(f"t{i}").fence() for i in range(2)]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def signals() -> None:
        timeline = Timeline("signaler")
        own = [timeline.fence() for _ in range(2)]
        dmabuf.send(theirs, *own)
        theirs.recv(1)
        for fence in own:
            fence.signal()

    with ours, Held(signals, only=step) as other:
        theirs.close()
        with SyncFile(DmaFenceArray(dmabuf.recv(ours))) as old:
            fd = old.dup()  # without the SyncFile, which would have this process advance it too
        slot = place_of(fd)
        ours.send(b"g")
        assert other.run_to(step)
        os.close(fd)
        assert slot is not None
        with next_in(slot[1].slot, fences) as new:
            again = place_of(new.fileno())
            assert again is not None
            assert again[1].gen == slot[1].gen + 1
            other.go_on()
            other.release()
            assert other.wait() == 0
            assert not readable(new.fileno())
            fences[1].signal()
            assert not readable(new.fileno())
            fences[0].signal()
            assert readable(new.fileno())
            assert [one.status for one in new.info().fences] == [1, 1]


def test_a_fork_in_the_middle_of_it_all_leaves_nothing() -> None:
    fence = Timeline("test").fence()
    with SyncFile(fence) as sf:
        sf.fileno()
        assert reap(fork(lambda: None)) == 0
        fence.signal()
        assert readable(sf.fileno())
    assert open_in_domain() == 0
