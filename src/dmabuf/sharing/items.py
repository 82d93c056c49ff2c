"""What a message of ``send`` is made of: the items for what travels, and what stands for them in the process that receives.

The message: 16 bytes (``dmabuf``, version, number of things, number of descriptors) and 80 for each item, native byte order. Most
things are one item; a range is one behind its buffer's, and the facts of a sync file of a private domain take as many as they need.
Nothing in it is trusted: numbers are bounded, and what ``send`` does not make is EBADMSG.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import weakref
from typing import Any, Final

from dmabuf.core.access.range import BufferRange
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.buffer.shared import SharedBuffer
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.fence.fence import DmaFence, wrap
from dmabuf.core.fence.timeline import Timeline, inherited, slot_of
from dmabuf.core.fence.travel import pack, unpack
from dmabuf.core.get import received
from dmabuf.core.sync.semaphore import TimelineSemaphore
from dmabuf.core.sync.sw_sync import SwSync
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.records import Record
from dmabuf.domain.sync_files import SyncFileRecord
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.remote_timeline import RemoteTimeline

MAX_THINGS: Final = 253  # SCM_MAX_FD, include/net/scm.h

MAGIC: Final = b"dmabuf\0\1"  # the last byte is the version
HEADER: Final = struct.Struct("=8sHHI")  # magic, things, descriptors, 0
ITEM: Final = struct.Struct("=BBHI8s64s")  # kind, flags, 0, index, domain, body
ONE: Final = struct.Struct("=8sHHIBBHI8sQQ16s32s")  # header and one buffer
_BODY: Final = struct.Struct("=QQ16s32s")  # of a buffer: st_dev, st_ino, nonce, name
_PART: Final = struct.Struct("=QQ48x")  # of a range: offset, length
_FENCE: Final = struct.Struct("=QQQ40x")  # handle, context, seqno
_TIMELINE: Final = struct.Struct("=QQ48x")  # number of its slot's use, context
_MOST_STRUCTURE: Final = 1 << 28  # bytes of a fence container: more than a domain has fences for
_SYNC: Final = struct.Struct("=I60x")  # of a sync file: bytes of its facts, in the items that follow

_BUFFER, _FENCE_KIND, _TIMELINE_KIND, _PRIVATE_DOMAIN, _DIRECTORY = 1, 2, 3, 4, 5
_CONTAINER, _SYNC_FILE, _MORE, _SW_SYNC = 6, 7, 8, 9
_RANGE: Final = 10  # of the buffer in the item before
_SEMAPHORE: Final = 11
WITH_FD: Final = frozenset((_BUFFER, _PRIVATE_DOMAIN, _DIRECTORY, _CONTAINER, _SYNC_FILE, _SW_SYNC, _SEMAPHORE))
_IS_PRIVATE, HAS_NAME = 1, 2  # flags of an item

# By id, as the commonest message names its domain: found without a look at the registry.
domains: weakref.WeakValueDictionary[bytes, Domain] = weakref.WeakValueDictionary()


# ---- errors ----


def socket_name(sock: socket.socket) -> str:
    """A socket in a message to the user."""
    return f"socket fd {sock.fileno()}"


def foreign(sock: socket.socket, what: str) -> DmaBufError:
    """EBADMSG: somebody else wrote to the socket."""
    remedy = "nothing but dmabuf.send() writes to the socket that recv() reads"
    return fail(errno.EBADMSG, "recv", socket_name(sock), remedy, what=f"it brought {what}")


# ---- to bytes ----


def _item(kind: int, domain: Domain, body: bytes, index: int = 0, flags: int = 0) -> bytes:
    return ITEM.pack(kind, flags | (_IS_PRIVATE if domain.path is None else 0), 0, index, bytes.fromhex(domain.id), body)


def _item_of(record: Record) -> bytes:
    """A buffer's part of a message. Its name is for the case that nobody living holds the record until it arrives."""
    name = record.info()["name"]
    body = _BODY.pack(record.dev, record.ino, record.nonce, name or b"")
    return _item(_BUFFER, record.domain, body, flags=0 if name is None else HAS_NAME)


def message_of(shared: SharedBuffer) -> bytes:
    """The whole message of one buffer; kept, for the next time that it is sent."""
    if shared.message is None:
        shared.message = HEADER.pack(MAGIC, 1, 1, 0) + _item_of(shared)
    return shared.message


def pack_things(things: tuple[Any, ...]) -> tuple[bytes, list[int], list[DmaFence], list[int]]:
    """(message, descriptors that travel, fences in it, descriptors to close afterwards); everything is checked first."""
    if not things:
        raise fail(errno.EINVAL, "send", "nothing", "name at least one buffer, fence, timeline or domain")
    if len(things) > MAX_THINGS:
        limit = f"send at most {MAX_THINGS} at once"
        raise fail(errno.EINVAL, "send", f"{len(things)} things", limit, what="the kernel takes no more in a message")
    items, fds, fences, directories, structures, opened = [], [], [], [], [], []
    for thing in things:
        if isinstance(thing, DmaBuf):
            handle = handle_of(thing)
            fds.append(handle.check("send"))
            items.append(_item_of(handle.shared))
        elif isinstance(thing, BufferRange):
            handle = handle_of(thing.buf)
            fds.append(handle.check("send"))
            items += [_item_of(handle.shared), _item(_RANGE, thing.buf.domain, _PART.pack(thing.offset, thing.length))]
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
    return HEADER.pack(MAGIC, len(items), len(fds), 0) + b"".join(items), fds, fences, opened


def _sync_items(sync_file: SyncFile) -> list[bytes]:
    """A sync file's part of a message. Where its domain has a directory the receiver looks there; else the facts come along."""
    sync_file.share("send")
    facts = sync_file.record().pack() if sync_file.domain.path is None and not sync_file.kernel else b""
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
    if inherited(timeline):
        raise fail(errno.EPERM, operation, timeline, "what a fork inherits is inert in the child: let the parent send it")
    if timeline.closed:
        raise fail(errno.EBADF, operation, timeline, "make a new timeline", what="the timeline is closed")
    index = slot_of(timeline)
    found = timeline.domain.shm.timeline_info(index)
    return index, found[0] if found else 0, timeline.context


# ---- from bytes ----


def things_of(sock: socket.socket, items: list[tuple[Any, ...]], fds: list[int], made: list[Any]) -> list[Any]:
    """What the items stand for, in their order; a descriptor that has become part of a thing is -1 in ``fds``."""
    order = iter(range(len(fds)))
    places = [next(order) if item[0] in WITH_FD else -1 for item in items]
    own: dict[int, Domain] = {}
    for at, (kind, _, _, _, identity, _) in enumerate(items):  # before what belongs to them
        if kind in (_PRIVATE_DOMAIN, _DIRECTORY):
            fd, fds[places[at]] = fds[places[at]], -1
            domain = own[at] = Domain.adopt(fd) if kind == _PRIVATE_DOMAIN else _directory(fd)
            if domain.id != identity.hex():
                raise foreign(sock, f"domain {domain.id} under the name of {identity.hex()}")
    for at, (kind, flags, _, index, identity, body) in enumerate(items):
        if at in own:
            made.append(own[at])
            continue
        domain = domain_of(identity, flags)
        if kind == _MORE:
            continue
        if kind == _BUFFER:
            fd, fds[places[at]] = fds[places[at]], -1
            dev, ino, nonce, name = _BODY.unpack(body)
            made.append(received(fd, domain, dev, ino, nonce, name.rstrip(b"\0") if flags & HAS_NAME else None))
        elif kind == _RANGE:
            if not made or items[at - 1][0] != _BUFFER:
                raise foreign(sock, "a range without its buffer")
            try:
                made[-1] = BufferRange(made[-1], *_PART.unpack(body))
            except OSError:
                raise foreign(sock, "a range that is not inside of its buffer") from None
        elif kind == _FENCE_KIND:
            handle, context, seqno = _FENCE.unpack(body)
            made.append(wrap(domain, handle, (context, seqno, index)))
        elif kind == _CONTAINER:
            fd, fds[places[at]] = fds[places[at]], -1
            made.append(_container(sock, domain, fd))
        elif kind == _SYNC_FILE:
            length = _SYNC.unpack(body)[0]
            facts = b"".join(item[5] for item in items[at + 1 : at + 1 + index])[:length]
            made.append(SyncFile.from_owned_fd(fds[places[at]], domain, SyncFileRecord.unpack(facts) if length else None))
            fds[places[at]] = -1
        elif kind in (_SW_SYNC, _SEMAPHORE):
            made.append((SwSync if kind == _SW_SYNC else TimelineSemaphore).from_owned_fd(fds[places[at]], domain))
            fds[places[at]] = -1
        elif kind == _TIMELINE_KIND:
            number, context = _TIMELINE.unpack(body)
            made.append(RemoteTimeline(domain, index, number, context))
        else:
            raise foreign(sock, f"a thing of kind {kind}, which this version does not know")
    return made


def _container(sock: socket.socket, domain: Domain, fd: int) -> DmaFence:
    """The container of fences whose structure is behind an fd, which is consumed."""
    with open(fd, "rb") as structure:
        try:
            return unpack(domain, structure.read() if os.fstat(fd).st_size <= _MOST_STRUCTURE else b"")
        except (ValueError, struct.error):
            raise foreign(sock, "something that is no container of fences") from None


def domain_of(identity: bytes, flags: int) -> Domain:
    """The domain of this process with that id."""
    domain = domains.get(identity) or known(identity.hex())
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
    domains[identity] = domain
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
