"""What a peer sends in place of a memfd: nothing is read, mapped or waited for before it is known to be one, sealed and not too long."""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import _native
from dmabuf._native import Mapping, OwnedFd
from dmabuf.core.fence.travel import MOST_BYTES
from dmabuf.domain.domain import Domain
from dmabuf.sharing import items, memory, messages
from dmabuf.sharing.remote_exporter import RemoteExporter
from dmabuf.sharing.sealed import SEALS, sealed
from tests.support.errnos import raises_errno

F_ADD_SEALS = 1033
ARRAY = struct.pack("=BBHiQQQQ", 1, 0, 0, 0, 1, 7, 1, 0) + struct.pack("=BBHiQQQQ", 0, 0, 0, 0, 5, 7, 1, 0)


def memfd(data: bytes, seals: int = 0, size: int | None = None) -> int:
    fd = os.memfd_create("foreign", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    if size is not None:
        os.truncate(fd, size)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def pipe() -> int:
    reader, writer = os.pipe()
    _KEPT.append(writer)  # open: a read would wait for it
    return reader


def fifo() -> int:
    with tempfile.TemporaryDirectory() as directory:
        os.mkfifo(f"{directory}/fifo")
        return os.open(f"{directory}/fifo", os.O_RDWR)


_KEPT: list[int] = []


@pytest.fixture(autouse=True)
def _close_kept() -> Iterator[None]:
    yield
    while _KEPT:
        os.close(_KEPT.pop())


FOREIGN: dict[str, Callable[[], int]] = {
    "pipe": pipe,
    "fifo": fifo,
    "endless device": lambda: os.open("/dev/zero", os.O_RDWR),
    "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
    "eventfd": lambda: os.eventfd(0),
    "path": lambda: os.open("/", os.O_PATH),
    "file": lambda: os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR),
    "unsealed": lambda: memfd(ARRAY),
    "may grow": lambda: memfd(ARRAY, SEALS & ~fcntl.F_SEAL_GROW),
    "may shrink": lambda: memfd(ARRAY, SEALS & ~fcntl.F_SEAL_SHRINK),
    "may change": lambda: memfd(ARRAY, SEALS & ~8),
    "empty": lambda: memfd(b"", SEALS),
    "holes": lambda: memfd(ARRAY, SEALS, 40 << 20),
    "too long": lambda: memfd(ARRAY, SEALS, 1 << 40),
}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with a, b:
        b.settimeout(30)
        yield a, b


def deliver(sock: socket.socket, kind: int, fd: int, domain: Domain, body: bytes = b"") -> None:
    message = items.HEADER.pack(items.MAGIC, 1, 1, 0) + items.ITEM.pack(kind, 0, 0, 0, bytes.fromhex(domain.id), body)
    sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd))])
    os.close(fd)


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_container_in_something_else_is_ebadmsg(pair: tuple[socket.socket, socket.socket], make: Callable[[], int]) -> None:
    deliver(pair[0], items._CONTAINER, make(), Domain.default())
    with raises_errno(errno.EBADMSG):
        dmabuf.recv(pair[1])


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("kind", [items._BUFFER, items._SW_SYNC, items._SEMAPHORE, items._SYNC_FILE, items._PRIVATE_DOMAIN])
def test_other_objects_in_something_else_are_refused(pair: tuple[socket.socket, socket.socket], make: Callable[[], int], kind: int) -> None:
    deliver(pair[0], kind, make(), Domain.default())
    with pytest.raises(dmabuf.DmaBufError):
        dmabuf.recv(pair[1])


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_long_message_in_something_else_is_ebadmsg(pair: tuple[socket.socket, socket.socket], make: Callable[[], int]) -> None:
    fd = make()
    pair[0].sendmsg([b'{"long":%d}' % (40 << 20)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd))])
    os.close(fd)
    with raises_errno(errno.EBADMSG):
        messages.receive(pair[1])


def test_long_message_arrives(pair: tuple[socket.socket, socket.socket]) -> None:
    body = {"text": "x" * (1 << 20)}
    messages.send(pair[0], body)
    got = messages.receive(pair[1])
    assert got is not None
    assert got[0]["text"] == body["text"]


def test_message_that_is_too_long_is_not_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    with raises_errno(errno.EMSGSIZE):
        messages.send(pair[0], {"text": "x" * messages.LONGEST})


def test_container_that_is_too_long_is_not_sent(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "MOST_BYTES", 100)
    timeline = dmabuf.Timeline("t")
    fences = [timeline.fence() for _ in range(3)]
    with raises_errno(errno.EMSGSIZE):
        dmabuf.send(pair[0], dmabuf.DmaFenceArray(fences))
    for fence in fences:
        fence.signal()
    timeline.close()
    assert MOST_BYTES >= 1 << 20


# ---- domains ----


def test_private_domain_that_may_become_shorter_is_einval(pair: tuple[socket.socket, socket.socket]) -> None:
    private = Domain.private()
    header = os.pread(private.fileno(), _native.HEADER_BYTES, 0)
    fd = os.memfd_create(f"dmabuf-domain:{private.id}")
    os.write(fd, header)
    deliver(pair[0], items._PRIVATE_DOMAIN, fd, private)
    with raises_errno(errno.EINVAL):
        dmabuf.recv(pair[1])


def test_private_domains_file_can_not_be_truncated() -> None:
    private = Domain.private()
    with raises_errno(errno.EPERM):
        os.truncate(private.fileno(), 0)


def test_directory_without_a_domain_gets_none(pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    deliver(pair[0], items._DIRECTORY, os.open(tmp_path, os.O_PATH), Domain.default())
    with raises_errno(errno.ENOENT):
        dmabuf.recv(pair[1])
    assert not os.listdir(tmp_path)


# ---- buffers ----


def test_memfd_of_huge_pages_is_no_buffer() -> None:
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    try:
        fd = os.memfd_create("huge", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    except OSError:
        pytest.skip("this kernel has no huge pages")
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    st = os.fstat(fd)
    assert _native.reference_buffer(fd, st.st_dev, st.st_ino) == -1
    os.close(fd)


@pytest.mark.parametrize("name", [b"a\0b", b"\0" * 32, b"x" * 32])
def test_name_in_a_message_ends_where_a_name_can(pair: tuple[socket.socket, socket.socket], name: bytes) -> None:
    with dmabuf.allocate(4096) as buf:
        fd, domain = buf.dup(), buf.domain
        st = os.fstat(fd)
        nonce = buf._handle.shared.nonce
        buf._handle.shared.message = None
    message = items.ONE.pack(
        items.MAGIC, 1, 1, 0, items._BUFFER, items.HAS_NAME, 0, 0, bytes.fromhex(domain.id), st.st_dev, st.st_ino, nonce, name
    )
    pair[0].sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd))])
    os.close(fd)
    (got,) = dmabuf.recv(pair[1])
    with got:
        assert got.name is None or len(os.fsencode(got.name)) <= 31


# ---- an exporter's memory ----


def test_memory_that_is_shown_can_not_become_shorter() -> None:
    fd = os.memfd_create("exporter", os.MFD_ALLOW_SEALING)
    os.truncate(fd, 8192)
    shown = memory.range_of(Mapping(fd, 8192), "mmap", "buffer")
    with raises_errno(errno.EPERM):
        os.truncate(fd, 0)
    shown.fd.close()
    os.close(fd)


@pytest.mark.parametrize("make", [lambda: os.memfd_create("plain"), FOREIGN["file"]], ids=["memfd without seals", "file"])
def test_memory_that_may_become_shorter_is_not_shown(make: Callable[[], int]) -> None:
    fd = make()
    os.truncate(fd, 8192)
    with raises_errno(errno.EOPNOTSUPP):
        memory.range_of(Mapping(fd, 8192), "mmap", "buffer")
    os.close(fd)


class Answers:
    """Calls whose answers come from a peer that does what it likes."""

    in_file = False

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def call(self, *_: object, **__: object) -> tuple[dict[str, object], list[OwnedFd]]:
        return {"mapping": 1, "offset": 0, "length": 4096, "writable": True, "iomem": False, "table": 1, "cpu": [], "dma": []}, [
            OwnedFd(self.fd)
        ]

    call_locked = call

    def count_mapping(self, mapping: int) -> None: ...
    def unmapped(self, mapping: int) -> None: ...
    def give_back(self, *_: object, **__: object) -> None: ...


@pytest.mark.parametrize("op", ["mmap", "vmap"])
def test_memory_that_a_peer_could_truncate_is_not_mapped(op: str) -> None:
    exporter = RemoteExporter(Answers(memfd(b"x" * 4096)))  # type: ignore[arg-type]
    with dmabuf.allocate(4096) as buf, raises_errno(errno.EOPNOTSUPP):
        exporter.mmap(buf, 0, 4096) if op == "mmap" else exporter.vmap(buf)


def test_sealed_bytes_arrive() -> None:
    with sealed("some", b"bytes") as made, contextlib.suppress(OSError):
        os.truncate(made.number, 0)
        raise AssertionError
