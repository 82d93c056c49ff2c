"""``send`` and ``recv``: buffers, fences, sync files, timelines and domains over AF_UNIX sockets (unix(7), SCM_RIGHTS).

One ``send`` is one message, and one ``recv`` takes one message, on SOCK_SEQPACKET, SOCK_STREAM and SOCK_DGRAM. These objects can be sent:

======================  ========================================================================================
a ``DmaBuf``            its descriptor; the receiver gets its own handle, and the buffer exists while in flight
a ``BufferRange``       its buffer, offset and length; the receiver closes ``.buf``
a ``DmaFence``          its number in the domain; the receiver waits for the same fence
an array or a chain     its structure, in a memfd; the receiver makes its own over the same fences
a ``SwSync``            its descriptor; the receiver shares it, like a ``TimelineSemaphore``
a ``SyncFile``          its descriptor; the receiver gets a ``SyncFile`` over the same fences
a ``Timeline``          its number; the receiver gets a ``RemoteTimeline``: its names, and whether it is closed
a ``Domain``            the descriptor of a private domain, or of another domain's directory
======================  ========================================================================================

Values are sent along as bytes or JSON (``meta``).

Buffers and fences belong to a domain that the receiver must have: the user's own domain, one that it inherited by fork or received before,
or one in the same message. A message arrives whole or not at all: an error closes every descriptor that came with it.

The other end must run as the same effective user, as the kernel recorded it when the sockets were connected (SO_PEERCRED). This is checked
once for each socket object. For a datagram socket that was bound and connected by hand the kernel has no such record. There each message
carries its sender's credentials, which the kernel checks.

``sharing/items.py`` has the content of a message. From a stream the first 96 bytes are read at once: that is all of the commonest message,
and never part of the next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
import weakref
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Final, NamedTuple

from dmabuf._native import OwnedFd, one_of, owned_rights, recv_one, send_one
from dmabuf.core.access.range import BufferRange
from dmabuf.core.buffer.handle import handle_behind, open_face
from dmabuf.core.buffer.shared import SharedBuffer
from dmabuf.core.dma_buf import BufHandle, DmaBuf
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.timeline import Timeline
from dmabuf.core.get import from_fd
from dmabuf.core.sync.semaphore import TimelineSemaphore
from dmabuf.core.sync.sw_sync import SwSync
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import finalizer
from dmabuf.domain.limits import descriptor_limit
from dmabuf.domain.records import confirmed
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.items import (
    HAS_NAME,
    HEADER,
    ITEM,
    MAGIC,
    MAX_OBJECTS,
    ONE,
    WITH_FD,
    Composed,
    Received,
    domain_of,
    domains,
    foreign,
    message_of,
    name_in,
    objects_of,
    pack_objects,
    socket_name,
)
from dmabuf.sharing.remote_timeline import RemoteTimeline

_FD: Final = struct.Struct("=i")
_UCRED: Final = struct.Struct("=3i")  # pid, uid, gid (unix(7))

_LONGEST: Final = HEADER.size + MAX_OBJECTS * ITEM.size
_CONTROL: Final = socket.CMSG_SPACE(MAX_OBJECTS * _FD.size) + socket.CMSG_SPACE(_UCRED.size)
_SOL_SOCKET, _SCM_RIGHTS, _SCM_CREDENTIALS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS), int(socket.SCM_CREDENTIALS)
_NOSIGNAL, _CLOEXEC, _CUT = int(socket.MSG_NOSIGNAL), int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC | socket.MSG_TRUNC)
_REST_S: Final = 10.0  # seconds for the rest of a message on a non-blocking socket
_CTRUNC: Final = int(socket.MSG_CTRUNC)


class Peer(NamedTuple):
    """What is known of a socket. ``first``: bytes to read at once; ``asks``: whether each message has its sender's credentials."""

    first: int
    stream: bool
    asks: bool


# By id(socket). An entry is removed with its socket, before the id can be reused.
_peers: dict[int, tuple[Peer, weakref.ref[socket.socket]]] = {}

Beginning = tuple[bytes, list[OwnedFd], Iterable[tuple[int, int, bytes]], int]  # of a message: data, descriptors, control part, flags
Sent = DmaBuf | BufferRange | DmaFence | SwSync | SyncFile | Timeline | TimelineSemaphore | RemoteTimeline | Domain | Composed


def send(sock: socket.socket, *objects: Sent, meta: Any = None) -> None:
    """Send objects as one message over a connected AF_UNIX socket. They stay usable in this process.

    Args:
        sock: The socket. Its timeout counts.
        *objects: Up to 253 buffers, ranges, streams, fences, sync files, timelines, semaphores or domains; at least one if there is no
            ``meta``. The kernel passes at most 253 descriptors with a message, and a stream has one for each buffer and one more.
        meta: What is sent along, and is ``meta`` of what :func:`recv` returns: bytes, or anything that JSON has. Of a tuple JSON makes a
            list, and keys become str. At most 1 MiB.

    Raises:
        InvalidError: There is nothing, or too much, to send, or the socket is not an AF_UNIX socket (EINVAL).
        TypeError: Something can't be sent.
        ClosedError: A buffer, a timeline or the socket is closed (EBADF).
        NotPermittedError: The other end belongs to another user, or a timeline or fence is from before a fork (EPERM).
        BrokenConnectionError: The other end is closed (EPIPE).
        DmaBufError: More descriptors are in flight than RLIMIT_NOFILE allows (ETOOMANYREFS), or meta is too long (EMSGSIZE).
        DmaBufTimeout: The socket timed out (ETIMEDOUT).
        WouldBlockError: The socket is non-blocking and full; nothing was sent (EAGAIN).
    """
    entry = _peers.get(id(sock))  # not peer_of() alone: each call less is worth it here
    peer = entry[0] if entry else peer_of(sock, "send")
    handle = handle_behind(objects[0]) if len(objects) == 1 and type(objects[0]) is DmaBuf and meta is None else None
    if handle is not None and handle.fd >= 0 and not peer.asks and sock.gettimeout() is None:
        # The commonest message on the commonest socket, in one native call.
        data = handle.shared.message or message_of(handle.shared)
        sent = send_one(sock.fileno(), data, handle.fd)
        if sent == len(data):
            return
        if sent == -errno.ESTALE:
            raise handle.lost("send", handle.fd)
        if sent < 0:
            raise translated(OSError(-sent, ""), "send", sock)
        _send_rest(sock, data[sent:])
        return
    rest, fences = begin_send(sock, peer, objects, meta, "send")
    if rest:
        try:
            _send_rest(sock, rest)
        except OSError as e:
            raise translated(e, "send", sock) from None
    sent_all(fences)


def begin_send(sock: socket.socket, peer: Peer, objects: tuple[Sent, ...], meta: Any, operation: str) -> tuple[bytes, Sequence[DmaFence]]:
    """Send the beginning of a message, with its descriptors. Return the bytes that are left, and the fences for :func:`sent_all`."""
    handle = handle_behind(objects[0]) if len(objects) == 1 and type(objects[0]) is DmaBuf and meta is None else None
    fences: Sequence[DmaFence] = ()
    opened: Sequence[OwnedFd] = ()
    if handle is not None and handle.fd >= 0:
        data = handle.shared.message or message_of(handle.shared)
        control = [(_SOL_SOCKET, _SCM_RIGHTS, _FD.pack(handle.descriptor("send")))]
    else:
        data, fds, fences, opened = pack_objects(objects, meta)
        control = [(_SOL_SOCKET, _SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
    if peer.asks:
        control.append((_SOL_SOCKET, _SCM_CREDENTIALS, _UCRED.pack(os.getpid(), os.geteuid(), os.getegid())))
    try:
        sent = sock.sendmsg((data,), control, _NOSIGNAL)
    except OSError as e:
        raise translated(e, operation, sock) from None
    finally:
        for own in opened:
            own.close()
    return data[sent:], fences


def sent_all(fences: Iterable[DmaFence]) -> None:
    """Mark the fences of a message that was sent: from now on a warning comes if one is dropped unsignaled."""
    for fence in fences:
        fence.shm.fence_share(fence.handle)


def recv(sock: socket.socket) -> Received:
    """Receive one message, and return the list of the objects that one ``send`` sent, whose ``meta`` is what was sent along.

    Each buffer is a new handle, which the caller closes.

    Args:
        sock: The socket. Its timeout counts.

    Raises:
        EOFError: The other end is closed, and everything was received.
        InvalidError: The socket is not an AF_UNIX socket (EINVAL).
        CrossDomainError: An object belongs to a domain that this process doesn't have (EXDEV).
        DmaBufError: Descriptors were lost because RLIMIT_NOFILE is reached (EMFILE), or the message is not one of ``send`` (EBADMSG).
        NotPermittedError: The other end belongs to another user (EPERM).
        NoDeviceError: The exporter has released a buffer (ENODEV).
        ConnectionLostError: The other end was closed in the middle of a message, or without reading what was sent to it (ECONNRESET).
        DmaBufTimeout: The socket timed out (ETIMEDOUT).
        WouldBlockError: The socket is non-blocking, and there is no message; nothing is lost (EAGAIN).
    """
    entry = _peers.get(id(sock))
    peer = entry[0] if entry else peer_of(sock, "recv")
    if not peer.asks and sock.gettimeout() is None:
        got = recv_one(sock.fileno(), peer.first, MAGIC)
        if isinstance(got, int):
            raise translated(OSError(-got, ""), "recv", sock)
        if len(got) == 4:
            return _take(sock, peer, *got)
        fd, identity, dev, ino, nonce, size, item_flags, body = got
        domain = domains.get(identity)
        name = name_in(body) if item_flags & HAS_NAME else None
        try:
            shared = None if domain is None else confirmed(SharedBuffer, domain, dev, ino, size, nonce)
            if domain is None:
                domain = domain_of(identity, item_flags)
        except BaseException:
            fd.close()
            raise
        return one_of(Received, from_fd(fd, domain, name=name) if shared is None else open_face(DmaBuf, BufHandle, fd, shared, name))
    return _take(sock, peer, *begin_recv(sock, peer, "recv"))


def begin_recv(sock: socket.socket, peer: Peer, operation: str) -> Beginning:
    """Receive the beginning of a message, with its descriptors."""
    try:
        # From the system call to the owners of the descriptors, all of this is C.
        return next(map(owned_rights, map(sock.recvmsg, (peer.first,), (_CONTROL,), (_CLOEXEC,))))
    except OSError as e:
        raise translated(e, operation, sock) from None


# ---- the socket ----


def peer_of(sock: socket.socket, operation: str) -> Peer:
    """Return what is known of a socket. It is checked at its first use."""
    entry = _peers.get(id(sock))
    if entry:
        return entry[0]
    if not isinstance(sock, socket.socket):
        raise TypeError(f"{operation}: expected a socket as the first argument, not {type(sock).__name__}")
    if sock.fileno() < 0:
        raise fail(errno.EBADF, operation, "socket", "open it again", what="the socket is closed")
    if sock.family != socket.AF_UNIX:
        raise fail(
            errno.EINVAL, operation, socket_name(sock), "use an AF_UNIX socket, for example of socket.socketpair()",
            what=f"it is an {sock.family.name} socket, which can't pass descriptors",
        )  # fmt: skip
    datagrams, stream = sock.type == socket.SOCK_DGRAM, sock.type == socket.SOCK_STREAM
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    asks = datagrams and not pid
    if asks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    elif not pid and uid == -1:
        raise fail(errno.ENOTCONN, operation, socket_name(sock), "connect it, or use what accept() returned")
    else:
        _same_user(uid, operation, sock)
    peer = Peer(ONE.size if stream else _LONGEST, stream, asks)
    at = id(sock)
    _peers[at] = (peer, weakref.ref(sock, finalizer(lambda _: _peers.pop(at, None))))
    return peer


def _same_user(uid: int, operation: str, sock: socket.socket) -> None:
    if uid != os.geteuid():
        raise fail(
            errno.EPERM, operation, socket_name(sock), "run both processes as the same user",
            what=f"the process at the other end is of uid {uid & 0xFFFFFFFF}, this one of uid {os.geteuid()}",
        )  # fmt: skip


def translated(error: OSError, operation: str, sock: socket.socket) -> OSError:
    """Return an error of the socket with a message. An error of this library stays as it is."""
    if isinstance(error, DmaBufError):
        return error
    number = error.errno or (errno.ETIMEDOUT if isinstance(error, TimeoutError) else errno.EIO)
    remedies: dict[int, tuple[str | None, str | None]] = {
        errno.EAGAIN: ("try again when the socket is ready", "it would block, and nothing was lost"),
        errno.ETIMEDOUT: ("raise the socket's timeout", "timed out, and nothing was lost"),
        errno.EPIPE: ("connect again", "the other end is closed, and nothing was sent"),
        errno.ECONNRESET: ("connect again", "the other end was closed without reading what was sent to it"),
        errno.ETOOMANYREFS: (
            "let the other end receive before more is sent, or raise RLIMIT_NOFILE",
            f"more descriptors are in flight than RLIMIT_NOFILE ({descriptor_limit()}) allows",
        ),
        errno.EMSGSIZE: ("send fewer objects at once, or raise SO_SNDBUF", None),
        errno.EBADF: ("open it again", "the socket, or a descriptor to send, is closed"),
    }
    remedy, what = remedies.get(number, (None, None))
    return fail(number, operation, socket_name(sock), remedy, what=what)


def _end_of(sock: socket.socket) -> float | None:
    """Return when the rest of a message must be there, None if the caller waits for ever.

    The socket's timeout counts for all of the rest, or a peer could send a byte at a time. On a non-blocking socket the other end is waited
    for: it is about to go on, unless it was stopped, or is no ``send``.
    """
    timeout = sock.gettimeout()
    return None if timeout is None else time.monotonic() + (timeout or _REST_S)


def _ready(sock: socket.socket, event: int, end: float | None) -> bool:
    """Wait until the socket is ready. Return False if the time is over."""
    if end is None:
        return True  # the call itself waits
    waiting = select.poll()
    waiting.register(sock, event)
    return bool(waiting.poll(max(0.0, end - time.monotonic()) * 1000))


def _send_rest(sock: socket.socket, rest: bytes) -> None:
    """Send the rest of a message whose beginning was sent, on a stream with a small buffer, non-blocking or not."""
    end = _end_of(sock)
    while rest:
        if not _ready(sock, select.POLLOUT, end):
            raise fail(errno.ETIMEDOUT, "send", socket_name(sock), "close the socket", what="timed out with half a message sent")
        with contextlib.suppress(BlockingIOError, TimeoutError):
            rest = rest[sock.send(rest, _NOSIGNAL) :]


def _receive_rest(sock: socket.socket, missing: int) -> bytes:
    """Receive the rest of a message whose beginning was received, non-blocking or not."""
    rest, end = b"", _end_of(sock)
    while len(rest) < missing:
        if not _ready(sock, select.POLLIN, end):
            raise fail(errno.ETIMEDOUT, "recv", socket_name(sock), "close the socket", what="timed out in the middle of a message")
        with contextlib.suppress(BlockingIOError, TimeoutError):
            more = sock.recv(missing - len(rest))
            if not more:
                raise fail(errno.ECONNRESET, "recv", socket_name(sock), what="the other end was closed in the middle of a message")
            rest += more
    return rest


# ---- from bytes ----


def _take(
    sock: socket.socket, peer: Peer, data: bytes, fds: list[OwnedFd], control: Iterable[tuple[int, int, bytes]], flags: int
) -> Received:
    """Return the objects of a message whose beginning and control part were received. Other descriptors of it are closed."""
    with contextlib.closing(taking(sock, peer, data, fds, control, flags)) as steps:
        try:
            missing = next(steps)
            while True:
                missing = steps.send(_receive_rest(sock, missing))
        except StopIteration as e:
            made: Received = e.value
            return made


def taking(
    sock: socket.socket, peer: Peer, data: bytes, fds: list[OwnedFd], control: Iterable[tuple[int, int, bytes]], flags: int
) -> Generator[int, bytes, Received]:
    """Do what :func:`_take` does. Yields how many more bytes it needs, and is sent them; so the caller decides how to wait."""
    made = Received()
    uid = -1
    for level, kind, raw in control:
        if level == _SOL_SOCKET and kind == _SCM_CREDENTIALS:
            uid = _UCRED.unpack(raw)[1]
    try:
        if not data and not fds and peer.first and not peer.asks and not flags & _CUT and sock.type != socket.SOCK_DGRAM:
            raise EOFError("recv: the other end of the socket is closed")
        if peer.asks:
            _same_user(uid, "recv", sock)
        items = yield from _items(sock, peer, data, flags, fds)
        return objects_of(sock, items, fds, made)
    except BaseException:
        _close(fds, made)
        raise


def _close(fds: list[OwnedFd], made: list[Any]) -> None:
    for fd in fds:
        fd.close()
    for one in made:
        if isinstance(one, BufferRange):
            one.buf.close()
        elif isinstance(one, DmaBuf | SwSync | SyncFile | TimelineSemaphore):
            one.close()


def _items(sock: socket.socket, peer: Peer, data: bytes, flags: int, fds: list[OwnedFd]) -> Generator[int, bytes, list[tuple[Any, ...]]]:
    """Ask for the rest of a message, check its numbers, and return its items."""
    if peer.stream and len(data) < ONE.size and MAGIC.startswith(data[: len(MAGIC)]):
        data += yield ONE.size - len(data)
    if len(data) < ONE.size or not data.startswith(MAGIC):
        raise foreign(sock, f"{len(data)} bytes that are not a message of dmabuf.send()")
    _, objects, count, _ = HEADER.unpack_from(data)
    length = HEADER.size + objects * ITEM.size
    if not 1 <= objects <= MAX_OBJECTS or count > objects:
        raise foreign(sock, f"a message of {objects} objects and {count} descriptors, which send() does not make")
    if peer.stream:
        data += yield length - len(data)
    if len(data) != length:
        raise foreign(sock, f"a message of {len(data)} bytes that should have {length}")
    if flags & _CTRUNC and len(fds) < count:
        raise fail(
            errno.EMFILE, "recv", socket_name(sock), "raise RLIMIT_NOFILE (ulimit -n) or close descriptors, and have it sent again",
            what=f"{count - len(fds)} of {count} descriptors were lost, RLIMIT_NOFILE is {descriptor_limit()}",
        )  # fmt: skip
    items = list(ITEM.iter_unpack(data[HEADER.size :]))
    if len(fds) != count or sum(item[0] in WITH_FD for item in items) != count:
        raise foreign(sock, f"a message with {len(fds)} descriptors that should have {count}")
    return items
