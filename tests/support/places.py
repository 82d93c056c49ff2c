"""Processes that open the domain of a directory, and what they leave in it."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import DmaBufError
from dmabuf.domain import place
from tests.support.steps import fork, reap

FILE = place.FILE
MIB = 1 << 20


def in_process(function: object) -> None:
    """Run a function in a process of its own, so that its domain is opened and left for good."""
    assert callable(function)
    assert reap(fork(function)) == 0


def visit(path: Path) -> None:
    """Open the domain, use it and leave it."""
    domain = dmabuf.Domain.open(path)
    with dmabuf.allocate(4096, domain=domain) as buf, buf.write() as view:
        view[0] = 1
    domain.leave()


def die_inside(path: Path) -> None:
    domain = dmabuf.Domain.open(path)
    buf = dmabuf.allocate(4096, domain=domain)
    with buf.write():
        os.kill(os.getpid(), signal.SIGKILL)


def left(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def refused(path: Path) -> DmaBufError:
    with pytest.raises(DmaBufError) as caught:
        dmabuf.Domain.open(path)
    return caught.value


def make(path: Path, data: bytes) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    (path / FILE).write_bytes(data)


@contextlib.contextmanager
def inhabitant(path: Path) -> Iterator[int]:
    """A process that lives in the domain."""
    r, w = os.pipe()
    there, here = os.pipe()

    def live() -> None:
        os.close(w)
        os.close(there)
        domain = dmabuf.Domain.open(path)
        buf = dmabuf.allocate(4096, domain=domain, name="inhabited")
        os.write(here, b"x")
        os.read(r, 1)
        buf.close()
        domain.leave()

    pid = fork(live)
    os.close(r)
    os.close(here)
    assert os.read(there, 1) == b"x"
    os.close(there)
    try:
        yield pid
    finally:
        os.close(w)
        reap(pid)
