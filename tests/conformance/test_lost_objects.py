"""Descriptors of shared state and sockets that somebody else closed: the file that has the number now is left alone."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import SwSync, SyncFile, Timeline, TimelineSemaphore
from dmabuf.core.sync.shared_object import SharedObject
from dmabuf.sharing import messages, server
from tests.support.errnos import raises_errno
from tests.support.lost import replaced, untouched

OBJECTS: dict[str, Callable[[], SharedObject]] = {"SwSync": lambda: SwSync("lost"), "TimelineSemaphore": TimelineSemaphore}
USES: dict[str, Callable[[Any], object]] = {
    "change": lambda one: one.inc() if isinstance(one, SwSync) else one.signal(5),
    "look": lambda one: one.statistics(),
}


@pytest.fixture(params=OBJECTS.values(), ids=OBJECTS)
def shared(request: pytest.FixtureRequest) -> Iterator[SharedObject]:
    made = request.param()
    yield made
    made.close()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_shared_state_is_not_written_to_another_file(shared: SharedObject, use: Callable[[Any], object]) -> None:
    own = shared._file._own
    assert own is not None
    number = own.number
    replaced(number)
    for _ in range(2):  # the first one keeps nothing locked
        with raises_errno(errno.EBADF):
            use(shared)
    shared.close()
    assert untouched(number)
    os.close(number)


def test_timeline_of_which_all_descriptors_are_lost_can_be_closed() -> None:
    sw = SwSync("lost")
    fence = sw.create_fence(1).fence
    own = sw._file._own
    assert own is not None
    numbers = [sw.fileno(), own.number]
    for number in numbers:
        replaced(number)
    sw.close()
    assert fence.status == 0  # another process may have the timeline
    for number in numbers:
        assert untouched(number)
        os.close(number)


@pytest.mark.parametrize("use", [lambda one: one.fileno(), lambda one: one.dup()], ids=["fileno", "dup"])
def test_another_file_is_not_given_away_as_shared_state(shared: SharedObject, use: Callable[[Any], object]) -> None:
    number = shared.fileno()
    replaced(number)
    with raises_errno(errno.EBADF):
        use(shared)
    shared.close()
    assert untouched(number)
    os.close(number)


def test_another_file_is_not_given_away_as_a_sync_file() -> None:
    with Timeline("t") as timeline:
        fence = timeline.fence()
        sync_file = SyncFile(fence)
        number = sync_file.fileno()
        replaced(number)
        a, b = socket.socketpair()
        with a, b:
            for use in (sync_file.fileno, sync_file.dup, lambda: dmabuf.send(a, sync_file)):
                with raises_errno(errno.EBADF):
                    use()
        fence.signal()
        assert sync_file.wait(0) > 0
        sync_file.close()
        assert untouched(number)
        os.close(number)


def test_another_eventfd_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """All eventfds have the same inode."""
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with TimelineSemaphore() as semaphore:
        mine, theirs = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
        notice = semaphore.eventfd(mine, 1)
        number = notice.fd.number
        os.dup2(theirs, number)
        semaphore.signal(1)
        assert "closed by somebody else" in str(told.pop().exc_value)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(theirs)
        os.fstat(number)
        for fd in (mine, theirs, number):
            os.close(fd)


# ---- sockets ----


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    messages.opened(lambda: a)
    yield a, b
    messages.shut(a)
    b.close()


def test_message_is_not_sent_to_another_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    number = pair[0].fileno()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        os.dup2(here.fileno(), number)
        with raises_errno(errno.EBADF):
            messages.send(pair[0], {"kind": "x"})
        there.setblocking(False)
        with pytest.raises(BlockingIOError):
            there.recv(10)
        there.send(b"theirs")
        with raises_errno(errno.EBADF):
            messages.receive(pair[0])
        assert here.recv(10) == b"theirs"
        messages.shut(pair[0])
        os.fstat(number)
        os.close(number)


def test_server_takes_no_connection_of_another_socket() -> None:
    listener = messages.opened(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    number = listener.fileno()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        theirs.bind(b"\0dmabuf-test-%d" % os.getpid())
        theirs.listen(1)
        os.dup2(theirs.fileno(), number)
        caller.connect(theirs.getsockname())
        with contextlib.closing(server._Spare()) as spare:
            server._accepting([listener], lambda: None, spare)  # type: ignore[arg-type]
        theirs.settimeout(30)
        theirs.accept()[0].close()
    messages.shut(listener)
    os.fstat(number)
    os.close(number)
