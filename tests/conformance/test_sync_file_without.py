"""Sync files where something is missing: room for a socket, the domain's directory, the other's network namespace."""

import ctypes
import os
import select
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import SyncFile, Timeline
from dmabuf._native import OFF_SWEEP, TICK_FENCE
from dmabuf.domain.dispatcher import DISPATCHER
from tests.support import no_sockets
from tests.support.children import Parent, Spawn
from tests.support.steps import fork, reap
from tests.support.waiting import until
from tests.support.ways import bare


def readable(fd: Any) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return tmp_path / "domain"


pytestmark = pytest.mark.usefixtures("sharer_ends")


def signals_without_sockets(parent: Parent) -> list[bool]:
    """Signals when nothing can be made readable, twice, and is asked whether it was."""
    timeline = Timeline("poor")
    one, two = timeline.fence(), timeline.fence()
    with SyncFile(one) as first, SyncFile(two) as second:
        socket.send_fds(parent.sock, [b"x"], [first.fileno()])
        socket.send_fds(parent.sock, [b"x"], [second.fileno()])
        shm = dmabuf.Domain.default().shm
        no_sockets.forbid()
        one.signal()
        two.signal()
        parent.send("signaled")
        parent.recv()
        return [shm.sync_wake(one.handle), shm.sync_wake_all(False)]


@pytest.mark.skipif(not no_sockets.AVAILABLE, reason="seccomp(2) is asked for by number")
def test_descriptor_is_readable_once_somebody_has_room_for_a_socket(child: Spawn) -> None:
    """The signaler tries again and again. Any other process that finishes what the dead have begun does it, too."""
    poor = child(signals_without_sockets)
    fds = [bare(poor), bare(poor)]
    assert poor.recv() == "signaled"
    assert not any(map(readable, fds))
    assert dmabuf.Domain.default().wake_sync_files()
    assert all(map(readable, fds))
    poor.send("end")
    assert poor.result() == [True, True]  # nothing is left to do
    for fd in fds:
        os.close(fd)


@pytest.mark.skipif(not no_sockets.AVAILABLE, reason="seccomp(2) is asked for by number")
def test_descriptor_is_readable_when_a_signaler_without_room_is_reaped(child: Spawn) -> None:
    poor = child(signals_without_sockets)
    fds = [bare(poor), bare(poor)]
    assert poor.recv() == "signaled"
    poor.kill()
    dmabuf.Domain.default().sweep()
    assert all(map(readable, fds))
    for fd in fds:
        os.close(fd)


CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h


def signals_elsewhere(parent: Parent) -> str:
    """Signals its fence from a network namespace of its own, in which the names of the others can't be reached."""
    fence = Timeline("elsewhere").fence()
    dmabuf.send(parent.sock, fence)
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET):
        parent.send("may not")
        return ""
    parent.send("is elsewhere")
    parent.recv()
    fence.signal()
    return "signaled"


def makes_descriptor(parent: Parent) -> None:
    """Makes the descriptor of a received fence for another process, and ends."""
    (fence,) = dmabuf.recv(parent.sock)
    with SyncFile(fence) as sf:
        socket.send_fds(parent.sock, [b"x"], [sf.fileno()])


def made_elsewhere(child: Spawn, fence: dmabuf.DmaFence) -> int:
    """A descriptor that no thread of this process makes readable: a dispatcher looks until the first tick after it has watched."""
    maker = child(makes_descriptor)
    dmabuf.send(maker.sock, fence)
    fd = bare(maker)
    maker.result()
    here = DISPATCHER.peek(dmabuf.Domain.default())
    until(lambda: here is None or here._thread is None or here._tickless)
    return fd


def sweeps(_: Spawn) -> None:
    dmabuf.Domain.default().sweep()


def waits(_: Spawn) -> None:
    dmabuf.Domain.default().shm.store64(OFF_SWEEP, 0)  # nobody has swept for long
    dmabuf.Domain.default().tick(TICK_FENCE, 0)


def joins(child: Spawn) -> None:
    child(join).result()


def join(_: Parent) -> None:
    dmabuf.Domain.default().join()


HOW: dict[str, Callable[[Spawn], None] | None] = {
    "SyncFile": None,
    "process sweeps": sweeps,
    "process waits": waits,
    "process joins": joins,
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_descriptor_signaled_from_another_network_namespace_becomes_readable(child: Spawn, how: Callable[[Spawn], None] | None) -> None:
    other = child(signals_elsewhere)
    (fence,) = dmabuf.recv(other.sock)
    if other.recv() == "may not":
        pytest.skip("this user may not make a network namespace")
    sf = SyncFile(fence) if how is None else None
    fd = made_elsewhere(child, fence) if sf is None else sf.dup()
    other.send("signal")
    assert other.result() == "signaled"
    if how is None:
        select.select([fd], [], [])  # by this process, which watches the fence
    else:
        assert not readable(fd)
        how(child)
        assert readable(fd)
    if sf is not None:
        sf.close()
    os.close(fd)


def without_directory(parent: Parent, path: Path) -> list[object]:
    """Everything that a sync file does, in a domain whose directory was removed."""
    domain = dmabuf.Domain.open(path)
    before = Timeline("before", domain=domain).fence()
    with SyncFile(before, "before") as old:
        old.fileno()
        shutil.rmtree(path)
        after = Timeline("after", domain=domain).fence()
        with SyncFile(after, "after") as new:
            socket.send_fds(parent.sock, [b"x"], [new.fileno()])
            child = fork(lambda: (select.select([new.fileno(), old.fileno()], [], []), os._exit(not 0 < new.wait())))
            seen = [readable(old), readable(new)]
            before.signal()
            after.signal()
            seen += [readable(old), readable(new), reap(child)]
            with SyncFile.from_fd(old.fileno()) as found:
                seen += [found.name, found.status]
    return seen


def test_sync_files_are_made_and_become_readable_without_the_directory(child: Spawn, elsewhere: Path) -> None:
    other = child(without_directory, elsewhere)
    fd = bare(other)
    assert other.result() == [False, False, True, True, 0, "before", 1]
    assert readable(fd)
    os.close(fd)
