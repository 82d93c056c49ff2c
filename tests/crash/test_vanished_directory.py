"""A domain's directory is removed while processes use it, by a logout or by hand. They go on, and nobody mixes them up with others."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import select
import shutil
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dmabuf
from dmabuf.domain import lives, place
from dmabuf.sharing.server import serve
from tests.support.drivers import Bare
from tests.support.steps import fork, reap

pytestmark = pytest.mark.crash


class Member:
    """A process that lives in the domain of a directory, and does what it is told. ``state``: what it keeps."""

    def __init__(self, where: Path, peer: socket.socket | None = None) -> None:
        ours, theirs = Pipe()
        self._orders = ours
        self.pid = fork(lambda: _obey(theirs, where, peer), ours.close)
        theirs.close()
        assert self._orders.recv() == "joined"

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call function(state, …) there. What it raises is raised here."""
        self._orders.send((function, arguments))
        good, value = self._orders.recv()
        if good:
            return value
        raise value

    def end(self) -> None:
        self._orders.close()
        assert reap(self.pid) in (0, -signal.SIGKILL)


def _obey(orders: Connection, where: Path, peer: socket.socket | None) -> None:
    state = SimpleNamespace(domain=dmabuf.Domain.open(where), sock=peer)
    state.domain.join()
    orders.send("joined")
    while True:
        try:
            function, arguments = orders.recv()
        except EOFError:
            break
        try:
            orders.send((True, function(state, *arguments)))
        except BaseException as e:
            traceback.print_exc()
            orders.send((False, e))
    vars(state).clear()


@pytest.fixture
def where() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vanished-", dir="/dev/shm") as directory:
        yield Path(directory) / "domain"


@pytest.fixture
def pair(where: Path) -> Iterator[tuple[Member, Member]]:
    """Two processes with a socket between them, whose domain's directory is there still."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    first, second = Member(where, one), Member(where, other)
    one.close()
    other.close()
    yield first, second
    for member in (second, first):
        member.end()


def vanish(where: Path) -> None:
    shutil.rmtree(where)


# ---- what members do ----


def make_and_send(state: SimpleNamespace, name: str) -> None:
    state.buf = dmabuf.allocate(4096, name=name, domain=state.domain)
    dmabuf.send(state.sock, state.buf)


def receive(state: SimpleNamespace) -> str | None:
    (state.buf,) = dmabuf.recv(state.sock)
    name: str | None = state.buf.name
    return name


def begin_write(state: SimpleNamespace) -> None:
    state.access = state.buf.write()
    state.access.__enter__()[0] = 7


def end_write(state: SimpleNamespace) -> None:
    state.access.__exit__(None, None, None)


def read(state: SimpleNamespace, timeout: float) -> int | str:
    try:
        with state.buf.read(timeout=timeout) as view:
            return int(view[0])
    except OSError as e:
        return errno.errorcode[e.errno or 0]


def read_in_a_fork(state: SimpleNamespace, timeout: float) -> int | str:
    r, w = os.pipe()

    def child() -> None:
        os.write(w, pickle.dumps(read(state, timeout)))

    assert reap(fork(child)) == 0
    os.close(w)
    with open(r, "rb") as f:
        found: int | str = pickle.load(f)
        return found


def die(state: SimpleNamespace) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_living_processes_exclude_each_other(pair: tuple[Member, Member], where: Path) -> None:
    first, second = pair
    first.do(make_and_send, "before")
    assert second.do(receive) == "before"
    vanish(where)
    first.do(begin_write)
    assert second.do(read, 0.05) == "ETIMEDOUT"
    first.do(end_write)
    assert second.do(read, 60) == 7
    first.do(make_and_send, "after")
    assert second.do(receive) == "after"
    first.do(begin_write)
    assert second.do(read, 0.05) == "ETIMEDOUT"
    first.do(end_write)


def test_child_that_is_forked_afterwards_joins_its_parents_domain(pair: tuple[Member, Member], where: Path) -> None:
    first, second = pair
    first.do(make_and_send, "frame")
    second.do(receive)
    vanish(where)
    first.do(begin_write)
    assert second.do(read_in_a_fork, 0.05) == "ETIMEDOUT"
    first.do(end_write)
    assert second.do(read_in_a_fork, 60) == 7
    assert not where.exists()


def test_death_is_noticed_and_reaped(pair: tuple[Member, Member], where: Path) -> None:
    first, second = pair
    first.do(make_and_send, "frame")
    second.do(receive)
    vanish(where)
    first.do(begin_write)
    with pytest.raises(EOFError):
        first.do(die)
    assert second.do(read, 60) == "EOWNERDEAD"


# ---- sync files ----


def send_fence_file(state: SimpleNamespace) -> None:
    state.timeline = dmabuf.Timeline("t", domain=state.domain)
    state.fence = state.timeline.fence()
    state.sync_file = dmabuf.SyncFile(state.fence)
    dmabuf.send(state.sock, state.sync_file)


def receive_fence_file(state: SimpleNamespace) -> None:
    (state.sync_file,) = dmabuf.recv(state.sock)


def signal_fence(state: SimpleNamespace) -> None:
    state.fence.signal()


def readable(state: SimpleNamespace, timeout: float) -> bool:
    return bool(select.select([state.sync_file.fileno()], [], [], timeout)[0])


@pytest.mark.parametrize("when", ["before", "after"])
def test_sync_file_becomes_readable(pair: tuple[Member, Member], where: Path, when: str) -> None:
    first, second = pair
    if when == "after":
        vanish(where)
    first.do(send_fence_file)
    second.do(receive_fence_file)
    if when == "before":
        vanish(where)
    assert not second.do(readable, 0)
    first.do(signal_fence)
    assert second.do(readable, 60)
    assert first.do(readable, 60)


def test_sync_file_becomes_readable_when_its_maker_dies(pair: tuple[Member, Member], where: Path) -> None:
    first, second = pair
    first.do(send_fence_file)
    second.do(receive_fence_file)
    vanish(where)
    with pytest.raises(EOFError):
        first.do(die)
    assert second.do(readable, 60)


# ---- calls between processes ----


def export(state: SimpleNamespace) -> None:
    state.driver = Bare()
    state.exported = dmabuf.export(state.driver, 4096, exp_name="bare", domain=state.domain)
    dmabuf.send(state.sock, state.exported)


def serving(state: SimpleNamespace) -> None:
    state.server = serve(state.domain)


def call(state: SimpleNamespace) -> int:
    (buf,) = dmabuf.recv(state.sock)
    with buf:
        attachment = buf.attach(dmabuf.Device("d"))
        with attachment.mapped(dmabuf.Direction.TO_DEVICE) as table:
            count = len(list(table))
        attachment.detach()
    return count


@pytest.mark.parametrize("served", ["before", "after"])
def test_exporter_is_called(pair: tuple[Member, Member], where: Path, served: str) -> None:
    first, second = pair
    if served == "before":
        first.do(serving)
    vanish(where)
    first.do(export)
    assert second.do(call) >= 1


def test_exporter_is_called_when_only_its_socket_was_removed(pair: tuple[Member, Member], where: Path) -> None:
    first, second = pair
    first.do(serving)
    (where / place.socket_name(first.do(life))).unlink()
    first.do(export)
    assert second.do(call) >= 1


def test_exporter_is_called_when_the_directory_was_opened_to_others(pair: tuple[Member, Member], where: Path) -> None:
    first, second = pair
    where.chmod(0o755)
    first.do(export)
    assert second.do(call) >= 1
    where.chmod(0o700)


# ---- those who come later ----


def identity(state: SimpleNamespace) -> str:
    return str(state.domain.id)


def receive_foreign(state: SimpleNamespace) -> tuple[int, str]:
    with pytest.raises(OSError) as caught:
        dmabuf.recv(state.sock)
    return caught.value.errno or 0, str(caught.value)


def test_newcomer_has_another_identity_and_is_told_why(where: Path) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    older = Member(where, one)
    vanish(where)
    newer = Member(where, other)
    one.close()
    other.close()
    try:
        assert older.do(identity) != newer.do(identity)
        older.do(make_and_send, "frame")
        number, text = newer.do(receive_foreign)
        assert number == errno.EXDEV
        assert "directory was removed" in text
    finally:
        newer.end()  # first: it has the older one's pipe too
        older.end()
    assert [p.name for p in where.iterdir()] == [place.FILE]


def send_domain(state: SimpleNamespace) -> tuple[int, str]:
    with pytest.raises(OSError) as caught:
        dmabuf.send(state.sock, state.domain)
    return caught.value.errno or 0, str(caught.value)


def pickle_domain(state: SimpleNamespace) -> tuple[int, str]:
    from multiprocessing.reduction import ForkingPickler

    with pytest.raises(OSError) as caught:
        ForkingPickler.dumps(state.domain)
    return caught.value.errno or 0, str(caught.value)


@pytest.mark.parametrize("way", [send_domain, pickle_domain])
@pytest.mark.parametrize("remade", [False, True])
def test_domain_whose_directory_is_gone_is_enoent_to_pass_on(
    pair: tuple[Member, Member], where: Path, way: Callable[..., Any], remade: bool
) -> None:
    vanish(where)
    other = Member(where) if remade else None
    number, text = pair[0].do(way)
    assert number == errno.ENOENT
    assert "directory was removed" in text
    if other is not None:
        other.end()


# ---- a stranger at the same path ----


def life(state: SimpleNamespace) -> int:
    return int(state.domain.life)


def forget_socket_of(state: SimpleNamespace, number: int) -> None:
    state.domain.forget_socket(number)


def leave(state: SimpleNamespace) -> None:
    state.domain.leave()


def test_stranger_at_the_same_path_keeps_its_socket_and_file(pair: tuple[Member, Member], where: Path) -> None:
    first, second = pair
    first.do(serving)
    vanish(where)
    stranger = Member(where)
    try:
        assert stranger.do(life) == first.do(life)
        stranger.do(serving)
        at = where / place.socket_name(stranger.do(life))
        before = (at.lstat().st_ino, (where / place.FILE).stat().st_ino)
        first.do(forget_socket_of, stranger.do(life))
        with pytest.raises(EOFError):
            first.do(die)
        second.do(leave)
        assert (at.lstat().st_ino, (where / place.FILE).stat().st_ino) == before
    finally:
        stranger.end()


def test_directory_that_is_renamed_away_and_back_is_found_again(pair: tuple[Member, Member], where: Path) -> None:
    first, second = pair
    where.rename(where.with_name("elsewhere"))
    with contextlib.suppress(OSError):
        first.do(serving)
    where.with_name("elsewhere").rename(where)
    first.do(export)
    assert second.do(call) >= 1


def test_lives_of_a_domain_without_directory_are_reaped(pair: tuple[Member, Member], where: Path) -> None:
    first, second = pair
    vanish(where)
    with pytest.raises(EOFError):
        first.do(die)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # its memory, and with it the lock, may go after its pipe
    assert second.do(alive_after_a_sweep) == 1


def alive_after_a_sweep(state: SimpleNamespace) -> int:
    state.domain.sweep()
    return len(lives.alive_slots(state.domain.shm))
