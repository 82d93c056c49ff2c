"""``DmaBufAttachment``: one device's use of one buffer: map, pin, and be notified of moves (semantics 1.4, 2.8–2.14).

Made by ``buf.attach(dev, importer=None)``: without an importer *static*, with one *dynamic*. A device may attach more than once. Static and
dynamic are matched with the exporter (semantics 2.13a, Linux 6.8):

| exporter | importer | at attach | map | unmap | at detach |
|---|---|---|---|---|---|
| static | static | – | op, wait for KERNEL fences; kept if the exporter caches | op; nothing if kept | op if kept |
| static | dynamic | op BIDIRECTIONAL, kept | the kept table | nothing | op |
| dynamic | static | pin, op BIDIRECTIONAL, wait for KERNEL fences, kept | the kept table | nothing | op, unpin |
| dynamic | dynamic | – | op | op | – |
| dynamic | dynamic, ``MOVE_NOTIFY`` off | – | pin, op | op, unpin | – |

``MOVE_NOTIFY`` is the kernel's option CONFIG_DMABUF_MOVE_NOTIFY, which Linux 7.1 has for good. ``DMABUF_MOVE_NOTIFY=0`` at the start of the
process, or :func:`moving`, turns it off. A failure at any step undoes the steps before it.

With the buffer's reservation lock held: ``map``, ``unmap``, ``pin``, ``unpin`` (else ``ContractError``). Without it: ``attach``,
``detach``, ``map_unlocked``, ``unmap_unlocked``, ``mapped`` (else ``ContractWarning`` and EDEADLK). An attachment keeps its handle of the
buffer from being collected, not from being closed. Detach before closing, since the exporter's ``release`` comes with the last descriptor.

A buffer that another process exports is attached in the same way, and the exporter's ops are called there (sharing/remote_exporter.py).
When that process is gone, operations that need it raise ENODEV. ``unmap``, ``unpin`` and ``detach`` then do what is left to do in this
process. Every process that has a plain buffer can attach devices to it. Each has its own attachments, and a listing shows those of the
process that prints it.
"""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

from dmabuf._native import Bracket
from dmabuf.core.base import debug
from dmabuf.core.base.usage import Direction, Usage, checked_direction
from dmabuf.core.buffer.backing import Backing
from dmabuf.core.buffer.handle import Face, Handle, handle_of
from dmabuf.core.contract import AnyBuffer, ImporterOps, overrides
from dmabuf.core.memory import checked
from dmabuf.core.memory.device import Device
from dmabuf.core.memory.scatterlist import SgTable
from dmabuf.core.resv.resv import DmaResv, resv_of, wait_until
from dmabuf.domain import dispatcher
from dmabuf.errors import ContractError, contract_warning, fail

MOVE_NOTIFY = os.environ.get("DMABUF_MOVE_NOTIFY") != "0"


def moving(on: bool = True) -> AbstractContextManager[None]:
    """Set ``MOVE_NOTIFY`` for a block, in the whole process. What is mapped meanwhile is unmapped as it was mapped."""
    return debug.Switched(globals(), "MOVE_NOTIFY", on)


@dataclass(frozen=True)
class AttachmentStatistics:
    """A snapshot of an attachment. ``cached``: a table is kept for it; ``mapped``: tables that its importer has in addition."""

    device: str
    dynamic: bool
    peer2peer: bool
    cached: bool
    mapped: int


class DmaBufAttachment:
    """A device attached to a buffer.

    ``dev``, ``dmabuf``, ``importer`` (None when static), ``attached`` (False after detach). ``priv`` belongs to the exporter.
    ``peer2peer``: the importer copes with memory that has no pages.

    Kernel: dma_buf_attachment (dmabuf, dev, peer2peer, priv, importer_ops as importer, importer_priv as importer).
    """

    __slots__ = ("__weakref__", "_backing", "_cached", "_mapped", "_resv", "attached", "dev", "dmabuf", "importer", "peer2peer", "priv")

    dev: Device
    dmabuf: AnyBuffer  # the DmaBuf
    importer: ImporterOps[DmaBufAttachment] | None
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
        return f"<dmabuf.DmaBufAttachment {self.dev.name} on {self._backing.record} {kind}{'' if self.attached else ' detached'}>"

    @property
    def is_dynamic(self) -> bool:
        """Whether it was attached with an importer.

        Kernel: dma_buf_attachment_is_dynamic.
        """
        return self.importer is not None

    # ---- the lock table (semantics 2.19) ----

    def _check(self, operation: str, level: int = 4) -> None:
        if not self.attached:
            contract_warning(f"{operation}: {self!r}: it was detached", level)
            raise fail(errno.EINVAL, operation, self, "attach again", what="the attachment is gone")

    def _locked(self, operation: str) -> None:
        self._check(operation, 5)
        if not self._resv.held_here():
            what = "the buffer's reservation lock is not held"
            raise ContractError(f"{operation}: {self!r}: {what}; hold it, or use {operation}_unlocked()")
        self._backing.check_reachable(operation)

    def _unlocked(self, operation: str) -> None:
        self._check(operation, 5)
        if self._resv.held_here():
            contract_warning(f"{operation}: {self!r}: the buffer's reservation lock is held by this thread or task", 4)
            what = "this thread or task holds the buffer's reservation lock"
            raise fail(errno.EDEADLK, operation, self, "unlock the reservation object first", what=what)
        self._backing.check_reachable(operation)

    # ---- mapping ----

    def map(self, direction: int, *, interruptible: bool = False) -> SgTable:
        """Return the table of DMA addresses for the device (semantics 2.11). The lock is held. A static importer waits for KERNEL fences.

        Args:
            direction: A ``Direction``.
            interruptible: A signal ends the wait for fences with EINTR, and nothing is mapped.

        Raises:
            ContractError: The lock isn't held.
            InvalidError: ``direction`` is not a direction (EINVAL); the attachment is gone (EINVAL, with a ``ContractWarning``).
            BusyError: The kept table is of another direction (EBUSY).
            NoMemoryError: The exporter returned no table (ENOMEM).
            NoDeviceError: The exporter's process is gone (ENODEV).
            OSError: What the exporter raised.

        Kernel: dma_buf_map_attachment.
        """
        self._locked("map")
        way = checked_direction(direction, "map", self)
        if self._cached is not None:
            kept, had = self._cached
            if had not in (way, Direction.BIDIRECTIONAL):
                raise fail(errno.EBUSY, "map", self, f"map {had.name}, or attach again", what=f"its table is kept for {had.name}")
            return kept
        pin = self._backing.dynamic and not MOVE_NOTIFY
        sgt: SgTable | None = None
        if pin:
            self._backing.exporter.pin(self)
        try:
            sgt = self._map(way, interruptible)
            if self._backing.cache:
                self._cached = sgt, way
            else:
                self._mapped[id(sgt)] = sgt, way, pin
        except BaseException:
            self._unmade(sgt, way, pin)
            raise
        return sgt

    def _unmade(self, sgt: SgTable | None, way: Direction, pinned: bool) -> None:
        """Undo a mapping. A signal handler that raises at the very beginning leaves it as it was, later it is undone all the same."""
        key = id(sgt)
        try:
            if sgt is not None:
                try:
                    self._mapped.pop(key, None)
                    checked.show(sgt)
                finally:
                    self._backing.exporter.unmap(self, sgt, way)
        finally:
            if pinned:
                self._backing.exporter.unpin(self)

    def _map(self, way: Direction, interruptible: bool) -> SgTable:
        """Call the exporter's op, wait, and apply the debug layer (semantics 2.11, step M)."""
        exporter = self._backing.exporter
        sgt = exporter.map(self, way)
        try:
            if sgt is None:
                raise fail(errno.ENOMEM, "map", self, what="its exporter returned no table")
            if not isinstance(sgt, SgTable):
                raise TypeError(f"map: the exporter returned {type(sgt).__name__}, not an SgTable")
            if self.importer is None:
                wait_until(self._resv, Usage.KERNEL, -1, interruptible=interruptible)
            checked.hide(sgt)
        except BaseException:
            self._unmade(sgt if isinstance(sgt, SgTable) else None, way, False)
            raise
        return sgt

    def unmap(self, sgt: SgTable | None, direction: int) -> None:
        """Unmap a table; a kept one stays (semantics 2.13). The lock is held.

        For None there is a ``ContractWarning`` and no effect.

        Args:
            sgt: What ``map`` returned.
            direction: As for ``map``.

        Raises:
            ContractError: The lock isn't held; this attachment has not mapped ``sgt``, or has unmapped it; ``map`` had another direction.
                Nothing is done.
            InvalidError: As ``map`` (EINVAL).

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
            raise ContractError(f"unmap: {self!r}: it has not mapped {sgt!r}; unmap each table once, where it was mapped")
        _, had, pinned = self._mapped[id(sgt)]
        if had is not way:  # the exporter would undo the wrong half, or refuse: then nobody could unmap it any more
            raise ContractError(f"unmap: {sgt!r}: it was mapped {had.name}; unmap it with the same direction")
        self._unmade(sgt, way, pinned)

    def map_unlocked(self, direction: int, *, interruptible: bool = False) -> SgTable:
        """Take the lock, and :meth:`map`.

        Raises:
            DeadlockError: The caller holds the lock (EDEADLK, with a ``ContractWarning``).
            OSError: As ``map``.

        Kernel: dma_buf_map_attachment_unlocked.
        """
        made: list[SgTable] = []
        try:
            return self._map_into(made, direction, interruptible)
        except BaseException:
            self._take_back(made)
            raise

    def _map_into(self, made: list[SgTable], direction: int, interruptible: bool = False) -> SgTable:
        """Do the same, and note the table before the lock is free. The caller takes back what it didn't get."""
        self._unlocked("map_unlocked")
        with self._resv.locked():
            sgt = self.map(direction, interruptible=interruptible)
            made.append(sgt)
        return sgt

    def _take_back(self, made: list[SgTable]) -> None:
        """Unmap what the caller noted when it was mapped."""
        while made:
            with self._resv.locked():
                _, way, _ = self._mapped.get(id(made[-1]), (None, None, None))
                if way is not None:
                    self._unmap(made[-1], way)
            del made[-1:]

    def unmap_unlocked(self, sgt: SgTable | None, direction: int) -> None:
        """Take the lock, and :meth:`unmap`.

        Raises:
            DeadlockError: The caller holds the lock (EDEADLK, with a ``ContractWarning``).
            ContractError, InvalidError: As ``unmap``.

        Kernel: dma_buf_unmap_attachment_unlocked.
        """
        self._unlocked("unmap_unlocked")
        with self._resv.locked():
            self._unmap(sgt, direction)

    def mapped(self, direction: int) -> AbstractContextManager[SgTable]:
        """Map for a block: ``with att.mapped(Direction.TO_DEVICE) as sgt``. The lock is not held, and may be taken in the block.

        Raises:
            OSError: As ``map_unlocked``.
        """
        return _Mapped(self, direction)

    # ---- pinning ----

    def pin(self) -> None:
        """Keep the memory where it is (semantics 2.10), for long uses such as scanout. The lock is held.

        Has no effect if the exporter has no such op. On a static attachment, which is pinned in any case, there is a ``ContractWarning``.

        Raises:
            ContractError: The lock isn't held.
            InvalidError: The attachment is gone (EINVAL, with a ``ContractWarning``).
            OSError: What the exporter raised.

        Kernel: dma_buf_pin.
        """
        self._pinning("pin")
        if self._backing.dynamic:
            self._backing.exporter.pin(self)

    def unpin(self) -> None:
        """Undo one :meth:`pin`. The lock is held.

        Raises:
            ContractError, InvalidError: As ``pin``.

        Kernel: dma_buf_unpin.
        """
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
        """End the attachment (semantics 2.9): unmap and unpin what is kept, and call the exporter's ``detach``. The lock is not held.

        Detaching twice gives a ``ContractWarning`` and has no effect.

        Raises:
            DeadlockError: The caller holds the lock (EDEADLK, with a ``ContractWarning``).

        Kernel: dma_buf_detach.
        """
        if not self.attached:
            contract_warning(f"detach: {self!r}: it was detached already", 2)
            return
        self._unlocked("detach")
        if self._mapped and debug.enabled:
            contract_warning(f"detach: {self!r}: {len(self._mapped)} tables are still mapped; unmap them first", 2)
        leave(self)

    def statistics(self) -> AttachmentStatistics:
        """Return a snapshot for programs."""
        return AttachmentStatistics(self.dev.name, self.is_dynamic, self.peer2peer, self._cached is not None, len(self._mapped))


class _Mapped(Bracket):
    """The block of ``mapped``."""

    __slots__ = ("_attachment", "_direction", "_made")

    def __init__(self, attachment: DmaBufAttachment, direction: int) -> None:
        self._attachment, self._direction = attachment, direction
        self._made: list[SgTable] = []

    def enter(self) -> SgTable:
        """Map."""
        return self._attachment._map_into(self._made, self._direction)

    def leave(self) -> None:
        """Unmap."""
        while self._made:
            self._attachment.unmap_unlocked(self._made[-1], self._direction)
            del self._made[-1:]


# ---- attaching and detaching, as every process that has the exporter does it ----


def make(buf: Face, dev: Device, importer: ImporterOps[DmaBufAttachment] | None, backing: Backing) -> DmaBufAttachment:
    """Return an attachment that nobody knows of yet."""
    att = object.__new__(DmaBufAttachment)
    att.dev, att.dmabuf, att.importer, att.priv = dev, buf, importer, None
    att.peer2peer = importer is not None and importer.allow_peer2peer
    att._backing, att._resv, att._cached, att._mapped, att.attached = backing, handle_of(buf).resv, None, {}, False
    return att


def enter(att: DmaBufAttachment, *, match: bool = True, interruptible: bool = False) -> None:
    """Attach: call the exporter's ``attach`` and put the attachment on the list. What fails undoes the steps before it.

    ``match``: map now if one side is dynamic and the other is not. For a device of another process, that process does so.
    """
    backing = att._backing
    if "attach" in backing.ops:
        backing.exporter.attach(att)
    try:
        with att._resv.locked():
            backing.attachments.insert(0, att)
            att.attached = True  # not before: one that the exporter refused never existed, even if the exporter kept it
            try:
                if match and att.is_dynamic != backing.dynamic:
                    _match(att, interruptible)
            except BaseException:
                _off_the_list(att)
                raise
    except BaseException:
        if att in backing.attachments:  # a signal handler raised when the lock was free again
            with att._resv.locked():
                _off_the_list(att)
        att.attached = False
        if "detach" in backing.ops:
            backing.exporter.detach(att)
        raise


def leave(att: DmaBufAttachment) -> None:
    """Detach: unmap and unpin what is kept, take the attachment off the list, and call the exporter's ``detach``. No lock is held."""
    backing = att._backing
    try:
        with att._resv.locked():
            _off_the_list(att)
    finally:
        if not att.attached and "detach" in backing.ops:
            backing.exporter.detach(att)
    att.priv = None


def _off_the_list(att: DmaBufAttachment) -> None:
    """Undo what :func:`enter` does under the lock, which is held."""
    backing = att._backing
    try:
        kept, att._cached = att._cached, None
        if kept is not None:
            att._unmade(*kept, backing.dynamic)
    finally:
        if att in backing.attachments:  # not, if a signal handler interrupted a detach before
            backing.attachments.remove(att)
        att.attached = False


def _match(att: DmaBufAttachment, interruptible: bool) -> None:
    """Map now, for all directions, until detach: one side is dynamic and the other is not (semantics 2.8, step 6)."""
    exporter, dynamic = att._backing.exporter, att._backing.dynamic
    if dynamic:
        exporter.pin(att)
    try:
        att._cached = att._map(Direction.BIDIRECTIONAL, interruptible), Direction.BIDIRECTIONAL
    except BaseException:
        if dynamic:
            exporter.unpin(att)
        raise


def resv_at(att: DmaBufAttachment) -> DmaResv:
    """Return the reservation object of the buffer, which an attachment keeps when its handle is closed."""
    return att._resv


def tables_of(att: DmaBufAttachment) -> list[tuple[SgTable, Direction]]:
    """Return the tables that the importer has mapped, with their directions."""
    return [(sgt, way) for sgt, way, _ in list(att._mapped.values())]


# ---- the verbs of a buffer ----


def attach(buf: Face, dev: object, importer: object, interruptible: bool) -> DmaBufAttachment:
    """Attach a device (semantics 2.8); the verb ``DmaBuf.attach``."""
    handle = handle_of(buf)
    handle.check_unlocked("attach")
    if dev is None:
        contract_warning(f"attach: {buf!r}: no device", 3)
        raise fail(errno.EINVAL, "attach", buf, "pass a dmabuf.Device", what="there is no device")
    if not isinstance(dev, Device):
        raise TypeError(f"attach: dev is a dmabuf.Device, not {type(dev).__name__}")
    ops = importer if isinstance(importer, ImporterOps) and overrides(importer, ImporterOps, "move_notify") else None
    if importer is not None and ops is None:
        contract_warning(f"attach: {buf!r}: importer {importer!r} has no move_notify", 3)
        what = f"importer {importer!r} has no move_notify"
        raise fail(errno.EINVAL, "attach", buf, "pass a dmabuf.Importer with a move_notify", what=what)
    backing = handle.shared.ensure_backing()
    backing.check_reachable("attach")
    att = make(buf, dev, ops, backing)
    enter(att, interruptible=interruptible)
    return att


def move_notify(handle: Handle) -> None:
    """Notify the importers (semantics 2.14); the verb ``DmaBuf.move_notify``."""
    handle.check_locked("move_notify")
    notify_moves(handle.shared.ensure_backing())


def notify_moves(backing: Backing) -> None:
    """Notify every dynamic importer of a buffer, the newest attachment first, that the memory is about to move.

    Raises:
        ContractError: The lock isn't held.
    """
    if not resv_of(backing.record).held_here():
        raise ContractError(f"move_notify: {backing.record}: its reservation lock is not held; hold it")
    for att in list(backing.attachments):
        if att.importer is not None:
            try:
                att.importer.move_notify(att)
            except Exception as e:  # the others must be notified all the same
                dispatcher.report(e, att.importer.move_notify)
