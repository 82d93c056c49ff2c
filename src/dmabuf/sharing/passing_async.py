"""``asend`` and ``arecv``: `passing` for tasks of asyncio and trio, which wait without stopping their loop.

Each call first tries, and waits for the socket only if it would block. It waits on a duplicate of the descriptor, because a loop knows its
waiters by the number, and the program may wait for the socket as well.
"""

from __future__ import annotations

import errno
import fcntl
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from dmabuf._native import owned
from dmabuf.core.task import waiting
from dmabuf.errors import WouldBlockError, fail, needing_descriptors
from dmabuf.sharing.items import Received, socket_name
from dmabuf.sharing.passing import Peer, Sent, begin_recv, begin_send, peer_of, sent_all, taking, translated

_NOSIGNAL = int(socket.MSG_NOSIGNAL)
T = TypeVar("T")


async def asend(sock: socket.socket, *objects: Sent, meta: Any = None) -> None:
    """:func:`send` in a task of asyncio or trio.

    A task that is canceled before its message has begun has sent nothing. On a stream whose buffer is full half a message may be sent; then
    close the socket.

    Args:
        sock: A non-blocking socket of the standard library.
        *objects: As in :func:`send`.
        meta: As in :func:`send`.

    Raises:
        InvalidError: The socket is not non-blocking (EINVAL), or as :func:`send`.
        DmaBufError: As :func:`send`, but for the timeouts.
        RuntimeError: No task of asyncio or trio runs here.
    """
    peer = _peer(sock, "asend")
    await waiting.checkpoint()  # before the message: a task that is canceled here has sent nothing
    rest, fences = await _when_ready(sock, "asend", True, lambda: begin_send(sock, peer, objects, meta, "asend"))
    while rest:
        try:
            rest = rest[sock.send(rest, _NOSIGNAL) :]
        except BlockingIOError:
            await _ready(sock, "asend", True)
        except OSError as e:
            raise translated(e, "asend", sock) from None
    sent_all(fences)


async def arecv(sock: socket.socket) -> Received:
    """:func:`recv` in a task of asyncio or trio.

    A task that is canceled before a message has begun has received nothing. In the middle of one, on a stream, the descriptors that came
    are closed; then close the socket.

    Args:
        sock: A non-blocking socket of the standard library.

    Raises:
        InvalidError: The socket is not non-blocking (EINVAL), or as :func:`recv`.
        EOFError: The other end is closed, and everything was received.
        DmaBufError: As :func:`recv`, but for the timeouts.
        RuntimeError: No task of asyncio or trio runs here.
    """
    peer = _peer(sock, "arecv")
    await waiting.checkpoint()  # before there is a message that a canceled task would lose
    steps = taking(sock, peer, *await _when_ready(sock, "arecv", False, lambda: begin_recv(sock, peer, "arecv")))
    try:
        missing = next(steps)
        while True:
            missing = steps.send(await _rest(sock, missing))
    except StopIteration as e:
        made: Received = e.value
        return made
    finally:
        steps.close()


async def _rest(sock: socket.socket, missing: int) -> bytes:
    """Receive the rest of a message whose beginning was received."""
    rest = b""
    while len(rest) < missing:
        try:
            more = sock.recv(missing - len(rest))
        except BlockingIOError:
            await _ready(sock, "arecv", False)
            continue
        except OSError as e:
            raise translated(e, "arecv", sock) from None
        if not more:
            raise fail(errno.ECONNRESET, "arecv", socket_name(sock), what="the other end was closed in the middle of a message")
        rest += more
    return rest


def _peer(sock: socket.socket, operation: str) -> Peer:
    peer = peer_of(sock, operation)
    if sock.gettimeout() != 0:
        raise fail(errno.EINVAL, operation, socket_name(sock), "call sock.setblocking(False)", what="the socket would block the event loop")
    return peer


async def _when_ready(sock: socket.socket, operation: str, write: bool, call: Callable[[], T]) -> T:
    """Return what a call on the socket returns once it doesn't block."""
    while True:
        try:
            return call()
        except WouldBlockError:
            await _ready(sock, operation, write)


async def _ready(sock: socket.socket, operation: str, write: bool) -> None:
    with needing_descriptors(operation, socket_name(sock)):
        own = owned(fcntl.fcntl, sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)
    with own:
        await waiting.descriptor(own.number, write, None)
