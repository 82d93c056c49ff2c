"""``ClientBuffer`` and ``ClientState``: what the exporter's process keeps for one other process, and how that ends.

As long as a client has anything of a buffer, this process keeps a handle of the buffer for it. The exporter's ``release`` therefore comes
after the last client, in whichever process. A client has of a buffer

- mappings of the exporter's, each as long as the client keeps its own mapping of the same memory;
- CPU accesses that were begun and not ended. If the client ends meanwhile, they are ended here, the last one first, so that the exporter
  sees as many ends as begins;
- attachments, with their tables, pins and vmaps. Each has a proxy of the client's device, with its name and limits, which takes the
  exporter's tables as any device does. The client's device maps the same memory in its own process.

A client that dies, or closes its last handle, mapping and attachment of this process's buffers, ends its session. The thread that notices
gives everything back.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from dmabuf._native import Mapping, OwnedFd
from dmabuf.core.attach.attachment import DmaBufAttachment, leave
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.export.exported import Exported
from dmabuf.core.get import from_fd
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import SgTable
from dmabuf.domain import dispatcher
from dmabuf.domain.records import in_words
from dmabuf.errors import fail
from dmabuf.sharing.messages import LOST, THERE, Body, no_room, number, text
from dmabuf.sharing.remote_importer import RemoteImporter
from dmabuf.sharing.server import Session

Key = tuple[int, int]  # (st_dev, st_ino)


class ClientBuffer:
    """What one client has of one buffer of this process."""

    def __init__(self, buf: DmaBuf, live: Exported) -> None:
        self.buf, self.live = buf, live
        self.users = 0  # running calls
        self.mappings: dict[int, Mapping] = {}
        self.brackets: list[tuple[int, Direction]] = []  # each with the fence of the client's block, 0 if it is for none
        self.attachments: dict[int, DmaBufAttachment] = {}
        self.pins: Counter[int] = Counter()  # by attachment
        self.tables: dict[int, tuple[DmaBufAttachment, SgTable, Direction]] = {}
        self.vmaps: list[IosysMap] = []

    @property
    def empty(self) -> bool:
        return not (self.users or self.mappings or self.brackets or self.attachments or self.tables or self.vmaps)

    def attachment(self, body: Body) -> DmaBufAttachment:
        """Return the attachment that a message names. If there is none, it fails with EINVAL."""
        found = self.attachments.get(number(body, "attachment"))
        if found is None:
            raise fail(errno.EINVAL, "request", self.buf, "attach again", what="no such attachment")
        return found

    def end(self) -> None:
        """Give everything back, in the client's order, because the client is gone."""
        exporter = self.live.exporter
        if self.tables or self.pins or self.vmaps or self.attachments:
            # A process that leaves, or has left, can't hold a lock, and nobody can wait for one of its. It must not join again for it.
            domain = self.buf.domain
            left = domain.leaving or domain.shm.life != self.live.life
            with contextlib.nullcontext() if left else self.buf.resv.locked():
                for attachment, sgt, way in self.tables.values():
                    _quietly(partial(exporter.unmap, attachment, sgt, way))
                for n, count in self.pins.items():
                    for _ in range(count):
                        _quietly(partial(exporter.unpin, self.attachments[n]))
                for map_ in self.vmaps:
                    _quietly(partial(self.live.vunmap, self.buf, map_))
        for attachment in self.attachments.values():
            _quietly(partial(detach, attachment))
        while self.brackets:
            _, direction = self.brackets.pop()
            if "end_cpu_access" in self.live.ops:  # not by live.end(), which this process may no longer call once it has left the domain
                _quietly(partial(exporter.end_cpu_access, self.buf, direction))
        for mapping in self.mappings.values():
            mapping.close()
        for one in (self.tables, self.pins, self.vmaps, self.attachments, self.mappings):
            one.clear()


def detach(attachment: DmaBufAttachment) -> None:
    """Detach for a client. No lock is held."""
    try:
        leave(attachment)
    finally:
        if isinstance(attachment.importer, RemoteImporter):
            attachment.importer.close()  # not before it is off the list: until then a move may notify it, and connect again


def _quietly(call: Callable[[], object]) -> None:
    """Call it, and report an error, which no caller gets."""
    try:
        call()
    except Exception as e:
        dispatcher.report(e, call)


class ClientState:
    """Everything that one client has of this process's buffers."""

    def __init__(self, session: Session) -> None:
        self.domain = session.domain
        self.numbers = itertools.count(1)
        self._buffers: dict[Key, ClientBuffer] = {}
        self._lock = threading.RLock()  # re-entrant, because a finalizer or a signal handler may come in the middle
        session.at_end.append(self.end)

    @contextlib.contextmanager
    def using(self, body: Body, fds: list[OwnedFd]) -> Iterator[ClientBuffer]:
        """Yield the entry of the buffer that a call is about. It exists in the block, and afterwards if there is something in it.

        Raises:
            NoDeviceError: This process doesn't export such a buffer (ENODEV).
            DmaBufError: No descriptor is free for the buffer (EMFILE), the message makes no sense (EBADMSG), or ``get()`` failed.
        """
        key = (number(body, "dev"), number(body, "ino"))
        with self._lock:
            entry = self._buffers.get(key)
            if entry is not None:
                entry.users += 1
        if entry is None:
            entry = self._made(key, body, fds)
        try:
            yield entry
        finally:
            with self._lock:
                entry.users -= 1
                last = entry.empty
                if last:
                    self._buffers.pop(key, None)
            if last:
                entry.buf.close()

    def _made(self, key: Key, body: Body, fds: list[OwnedFd]) -> ClientBuffer:
        if body.get(LOST):
            raise no_room(text(body, "kind"), in_words(self.domain, *key), THERE)
        if not fds:
            raise unknown(key)
        buf = from_fd(fds.pop(0), self.domain)
        shared = handle_of(buf).shared
        live = shared.backing
        if (shared.dev, shared.ino) != key or not isinstance(live, Exported):
            buf.close()
            raise unknown(key)
        with self._lock:
            entry = self._buffers.setdefault(key, ClientBuffer(buf, live))
            entry.users += 1
        if entry.buf is not buf:
            buf.close()
        return entry

    def end(self) -> None:
        while self._buffers:
            _, entry = self._buffers.popitem()
            entry.end()
            _quietly(entry.buf.close)


def unknown(key: Key) -> OSError:
    return fail(
        errno.ENODEV, "request", f"buffer ino {key[1]}", "ask its exporter for a new buffer", what="this process exports no such buffer"
    )
