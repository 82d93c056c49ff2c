"""The items of a message of ``send``, and the objects that the receiver makes of them.

A message has 16 bytes (``dmabuf``, version, number of items, number of descriptors) and 80 bytes for each item, in native byte order. Most
objects are one item. A range is a second item after its buffer's. The record of a sync file of a private domain, and what is sent along
(``meta``), are as many as they need; more than :data:`INLINE_META` bytes of meta are in a sealed memfd.
The receiver trusts nothing in it: numbers are bounded, and a message that ``send`` does not make is EBADMSG.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final

from dmabuf._native import OwnedFd, WeakValues
from dmabuf.core.access.range import BufferRange
from dmabuf.core.base.registry import Registry
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.buffer.identity import NAME_BYTES
from dmabuf.core.buffer.shared import SharedBuffer
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.fence.fence import DmaFence, wrap
from dmabuf.core.fence.timeline import Timeline, inherited, slot_of
from dmabuf.core.fence.travel import MOST_BYTES, pack, unpack
from dmabuf.core.get import received
from dmabuf.core.sync.semaphore import TimelineSemaphore
from dmabuf.core.sync.sw_sync import SwSync
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.domain import place
from dmabuf.domain.directory import open_at
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.records import Record
from dmabuf.domain.sync_files import SyncFileRecord
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.remote_timeline import RemoteTimeline, use_of
from dmabuf.sharing.sealed import content, sealed

MAX_OBJECTS: Final = 253  # SCM_MAX_FD, include/net/scm.h

MAGIC: Final = b"dmabuf\0\1"  # the last byte is the version
HEADER: Final = struct.Struct("=8sHHI")  # magic, objects, descriptors, 0
ITEM: Final = struct.Struct("=BBHI8s64s")  # kind, flags, 0, index, domain, body
ONE: Final = struct.Struct("=8sHHIBBHI8sQQ16s32s")  # header and one buffer
_BODY: Final = struct.Struct("=QQ16s32s")  # of a buffer: st_dev, st_ino, nonce, name
_PART: Final = struct.Struct("=QQ48x")  # of a range: offset, length
_FENCE: Final = struct.Struct("=QQQ40x")  # handle, context, seqno
_TIMELINE: Final = struct.Struct("=QQ48x")  # number of the slot's use, context
_SYNC: Final = struct.Struct("=I60x")  # of a sync file: bytes of its record, in the items that follow
_STREAM_BODY: Final = struct.Struct("=I60x")  # how many buffers
_META_BODY: Final = struct.Struct("=IB59x")  # of meta: its bytes, and whether they are JSON

INLINE_META: Final = 1024
MAX_META: Final = 1 << 20  # bytes
_NO_DOMAIN: Final = bytes(8)

_BUFFER, _FENCE_KIND, _TIMELINE_KIND, _PRIVATE_DOMAIN, _DIRECTORY = 1, 2, 3, 4, 5
_CONTAINER, _SYNC_FILE, _MORE, _SW_SYNC = 6, 7, 8, 9
_RANGE: Final = 10  # of the buffer in the item before
_SEMAPHORE: Final = 11
_META, _META_FD = 12, 13  # in the items that follow, or in a memfd
_STREAM: Final = 14  # made of the buffers in the items that follow
WITH_FD: Final = frozenset((_BUFFER, _PRIVATE_DOMAIN, _DIRECTORY, _CONTAINER, _SYNC_FILE, _SW_SYNC, _SEMAPHORE, _META_FD))
_IS_PRIVATE, HAS_NAME = 1, 2  # flags of an item

# By id, as in the commonest message, whose domain is found here without the registry.
domains: WeakValues[bytes, Domain] = WeakValues()


class Composed(ABC):
    """What is sent as several buffers: a stream."""

    @abstractmethod
    def sent_as(self) -> tuple[DmaBuf, ...]:
        """Return the buffers.

        Raises:
            ClosedError: It is closed (EBADF).
        """


COMPOSED: Final[Registry[Callable[[tuple[DmaBuf, ...]], Composed]]] = Registry("composed object", {"stream": "dmabuf.stream.stream"})
"""Functions that make what was sent as several buffers, which they own from then on."""


class Received(list[Any]):
    """The objects of one message. ``meta``: what was sent along with them, None if nothing was."""

    meta: Any = None


# ---- errors ----


def socket_name(sock: socket.socket) -> str:
    """Return the name of a socket in messages."""
    return f"socket fd {sock.fileno()}"


def foreign(sock: socket.socket, what: str) -> DmaBufError:
    """Return the error for a message that ``send`` did not make (EBADMSG)."""
    remedy = "write to this socket with dmabuf.send() only"
    return fail(errno.EBADMSG, "recv", socket_name(sock), remedy, what=f"it brought {what}")


# ---- to bytes ----


def _item(kind: int, domain: Domain, body: bytes, index: int = 0, flags: int = 0) -> bytes:
    return ITEM.pack(kind, flags | (_IS_PRIVATE if domain.path is None else 0), 0, index, bytes.fromhex(domain.id), body)


def _item_of(record: Record) -> bytes:
    """Return a buffer's item. It has the name in case no process references the record until the message arrives."""
    name = record.info()["name"]
    body = _BODY.pack(record.dev, record.ino, record.nonce, name or b"")
    return _item(_BUFFER, record.domain, body, flags=0 if name is None else HAS_NAME)


def message_of(shared: SharedBuffer) -> bytes:
    """Return the whole message of one buffer, which is kept for the next send()."""
    if shared.message is None:
        shared.message = HEADER.pack(MAGIC, 1, 1, 0) + _item_of(shared)
    return shared.message


def pack_meta(meta: Any) -> tuple[bytes, bool]:
    """Return what is sent along as (bytes, whether they are JSON).

    Raises:
        TypeError: It is neither bytes nor what JSON has.
        DmaBufError: It is more than :data:`MAX_META` bytes (EMSGSIZE).
    """
    as_json = not isinstance(meta, (bytes, bytearray, memoryview))
    if as_json:
        try:
            data = json.dumps(meta, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as e:
            raise TypeError(f"send: meta is bytes, or what JSON has (dict, list, str, numbers, bool, None): {e}") from None
    else:
        data = bytes(meta)
    if len(data) > MAX_META:
        remedy = f"send at most {MAX_META}, or put it into a buffer"
        raise fail(errno.EMSGSIZE, "send", "meta", remedy, what=f"it has {len(data)} bytes")
    return data, as_json


def _pieces(data: bytes) -> list[bytes]:
    """Return items of bytes that didn't fit into an item before them."""
    return [ITEM.pack(_MORE, 0, 0, 0, _NO_DOMAIN, data[at : at + 64]) for at in range(0, len(data), 64)]


def pack_objects(objects: tuple[Any, ...], meta: Any = None) -> tuple[bytes, list[int], list[DmaFence], list[OwnedFd]]:
    """Return (message, its descriptors, its fences, descriptors to close afterwards). Everything is checked first."""
    if not objects and meta is None:
        remedy = "pass at least one buffer, fence, timeline or domain, or meta"
        raise fail(errno.EINVAL, "send", "an empty message", remedy, what="there is nothing to send")
    if len(objects) > MAX_OBJECTS:
        limit = f"send at most {MAX_OBJECTS} at once"
        raise fail(errno.EINVAL, "send", f"{len(objects)} objects", limit, what="the kernel passes no more with a message")
    items, fds, fences, directories, structures, opened = [], [], [], [], [], []
    for one in objects:
        if isinstance(one, DmaBuf):
            handle = handle_of(one)
            fds.append(handle.descriptor("send"))
            items.append(_item_of(handle.shared))
        elif isinstance(one, BufferRange):
            handle = handle_of(one.buf)
            fds.append(handle.descriptor("send"))
            items += [_item_of(handle.shared), _item(_RANGE, one.buf.domain, _PART.pack(one.offset, one.length))]
        elif isinstance(one, DmaFence):
            check_fence(one, "send")
            structure = pack(one)
            if structure is not None:
                if len(structure) > MOST_BYTES:
                    remedy = "merge fewer fences into one"
                    raise fail(errno.EMSGSIZE, "send", one, remedy, what=f"it has more than {MOST_BYTES // 40} fences")
                structures.append((len(fds), structure))
                fds.append(-1)
                items.append(_item(_CONTAINER, one.domain, b""))
                continue
            one.publish()
            items.append(_item(_FENCE_KIND, one.domain, _FENCE.pack(one.handle, one.context, one.seqno), one.timeline_index))
            fences.append(one)
        elif isinstance(one, SyncFile):
            fds.append(one.fileno())
            items += _sync_items(one)
        elif isinstance(one, SwSync | TimelineSemaphore):
            fds.append(one.fileno())
            items.append(_item(_SW_SYNC if isinstance(one, SwSync) else _SEMAPHORE, one.domain, b""))
        elif isinstance(one, Timeline | RemoteTimeline):
            index, number, context = timeline_place(one, "send")
            items.append(_item(_TIMELINE_KIND, one.domain, _TIMELINE.pack(number, context), index))
        elif isinstance(one, Composed):
            handles = [handle_of(buf) for buf in one.sent_as()]
            fds += [handle.descriptor("send") for handle in handles]
            items.append(_item(_STREAM, handles[0].domain, _STREAM_BODY.pack(len(handles))))
            items += [_item_of(handle.shared) for handle in handles]
        elif isinstance(one, Domain) and one.path is None:
            fds.append(one.fileno())
            items.append(_item(_PRIVATE_DOMAIN, one, b""))
        elif isinstance(one, Domain):
            directories.append((len(fds), one))
            fds.append(-1)
            items.append(_item(_DIRECTORY, one, b""))
        else:
            remedy = "; pass its items one by one, as send(sock, *objects)" if isinstance(one, list | tuple) else ""
            kinds = "buffers, ranges, streams, fences, sync files, timelines or domains"
            raise TypeError(f"send: expected {kinds}, not {type(one).__name__}{remedy}")
    if meta is not None:
        data, as_json = pack_meta(meta)
        pieces = _pieces(data) if len(data) <= INLINE_META and len(items) + 1 + -(-len(data) // 64) <= MAX_OBJECTS else []
        if data and not pieces:
            structures.append((len(fds), data))
            fds.append(-1)
        items.append(
            ITEM.pack(_META if pieces or not data else _META_FD, 0, 0, len(pieces), _NO_DOMAIN, _META_BODY.pack(len(data), as_json))
        )
        items += pieces
    if len(items) > MAX_OBJECTS:
        remedy = "send fewer at once, or merge fewer fences into one, or use a domain that has a directory"
        what = "with their fences and meta they don't fit into a message"
        raise fail(errno.EMSGSIZE, "send", f"{len(objects)} objects", remedy, what=what)
    try:
        try:
            for at, one in directories:
                with one.directory() as directory:
                    if directory is None:
                        raise directory_lost("send", one)
                    opened.append(open_at(directory, ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
                fds[at] = opened[-1].number
        except DmaBufError:
            raise
        except OSError as e:
            raise fail(e.errno or errno.EIO, "send", "a domain", "don't remove or rename its directory", what=e.strerror) from None
        try:
            for at, structure in structures:
                opened.append(sealed("dmabuf-sent", structure))
                fds[at] = opened[-1].number
        except OSError as e:
            raise fail(e.errno or errno.EIO, "send", "a container of fences, or meta", "close descriptors, or free memory") from None
    except BaseException:
        for own in opened:
            own.close()
        raise
    return HEADER.pack(MAGIC, len(items), len(fds), 0) + b"".join(items), fds, fences, opened


def directory_lost(operation: str, domain: Domain) -> OSError:
    """Return the error for a process that should join a domain whose directory is gone."""
    remedy = "start its processes again; those that it has go on, but no other can join them"
    return fail(errno.ENOENT, operation, domain, remedy, what="its directory was removed")


def _sync_items(sync_file: SyncFile) -> list[bytes]:
    """Return a sync file's items. If its domain has a directory, the receiver finds the record there; else the record comes along."""
    sync_file.share("send")
    facts = sync_file.record().pack() if sync_file.domain.path is None and not sync_file.kernel else b""
    pieces = [facts[at : at + 64].ljust(64, b"\0") for at in range(0, len(facts), 64)]
    domain = sync_file.domain
    return [_item(_SYNC_FILE, domain, _SYNC.pack(len(facts)), len(pieces)), *(_item(_MORE, domain, piece) for piece in pieces)]


def check_fence(fence: DmaFence, operation: str) -> None:
    """Check that a fence can be sent. One from before a fork can't, because its domain has ended since (EPERM)."""
    if fence.shm is not fence.domain.shm:
        raise fail(errno.EPERM, operation, fence, "make a new fence", what="it is from before a fork, and its domain has ended")


def timeline_place(timeline: Timeline | RemoteTimeline, operation: str) -> tuple[int, int, int]:
    """Return (index, use of the slot, context) of a timeline.

    Raises:
        NotPermittedError: The timeline belongs to the parent of this process (EPERM).
        ClosedError: The timeline is closed (EBADF).
    """
    if isinstance(timeline, RemoteTimeline):
        return *use_of(timeline), timeline.context
    if inherited(timeline):
        raise fail(errno.EPERM, operation, timeline, "send it in the parent", what="the timeline belongs to the parent of this process")
    if timeline.closed:
        raise fail(errno.EBADF, operation, timeline, "make a new timeline", what="the timeline is closed")
    index = slot_of(timeline)
    found = timeline.domain.shm.timeline_info(index)
    return index, found[0] if found else 0, timeline.context


# ---- from bytes ----


def name_in(body: bytes) -> bytes:
    """Return a buffer's name from a message, up to its first NUL, and not longer than a name can be."""
    return body[:NAME_BYTES].partition(b"\0")[0]


def _meta_of(sock: socket.socket, made: Received, data: bytes, as_json: int) -> None:
    """Give the objects of a message what was sent along with them."""
    if made.meta is not None:
        raise foreign(sock, "meta twice")
    if not as_json:
        made.meta = data
        return
    try:
        made.meta = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise foreign(sock, f"meta that is not JSON: {e}") from None


def objects_of(sock: socket.socket, items: list[tuple[Any, ...]], fds: list[OwnedFd], made: Received) -> Received:
    """Return the objects of some items, in their order. A descriptor that belongs to an object is then taken from ``fds``."""
    order = iter(range(len(fds)))
    places = [next(order) if item[0] in WITH_FD else -1 for item in items]
    own: dict[int, Domain] = {}
    composed: list[tuple[int, int]] = []
    for at, (kind, _, _, _, identity, _) in enumerate(items):  # domains first, before the objects in them
        if kind in (_PRIVATE_DOMAIN, _DIRECTORY):
            fd = fds[places[at]]
            domain = own[at] = Domain.adopt(fd) if kind == _PRIVATE_DOMAIN else _directory(fd)
            if domain.id != identity.hex():
                raise foreign(sock, f"domain {domain.id} under the name of {identity.hex()}")
    for at, (kind, flags, _, index, identity, body) in enumerate(items):
        if at in own:
            made.append(own[at])
            continue
        if kind == _MORE:
            continue
        if kind in (_META, _META_FD):
            length, as_json = _META_BODY.unpack(body)
            data = _pieces_at(sock, items, at, index, length) if kind == _META else _in_memory(sock, fds[places[at]], length)
            _meta_of(sock, made, data, as_json)
            continue
        domain = domain_of(identity, flags)
        if kind == _STREAM:
            composed.append((len(made), *_STREAM_BODY.unpack(body)))
        elif kind == _BUFFER:
            fd = fds[places[at]]
            dev, ino, nonce, name = _BODY.unpack(body)
            made.append(received(fd, domain, dev, ino, nonce, name_in(name) if flags & HAS_NAME else None))
        elif kind == _RANGE:
            if not made or items[at - 1][0] != _BUFFER:
                raise foreign(sock, "a range without its buffer")
            try:
                made[-1] = BufferRange(made[-1], *_PART.unpack(body))
            except OSError:
                raise foreign(sock, "a range that is not inside its buffer") from None
        elif kind == _FENCE_KIND:
            handle, context, seqno = _FENCE.unpack(body)
            made.append(wrap(domain, handle, (context, seqno, index)))
        elif kind == _CONTAINER:
            made.append(_container(sock, domain, fds[places[at]]))
        elif kind == _SYNC_FILE:
            length = _SYNC.unpack(body)[0]
            facts = b"".join(item[5] for item in items[at + 1 : at + 1 + index])[:length]
            made.append(SyncFile.from_owned_fd(fds[places[at]], domain, SyncFileRecord.unpack(facts) if length else None))
        elif kind in (_SW_SYNC, _SEMAPHORE):
            made.append((SwSync if kind == _SW_SYNC else TimelineSemaphore).from_owned_fd(fds[places[at]], domain))
        elif kind == _TIMELINE_KIND:
            number, context = _TIMELINE.unpack(body)
            made.append(RemoteTimeline(domain, index, number, context))
        else:
            raise foreign(sock, f"an object of kind {kind}, which this version doesn't know")
    for start, count in reversed(composed):
        bufs = tuple(made[start : start + count])
        if len(bufs) != count or not count or not all(isinstance(buf, DmaBuf) for buf in bufs):
            raise foreign(sock, "a stream without its buffers")
        made[start : start + count] = [COMPOSED.find("stream")(bufs)]
    return made


def _pieces_at(sock: socket.socket, items: list[tuple[Any, ...]], at: int, count: int, length: int) -> bytes:
    """Return bytes that are in the items after one."""
    pieces = items[at + 1 : at + 1 + count]
    if count != -(-length // 64) or len(pieces) != count or any(piece[0] != _MORE for piece in pieces):
        raise foreign(sock, f"{length} bytes in {len(pieces)} items")
    return b"".join(piece[5] for piece in pieces)[:length]


def _in_memory(sock: socket.socket, fd: OwnedFd, length: int) -> bytes:
    """Return the meta behind a descriptor, which is consumed."""
    with fd as memory:
        try:
            return content(memory, length, min(length, MAX_META))
        except ValueError as e:
            raise foreign(sock, f"something that is not meta: its memory {e}") from None


def _container(sock: socket.socket, domain: Domain, fd: OwnedFd) -> DmaFence:
    """Return the container of fences whose structure is behind a descriptor, which is consumed."""
    with fd as structure:
        try:
            return unpack(domain, content(structure, 1, MOST_BYTES))
        except ValueError as e:
            raise foreign(sock, f"something that is not a container of fences: {e}") from None


def domain_of(identity: bytes, flags: int) -> Domain:
    """Return this process's domain with that id."""
    domain = domains.get(identity) or known(identity.hex())
    if domain is None:
        domain = Domain.default()
        if domain.id != identity.hex():
            place.check_set_aside(domain.path, identity.hex(), "recv", f"domain {identity.hex()}")
            private = flags & _IS_PRIVATE
            raise fail(
                errno.EXDEV, "recv", f"domain {identity.hex()}",
                "send the domain along: dmabuf.send(sock, domain, …)"
                if private
                else place.SHARE_DOMAIN,
                what=f"the message belongs to a {'private domain' if private else 'domain'} that this process doesn't have",
            )  # fmt: skip
    domains[identity] = domain
    return domain


def _directory(fd: OwnedFd) -> Domain:
    """Return the domain in the directory behind a descriptor, which is consumed."""
    with fd:
        path = os.readlink(f"/proc/self/fd/{fd.number}")
        here = os.fstat(fd.number)
        try:
            there = os.stat(path)
            os.stat(place.FILE, dir_fd=fd.number, follow_symlinks=False)  # in a directory of something else nothing is made
        except OSError:
            there = None
        if there is None or (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            remedy = "start the domain's processes again, or give both processes the same mounts"
            what = "the domain's directory isn't there for this process: removed, renamed, or in another mount namespace"
            raise fail(errno.ENOENT, "recv", path, remedy, what=what)
    return Domain.open(path)
