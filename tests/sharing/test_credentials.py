"""Who is at the other end of the socket."""

import errno
import os
import socket
from pathlib import Path

import pytest

import dmabuf
from dmabuf.sharing import passing
from tests.sharing.conftest import Pair
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno

_NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def _connect_as(parent: Parent, uid: int, address: bytes) -> None:
    os.setresuid(uid, uid, uid)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(address)
        parent.recv()


@as_root
@pytest.mark.parametrize("operation", ["send", "recv"])
def test_a_peer_of_another_user_is_refused_by_uid(child: Spawn, operation: str, buf: dmabuf.DmaBuf) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("")  # an abstract address, which has no permissions
        listener.listen()
        other = child(_connect_as, _NOBODY, listener.getsockname())
        sock, _ = listener.accept()
        with sock, raises_errno(errno.EPERM, PermissionError) as caught:
            getattr(dmabuf, operation)(*([sock, buf] if operation == "send" else [sock]))
        assert str(_NOBODY) in str(caught.value)
        other.send()
        other.result()


def test_the_other_users_uid_is_named(seqpacket: Pair, buf: dmabuf.DmaBuf, monkeypatch: pytest.MonkeyPatch) -> None:
    dmabuf.send(seqpacket[1], buf)
    real = os.geteuid()
    monkeypatch.setattr(passing.os, "geteuid", lambda: real + 1)
    for operation in (lambda: dmabuf.send(seqpacket[0], buf), lambda: dmabuf.recv(seqpacket[0])):
        with raises_errno(errno.EPERM) as caught:
            operation()
        assert f"uid {real}," in str(caught.value)


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_a_connected_pair_over_a_path_works(tmp_path: Path, kind: socket.SocketKind, buf: dmabuf.DmaBuf) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, kind) as listener, socket.socket(socket.AF_UNIX, kind) as client:
        listener.bind(path)
        listener.listen()
        client.connect(path)
        server, _ = listener.accept()
        with server:
            dmabuf.send(client, buf)
            dmabuf.recv(server)[0].close()
            dmabuf.send(server, buf)
            dmabuf.recv(client)[0].close()


def test_datagrams_between_bound_sockets_carry_their_credentials(tmp_path: Path, buf: dmabuf.DmaBuf) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        server.bind(str(tmp_path / "server"))
        client.connect(str(tmp_path / "server"))
        dmabuf.send(client, buf)  # before anybody asked for credentials
        dmabuf.recv(server)[0].close()
        dmabuf.send(client, buf, buf)
        for got in dmabuf.recv(server):
            got.close()


def _datagram_as(parent: Parent, uid: int, path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, open("/dev/null") as f:
        sock.connect(path)
        os.setresuid(uid, uid, uid)
        socket.send_fds(sock, [b"x" * 96], [f.fileno()])


@as_root
def test_a_datagram_of_another_user_is_refused(child: Spawn, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        path = str(tmp_path / "server")
        server.bind(path)
        server.setblocking(False)
        with raises_errno(errno.EAGAIN):
            dmabuf.recv(server)
        server.setblocking(True)
        other = child(_datagram_as, _NOBODY, path)
        with raises_errno(errno.EPERM) as caught:
            dmabuf.recv(server)
        assert str(_NOBODY) in str(caught.value)
        other.result()


def test_a_datagram_from_nobody_known_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        server.bind(str(tmp_path / "server"))
        client.connect(str(tmp_path / "server"))
        client.send(b"x" * 96)
        with raises_errno(errno.EPERM):
            dmabuf.recv(server)
