"""What the tests of sharing start from."""

import socket
from collections.abc import Iterator

import pytest

import dmabuf

SIZE = 4096
KINDS = {"seqpacket": socket.SOCK_SEQPACKET, "stream": socket.SOCK_STREAM, "dgram": socket.SOCK_DGRAM}

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def buf() -> Iterator[dmabuf.DmaBuf]:
    with dmabuf.allocate(SIZE, name="shared") as made:
        yield made


@pytest.fixture
def tl() -> Iterator[dmabuf.Timeline]:
    with dmabuf.Timeline("frames", driver="camera") as made:
        yield made


def _pair(kind: socket.SocketKind) -> Iterator[Pair]:
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    with here, there:
        yield here, there


@pytest.fixture(params=list(KINDS))
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A connected pair of each kind of socket."""
    yield from _pair(KINDS[request.param])


@pytest.fixture
def seqpacket() -> Iterator[Pair]:
    yield from _pair(socket.SOCK_SEQPACKET)


@pytest.fixture
def stream() -> Iterator[Pair]:
    yield from _pair(socket.SOCK_STREAM)
