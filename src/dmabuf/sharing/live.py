"""``Elsewhere``: a buffer whose exporter is another process. What needs the exporter is carried there, with the same results and errors.

It stands where the exporter's own side would (``record.live``), with an exporter whose ops are calls: so every rule of a buffer and of
an attachment, its checks, its unwinding and its counts, is the same code in every process, and only the ops travel. Memory comes as
descriptors and ranges and is mapped here, for the device that attached; DMA addresses that the exporter filled in by itself come as they
are.

*The lock.* An op that is called with the reservation lock held runs in the exporter's process with the lock held there: it is lent to the
thread that serves the call, and comes back (sharing/lending.py). So whoever dies in the middle, memory is never touched without the lock,
and when the exporter dies, the lock is the caller's again, before anybody else can have it. A call under the lock is waited for whatever
signal handlers raise: they run, and what they raised comes when the lock is back and what the call made is undone.

A dead exporter is ENODEV for everything that needs it. What only gives back (``unmap``, ``unpin``, ``detach``, ``vunmap``) succeeds, and
does what is to be done in this process. In a forked child the attachments and vmaps are the parent's (ENODEV); the buffer is used as by
any other process.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterable
from typing import Any, Final

from dmabuf import _native
from dmabuf.core.attach.attachment import DmaBufAttachment
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer import residence
from dmabuf.core.buffer.backing import BACKINGS, Backing
from dmabuf.core.contract import OPS, Exporter
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import DmaEntry, SgEntry, SgTable, mapping_of
from dmabuf.core.resv.lock import lent, record_of
from dmabuf.core.resv.resv import resv_of
from dmabuf.domain import dispatcher
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.records import Record
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing import memory
from dmabuf.sharing.lending import Lent
from dmabuf.sharing.line import Line, line_to
from dmabuf.sharing.messages import Body, close_all, flag, number
from dmabuf.sharing.service import Answer, Session, register, serve

# What gives back works without the exporter, as far as this process is concerned.
_GIVE_BACK: Final = frozenset({"unmap", "unmap_unlocked", "unpin", "detach", "vunmap"})
_MOST: Final = (1 << 63) - 1
_all: weakref.WeakSet[Elsewhere] = weakref.WeakSet()
_revoking = fork_lock()  # a table is taken out of reach once, by its importer or by the exporter


class Elsewhere(Backing):
    """The driver side, in this process, of a buffer that another one exports. ``peer``: that process's life; ``in_file``: as Backing."""

    def __init__(self, record: Record, peer: int, in_file: bool) -> None:
        super().__init__(Carried(self), frozenset(), record, False)
        self.peer, self.in_file = peer, in_file
        self.life = record.shm.life  # 0: a forked child that has none yet
        self.line: Line | None = None
        self.asked = False
        self.held = 0  # mappings of this process's
        _all.add(self)

    @classmethod
    def of(cls, record: Record, fd: int) -> Elsewhere:
        """The backing of a buffer whose exporter made the record; it is not joined for, since a forked child asks too."""
        return cls(record, record.seen()["life"], residence.in_file(fd))

    def here(self, operation: str) -> None:
        """Errors: ENODEV the exporter's process is gone, or this is of before a fork."""
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
            raise self._line().gone(operation, self.about)

    @property
    def about(self) -> str:
        return f"buffer ino {self.record.ino}"

    def _line(self) -> Line:
        if self.line is None:
            self.line = line_to(self.record.domain, self.peer, self)
        return self.line

    def call(
        self,
        kind: str,
        buf: DmaBuf | None = None,
        body: Body | None = None,
        *,
        operation: str = "",
        kept: bool = False,
        noted: bool = False,
    ) -> tuple[Body, list[int]]:
        """Carry a call about this buffer; ``kept``, ``noted``: see :meth:`Line.call`."""
        named = {"dev": self.record.dev, "ino": self.record.ino, **(body or {})}
        fds: Iterable[int] = () if buf is None or buf._fd < 0 else (buf._fd,)
        try:
            return self._line().call(kind, named, fds, operation=operation or kind, obj=buf or self.about, kept=kept, noted=noted)
        finally:
            self.settle()

    def call_locked(self, kind: str, buf: DmaBuf, body: Body | None = None, *, noted: bool = False) -> tuple[Body, list[int]]:
        """Carry a call under the reservation lock, which the caller holds; see the module."""
        with Lent(resv_of(self.record), self.peer) as loan:
            return self.call(kind, buf, {**(body or {}), "holder": loan}, kept=True, noted=noted)

    def give_back(self, kind: str, buf: DmaBuf, body: Body, *, locked: bool) -> None:
        """Carry what has no errors; nothing if nobody is there any more.

        ``locked``: under the lock; or, if a call before has lost it, without a wait, and the lock is taken there.
        """
        if locked and not resv_of(self.record).held_here():
            if self.line is not None:
                self.line.note(kind, {"dev": self.record.dev, "ino": self.record.ino, **body, "holder": 0})
            return
        try:
            _, came = self.call_locked(kind, buf, body, noted=True) if locked else self.call(kind, buf, body, noted=True)
            close_all(came)
        except DmaBufError as e:
            if e.errno != errno.ENODEV:
                raise

    # ---- the end ----

    def leaving(self) -> None:
        """Nothing to remember."""

    def departed(self, quiet: bool) -> None:
        """A handle of this process was closed."""
        self.settle()

    def settle(self) -> None:
        """With nothing of the buffer left in this process, the exporter's process forgets us."""
        line = self.line
        if line is not None and not (self.record.handles or self.held or self.attachments or self.vmaps):
            self.line = None
            line.leave(self)

    def unmapped(self, mapping: int) -> None:
        """A mapping of this process is closed, perhaps by the garbage collector."""
        if self.life != self.record.shm.life:
            return  # the parent's
        self.held -= 1
        if self.line is not None:
            self.line.note("unmapped", {"dev": self.record.dev, "ino": self.record.ino, "mapping": mapping})
        self.settle()


class Carried(Exporter):
    """An exporter whose ops are calls to the process of the real one."""

    __slots__ = ("attached", "away", "tables")

    def __init__(self, away: Elsewhere) -> None:
        self.away = away
        self.attached: dict[int, DmaBufAttachment] = {}  # by the number that the exporter's process gave
        self.tables: dict[int, tuple[SgTable, int, _native.Mapping | None]] = {}  # by id()

    # ---- attachments ----

    def attach(self, attachment: DmaBufAttachment) -> None:
        dev = attachment.dev
        if attachment.importer is not None:
            serve(attachment.dmabuf.domain)  # where it hears of moves
        answer, _ = self.away.call(
            "attach",
            attachment.dmabuf,
            {
                "device": dev.name,
                "dma_mask": dev.dma_mask,
                "max_segment": dev.max_segment,
                "dynamic": attachment.is_dynamic,
                "peer2peer": attachment.peer2peer,
            },
        )
        attachment.peer2peer = attachment.peer2peer and flag(answer, "peer2peer")
        self.attached[number(answer, "attachment")] = attachment

    def _number(self, attachment: DmaBufAttachment) -> int:
        return next(n for n, one in self.attached.items() if one is attachment)

    def detach(self, attachment: DmaBufAttachment) -> None:
        n = self._number(attachment)
        del self.attached[n]
        self.away.give_back("detach", attachment.dmabuf, {"attachment": n}, locked=False)

    def pin(self, attachment: DmaBufAttachment) -> None:
        self.away.call_locked("pin", attachment.dmabuf, {"attachment": self._number(attachment)})

    def unpin(self, attachment: DmaBufAttachment) -> None:
        self.away.give_back("unpin", attachment.dmabuf, {"attachment": self._number(attachment)}, locked=True)

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
        about = {"attachment": self._number(attachment), "direction": int(direction)}
        answer, fds = self.away.call_locked("map", attachment.dmabuf, about)
        if "table" not in answer:
            return None
        n = number(answer, "table")
        try:
            made, mapping = _table(answer, fds)
            if mapping is not None:
                attachment.dev.map_sgtable(made, direction)
        except BaseException:
            self.away.give_back("unmap", attachment.dmabuf, {"table": n}, locked=True)
            raise
        finally:
            close_all(fds)
        self.tables[id(made)] = made, n, mapping
        return made

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        _, n, mapping = self.tables[id(sgt)]
        if mapping is not None:
            self._out_of_reach(attachment, sgt, direction)
        del self.tables[id(sgt)]
        self.away.give_back("unmap", attachment.dmabuf, {"table": n}, locked=True)

    def _out_of_reach(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        """Unmap it for the device, unless the exporter has revoked it meanwhile."""
        with _revoking:
            if mapping_of(sgt) is not None:
                attachment.dev.unmap_sgtable(sgt, direction)

    def revoke(self, attachment: DmaBufAttachment) -> None:
        """The memory has moved: what the importer kept of it faults from now on. No lock is held: who holds it may wait for the move."""
        for sgt, direction, _ in list(attachment._mapped.values()):
            if (kept := self.tables.get(id(sgt))) is not None and kept[2] is not None:
                self._out_of_reach(attachment, sgt, direction)

    # ---- CPU access ----

    def begin_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.away.call("begin", buf, {"direction": int(direction)}, operation="begin_cpu_access")

    def end_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.away.call("end", buf, {"direction": int(direction)}, operation="end_cpu_access")

    def mmap(self, buf: DmaBuf, offset: int, length: int) -> _native.Mapping:
        away = self.away
        answer, fds = away.call("mmap", buf, {"offset": offset, "length": length})
        n = number(answer, "mapping")
        away.held += 1
        try:
            return _native.Mapping(
                _first(fds),
                number(answer, "length", _MOST),
                offset=number(answer, "offset", _MOST),
                writable=flag(answer, "writable"),
                on_close=lambda: away.unmapped(n),
            )
        except BaseException:
            away.unmapped(n)
            raise
        finally:
            close_all(fds)

    def vmap(self, buf: DmaBuf) -> IosysMap:
        answer, fds = self.away.call_locked("vmap", buf)
        try:
            if self.away.in_file:  # a view that outlives the vmap keeps the memory where it is
                fd = buf.fileno()
                return IosysMap.init_vaddr(memoryview(residence.mapping(fd, "vmap", buf, 0, buf.size, residence.may_write(fd))))
            _, view = memory.shown(_first(fds), number(answer, "offset", _MOST), number(answer, "length", _MOST), flag(answer, "writable"))
            return IosysMap.init_vaddr_iomem(view) if flag(answer, "iomem") else IosysMap.init_vaddr(view)
        except BaseException:
            self.away.give_back("vunmap", buf, {}, locked=True)
            raise
        finally:
            close_all(fds)

    def vunmap(self, buf: DmaBuf, map: IosysMap) -> None:
        self.away.give_back("vunmap", buf, {}, locked=True)

    def release(self, buf: DmaBuf) -> None:
        """Happens in the exporter's process."""


def _first(fds: list[int]) -> int:
    if not fds:
        raise fail(errno.EBADMSG, "request", "an answer", "both processes use the same version of dmabuf?", what="no memory came with it")
    return fds[0]


def _table(answer: Body, fds: list[int]) -> tuple[SgTable, _native.Mapping | None]:
    """The table of an answer, its memory mapped here; no mapping: its DMA side came filled in, or it has none."""
    cpu = [SgEntry(page, offset, length) for page, offset, length in _threes(answer, "cpu")]
    dma = [DmaEntry(address, length) for address, length, _ in _threes(answer, "dma")]
    if dma or not fds:
        return SgTable(cpu, dma, None), None
    mapping, view = memory.shown(fds[0], number(answer, "offset", _MOST), number(answer, "length", _MOST), flag(answer, "writable"))
    return SgTable(cpu, (), view), mapping


def _threes(answer: Body, name: str) -> Iterable[tuple[int, int, int]]:
    """Flat numbers, three to an entry. Errors: EBADMSG."""
    flat = answer.get(name, [])
    if not isinstance(flat, list) or len(flat) % 3 or any(type(n) is not int or not 0 <= n < 1 << 64 for n in flat):
        raise fail(errno.EBADMSG, "request", "an answer", "both processes use the same version of dmabuf?", what=f"{name!r} is no table")
    walk = iter(flat)
    return zip(walk, walk, walk, strict=True)


def _attached(session: Session, body: Body) -> tuple[Carried, DmaBufAttachment] | None:
    """Whom a request of the exporter is about; None: detached meanwhile."""
    key = (number(body, "dev"), number(body, "ino"))
    record: Record | None = (session.domain.local.get("records") or {}).get(key)
    away: Any = record.live if record is not None else None
    if not isinstance(away, Elsewhere) or not isinstance(away.exporter, Carried):
        return None
    attachment = away.exporter.attached.get(number(body, "attachment"))
    return None if attachment is None else (away.exporter, attachment)


def _revoked(session: Session, body: Body, fds: list[int]) -> Answer:
    """The exporter has moved the memory; it holds no lock."""
    found = _attached(session, body)
    if found is not None:
        found[0].revoke(found[1])
    return Answer()


def _moved(session: Session, body: Body, fds: list[int]) -> Answer:
    """The exporter is about to move the memory, holds the lock, and waits until this importer has heard of it."""
    found, holder = _attached(session, body), number(body, "holder")
    if found is None:
        return Answer()
    attachment = found[1]
    resv = attachment._resv
    if attachment.importer is None or record_of(resv).shm.resv_owner(record_of(resv).index) != holder:
        return Answer()  # detached meanwhile
    with lent(resv, holder):
        try:
            attachment.importer.move_notify(attachment)
        except Exception as e:  # as of an importer here: told where it is
            dispatcher.report(e, attachment.importer.move_notify)
    return Answer()


def _after_fork() -> None:
    """The child is another process of its own; what its parent attached and mapped is its parent's."""
    for away in list(_all):
        if away.record.live is away:
            away.record.live = Elsewhere(away.record, away.peer, away.in_file)


register("moved", _moved)
register("revoked", _revoked)
BACKINGS.register("remote", Elsewhere.of)
os.register_at_fork(after_in_child=_after_fork)
