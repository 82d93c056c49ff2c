"""``send`` and ``recv``: buffers, fences, sync files, timelines and domains over AF_UNIX sockets (unix(7), SCM_RIGHTS).

One ``send`` is one message and one ``recv`` takes one message, on SOCK_SEQPACKET, SOCK_STREAM and SOCK_DGRAM alike. What travels:

======================  =====================================================================================
a ``DmaBuf``            its fd; the receiver gets a handle of its own, and the buffer lives on while in flight
a ``BufferRange``       its buffer, offset and length; the receiver closes ``.buf``
a ``DmaFence``          its number in the domain; the receiver waits for the same fence
an array or a chain     what it is made of, in a memfd; the receiver makes its own over the same fences
a ``SwSync``            its descriptor; the receiver is a holder like any other, as of a ``TimelineSemaphore``
a ``SyncFile``          its descriptor; the receiver gets a ``SyncFile`` over the same fences
a ``Timeline``          its number; the receiver gets a ``RemoteTimeline``: who it is, and whether it is closed
a ``Domain``            a private one's fd; of a directory's, the directory
======================  =====================================================================================

Buffers and fences belong to a domain that the receiver must have: the user's own, one that it inherited by fork or received before, or
one that comes in the same message. A message is whole or not there: an error closes every descriptor that came with it.

The other end must run as the same effective user, as the kernel saw it when the sockets were connected (SO_PEERCRED); looked up once
for each socket object. A datagram socket that was bound and connected by hand has no such record: there each message carries its
sender's credentials, vouched for by the kernel.

What a message is made of is in ``sharing/items.py``. On a stream the first 96 bytes are read at once, which is all of the commonest message
and never part of the next one.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import struct
import weakref
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from dmabuf._native import recv_one, send_one
from dmabuf.core.access.range import BufferRange
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.buffer.shared import confirmed
from dmabuf.core.dma_buf import DmaBuf, new_handle
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.timeline import Timeline
from dmabuf.core.get import from_fd
from dmabuf.core.sync.semaphore import TimelineSemaphore
from dmabuf.core.sync.sw_sync import SwSync
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.domain.domain import Domain
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.items import (
    HAS_NAME,
    HEADER,
    ITEM,
    MAGIC,
    MAX_THINGS,
    ONE,
    WITH_FD,
    domain_of,
    domains,
    foreign,
    message_of,
    pack_things,
    socket_name,
    things_of,
)
from dmabuf.sharing.remote_timeline import RemoteTimeline

_FD: Final = struct.Struct("=i")
_UCRED: Final = struct.Struct("=3i")  # pid, uid, gid (unix(7))

_LONGEST: Final = HEADER.size + MAX_THINGS * ITEM.size
_CONTROL: Final = socket.CMSG_SPACE(MAX_THINGS * _FD.size) + socket.CMSG_SPACE(_UCRED.size)
_SOL_SOCKET, _SCM_RIGHTS, _SCM_CREDENTIALS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS), int(socket.SCM_CREDENTIALS)
_NOSIGNAL, _CLOEXEC, _CUT = int(socket.MSG_NOSIGNAL), int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC | socket.MSG_TRUNC)
_CTRUNC: Final = int(socket.MSG_CTRUNC)


class _Peer(NamedTuple):
    """What was found out about a socket. ``first``: bytes to read at once; ``asks``: each message brings its sender's credentials."""

    first: int
    stream: bool
    asks: bool


# By id(socket): an entry goes with its socket, before the id can be another's.
_peers: dict[int, tuple[_Peer, weakref.ref[socket.socket]]] = {}

Sent = DmaBuf | BufferRange | DmaFence | SwSync | SyncFile | Timeline | TimelineSemaphore | RemoteTimeline | Domain


def send(sock: socket.socket, *things: Sent) -> None:
    """Send things as one message over a connected AF_UNIX socket; what is sent stays usable here.

    ``things``: 1 to 253 (the kernel's limit of descriptors in a message). The socket's timeout counts; a non-blocking socket raises
    ``BlockingIOError`` having sent nothing.

    Errors: EINVAL nothing, or too much, to send, or not an AF_UNIX socket; TypeError something that does not travel; EBADF a closed
    buffer, timeline or socket; EPERM the other end is another user's, or a timeline or fence from before a fork; EPIPE nobody is there to
    read; ETOOMANYREFS more descriptors in flight than RLIMIT_NOFILE; ETIMEDOUT, EAGAIN.
    """
    entry = _peers.get(id(sock))
    peer = entry[0] if entry else _look_at(sock, "send")
    handle = handle_of(things[0]) if len(things) == 1 and type(things[0]) is DmaBuf else None
    if handle is not None and handle.fd >= 0 and not peer.asks and sock.gettimeout() is None:
        # The commonest message on the commonest socket, in one native call.
        data = handle.shared.message or message_of(handle.shared)
        sent = send_one(sock.fileno(), data, handle.fd)
        if sent == len(data):
            return
        if sent < 0:
            raise _translated(OSError(-sent, ""), "send", sock)
        _send_rest(sock, data[sent:])
        return
    fences: list[DmaFence] | tuple[()] = ()
    opened: list[int] | tuple[()] = ()
    if handle is not None and handle.fd >= 0:
        data = handle.shared.message or message_of(handle.shared)
        control = [(_SOL_SOCKET, _SCM_RIGHTS, _FD.pack(handle.fd))]
    else:
        data, fds, fences, opened = pack_things(things)
        control = [(_SOL_SOCKET, _SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
    if peer.asks:
        control.append((_SOL_SOCKET, _SCM_CREDENTIALS, _UCRED.pack(os.getpid(), os.geteuid(), os.getegid())))
    try:
        sent = sock.sendmsg((data,), control, _NOSIGNAL)
        if sent != len(data):
            _send_rest(sock, data[sent:])
    except OSError as e:
        raise _translated(e, "send", sock) from None
    finally:
        for fd in opened:
            os.close(fd)
    for fence in fences:
        fence.shm.fence_share(fence.handle)  # to drop it unsignalled now hurts somebody


def recv(sock: socket.socket) -> list[Any]:
    """Receive one message: the list of what one ``send`` sent.

    Buffers are handles of their own, to be closed. The socket's timeout counts; a non-blocking socket raises ``BlockingIOError`` and loses
    nothing. ``EOFError``: the other end is closed and everything was received.

    Errors: EINVAL not an AF_UNIX socket; EXDEV something of a domain that this process does not have; EMFILE descriptors were lost because
    RLIMIT_NOFILE is reached; EBADMSG what came is not a message of ``send``; EPERM the other end is another user's; ENODEV the exporter has
    released a buffer; ECONNRESET the other end went in the middle of a message, or without reading ours; ETIMEDOUT, EAGAIN.
    """
    entry = _peers.get(id(sock))
    peer = entry[0] if entry else _look_at(sock, "recv")
    if not peer.asks and sock.gettimeout() is None:
        got = recv_one(sock.fileno(), peer.first, MAGIC)
        if type(got) is int:
            raise _translated(OSError(-got, ""), "recv", sock)
        assert isinstance(got, tuple)
        if len(got) == 3:
            return _take(sock, peer, *got)
        fd, identity, dev, ino, nonce, size, item_flags, body = got
        domain = domains.get(identity)
        name = body.rstrip(b"\0") if item_flags & HAS_NAME else None
        try:
            shared = None if domain is None else confirmed(domain, dev, ino, size, nonce)
            domain = domain or domain_of(identity, item_flags)
        except BaseException:
            os.close(fd)
            raise
        return [from_fd(fd, domain, name=name) if shared is None else new_handle(fd, shared, name)]
    try:
        data, control, flags, _ = sock.recvmsg(peer.first, _CONTROL, _CLOEXEC)
    except OSError as e:
        raise _translated(e, "recv", sock) from None
    return _take(sock, peer, data, control, flags)


# ---- the socket ----


def _look_at(sock: socket.socket, operation: str) -> _Peer:
    """Judge a socket that is seen for the first time."""
    if not isinstance(sock, socket.socket):
        raise TypeError(f"{operation}: the first argument is a socket, not {type(sock).__name__}")
    if sock.fileno() < 0:
        raise fail(errno.EBADF, operation, "socket", "open it again", what="the socket is closed")
    if sock.family != socket.AF_UNIX:
        raise fail(
            errno.EINVAL, operation, socket_name(sock), "descriptors travel over AF_UNIX sockets only, such as socket.socketpair() makes",
            what=f"it is an {sock.family.name} socket",
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
    peer = _Peer(ONE.size if stream else _LONGEST, stream, asks)
    at = id(sock)
    _peers[at] = (peer, weakref.ref(sock, lambda _: _peers.pop(at, None)))
    return peer


def _same_user(uid: int, operation: str, sock: socket.socket) -> None:
    if uid != os.geteuid():
        raise fail(
            errno.EPERM, operation, socket_name(sock), "buffers are shared between processes of one user: run both as the same",
            what=f"the process at the other end is of uid {uid & 0xFFFFFFFF}, this one of uid {os.geteuid()}",
        )  # fmt: skip


def _translated(error: OSError, operation: str, sock: socket.socket) -> OSError:
    """An error of the socket in our words; our own errors as they are."""
    if isinstance(error, DmaBufError):
        return error
    number = error.errno or (errno.ETIMEDOUT if isinstance(error, TimeoutError) else errno.EIO)
    remedies: dict[int, tuple[str | None, str | None]] = {
        errno.EAGAIN: ("try again when the socket is ready; nothing was lost", None),
        errno.ETIMEDOUT: ("raise the socket's timeout; nothing was lost", None),
        errno.EPIPE: ("nothing was sent", "the other end is closed"),
        errno.ECONNRESET: (None, "the other end was closed without reading what was sent to it"),
        errno.ETOOMANYREFS: (
            "let the other end receive before more is sent, or raise RLIMIT_NOFILE",
            f"more descriptors are in flight than RLIMIT_NOFILE ({resource.getrlimit(resource.RLIMIT_NOFILE)[0]}) allows",
        ),
        errno.EMSGSIZE: ("send fewer at once, or raise SO_SNDBUF", None),
        errno.EBADF: ("open it again", "the socket, or a descriptor to send, is closed"),
    }
    remedy, what = remedies.get(number, (None, None))
    return fail(number, operation, socket_name(sock), remedy, what=what)


def _ready(sock: socket.socket, event: int) -> None:
    waiting = select.poll()
    waiting.register(sock, event)
    waiting.poll()


def _send_rest(sock: socket.socket, rest: bytes) -> None:
    """Finish a message whose beginning is on its way, on a stream with a small buffer; non-blocking or not."""
    while rest:
        try:
            rest = rest[sock.send(rest, _NOSIGNAL) :]
        except BlockingIOError:
            _ready(sock, select.POLLOUT)
        except TimeoutError:
            raise fail(errno.ETIMEDOUT, "send", socket_name(sock), "close the socket", what="timed out with half a message sent") from None


def _receive_rest(sock: socket.socket, missing: int) -> bytes:
    """The rest of a message whose beginning was taken; non-blocking or not."""
    rest = b""
    while len(rest) < missing:
        try:
            more = sock.recv(missing - len(rest))
        except BlockingIOError:
            _ready(sock, select.POLLIN)
            continue
        except TimeoutError:
            raise fail(
                errno.ETIMEDOUT, "recv", socket_name(sock), "close the socket", what="timed out in the middle of a message"
            ) from None
        if not more:
            raise fail(errno.ECONNRESET, "recv", socket_name(sock), what="the other end was closed in the middle of a message")
        rest += more
    return rest


# ---- from bytes ----


def _take(sock: socket.socket, peer: _Peer, data: bytes, control: Iterable[tuple[int, int, bytes]], flags: int) -> list[Any]:
    """The things in a message whose beginning and control part are here; what does not become part of one is closed."""
    fds: list[int] = []
    made: list[Any] = []
    uid = -1
    for level, kind, raw in control:
        if level == _SOL_SOCKET and kind == _SCM_RIGHTS:
            fds.extend(struct.unpack(f"={len(raw) // 4}i", raw[: len(raw) // 4 * 4]))
        elif level == _SOL_SOCKET and kind == _SCM_CREDENTIALS:
            uid = _UCRED.unpack(raw)[1]
    try:
        if not data and not fds and peer.first and not peer.asks and not flags & _CUT and sock.type != socket.SOCK_DGRAM:
            raise EOFError("recv: the other end of the socket is closed")
        if peer.asks:
            _same_user(uid, "recv", sock)
        items = _items(sock, peer, data, flags, fds)
        return things_of(sock, items, fds, made)
    except BaseException:
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        for thing in made:
            if isinstance(thing, BufferRange):
                thing.buf.close()
            elif isinstance(thing, DmaBuf | SwSync | SyncFile | TimelineSemaphore):
                thing.close()
        raise


def _items(sock: socket.socket, peer: _Peer, data: bytes, flags: int, fds: list[int]) -> list[tuple[Any, ...]]:
    """The items of a whole message, its rest read and its numbers checked."""
    if peer.stream and len(data) < ONE.size and MAGIC.startswith(data[: len(MAGIC)]):
        data += _receive_rest(sock, ONE.size - len(data))
    if len(data) < ONE.size or not data.startswith(MAGIC):
        raise foreign(sock, f"{len(data)} bytes that are no message of dmabuf.send()")
    _, things, count, _ = HEADER.unpack_from(data)
    length = HEADER.size + things * ITEM.size
    if not 1 <= things <= MAX_THINGS or count > things:
        raise foreign(sock, f"a message of {things} things and {count} descriptors, which send() does not make")
    if peer.stream:
        data += _receive_rest(sock, length - len(data))
    if len(data) != length:
        raise foreign(sock, f"a message of {len(data)} bytes that should have {length}")
    if flags & _CTRUNC and len(fds) < count:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise fail(
            errno.EMFILE, "recv", socket_name(sock), "raise RLIMIT_NOFILE (ulimit -n) or close descriptors, and have it sent again",
            what=f"{count - len(fds)} of {count} descriptors were lost, RLIMIT_NOFILE is {limit}",
        )  # fmt: skip
    items = list(ITEM.iter_unpack(data[HEADER.size :]))
    if len(fds) != count or sum(item[0] in WITH_FD for item in items) != count:
        raise foreign(sock, f"a message with {len(fds)} descriptors that should have {count}")
    return items
