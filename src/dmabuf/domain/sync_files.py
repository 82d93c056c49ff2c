"""The descriptors of sync files: the slots that they have in the domain, and how a process recognizes one.

A sync file's descriptor is a socket with an abstract name (``native/fds/pollable.h``). Any process of the domain can make it readable, even
if its maker is dead, and ``getsockname`` tells a process that received the bare descriptor which sync file it is. The name says the
domain, the slot and its generation. In the slots are the sync file's name, its fences, and their results once they are known
(``native/domain/sync.c`` says how it is advanced and made readable).

A slot is in use as long as some process has the descriptor, which only the kernel knows. A process makes sync files in chunks of its own,
and uses a slot again when the name of its last use is free. A process that dies leaves nothing to clean up: the next owner of the chunk
asks for each slot whether it is in use.

Every user of the machine can connect to an abstract name and so make a descriptor readable early. ``wait`` and ``status`` look at the
fences and are not deceived.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

from dmabuf._native import CH_LEAF, CH_SYNC, OwnedFd, owned
from dmabuf.domain.domain import Domain
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.local import Local
from dmabuf.errors import fail

MAX_LEAVES: Final = 1 << 16  # in a message
NAME_BYTES: Final = 32  # with its NUL (SYNC_IOC_MERGE, semantics 5.1)
_TRIES: Final = 2  # slots of closed sync files to look at, for each that is made
_PREFIX: Final = b"\0dmabuf/sync-"
_HEAD: Final = struct.Struct("=8s32sI")
_LEAF: Final = struct.Struct("=QQQIiQ64s64s")
_MAGIC: Final = b"dmabufS\1"  # the last byte is the version


class Leaf(NamedTuple):
    """A fence of a sync file. ``status``: 0 unless the fence is known to be signaled."""

    handle: int
    context: int
    seqno: int
    timeline: int
    status: int = 0
    timestamp: int = 0
    driver: bytes = b""
    name: bytes = b""


class SyncFileRecord(NamedTuple):
    """What every process knows of a sync file: its name and its fences."""

    name: bytes
    leaves: tuple[Leaf, ...]

    def pack(self) -> bytes:
        """Return the record as bytes for a message. More fences than a receiver takes are EMSGSIZE."""
        if len(self.leaves) > MAX_LEAVES:
            remedy = f"send it in a domain that has a directory, or merge at most {MAX_LEAVES} fences"
            raise fail(errno.EMSGSIZE, "send", "a sync file", remedy, what=f"it has {len(self.leaves)} fences")
        head = _HEAD.pack(_MAGIC, self.name[: NAME_BYTES - 1], len(self.leaves))
        return head + b"".join(_LEAF.pack(*leaf) for leaf in self.leaves)

    @classmethod
    def unpack(cls, data: bytes) -> SyncFileRecord:
        """Return the record in some bytes. Bytes that are not a record are EUCLEAN."""
        if len(data) < _HEAD.size or not data.startswith(_MAGIC):
            raise _nonsense(f"{len(data)} bytes that don't begin like a record")
        _, name, count = _HEAD.unpack_from(data)
        if not 1 <= count <= MAX_LEAVES or len(data) != _HEAD.size + count * _LEAF.size:
            raise _nonsense(f"{len(data)} bytes for {count} fences")
        leaves = (Leaf(*found[:6], *(text.rstrip(b"\0") for text in found[6:])) for found in _LEAF.iter_unpack(data[_HEAD.size :]))
        return cls(name.rstrip(b"\0"), tuple(leaves))


def _nonsense(what: str) -> OSError:
    return fail(errno.EUCLEAN, "look up", "a sync file", "send it with dmabuf.send()", what=f"its record has {what}")


class Place(NamedTuple):
    """A sync file's slot, with its generation, and the slots of its fences if this process made it."""

    slot: int
    gen: int
    leaves: tuple[int, ...] = ()


class SyncSlots:
    """The slots of sync files that one life of this process owns."""

    def __init__(self, domain: Domain) -> None:
        self.shm = domain.join()
        self.life = self.shm.life
        self._lock = fork_lock()
        self._heads: list[int] = []
        self._leaves: list[int] = []
        self._closed: deque[Place] = deque()  # other processes may have their descriptors

    def make(self, record: SyncFileRecord) -> tuple[OwnedFd, Place]:
        """Make the descriptor of a sync file.

        Raises:
            DmaBufError: No descriptor is free (EMFILE).
            NoSpaceError: The domain is full (ENOSPC).
        """
        with self._lock:
            self._look_at_closed()
            slot, leaves = self._take(CH_SYNC, self._heads, 1)[0], self._take(CH_LEAF, self._leaves, len(record.leaves))
        try:
            fd, gen = self.shm.sync_make(slot, leaves, record.name, record.leaves)
        except BaseException as e:
            self._give_back(Place(slot, 0, leaves))
            if isinstance(e, OSError) and e.errno in (errno.EMFILE, errno.ENFILE):
                raise fail(e.errno, "fileno", "a sync file", "raise RLIMIT_NOFILE, or close descriptors") from None
            raise
        return fd, Place(slot, gen, leaves)

    def _take(self, kind: int, free: list[int], count: int) -> tuple[int, ...]:
        while len(free) < count:
            free += self.shm.sync_slots(self.shm.chunk_claim(kind))
        taken = tuple(free[-count:])
        del free[-count:]
        return taken

    def closed(self, place: Place) -> None:
        """Take back the slots of a sync file that this process made and has closed, once no process has the descriptor."""
        if not any(place is one for one in itertools.islice(reversed(self._closed), 8)):  # a close() that is called again says it again
            self._closed.append(place)

    def _look_at_closed(self) -> None:
        for _ in range(min(_TRIES, len(self._closed))):
            place = self._closed.popleft()
            if self.shm.sync_exists(place.slot, place.gen):
                self._closed.append(place)
            else:
                self._give_back(place)

    def _give_back(self, place: Place) -> None:
        self._heads.append(place.slot)
        self._leaves += place.leaves


SLOTS: Final[Local[SyncSlots]] = Local(SyncSlots)


def slots_of(domain: Domain) -> SyncSlots:
    """Return this process's slots in a domain, for its present life."""
    domain.join()
    found = SLOTS.of(domain)
    return found if found.life == domain.shm.life else SLOTS.renew(domain, found)


def place_of(fd: int) -> tuple[str, Place] | None:
    """Return (id of the domain, place) of a sync file's descriptor, None of any other. A descriptor that isn't open is EBADF."""
    if not os.fstat(fd).st_mode & 0o170000 == 0o140000:  # S_IFSOCK
        return None
    with owned(os.dup, fd) as own:
        sock = socket.socket(fileno=own.number)
        try:
            listens = sock.family == socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            address: str | bytes = sock.getsockname() if listens else ""
        finally:
            sock.detach()
    if not isinstance(address, bytes) or not address.startswith(_PREFIX):
        return None
    parts = address[len(_PREFIX) :].split(b"-")
    if len(parts) != 2 or any(len(part) != 16 or part.strip(b"0123456789abcdef") for part in parts):
        return None
    return parts[0].decode(), Place(int(parts[1][:8], 16), int(parts[1][8:], 16))


def find(domain: Domain, place: Place) -> SyncFileRecord | None:
    """Return the record of a sync file, None if all processes have left its domain since. One that makes no sense is EUCLEAN."""
    found = domain.join().sync_info(place.slot, place.gen)
    return None if found is None else SyncFileRecord(found[0], leaves(found[1]))


def leaves(found: Iterable[tuple[int, int, int, int, int, int, bytes, bytes]]) -> tuple[Leaf, ...]:
    """Return what ``Shm.sync_info`` says of fences."""
    return tuple(Leaf(*one) for one in found)
