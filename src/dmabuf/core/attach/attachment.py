"""``DmaBufAttachment``: one device's use of one buffer: map, pin, and hear of moves (spec 1.4, 2.8–2.14).

Made by ``buf.attach(dev, importer=None)``: without an importer *static*, with one *dynamic*. A device may attach more than once. Static and
dynamic are matched with the exporter (spec 2.13a, Linux 6.8):

| exporter | importer | at attach | map | unmap | at detach |
|---|---|---|---|---|---|
| static | static | – | op, wait for KERNEL fences; kept if the exporter caches | op; nothing if kept | op if kept |
| static | dynamic | op BIDIRECTIONAL, kept | the kept table | nothing | op |
| dynamic | static | pin, op BIDIRECTIONAL, wait for KERNEL fences, kept | the kept table | nothing | op, unpin |
| dynamic | dynamic | – | pin, op | op, unpin | – |
| dynamic | dynamic, ``MOVE_NOTIFY`` on | – | op | op | – |

``MOVE_NOTIFY`` is the kernel's experimental CONFIG_DMABUF_MOVE_NOTIFY, off by default: ``DMABUF_MOVE_NOTIFY=1`` at the start of the
process, or :func:`moving`. A failure at any step undoes the steps before it.

With the buffer's reservation lock held: ``map``, ``unmap``, ``pin``, ``unpin`` (else ``ContractError``). Without it: ``attach``,
``detach``, ``map_unlocked``, ``unmap_unlocked``, ``mapped`` (else ``ContractWarning`` and EDEADLK). An attachment keeps its handle of the
buffer from being collected, not from being closed; detach before closing, as the exporter's ``release`` comes with the last descriptor.

Buffers exported by another process are attached like one's own: the exporter's ops are called there (sharing/remote_exporter.py). When that
process is gone, what needs it is ENODEV; ``unmap``, ``unpin`` and ``detach`` then do what is left to do. Plain buffers can be attached by
every process that has them; each has its own attachments, and listings show those of the process that prints them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from dmabuf.core.base import debug
from dmabuf.core.base.usage import Direction, Usage, checked_direction
from dmabuf.core.buffer.backing import Backing, backing_of
from dmabuf.core.contract import Importer, overrides
from dmabuf.core.memory import checked
from dmabuf.core.memory.device import Device
from dmabuf.core.memory.scatterlist import SgTable
from dmabuf.core.resv.resv import wait_until
from dmabuf.domain import dispatcher
from dmabuf.errors import ContractError, contract_warning, fail

if TYPE_CHECKING:
    from dmabuf.core.dma_buf import DmaBuf
    from dmabuf.core.resv.resv import DmaResv

MOVE_NOTIFY = os.environ.get("DMABUF_MOVE_NOTIFY") == "1"


@contextmanager
def moving(on: bool = True) -> Iterator[None]:
    """Set ``MOVE_NOTIFY`` for a block, in the whole process. What is mapped meanwhile is unmapped as it was mapped."""
    global MOVE_NOTIFY
    before, MOVE_NOTIFY = MOVE_NOTIFY, on
    try:
        yield
    finally:
        MOVE_NOTIFY = before


@dataclass(frozen=True)
class AttachmentStatistics:
    """What an attachment says of itself. ``cached``: a table is kept for it; ``mapped``: tables that its importer has besides."""

    device: str
    dynamic: bool
    peer2peer: bool
    cached: bool
    mapped: int


class DmaBufAttachment:
    """A device attached to a buffer. ``priv``: the exporter's, for whatever it needs; ``peer2peer``: memory without pages will do.

    ``dev``, ``dmabuf``, ``importer`` (None when static), ``attached``: False after detach.

    Kernel: dma_buf_attachment (dmabuf, dev, peer2peer, priv, importer_ops as importer, importer_priv as importer).
    """

    __slots__ = ("__weakref__", "_backing", "_cached", "_mapped", "_resv", "attached", "dev", "dmabuf", "importer", "peer2peer", "priv")

    dev: Device
    dmabuf: DmaBuf
    importer: Importer | None
    peer2peer: bool
    priv: Any
    attached: bool
    _backing: Backing
    _resv: DmaResv
    _cached: tuple[SgTable, Direction] | None
    _mapped: dict[int, tuple[SgTable, Direction, bool]]  # by id(): the table, the direction, and whether mapping pinned

    def __new__(cls, *_: object, **__: object) -> Self:
        raise TypeError("a DmaBufAttachment is made by DmaBuf.attach()")

    def __repr__(self) -> str:
        kind = "static" if self.importer is None else "dynamic"
        return f"<dmabuf.DmaBufAttachment {self.dev.name} on ino {self._backing.record.ino} {kind}{'' if self.attached else ' detached'}>"

    @property
    def is_dynamic(self) -> bool:
        """Was it attached with an importer? Kernel: dma_buf_attachment_is_dynamic."""
        return self.importer is not None

    # ---- the lock table (spec 2.19) ----

    def _check(self, operation: str, level: int = 4) -> None:
        if not self.attached:
            contract_warning(f"{operation}: {self!r}: it was detached", level)
            raise fail(errno.EINVAL, operation, self, "attach again", what="the attachment is gone")

    def _locked(self, operation: str) -> None:
        self._check(operation, 5)
        if not self._resv.held_here():
            raise ContractError(f"{operation}: {self!r}: hold the buffer's reservation lock, or use {operation}_unlocked()")
        self._backing.here(operation)

    def _unlocked(self, operation: str) -> None:
        self._check(operation, 5)
        if self._resv.held_here():
            contract_warning(f"{operation}: {self!r}: the buffer's reservation lock is held by this thread or task", 4)
            raise fail(errno.EDEADLK, operation, self, "unlock the reservation object first")
        self._backing.here(operation)

    # ---- mapping ----

    def map(self, direction: int, *, interruptible: bool = False) -> SgTable:
        """The table of DMA addresses for the device (spec 2.11); the lock is held. A static importer waits for KERNEL fences.

        ``interruptible``: a signal ends that wait with EINTR, mapped nothing. Errors: the exporter's, ENOMEM when it returned no table;
        EBUSY the kept table is of another direction; EINVAL no direction, detached (with ``ContractWarning``); ``ContractError`` without
        the lock. Kernel: dma_buf_map_attachment.
        """
        self._locked("map")
        way = checked_direction(direction, "map", self)
        if self._cached is not None:
            sgt, had = self._cached
            if had not in (way, Direction.BIDIRECTIONAL):
                raise fail(errno.EBUSY, "map", self, f"map {had.name}, or attach again", what=f"its table is kept for {had.name}")
            return sgt
        pin = self._backing.dynamic and not MOVE_NOTIFY
        if pin:
            self._backing.exporter.pin(self)
        try:
            sgt = self._map(way, interruptible)
        except BaseException:
            if pin:
                self._backing.exporter.unpin(self)
            raise
        if self._backing.cache:
            self._cached = sgt, way
        else:
            self._mapped[id(sgt)] = sgt, way, pin
        return sgt

    def _map(self, way: Direction, interruptible: bool) -> SgTable:
        """The exporter's op, the wait, and the debug layer (spec 2.11, step M)."""
        exporter = self._backing.exporter
        sgt = exporter.map(self, way)
        if sgt is None:
            raise fail(errno.ENOMEM, "map", self, what="its exporter returned no table")
        if not isinstance(sgt, SgTable):
            raise TypeError(f"map: the exporter returned {type(sgt).__name__}, not an SgTable")
        try:
            if self.importer is None:
                wait_until(self._resv, Usage.KERNEL, -1, interruptible=interruptible)
            checked.hide(sgt)
        except BaseException:
            checked.show(sgt)
            exporter.unmap(self, sgt, way)
            raise
        return sgt

    def unmap(self, sgt: SgTable | None, direction: int) -> None:
        """Give a table back; a kept one stays (spec 2.13). The lock is held; ``direction`` as for map.

        Errors: ``ContractWarning``, and nothing is done, for None; ``ContractError``, and nothing is done, without the lock, for a table
        that this attachment has not mapped or has unmapped, and for another direction than map's; EINVAL as :meth:`map`.
        Kernel: dma_buf_unmap_attachment.
        """
        self._locked("unmap")
        self._unmap(sgt, direction)

    def _unmap(self, sgt: SgTable | None, direction: int) -> None:
        way = checked_direction(direction, "unmap", self)
        if sgt is None:
            contract_warning(f"unmap: {self!r}: no table", 3)
            return
        if self._cached is not None and sgt is self._cached[0]:
            return
        if id(sgt) not in self._mapped:
            raise ContractError(f"unmap: {self!r} has not mapped {sgt!r}")
        _, had, pinned = self._mapped[id(sgt)]
        if had is not way:  # the exporter would undo the wrong half, or refuse: then nobody could unmap it any more
            raise ContractError(f"unmap: {sgt!r} was mapped {had.name}: unmap it with the same direction")
        del self._mapped[id(sgt)]
        checked.show(sgt)
        try:
            self._backing.exporter.unmap(self, sgt, way)
        finally:
            if pinned:
                self._backing.exporter.unpin(self)

    def map_unlocked(self, direction: int, *, interruptible: bool = False) -> SgTable:
        """:meth:`map` that takes the lock itself. Errors: as map, but with the lock held ``ContractWarning`` and EDEADLK.

        Kernel: dma_buf_map_attachment_unlocked.
        """
        self._unlocked("map_unlocked")
        with self._resv.locked():
            return self.map(direction, interruptible=interruptible)

    def unmap_unlocked(self, sgt: SgTable | None, direction: int) -> None:
        """:meth:`unmap` that takes the lock itself. Errors: as unmap, but with the lock held ``ContractWarning`` and EDEADLK.

        Kernel: dma_buf_unmap_attachment_unlocked.
        """
        self._unlocked("unmap_unlocked")
        with self._resv.locked():
            self._unmap(sgt, direction)

    @contextmanager
    def mapped(self, direction: int) -> Iterator[SgTable]:
        """``with att.mapped(Direction.TO_DEVICE) as sgt``: mapped for the block. The lock is not held, and may be taken inside of it."""
        sgt = self.map_unlocked(direction)
        try:
            yield sgt
        finally:
            self.unmap_unlocked(sgt, direction)

    # ---- pinning ----

    def pin(self) -> None:
        """Keep the memory where it is (spec 2.10), for long uses such as scanout; the lock is held. Nothing without the exporter's op.

        Errors: the exporter's; ``ContractError`` without the lock. ``ContractWarning`` on a static attachment, which is pinned anyhow.
        Kernel: dma_buf_pin.
        """
        self._pinning("pin")
        if self._backing.dynamic:
            self._backing.exporter.pin(self)

    def unpin(self) -> None:
        """Undo one :meth:`pin`; the lock is held. Errors: as pin. Kernel: dma_buf_unpin."""
        self._pinning("unpin")
        if self._backing.dynamic:
            self._backing.exporter.unpin(self)

    def _pinning(self, operation: str) -> None:
        self._check(operation)
        if self.importer is None:
            contract_warning(f"{operation}: {self!r}: only dynamic importers pin", 3)
        self._locked(operation)

    # ---- the end ----

    def detach(self) -> None:
        """End the attachment (spec 2.9): what is kept is unmapped and unpinned, the exporter's ``detach`` runs. The lock is not held.

        Errors: ``ContractWarning``, and nothing is done, when it is detached already; ``ContractWarning`` and EDEADLK with the lock held.
        Kernel: dma_buf_detach.
        """
        if not self.attached:
            contract_warning(f"detach: {self!r}: it was detached already", 2)
            return
        self._unlocked("detach")
        if self._mapped and debug.enabled:
            contract_warning(f"detach: {self!r}: {len(self._mapped)} tables are still mapped: unmap them first", 2)
        backing = self._backing
        with self._resv.locked():
            kept, self._cached = self._cached, None
            try:
                if kept is not None:
                    checked.show(kept[0])
                    try:
                        backing.exporter.unmap(self, *kept)
                    finally:
                        if backing.dynamic:
                            backing.exporter.unpin(self)
            finally:
                backing.attachments.remove(self)
                self.attached = False
        if "detach" in backing.ops:
            backing.exporter.detach(self)
        self.priv = None

    def statistics(self) -> AttachmentStatistics:
        """A snapshot for programs."""
        return AttachmentStatistics(self.dev.name, self.is_dynamic, self.peer2peer, self._cached is not None, len(self._mapped))


def make(buf: DmaBuf, dev: Device, importer: Importer | None, backing: Backing) -> DmaBufAttachment:
    """An attachment that nobody knows of yet."""
    att = object.__new__(DmaBufAttachment)
    att.dev, att.dmabuf, att.importer, att.priv = dev, buf, importer, None
    att.peer2peer = importer is not None and importer.allow_peer2peer
    att._backing, att._resv, att._cached, att._mapped, att.attached = backing, buf.resv, None, {}, False
    return att


def attach(buf: DmaBuf, dev: object, importer: object, interruptible: bool) -> DmaBufAttachment:
    """What ``DmaBuf.attach`` does after the check of the lock (spec 2.8)."""
    if dev is None:
        contract_warning(f"attach: {buf!r}: no device", 3)
        raise fail(errno.EINVAL, "attach", buf, "pass a dmabuf.Device")
    if not isinstance(dev, Device):
        raise TypeError(f"attach: dev is a dmabuf.Device, not {type(dev).__name__}")
    ops = importer if isinstance(importer, Importer) and overrides(importer, Importer, "move_notify") else None
    if importer is not None and ops is None:
        contract_warning(f"attach: {buf!r}: importer {importer!r} has no move_notify", 3)
        raise fail(errno.EINVAL, "attach", buf, "an importer is a dmabuf.Importer with a move_notify")
    backing = backing_of(buf._record)
    backing.here("attach")
    att = make(buf, dev, ops, backing)
    exporter = backing.exporter
    if "attach" in backing.ops:
        exporter.attach(att)
    try:
        with att._resv.locked():
            backing.attachments.insert(0, att)
            att.attached = True  # not before: one that the exporter refused never was, whoever kept it
            try:
                if att.is_dynamic != backing.dynamic:
                    _match(att, interruptible)
            except BaseException:
                backing.attachments.remove(att)
                raise
    except BaseException:
        att.attached = False
        if "detach" in backing.ops:
            exporter.detach(att)
        raise
    return att


def _match(att: DmaBufAttachment, interruptible: bool) -> None:
    """One side is dynamic and the other not: map now, for all directions, until detach (spec 2.8, step 6)."""
    exporter, dynamic = att._backing.exporter, att._backing.dynamic
    if dynamic:
        exporter.pin(att)
    try:
        att._cached = att._map(Direction.BIDIRECTIONAL, interruptible), Direction.BIDIRECTIONAL
    except BaseException:
        if dynamic:
            exporter.unpin(att)
        raise


def move_notify(backing: Backing) -> None:
    """What ``DmaBuf.move_notify`` does after the check of the lock (spec 2.14)."""
    for att in list(backing.attachments):
        if att.importer is not None:
            try:
                att.importer.move_notify(att)
            except Exception as e:  # the others must hear of it all the same
                dispatcher.report(e, att.importer.move_notify)
