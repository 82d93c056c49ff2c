"""The answering side of a process: what makes no sense gets an errno, and nothing of a socket is left by whoever goes."""

import errno
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import Direction, Domain, _native
from dmabuf.domain import place
from dmabuf.sharing import server
from dmabuf.sharing.messages import LONGEST, VERSION
from dmabuf.sharing.server import serve
from tests.support import elsewhere as do
from tests.support.children import Parent, Spawn
from tests.support.drivers import PAGE, Static
from tests.support.elsewhere import Place
from tests.support.steps import fork, reap


def connected() -> socket.socket:
    """To this process's own service, as any process of the user could be."""
    domain = Domain.default()
    serve(domain)
    assert domain.path is not None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(str(domain.path / place.socket_name(domain.life)))
    return sock


def hello(**more: Any) -> bytes:
    domain = Domain.default()
    return json.dumps({"version": VERSION, "domain": domain.id, "to": domain.life, "life": domain.life, **more}).encode()


def answer(sock: socket.socket) -> Any:
    return json.loads(sock.recv(1 << 16))


@pytest.fixture
def exporter() -> Iterator[Static]:
    made = Static()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (b"x", errno.EBADMSG),
        (b"\xff\xfe", errno.EBADMSG),
        (b"[]", errno.EBADMSG),
        (b"{", errno.EBADMSG),
        (b"[" * 20000, errno.EBADMSG),
        (b'{"long": 5}', errno.EBADMSG),
        (b'{"long": -1}', errno.EBADMSG),
        (b'{"long": %d}' % (LONGEST + 1), errno.EBADMSG),
        (b"{}", errno.EBADMSG),
        (b'{"version": true}', errno.EBADMSG),
        (b'{"version": "1"}', errno.EBADMSG),
        (b" " * 40000, errno.EBADMSG),
        (b'{"version": 999}', errno.ENODEV),
    ],
    ids=lambda value: repr(value[:16]) if isinstance(value, bytes) else None,
)
def test_a_greeting_that_makes_no_sense_is_refused(data: bytes, number: int) -> None:
    with connected() as sock:
        sock.send(data)
        assert answer(sock)["errno"] == number
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    "wrong", [{"domain": "0" * 16}, {"to": 1}, {"version": VERSION + 1}, {"session": "nobody's"}, {"session": "x" * 300}]
)
def test_who_looks_for_somebody_else_is_refused(wrong: dict[str, Any]) -> None:
    with connected() as sock:
        sock.send(hello(**wrong))
        assert answer(sock)["errno"] in (errno.ENODEV, errno.EBADMSG)


BAD_REQUESTS: list[dict[str, Any]] = [
    {},
    {"kind": 5},
    {"kind": "nothing of the kind"},
    {"kind": "begin"},
    {"kind": "begin", "direction": 9, "dev": 1, "ino": 1},
    {"kind": "begin", "direction": 1, "dev": -1, "ino": 1},
    {"kind": "begin", "direction": 1, "dev": 1, "ino": 1 << 64},
    {"kind": "begin", "direction": True, "dev": 1, "ino": 1},
    {"kind": "begin", "direction": 1, "dev": 1, "ino": 1},
    {"kind": "exporter", "dev": 1, "ino": "x"},
    {"kind": "mmap", "dev": 1, "ino": 1},
    {"kind": "attach", "dev": 1, "ino": 1},
    {"kind": "attach", "dev": 1, "ino": 1, "device": "", "dma_mask": 1 << 40, "max_segment": 0},
    {"kind": "attach", "dev": 1, "ino": 1, "device": "x" * 9999, "dma_mask": 1 << 40, "max_segment": 4096},
    {"kind": "detach", "dev": 1, "ino": 1, "attachment": 7},
    {"kind": "pin", "dev": 1, "ino": 1, "holder": 1 << 63},
    {"kind": "map", "dev": 1, "ino": 1, "holder": 1, "direction": 2},
    {"kind": "vunmap", "dev": 1, "ino": 1, "holder": 1},
    {"kind": "moved"},
]


@pytest.mark.parametrize("body", BAD_REQUESTS, ids=lambda body: json.dumps(body)[:60])
def test_a_request_that_makes_no_sense_is_answered_with_an_errno(body: dict[str, Any]) -> None:
    with connected() as main, connected() as sock:
        main.send(hello())
        sock.send(hello(session=answer(main)["session"]))
        assert answer(sock) == {}
        sock.send(json.dumps(body).encode())
        assert answer(sock)["errno"] in (errno.EBADMSG, errno.ENOSYS, errno.ENODEV, errno.EINVAL)


def test_answer_that_is_too_long_is_undone_and_emsgsize(monkeypatch: pytest.MonkeyPatch) -> None:
    undone: list[Any] = []
    long = server.Answer({"text": "x" * LONGEST}, undo=undone.append)
    monkeypatch.setitem(server._handlers, "long", lambda session, body, fds: long)
    with connected() as main, connected() as sock:
        main.send(hello())
        sock.send(hello(session=answer(main)["session"]))
        assert answer(sock) == {}
        sock.send(b'{"kind":"long"}')
        assert answer(sock)["errno"] == errno.EMSGSIZE
    assert len(undone) == 1


@pytest.mark.parametrize(
    ("kind", "more", "number"),
    [
        ("begin", {"direction": 1, "block": 0}, 0),
        ("detach", {"attachment": 7}, errno.EINVAL),
        ("map", {"holder": 12345 << 32 | 99, "direction": 1, "attachment": 1}, errno.EPERM),
        ("vunmap", {"holder": (1 << 64) - 1}, errno.EPERM),
        ("mmap", {"offset": 1, "length": 1}, errno.EINVAL),
        ("mmap", {"offset": 0, "length": 1 << 60}, errno.EINVAL),
        ("attach", {"device": "", "dma_mask": 1, "max_segment": 0, "peer2peer": False, "dynamic": False}, errno.EINVAL),
        ("attach", {"device": "d", "dma_mask": 5, "max_segment": 0, "peer2peer": False, "dynamic": False}, errno.EINVAL),
        ("attach", {"device": "d", "dma_mask": (1 << 32) - 1, "max_segment": 0, "peer2peer": 0, "dynamic": False}, errno.EBADMSG),
    ],
)
def test_a_request_for_a_real_buffer_is_bounded(exporter: Static, kind: str, more: dict[str, Any], number: int) -> None:
    with dmabuf.export(exporter, PAGE) as buf, connected() as main, connected() as sock:
        main.send(hello())
        sock.send(hello(session=answer(main)["session"]))
        answer(sock)
        st = os.fstat(buf.fileno())
        body = {"kind": kind, "dev": st.st_dev, "ino": st.st_ino, **more}
        socket.send_fds(sock, [json.dumps(body).encode()], [buf.fileno()])
        assert answer(sock).get("errno", 0) == number
        assert not buf.resv.is_locked()
    assert exporter.count("attach") == exporter.count("detach") == 0


def test_a_descriptor_of_something_else_is_refused(exporter: Static) -> None:
    with dmabuf.export(exporter, PAGE) as buf, connected() as main, connected() as sock, open("/dev/null", "rb") as other:
        main.send(hello())
        sock.send(hello(session=answer(main)["session"]))
        answer(sock)
        st = os.fstat(buf.fileno())
        body = {"kind": "begin", "dev": st.st_dev, "ino": st.st_ino, "direction": 1, "block": 0}
        socket.send_fds(sock, [json.dumps(body).encode()], [other.fileno()])
        assert answer(sock)["errno"] == errno.EINVAL
        with dmabuf.allocate(PAGE) as plain:
            socket.send_fds(sock, [json.dumps(body).encode()], [plain.fileno()])
            assert answer(sock)["errno"] == errno.ENODEV
    assert exporter.count("begin") == 0


def test_after_nonsense_the_service_goes_on(child: Spawn, exporter: Static) -> None:
    with connected() as sock:
        sock.send(b"nonsense")
        answer(sock)
    with dmabuf.export(exporter, PAGE) as buf, Place(child, False).of(buf) as there:
        there.do(do.begin, Direction.TO_DEVICE)
        there.do(do.end, Direction.TO_DEVICE)
    assert exporter.calls[:2] == [("begin", Direction.TO_DEVICE), ("end", Direction.TO_DEVICE)]


# -- nothing is left


def sockets() -> set[str]:
    domain = Domain.default()
    assert domain.path is not None
    return {name for name in os.listdir(domain.path) if name.startswith(place.SOCKET)}


def serves(parent: Parent) -> None:
    exporter = Static()
    with dmabuf.export(exporter, PAGE):
        parent.send(place.socket_name(Domain.default().life))
        parent.recv()
    exporter.close()


def test_the_socket_goes_with_its_process(child: Spawn) -> None:
    other = child(serves)
    name = other.recv()
    assert name in sockets()
    other.send("end")
    other.result()
    assert name not in sockets()


@pytest.mark.crash
def test_the_socket_of_a_killed_process_goes_with_its_reaper(child: Spawn) -> None:
    other = child(serves)
    name = other.recv()
    other.kill()
    Domain.default().sweep()
    assert name not in sockets()


@pytest.mark.crash
@pytest.mark.parametrize("step", ["service_bound", "reap_outside"])
def test_a_death_in_the_middle_leaves_no_socket(step: str) -> None:
    before = sockets()

    def dies() -> None:
        Domain.default().join()
        if step == "reap_outside":
            if not os.fork():
                serve(Domain.default())
                os.kill(os.getpid(), signal.SIGKILL)
            os.wait()
            _native.step_arm("kill", step, 1)
            Domain.default().reap_dead()
        else:
            _native.step_arm("kill", step, 1)
            serve(Domain.default())

    assert reap(fork(dies)) == -signal.SIGKILL
    Domain.default().sweep()
    assert sockets() == before
