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

The message: 16 bytes (``dmabuf``, version, number of things, number of descriptors) and 80 for each thing, native byte order. On a
stream the first 96 bytes are read at once, which is all of the commonest message and never part of the next one.
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

from dmabuf import _native
from dmabuf.core.buffer import DmaBuf
from dmabuf.core.buffer_range import BufferRange
from dmabuf.core.fence import DmaFence, Timeline, wrap
from dmabuf.core.fence_travel import pack, unpack
from dmabuf.core.handles import from_fd, received
from dmabuf.core.semaphore import TimelineSemaphore
from dmabuf.core.sw_sync import SwSync
from dmabuf.core.sync_file import SyncFile
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.records import Record, confirmed
from dmabuf.domain.sync_files import Facts
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.remote import RemoteTimeline

MAX_THINGS: Final = 253  # SCM_MAX_FD, include/net/scm.h

_MAGIC: Final = b"dmabuf\0\1"  # the last byte is the version
_HEADER: Final = struct.Struct("=8sHHI")  # magic, things, descriptors, 0
_ITEM: Final = struct.Struct("=BBHI8s64s")  # kind, flags, 0, index, domain, body
_ONE: Final = struct.Struct("=8sHHIBBHI8sQQ16s32s")  # header and one buffer
_BODY: Final = struct.Struct("=QQ16s32s")  # of a buffer: st_dev, st_ino, nonce, name
_PART: Final = struct.Struct("=QQ48x")  # of a range: offset, length
_FENCE: Final = struct.Struct("=QQQ40x")  # handle, context, seqno
_TIMELINE: Final = struct.Struct("=QQ48x")  # number of its slot's use, context
_MOST_STRUCTURE: Final = 1 << 28  # bytes of a fence container: more than a domain has fences for
_SYNC: Final = struct.Struct("=I60x")  # of a sync file: bytes of its facts, in the items that follow
_FD: Final = struct.Struct("=i")
_UCRED: Final = struct.Struct("=3i")  # pid, uid, gid (unix(7))

_BUFFER, _FENCE_KIND, _TIMELINE_KIND, _PRIVATE_DOMAIN, _DIRECTORY = 1, 2, 3, 4, 5
_CONTAINER, _SYNC_FILE, _MORE, _SW_SYNC = 6, 7, 8, 9
_RANGE: Final = 10  # of the buffer in the item before
_SEMAPHORE: Final = 11
_WITH_FD: Final = frozenset((_BUFFER, _PRIVATE_DOMAIN, _DIRECTORY, _CONTAINER, _SYNC_FILE, _SW_SYNC, _SEMAPHORE))
_ONE_SIZE: Final = _ONE.size
_IS_PRIVATE, _HAS_NAME = 1, 2  # flags of an item

_LONGEST: Final = _HEADER.size + MAX_THINGS * _ITEM.size
_CONTROL: Final = socket.CMSG_SPACE(MAX_THINGS * _FD.size) + socket.CMSG_SPACE(_UCRED.size)
_SOL_SOCKET, _SCM_RIGHTS, _SCM_CREDENTIALS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS), int(socket.SCM_CREDENTIALS)
_NOSIGNAL, _CLOEXEC, _CUT = int(socket.MSG_NOSIGNAL), int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC | socket.MSG_TRUNC)
_CTRUNC: Final = int(socket.MSG_CTRUNC)
_MESSAGE: Final = "message"  # of a buffer alone, in Record.shared


class _Peer(NamedTuple):
    """What was found out about a socket. ``first``: bytes to read at once; ``asks``: each message brings its sender's credentials."""

    first: int
    stream: bool
    asks: bool


# By id(socket): an entry goes with its socket, before the id can be another's.
_peers: dict[int, tuple[_Peer, weakref.ref[socket.socket]]] = {}
_domains: weakref.WeakValueDictionary[bytes, Domain] = weakref.WeakValueDictionary()


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
    if len(things) == 1 and type(thing := things[0]) is DmaBuf and (fd := thing._fd) >= 0 and not peer.asks and sock.gettimeout() is None:
        # The commonest message on the commonest socket, in one native call.
        data = thing._record.shared.get(_MESSAGE) or _message_of(thing._record)
        sent = _native.send_one(sock.fileno(), data, fd)
        if sent == len(data):
            return
        if sent < 0:
            raise _translated(OSError(-sent, ""), "send", sock)
        _send_rest(sock, data[sent:])
        return
    fences: list[DmaFence] | tuple[()] = ()
    opened: list[int] | tuple[()] = ()
    if len(things) == 1 and type(thing := things[0]) is DmaBuf and (fd := thing._fd) >= 0:
        data = thing._record.shared.get(_MESSAGE) or _message_of(thing._record)
        control = [(_SOL_SOCKET, _SCM_RIGHTS, _FD.pack(fd))]
    else:
        data, fds, fences, opened = _pack(things)
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
        fence.shm.fence_mark(fence.handle, "shared", 1)  # to drop it unsignalled now hurts somebody


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
        got = _native.recv_one(sock.fileno(), peer.first, _MAGIC)
        if type(got) is int:
            raise _translated(OSError(-got, ""), "recv", sock)
        assert isinstance(got, tuple)
        if len(got) == 3:
            return _take(sock, peer, *got)
        fd, identity, dev, ino, nonce, size, item_flags, body = got
        domain = _domains.get(identity)
        name = body.rstrip(b"\0") if item_flags & _HAS_NAME else None
        try:
            record = None if domain is None else confirmed(domain, dev, ino, size, nonce)
            domain = domain or _domain_of(identity, item_flags)
        except BaseException:
            os.close(fd)
            raise
        return [from_fd(fd, domain, name=name) if record is None else DmaBuf._make(fd, record, name)]
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
            errno.EINVAL, operation, _named(sock), "descriptors travel over AF_UNIX sockets only, such as socket.socketpair() makes",
            what=f"it is an {sock.family.name} socket",
        )  # fmt: skip
    datagrams, stream = sock.type == socket.SOCK_DGRAM, sock.type == socket.SOCK_STREAM
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    asks = datagrams and not pid
    if asks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    elif not pid and uid == -1:
        raise fail(errno.ENOTCONN, operation, _named(sock), "connect it, or use what accept() returned")
    else:
        _same_user(uid, operation, sock)
    peer = _Peer(_ONE.size if stream else _LONGEST, stream, asks)
    at = id(sock)
    _peers[at] = (peer, weakref.ref(sock, lambda _: _peers.pop(at, None)))
    return peer


def _same_user(uid: int, operation: str, sock: socket.socket) -> None:
    if uid != os.geteuid():
        raise fail(
            errno.EPERM, operation, _named(sock), "buffers are shared between processes of one user: run both as the same",
            what=f"the process at the other end is of uid {uid & 0xFFFFFFFF}, this one of uid {os.geteuid()}",
        )  # fmt: skip


def _named(sock: socket.socket) -> str:
    return f"socket fd {sock.fileno()}"


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
    return fail(number, operation, _named(sock), remedy, what=what)


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
            raise fail(errno.ETIMEDOUT, "send", _named(sock), "close the socket", what="timed out with half a message sent") from None


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
            raise fail(errno.ETIMEDOUT, "recv", _named(sock), "close the socket", what="timed out in the middle of a message") from None
        if not more:
            raise fail(errno.ECONNRESET, "recv", _named(sock), what="the other end was closed in the middle of a message")
        rest += more
    return rest


# ---- to bytes ----


def _item(kind: int, domain: Domain, body: bytes, index: int = 0, flags: int = 0) -> bytes:
    return _ITEM.pack(kind, flags | (_IS_PRIVATE if domain.path is None else 0), 0, index, bytes.fromhex(domain.id), body)


def _item_of(record: Record) -> bytes:
    """A buffer's part of a message. Its name is for the case that nobody living holds the record until it arrives."""
    name = record.info()["name"]
    body = _BODY.pack(record.dev, record.ino, record.nonce, name or b"")
    return _item(_BUFFER, record.domain, body, flags=0 if name is None else _HAS_NAME)


def _message_of(record: Record) -> bytes:
    message: bytes = record.shared.setdefault(_MESSAGE, _HEADER.pack(_MAGIC, 1, 1, 0) + _item_of(record))
    return message


def _pack(things: tuple[Any, ...]) -> tuple[bytes, list[int], list[DmaFence], list[int]]:
    """(message, descriptors that travel, fences in it, descriptors to close afterwards); everything is checked first."""
    if not things:
        raise fail(errno.EINVAL, "send", "nothing", "name at least one buffer, fence, timeline or domain")
    if len(things) > MAX_THINGS:
        limit = f"send at most {MAX_THINGS} at once"
        raise fail(errno.EINVAL, "send", f"{len(things)} things", limit, what="the kernel takes no more in a message")
    items, fds, fences, directories, structures, opened = [], [], [], [], [], []
    for thing in things:
        if isinstance(thing, DmaBuf):
            fds.append(thing._check("send"))
            items.append(_item_of(thing._record))
        elif isinstance(thing, BufferRange):
            fds.append(thing.buf._check("send"))
            items += [_item_of(thing.buf._record), _item(_RANGE, thing.buf.domain, _PART.pack(thing.offset, thing.length))]
        elif isinstance(thing, DmaFence):
            check_fence(thing, "send")
            structure = pack(thing)
            if structure is not None:
                structures.append((len(fds), structure))
                fds.append(-1)
                items.append(_item(_CONTAINER, thing.domain, b""))
                continue
            thing.publish()
            items.append(_item(_FENCE_KIND, thing.domain, _FENCE.pack(thing.handle, thing.context, thing.seqno), thing.timeline_index))
            fences.append(thing)
        elif isinstance(thing, SyncFile):
            fds.append(thing.fileno())
            items += _sync_items(thing)
        elif isinstance(thing, SwSync | TimelineSemaphore):
            fds.append(thing.fileno())
            items.append(_item(_SW_SYNC if isinstance(thing, SwSync) else _SEMAPHORE, thing.domain, b""))
        elif isinstance(thing, Timeline | RemoteTimeline):
            index, number, context = timeline_place(thing, "send")
            items.append(_item(_TIMELINE_KIND, thing.domain, _TIMELINE.pack(number, context), index))
        elif isinstance(thing, Domain) and thing.path is None:
            fds.append(thing.fileno())
            items.append(_item(_PRIVATE_DOMAIN, thing, b""))
        elif isinstance(thing, Domain):
            directories.append((len(fds), thing))
            fds.append(-1)
            items.append(_item(_DIRECTORY, thing, b""))
        else:
            raise TypeError(f"send: buffers, ranges, fences, sync files, timelines and domains travel, {type(thing).__name__} does not")
    if len(items) > MAX_THINGS:
        remedy = "send fewer at once, or merge fewer fences into one, or use a domain that has a directory"
        raise fail(errno.EMSGSIZE, "send", f"{len(things)} things", remedy, what="their fences don't fit into a message")
    try:
        for at, thing in directories:
            fds[at] = os.open(thing.path or "", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.append(fds[at])
    except OSError as e:
        for fd in opened:
            os.close(fd)
        raise fail(e.errno or errno.EIO, "send", "a domain", "its directory must stay where it is", what=e.strerror) from None
    try:
        for at, structure in structures:
            fds[at] = os.memfd_create("dmabuf-fence", os.MFD_CLOEXEC)
            opened.append(fds[at])
            if os.pwrite(fds[at], structure, 0) != len(structure):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    except OSError as e:
        for fd in opened:
            os.close(fd)
        raise fail(e.errno or errno.EIO, "send", "a container of fences", "its structure needs a descriptor and memory") from None
    return _HEADER.pack(_MAGIC, len(items), len(fds), 0) + b"".join(items), fds, fences, opened


def _sync_items(sync_file: SyncFile) -> list[bytes]:
    """A sync file's part of a message. Where its domain has a directory the receiver looks there; else the facts come along."""
    sync_file.share("send")
    facts = sync_file.facts().pack() if sync_file.domain.path is None and not sync_file.kernel else b""
    pieces = [facts[at : at + 64].ljust(64, b"\0") for at in range(0, len(facts), 64)]
    domain = sync_file.domain
    return [_item(_SYNC_FILE, domain, _SYNC.pack(len(facts)), len(pieces)), *(_item(_MORE, domain, piece) for piece in pieces)]


def check_fence(fence: DmaFence, operation: str) -> None:
    """Errors: EPERM a fence from before a fork, whose domain began anew since."""
    if fence.shm is not fence.domain.shm:
        raise fail(errno.EPERM, operation, fence, "what a fork inherits is inert once its domain is gone")


def timeline_place(timeline: Timeline | RemoteTimeline, operation: str) -> tuple[int, int, int]:
    """(index, use of the slot, context). Errors: EPERM inherited by a fork; EBADF closed."""
    if isinstance(timeline, RemoteTimeline):
        return timeline._index, timeline._number, timeline.context
    if timeline._shm.life != timeline._life:
        raise fail(errno.EPERM, operation, timeline, "what a fork inherits is inert in the child: let the parent send it")
    if timeline.closed:
        raise fail(errno.EBADF, operation, timeline, "make a new timeline", what="the timeline is closed")
    found = timeline._shm.timeline_info(timeline._index)
    return timeline._index, found[0] if found else 0, timeline.context


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
        return _things(sock, items, fds, made)
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
    if peer.stream and len(data) < _ONE.size and _MAGIC.startswith(data[: len(_MAGIC)]):
        data += _receive_rest(sock, _ONE.size - len(data))
    if len(data) < _ONE.size or not data.startswith(_MAGIC):
        raise _foreign(sock, f"{len(data)} bytes that are no message of dmabuf.send()")
    _, things, count, _ = _HEADER.unpack_from(data)
    length = _HEADER.size + things * _ITEM.size
    if not 1 <= things <= MAX_THINGS or count > things:
        raise _foreign(sock, f"a message of {things} things and {count} descriptors, which send() does not make")
    if peer.stream:
        data += _receive_rest(sock, length - len(data))
    if len(data) != length:
        raise _foreign(sock, f"a message of {len(data)} bytes that should have {length}")
    if flags & _CTRUNC and len(fds) < count:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise fail(
            errno.EMFILE, "recv", _named(sock), "raise RLIMIT_NOFILE (ulimit -n) or close descriptors, and have it sent again",
            what=f"{count - len(fds)} of {count} descriptors were lost, RLIMIT_NOFILE is {limit}",
        )  # fmt: skip
    items = list(_ITEM.iter_unpack(data[_HEADER.size :]))
    if len(fds) != count or sum(item[0] in _WITH_FD for item in items) != count:
        raise _foreign(sock, f"a message with {len(fds)} descriptors that should have {count}")
    return items


def _foreign(sock: socket.socket, what: str) -> DmaBufError:
    remedy = "nothing but dmabuf.send() writes to the socket that recv() reads"
    return fail(errno.EBADMSG, "recv", _named(sock), remedy, what=f"it brought {what}")


def _things(sock: socket.socket, items: list[tuple[Any, ...]], fds: list[int], made: list[Any]) -> list[Any]:
    """What the items stand for, in their order; a descriptor that has become part of a thing is -1 in ``fds``."""
    order = iter(range(len(fds)))
    places = [next(order) if item[0] in _WITH_FD else -1 for item in items]
    domains: dict[int, Domain] = {}
    for at, (kind, _, _, _, identity, _) in enumerate(items):  # before what belongs to them
        if kind in (_PRIVATE_DOMAIN, _DIRECTORY):
            fd, fds[places[at]] = fds[places[at]], -1
            domain = domains[at] = Domain.adopt(fd) if kind == _PRIVATE_DOMAIN else _directory(fd)
            if domain.id != identity.hex():
                raise _foreign(sock, f"domain {domain.id} under the name of {identity.hex()}")
    for at, (kind, flags, _, index, identity, body) in enumerate(items):
        if at in domains:
            made.append(domains[at])
            continue
        domain = _domain_of(identity, flags)
        if kind == _MORE:
            continue
        if kind == _BUFFER:
            fd, fds[places[at]] = fds[places[at]], -1
            dev, ino, nonce, name = _BODY.unpack(body)
            made.append(received(fd, domain, dev, ino, nonce, name.rstrip(b"\0") if flags & _HAS_NAME else None))
        elif kind == _RANGE:
            if not made or items[at - 1][0] != _BUFFER:
                raise _foreign(sock, "a range without its buffer")
            try:
                made[-1] = BufferRange(made[-1], *_PART.unpack(body))
            except OSError:
                raise _foreign(sock, "a range that is not inside of its buffer") from None
        elif kind == _FENCE_KIND:
            handle, context, seqno = _FENCE.unpack(body)
            made.append(wrap(domain, handle, (context, seqno, index)))
        elif kind == _CONTAINER:
            fd, fds[places[at]] = fds[places[at]], -1
            made.append(_container(sock, domain, fd))
        elif kind == _SYNC_FILE:
            length = _SYNC.unpack(body)[0]
            facts = b"".join(item[5] for item in items[at + 1 : at + 1 + index])[:length]
            made.append(SyncFile.taken(fds[places[at]], domain, Facts.unpack(facts) if length else None))
            fds[places[at]] = -1
        elif kind in (_SW_SYNC, _SEMAPHORE):
            made.append((SwSync if kind == _SW_SYNC else TimelineSemaphore).taken(fds[places[at]], domain))
            fds[places[at]] = -1
        elif kind == _TIMELINE_KIND:
            number, context = _TIMELINE.unpack(body)
            made.append(RemoteTimeline(domain, index, number, context))
        else:
            raise _foreign(sock, f"a thing of kind {kind}, which this version does not know")
    return made


def _container(sock: socket.socket, domain: Domain, fd: int) -> DmaFence:
    """The container of fences whose structure is behind an fd, which is consumed."""
    with open(fd, "rb") as structure:
        try:
            return unpack(domain, structure.read() if os.fstat(fd).st_size <= _MOST_STRUCTURE else b"")
        except (ValueError, struct.error):
            raise _foreign(sock, "something that is no container of fences") from None


def _domain_of(identity: bytes, flags: int) -> Domain:
    """The domain of this process with that id."""
    domain = _domains.get(identity) or known(identity.hex())
    if domain is None:
        domain = Domain.default()
        if domain.id != identity.hex():
            private = flags & _IS_PRIVATE
            raise fail(
                errno.EXDEV, "recv", f"domain {identity.hex()}",
                "send the domain along: dmabuf.send(sock, domain, …)"
                if private
                else "start both processes with the same DMABUF_DOMAIN, or send the domain along: dmabuf.send(sock, domain, …)",
                what=f"what came belongs to a {'private domain' if private else 'domain'} that this process does not have",
            )  # fmt: skip
    _domains[identity] = domain
    return domain


def _directory(fd: int) -> Domain:
    """The domain in the directory behind an fd, which is consumed."""
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
        here = os.fstat(fd)
        try:
            there = os.stat(path)
        except OSError:
            there = None
        if there is None or (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise fail(errno.ENOENT, "recv", path, "the directory of a domain must stay where it is", what="the domain's directory is gone")
    finally:
        os.close(fd)
    return Domain.open(path)
