"""``RemoteBacking``: a buffer whose exporter is another process. Its ops are called there, with the same results and errors.

It is the buffer's backing (``SharedBuffer.backing``), with an exporter whose ops are remote calls. So every rule of a buffer and of an
attachment, its checks, its unwinding and its counts, is the same code in every process. Memory comes as descriptors and ranges, and is
mapped here for the device that attached. DMA addresses that the exporter filled in itself come as they are.

*The lock.* An op that is called with the reservation lock held runs in the exporter's process with the lock held there: it is lent to the
serving thread, and comes back (sharing/lending.py). Whichever process dies in the middle, memory is never touched without the lock. When
the exporter dies, the caller has the lock back before any other process can take it. A call under the lock is waited for whatever signal
handlers raise. They run, and what they raised comes when the lock is back and what the call made is undone.

A dead exporter is ENODEV for everything that needs it. ``unmap``, ``unpin``, ``detach`` and ``vunmap`` only give back: they succeed, and do
what must be done in this process. In a forked child the attachments and vmaps are the parent's (ENODEV); the child uses the buffer like
any other process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Final, cast

from dmabuf._native import Access, OwnedFd, finish
from dmabuf.core.attach.attachment import DmaBufAttachment, resv_at
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer import residency
from dmabuf.core.buffer.backing import Backing, Descriptor
from dmabuf.core.buffer.shared import BACKINGS, SharedBuffer, known
from dmabuf.core.contract import OPS, Buffer
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.export.exported import OF_PARENT
from dmabuf.core.resv.lock import lent, record_of
from dmabuf.core.resv.resv import resv_of
from dmabuf.domain import dispatcher
from dmabuf.domain.guards import finalizer
from dmabuf.domain.weak_objects import WeakObjects
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.client import Client, client_of
from dmabuf.sharing.lending import Lent
from dmabuf.sharing.messages import Body, close_all, flag, number
from dmabuf.sharing.remote_exporter import RemoteExporter
from dmabuf.sharing.server import Answer, Session, register

# These ops only give back. Without the exporter they do this process's part.
_GIVE_BACK: Final = frozenset({"unmap", "unmap_unlocked", "unpin", "detach", "vunmap"})
_all: WeakObjects[RemoteBacking] = WeakObjects()


class RemoteBacking(Backing):
    """The backing of a buffer that another process exports. ``peer``: that process's life; ``in_file``: as in `Backing`."""

    record: SharedBuffer

    def __init__(self, record: SharedBuffer, peer: int, in_file: bool) -> None:
        self.remote = RemoteExporter(self)
        super().__init__(self.remote, frozenset(), record, False)
        self.peer, self.in_file = peer, in_file
        self.life = record.shm.life  # 0: a forked child that has none yet
        self.client: Client | None = None
        self.asked = False
        self.mappings: set[int] = set()  # numbers of this process's mappings of the exporter's memory
        _all.add(self)

    @classmethod
    def of(cls, record: SharedBuffer, fd: int) -> RemoteBacking:
        """Return the backing of a buffer from its record. It doesn't join the domain, because a forked child calls it too."""
        return cls(record, record.seen()["life"], residency.in_file(fd))

    def check_reachable(self, operation: str) -> None:
        if not self.life:
            self.record.ensure()
            self.life = self.record.shm.life
        if self.life != self.record.shm.life:
            raise fail(errno.ENODEV, operation, self.about, "attach again", what="what a forked child inherits is the parent's")
        if operation in _GIVE_BACK:
            return
        if not self.asked:
            answer, _ = self.call("exporter", operation=operation)
            ops = answer.get("ops")
            self.ops = frozenset(ops if isinstance(ops, list) else ()) & frozenset(OPS) | {"attach", "detach"}
            self.cache, self.dynamic = flag(answer, "cache"), "pin" in self.ops
            self.asked = True
        elif not self.record.shm.life_current(self.peer):
            raise self._client().gone(operation, self.about)

    @property
    def about(self) -> str:
        return str(self.record)

    def _client(self) -> Client:
        if self.client is None:
            self.client = client_of(self.record.domain, self.peer, self)
        return self.client

    def call(
        self,
        kind: str,
        buf: DmaBuf | None = None,
        body: Body | None = None,
        *,
        operation: str = "",
        locked: bool = False,
        or_post: bool = False,
    ) -> tuple[Body, list[OwnedFd]]:
        """Make a remote call about this buffer. ``locked``, ``or_post``: see :meth:`Client.call`."""
        named = {"dev": self.record.dev, "ino": self.record.ino, **(body or {})}
        fds: Iterable[int] = () if buf is None or buf.closed else (buf.fileno(),)
        try:
            return self._client().call(kind, named, fds, operation=operation or kind, obj=buf or self.about, locked=locked, or_post=or_post)
        finally:
            self.close_if_unused()

    def call_locked(self, kind: str, buf: DmaBuf, body: Body | None = None, *, or_post: bool = False) -> tuple[Body, list[OwnedFd]]:
        """Make a remote call under the reservation lock, which the caller holds, see the module."""
        with Lent(resv_of(self.record), self.peer) as loan:
            return self.call(kind, buf, {**(body or {}), "holder": loan}, locked=True, or_post=or_post)

    def give_back(self, kind: str, buf: DmaBuf, body: Body, *, locked: bool) -> None:
        """Make a remote call that only gives back. It has no errors, and no effect if the exporter's process is gone.

        ``locked``: make it under the lock. If an earlier call has lost the lock, it is sent without waiting, and the server takes the lock.
        """
        if locked and not resv_of(self.record).held_here():
            if self.client is not None:
                self.client.post(kind, {"dev": self.record.dev, "ino": self.record.ino, **body, "holder": 0})
            return
        try:
            _, came = self.call_locked(kind, buf, body, or_post=True) if locked else self.call(kind, buf, body, or_post=True)
            close_all(came)
        except DmaBufError as e:
            if e.errno != errno.ENODEV:
                raise

    # ---- CPU access ----

    def begin(self, buf: Buffer, direction: Direction, access: Access | None = None) -> None:
        if access is None:
            return super().begin(buf, direction)
        self.check_reachable("begin_cpu_access")
        if "begin_cpu_access" in self.ops:
            access.begun(int)  # noted before it has begun, since its end is asked for in any case, and then does nothing there
            self.remote.begin(cast("DmaBuf", buf), direction, access.fence)

    def end(self, buf: Descriptor, direction: Direction, access: Access | None = None) -> None:
        if access is None:
            return super().end(buf, direction)
        self.check_reachable("end_cpu_access")
        if "end_cpu_access" in self.ops:
            access.told(finish, self.remote.end, buf, direction, access.fence)

    # ---- the end ----

    def before_close(self, handle: object) -> None:
        """Nothing to note."""

    def after_close(self, handle: object, quiet: bool) -> None:
        self.close_if_unused()

    def close_if_unused(self) -> None:
        """Drop the client if this process has nothing of the buffer left. Then the exporter's process frees what it kept."""
        client = self.client
        if client is not None and not (self.record.handles or self.mappings or self.attachments or self.vmaps):
            self.client = None
            client.leave(self)

    def count_mapping(self, mapping: int) -> None:
        """A mapping of this process shows the exporter's memory."""
        self.mappings.add(mapping)

    @finalizer
    def unmapped(self, mapping: int) -> None:
        """Uncount a mapping, which is closed, perhaps by its finalizer. Doing so twice has no effect."""
        if self.life != self.record.shm.life:
            return  # the parent's
        self.mappings.discard(mapping)
        if self.client is not None:
            self.client.post("unmapped", {"dev": self.record.dev, "ino": self.record.ino, "mapping": mapping})
        self.close_if_unused()


def _attached(session: Session, body: Body) -> tuple[RemoteExporter, DmaBufAttachment] | None:
    """Return the attachment that a call of the exporter is about, None if it was detached meanwhile."""
    shared = known(session.domain, number(body, "dev"), number(body, "ino"))
    away = None if shared is None else shared.backing
    if not isinstance(away, RemoteBacking) or not isinstance(away.exporter, RemoteExporter):
        return None
    attachment = away.exporter.attached.get(number(body, "attachment"))
    return None if attachment is None else (away.exporter, attachment)


def _revoked(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    """Handle a call of the exporter, which has moved the memory and holds no lock."""
    found = _attached(session, body)
    if found is not None:
        found[0].revoke(found[1])
    return Answer()


def _moved(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    """Notify the importer for the exporter, which is about to move the memory, holds the lock, and waits."""
    found, holder = _attached(session, body), number(body, "holder")
    if found is None:
        return Answer()
    attachment = found[1]
    resv = resv_at(attachment)
    if attachment.importer is None or record_of(resv).shm.resv_owner(record_of(resv).index) != holder:
        return Answer()  # it was detached meanwhile
    with lent(resv, holder):
        try:
            attachment.importer.move_notify(attachment)
        except Exception as e:  # reported in the importer's process
            dispatcher.report(e, attachment.importer.move_notify)
    return Answer()


def _after_fork() -> None:
    """Give the child backings of its own: what its parent attached and mapped is the parent's."""
    for away in list(_all):
        if away.record.backing is away:
            away.record.backing = RemoteBacking(away.record, away.peer, away.in_file)


register("moved", _moved)
register("revoked", _revoked)
BACKINGS.register("remote", RemoteBacking.of)
OF_PARENT.register("remote", RemoteBacking)
os.register_at_fork(after_in_child=_after_fork)
