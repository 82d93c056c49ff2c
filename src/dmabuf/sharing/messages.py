"""The messages and errors between clients and servers, and their sockets.

*A message* is one SOCK_SEQPACKET datagram of JSON, with descriptors. A message of more than :data:`INLINE` bytes is in a sealed memfd. The
receiver trusts nothing in it: lengths and counts are bounded, :func:`number`, :func:`text` and :func:`flag` check fields, and a message
that makes no sense is EBADMSG. There are no pickles. An error travels as its errno, its text and the parts of the message, and a
``ContractError`` as itself. If the receiver has no room for descriptors, the message is :data:`LOST`. Where it needs them, that is EMFILE
(:func:`no_room`).

*A socket* is closed in a forked child, because its copy would keep the other end from noticing this process's death.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any, Final

from dmabuf._native import OwnedFd, close_same, is_same, receive_message, send_message
from dmabuf.domain import dispatcher, lives, place
from dmabuf.domain.directory import bind_socket, socket_address
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import WeakKeys
from dmabuf.errors import ContractError, ContractWarning, DmaBufError, fail, rebuilt, text_of
from dmabuf.sharing.sealed import content, sealed

VERSION: Final = 2
INLINE: Final = 32 << 10  # bytes of JSON in the datagram itself; well below any SO_SNDBUF
LONGEST: Final = 16 << 20  # bytes of JSON in a memfd; decoded they may take six times as much
_TEXT: Final = 1 << 16  # characters of an error's text; a longer one is cut
MAX_FDS: Final = 8

LOST: Final = "lost"  # a field of a received message: its descriptors are missing
THERE: Final = "the other process"  # where no descriptor is left, in the caller's message
NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS)

_UCRED: Final = struct.Struct("=3i")  # pid, uid, gid (unix(7))

# Made once: json.dumps() makes an encoder at each call, json.loads() looks for the encoding, and flags of an enum are slow to combine.
_encode: Final = json.JSONEncoder(separators=(",", ":")).encode
_decode: Final[Callable[[str], object]] = json.JSONDecoder().decode
_FDS_LOST, _TRUNCATED = int(socket.MSG_CTRUNC), int(socket.MSG_TRUNC)

Body = dict[str, Any]


def number(body: Body, name: str, most: int = (1 << 64) - 1) -> int:
    """Return a number of a message. It fails with EBADMSG if the number is missing, not an int, negative, or more than ``most``."""
    value = body.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise nonsense(f"{name!r} is not a number up to {most}")
    return value


def text(body: Body, name: str, longest: int = 255) -> str:
    """Return a text of a message. It fails with EBADMSG if the text is missing, not a str, or longer than ``longest``."""
    value = body.get(name)
    if not isinstance(value, str) or len(value) > longest:
        raise nonsense(f"{name!r} is not a text of up to {longest} characters")
    return value


def flag(body: Body, name: str) -> bool:
    """Return a truth value of a message. It fails with EBADMSG if the value is missing or not a bool."""
    value = body.get(name)
    if not isinstance(value, bool):
        raise nonsense(f"{name!r} is neither true nor false")
    return value


def nonsense(what: str) -> DmaBufError:
    """Return the error for a message that makes no sense."""
    return fail(errno.EBADMSG, "request", "a message", "use the same version of dmabuf in both processes", what=what)


def no_room(operation: str, obj: object, where: str, number: int = errno.EMFILE) -> DmaBufError:
    """Return the error of a call for which no descriptor is left. ``number``: ENFILE stays, everything else becomes EMFILE."""
    value = errno.ENFILE if number == errno.ENFILE else errno.EMFILE
    return fail(value, operation, obj, "raise RLIMIT_NOFILE there, or close descriptors", what=f"no descriptor is left in {where}")


def send(sock: socket.socket, body: Body, fds: Iterable[int | OwnedFd] = (), flags: int = 0) -> None:
    """Send a message.

    Raises:
        ClosedError: Somebody else closed the socket's descriptor (EBADF).
        DmaBufError: The message is too long (EMSGSIZE).
        OSError: sendmsg(2) failed.
    """
    data, given = _encode(body).encode(), [fd if isinstance(fd, int) else fd.fileno() for fd in fds]
    if len(data) <= INLINE:
        send_message(sock.fileno(), *_inode(sock), data, given, flags)
        return
    if len(data) > LONGEST:
        remedy = "pass a table of fewer entries"
        raise fail(errno.EMSGSIZE, "request", f"{len(data)} bytes", remedy, what=f"a message has at most {LONGEST} bytes")
    with sealed("dmabuf-message", data) as extra:
        send_message(sock.fileno(), *_inode(sock), _encode({"long": len(data)}).encode(), [extra.number, *given], flags)


def receive(sock: socket.socket) -> tuple[Body, list[OwnedFd]] | None:
    """Return one message with its descriptors, None at the end.

    Raises:
        ClosedError: Somebody else closed the socket's descriptor (EBADF).
        DmaBufError: The message makes no sense, and its descriptors are closed (EBADMSG); or its text is lost, because no descriptor was
            free for it (EMFILE).
        OSError: recvmsg(2) failed.
    """
    data, fds, flags = receive_message(sock.fileno(), *_inode(sock), INLINE + 1)
    lost = bool(flags & _FDS_LOST)
    if not data and not fds and not lost:
        return None
    try:
        if flags & _TRUNCATED or len(data) > INLINE:
            raise nonsense("it is truncated")
        if len(fds) > MAX_FDS:
            raise nonsense(f"it has {len(fds)} descriptors")
        if lost:
            fds.clear()
        body = _decode(data.decode())
        if isinstance(body, dict) and "long" in body:
            if lost:
                raise no_room("request", "a message", "the process that it was sent to")
            body = _decode(_long(number(body, "long", LONGEST), fds).decode())
    except (ValueError, RecursionError) as e:
        raise nonsense(f"it is not JSON: {e}") from None
    if not isinstance(body, dict):
        raise nonsense("it is not an object")
    body[LOST] = lost
    return body, fds


def receive_last(sock: socket.socket) -> tuple[Body, list[OwnedFd]] | None:
    """Do as :func:`receive`, also if the other end is closed: what it sent before comes after the reset."""
    for _ in range(2):
        with contextlib.suppress(ConnectionResetError):
            return receive(sock)
    return None


def _long(size: int, fds: list[OwnedFd]) -> bytes:
    if not fds:
        raise nonsense("a long message has no memory")
    with fds.pop(0) as memory:
        try:
            return content(memory, size, size)
        except ValueError as e:
            raise nonsense(f"the memory of a long message {e}") from None


def close_all(fds: list[OwnedFd]) -> None:
    """Close descriptors and empty the list."""
    while fds:
        fds.pop().close()


def encode_error(error: BaseException, kind: str) -> Body:
    """Return an exception as a message. An exporter's exception may have anything in its fields, and its ``str()`` may raise."""
    if isinstance(error, OSError):
        number = error.errno if isinstance(error.errno, int) and 0 < error.errno < 4096 else errno.EIO
        message = error.strerror if isinstance(error.strerror, str) and error.strerror else text_of(error)
        told: Body = {"errno": int(number), "text": message[:_TEXT]}
        if isinstance(error, DmaBufError):
            parts = {"operation": error.operation, "remedy": error.remedy}
            told |= {"ours": True, **{name: part for name, part in parts.items() if isinstance(part, str)}}
        return told
    for name, one in _OTHERS.items():
        if type(error) is one:
            return {"error": name, "text": text_of(error)[:_TEXT]}
    dispatcher.report(error, kind)  # the code with the bug is in this process
    return {"error": "ContractError", "text": f"{kind}: the exporter raised {type(error).__name__}: {text_of(error)}"[:_TEXT]}


_OTHERS: Final[dict[str, type[Exception]]] = {"ContractError": ContractError, "ContractWarning": ContractWarning, "TypeError": TypeError}


def decode_error(told: Body) -> BaseException:
    """Return the exception in a message of :func:`encode_error`."""
    message = text(told, "text", _TEXT)
    if "error" in told:
        return _OTHERS.get(text(told, "error"), ContractError)(message)
    value = number(told, "errno", 4095) or errno.EIO
    if not told.get("ours"):
        return OSError(value, message)
    parts = [part if isinstance(part, str) else None for part in (told.get("operation"), told.get("remedy"))]
    return rebuilt(value, message, *parts)


def check_user(sock: socket.socket) -> None:
    """Raise NotPermittedError if the other end belongs to another user (EPERM)."""
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != os.geteuid():
        raise fail(
            errno.EPERM, "request", f"a process of uid {uid}", "use a domain of one user", what="the other end belongs to another user"
        )


# Every open socket, with its (st_dev, st_ino): a forked child closes them. Weak, since a signal handler may raise before a socket has an
# owner, and the garbage collector then closes it.
_sockets: WeakKeys[socket.socket, tuple[int, int]] = WeakKeys()


def _inode(sock: socket.socket) -> tuple[int, int]:
    found = _sockets.get(sock)
    if found is None:  # one that opened() didn't make
        about = os.fstat(sock.fileno())
        found = about.st_dev, about.st_ino
    return found


def check_socket(sock: socket.socket) -> None:
    """Raise ClosedError if somebody else closed the socket's descriptor, because its number may be another file's now (EBADF)."""
    if not is_same(sock.fileno(), *_inode(sock)):
        what = "it was closed by somebody else, and the number may be another file's now"
        raise fail(errno.EBADF, "request", f"fd {sock.fileno()}", "close the object, not its descriptor", what=what)


def opened(make: Callable[[], socket.socket]) -> socket.socket:
    """Make a socket that a forked child closes."""
    with lives.FORK_GUARD:
        sock = make()
        about = os.fstat(sock.fileno())
        _sockets[sock] = about.st_dev, about.st_ino
        return sock


def shut(sock: socket.socket) -> None:
    """Close a socket of :func:`opened`."""
    _close(sock)
    _sockets.pop(sock, None)  # in this order: after a fork in between the child closes the socket again, and doesn't keep a copy


def _close(sock: socket.socket) -> None:
    """Close it, unless somebody else did, and the number is another file's now."""
    inode, fd = _sockets.get(sock), sock.detach()
    if fd >= 0:
        close_same(fd, *inode) if inode else os.close(fd)


def _after_fork() -> None:
    for sock in list(_sockets):
        _close(sock)
    _sockets.clear()


def connect(sock: socket.socket, domain: Domain, life: int) -> None:
    """Connect to the socket of a life. If the process is gone or serves nothing, connect(2) fails with ENOENT or ECONNREFUSED."""
    with domain.directory() as directory:
        if directory is not None:
            with contextlib.suppress(FileNotFoundError):  # the directory was removed just now, or the name in it
                return sock.connect(socket_address(directory, place.socket_name(life)))
    sock.connect(_abstract(domain, life))


def bind(sock: socket.socket, domain: Domain, life: int) -> bool:
    """Give the socket of this process's life its address. Return True if the address is in the domain's directory."""
    with domain.directory() as directory:
        if directory is not None:
            bind_socket(sock, directory, place.socket_name(life))
            return True
    bind_without_path(sock, domain, life)
    return False


def bind_without_path(sock: socket.socket, domain: Domain, life: int) -> None:
    """Give the socket of this process's life the address by which it is found without the domain's directory."""
    sock.bind(_abstract(domain, life))


def _abstract(domain: Domain, life: int) -> bytes:
    return b"\0dmabuf-" + domain.id.encode() + b"-%08x" % life


os.register_at_fork(after_in_child=_after_fork)
