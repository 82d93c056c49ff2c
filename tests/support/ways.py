"""The ways in which a descriptor's object travels between a test and its child."""

import os
import socket
from typing import Any

import pytest

import dmabuf
from tests.support.children import Child, Parent

WAYS = pytest.mark.parametrize("way", ["dmabuf.send", "multiprocessing", "bare descriptor"])


def bare(link: Parent | Child) -> int:
    """A descriptor that came as such."""
    _, (fd,), _, _ = socket.recv_fds(link.sock, 1, 1)
    return fd


def sent(link: Parent | Child, thing: Any, way: str) -> None:
    """Send a sync file, timeline or semaphore."""
    match way:
        case "dmabuf.send":
            dmabuf.send(link.sock, thing)
        case "multiprocessing":
            link.send(thing)
        case _:
            socket.send_fds(link.sock, [b"x"], [thing.fileno()])


def received(link: Parent | Child, kind: type[Any], way: str) -> Any:
    """Receive what `sent` has sent."""
    match way:
        case "dmabuf.send":
            (thing,) = dmabuf.recv(link.sock)
        case "multiprocessing":
            thing = link.recv()
        case _:
            fd = bare(link)
            thing = kind.from_fd(fd)
            os.close(fd)
    assert isinstance(thing, kind)
    return thing
