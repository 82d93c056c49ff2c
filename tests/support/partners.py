"""Children that do one thing to a buffer and stand still in it until told to go on, for tests of what others see.

Buffers travel as bare descriptors here, so that a test of seeing doesn't lean on the code that sends; :func:`handed` is for the tests that
may lean on it.
"""

import socket
from typing import Any

import dmabuf
from dmabuf import Timeline, Usage
from tests.support.children import Child, Parent, Spawn
from tests.support.fences import attach


def give(other: Child, *bufs: dmabuf.DmaBuf) -> None:
    """Send buffers to a child, which takes them."""
    socket.send_fds(other.sock, [b"x"], [buf.fileno() for buf in bufs])


def handed(other: Child, *things: Any, says: object = None) -> Child:
    """The child, once it was sent things by ``dmabuf.send``; ``says``: and has said that it has got so far."""
    dmabuf.send(other.sock, *things)
    if says is not None:
        assert other.recv() == says
    return other


def take(parent: Parent) -> dmabuf.DmaBuf:
    """The one buffer that the test gives."""
    _, (fd,), _, _ = socket.recv_fds(parent.sock, 1, 1)
    buf = dmabuf.get(fd)
    socket.close(fd)
    return buf


def holds(parent: Parent, names: list[str | bytes | None], size: int = 4096) -> None:
    """Buffers of its own, by name."""
    bufs = [dmabuf.allocate(size, name=name) for name in names]
    parent.send([buf.ino for buf in bufs])
    parent.recv()


def has(parent: Parent, dups: int, maps: int) -> None:
    """So many descriptors beside the first, and mappings."""
    with take(parent) as buf:
        others = [buf.get_dma_buf() for _ in range(dups)]
        mapped = [buf.mmap() for _ in range(maps)]
        parent.send("there")
        parent.recv()
        for mapping in mapped:
            mapping.close()
        for other in others:
            other.close()


def fences(parent: Parent, driver: str, timeline: str, usage: Usage) -> None:
    """A pending fence on the buffer."""
    with take(parent) as buf, Timeline(timeline, driver=driver) as line:
        fence = line.fence()
        attach(buf.resv, fence, usage)
        parent.send("there")
        parent.recv()
        fence.signal()


def is_inside(parent: Parent, write: bool) -> None:
    """In an access of the buffer."""
    with take(parent) as buf, buf.write() if write else buf.read():
        parent.send("there")
        parent.recv()


def locks(parent: Parent) -> None:
    """Holds the buffer's reservation lock."""
    with take(parent) as buf, buf.resv.locked():
        parent.send("there")
        parent.recv()


def started(child: Spawn, buf: dmabuf.DmaBuf, function: object, *arguments: object) -> Child:
    """One of the children above that has the buffer and is where it stays."""
    other = child(function, *arguments)  # type: ignore[arg-type]
    give(other, buf)
    assert other.recv() == "there"
    return other
