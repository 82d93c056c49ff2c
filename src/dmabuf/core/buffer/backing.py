"""What stands behind a buffer in this process: its exporter's ops, its attachments and its vmap count (spec 1.2).

``Plain`` backs a buffer of the memfd heap, whose memory every process can map; it is made when somebody attaches or vmaps. A buffer of
:func:`dmabuf.export` has an ``Exported`` behind it (core/export/exported.py): it is ``record.live``, the one attribute that the paths of
access look at. Where the exporter is another process, something stands in its place that carries the calls there.
"""

from __future__ import annotations

import errno
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from dmabuf import _native
from dmabuf.core.base import debug
from dmabuf.core.base.registry import Registry
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer import residence
from dmabuf.core.contract import Exporter, checked_ops
from dmabuf.core.memory.checked import CheckedMap
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import SgTable
from dmabuf.core.resv.lock import record_of
from dmabuf.core.resv.resv import resv_of
from dmabuf.core.task.owner import current
from dmabuf.domain.domain import Domain
from dmabuf.domain.records import Record
from dmabuf.errors import ContractError, contract_warning, fail

if TYPE_CHECKING:
    from dmabuf.core.attach.attachment import DmaBufAttachment
    from dmabuf.core.dma_buf import DmaBuf

EXPORTED = b"exported"


class Backing:
    """The driver side of one buffer in this process.

    ``in_file``: the memory is the buffer's own file, which every handle maps for itself. ``own_descriptions``: open file descriptions of
    the buffer that are no references.
    """

    in_file = False
    own_descriptions = 0

    def __init__(self, exporter: Exporter, ops: frozenset[str], record: Record, cache: bool) -> None:
        self.exporter, self.ops, self.record, self.cache = exporter, ops, record, cache
        self.dynamic = "pin" in ops
        self.attachments: list[DmaBufAttachment] = []  # newest first; under the reservation lock
        self.vmaps = 0
        self.mapped: IosysMap | None = None
        self.brackets = 0  # open begin_cpu_access calls of this process, counted by the debug layer

    def here(self, operation: str) -> None:
        """Errors: ENODEV the exporter is not in this process."""

    # ---- CPU access ----

    def begin(self, buf: DmaBuf, direction: Direction) -> None:
        self.here("begin_cpu_access")
        if "begin_cpu_access" in self.ops:
            self.exporter.begin_cpu_access(buf, direction)

    def end(self, buf: DmaBuf, direction: Direction) -> None:
        self.here("end_cpu_access")
        if "end_cpu_access" in self.ops:
            self.exporter.end_cpu_access(buf, direction)

    def mappable(self, buf: DmaBuf, operation: str) -> None:
        """Errors: as :meth:`here`; EINVAL the exporter offers no mmap."""
        self.here(operation)
        if "mmap" not in self.ops and not self.in_file:
            raise fail(errno.EINVAL, operation, buf, "use vmap(), or attach a device", what="its exporter offers no mmap")

    def mmap(self, buf: DmaBuf, operation: str, offset: int, length: int, writable: bool) -> _native.Mapping:
        """The exporter's mapping. Errors: EINVAL it has none to offer; EACCES writable wanted, and it is not."""
        self.mappable(buf, operation)
        if self.in_file:
            return self._map_file(buf, operation, offset, length, writable)
        mapping = self.exporter.mmap(buf, offset, length)
        if not isinstance(mapping, _native.Mapping):
            raise TypeError(f"{operation}: the exporter's mmap returned {type(mapping).__name__}, not what DmaBuf.mmap() returns")
        if writable and not mapping.writable:
            mapping.close()
            raise fail(errno.EACCES, operation, buf, "map it with writable=False", what="the exporter's memory is read-only")
        self.keep(mapping)
        return mapping

    def _map_file(self, buf: DmaBuf, operation: str, offset: int, length: int, writable: bool) -> _native.Mapping:
        direction = Direction.BIDIRECTIONAL if writable else Direction.FROM_DEVICE
        self.begin(buf, direction)  # the memory is there until the end, and from the mapping on by that
        try:
            mapping = residence.mapping(buf.fileno(), operation, buf, offset, length, writable)
        finally:
            self.end(buf, direction)
        self.keep(mapping)
        return mapping

    def keep_open(self, buf: DmaBuf) -> Any:
        """What to call :meth:`end` with once the handle may be closed; None: there is nothing, so it must be called before."""
        return buf

    def keep(self, mapping: _native.Mapping) -> None:
        """A mapping is a reference until it is closed."""

    # ---- vmap, the lock is held ----

    def vmap(self, buf: DmaBuf, *, tell: bool = True) -> IosysMap:
        """Spec 2.18, from step 2 on. ``tell``: warn when the exporter fails."""
        self.here("vmap")
        if "vmap" not in self.ops:
            raise fail(errno.EINVAL, "vmap", buf, "use mmap(), or attach a device", what="its exporter offers no vmap")
        if self.vmaps:
            if self.mapped is None:
                raise ContractError(f"vmap: {buf!r} is counted as mapped and has no map")
        else:
            try:
                made = self.exporter.vmap(buf)
                if not isinstance(made, IosysMap):
                    raise TypeError(f"vmap: the exporter's vmap returned {type(made).__name__}, not an IosysMap")
                if made.is_null():
                    raise fail(errno.ENOMEM, "vmap", buf, what="its exporter returned no map")
            except OSError as e:
                if tell:
                    contract_warning(f"vmap: {buf!r}: its exporter failed: {e}", 4)
                raise
            if debug.enabled:
                made = CheckedMap.of(made, self.bracketed, debug.place(sys._getframe(1)))
            self.mapped = made
        assert self.mapped is not None
        given = self.mapped.copy()
        self.vmaps += 1
        return given

    def vunmap(self, buf: DmaBuf, map: IosysMap) -> None:
        """Spec 2.18."""
        self.here("vunmap")
        if not self.vmaps or self.mapped is None:
            raise ContractError(f"vunmap: {buf!r} is not mapped")
        if not self.mapped.is_equal(map):
            raise ContractError(f"vunmap: {buf!r}: this is not the map that vmap() gave")
        self.vmaps -= 1
        if not self.vmaps:
            kept, self.mapped = self.mapped, None
            try:
                if "vunmap" in self.ops:
                    self.exporter.vunmap(buf, map)
            finally:
                kept.clear()

    def bracketed(self) -> bool:
        """May the CPU access the buffer: inside of begin and end, or of an access block of the running thread or task?"""
        if self.brackets > 0:
            return True
        shm, word = self.record.shm, current(self.record.domain).word
        target = record_of(resv_of(self.record))
        entries = (shm.fence_info(handle) for handle in shm.resv_pending(target.index, 3, 0))
        return any(info is not None and info["owner"] == word for info in entries)


class _Memfd(Exporter):
    """The memfd heap as an exporter: static, its memory the file of the buffer itself."""

    __slots__ = ()

    def attach(self, attachment: DmaBufAttachment) -> None:
        attachment.priv = attachment.dmabuf._any_window()

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable:
        memory: _native.Mapping = attachment.priv
        sgt = SgTable.from_ranges([(0, memory.size)], max_segment=attachment.dev.max_segment, memory=memory)
        return attachment.dev.map_sgtable(sgt, direction)

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        attachment.dev.unmap_sgtable(sgt, direction)

    def vmap(self, buf: DmaBuf) -> IosysMap:
        return IosysMap.init_vaddr(memoryview(buf._map_memfd("vmap", 0, buf.size, True)))

    def release(self, buf: DmaBuf) -> None:
        """The kernel frees a memfd by itself."""


_MEMFD = _Memfd()
_MEMFD_OPS = checked_ops(_MEMFD, False)


def backing_of(record: Record) -> Backing:
    """The driver side of a buffer; for plain memory made at first use."""
    found: Backing | None = record.shared.get("backing") if record.live is None else record.live
    if found is None:
        found = record.shared.setdefault("backing", Backing(_MEMFD, _MEMFD_OPS, record, False))
    return found


def devices_of(domain: Domain, dev: int, ino: int) -> list[str]:
    """Names of the devices that this process has attached to a buffer, the newest first; takes no lock."""
    known: weakref.WeakValueDictionary[tuple[int, int], Record] = domain.local.get("records") or weakref.WeakValueDictionary()
    record = known.get((dev, ino))
    found: Backing | None = None if record is None else record.live or record.shared.get("backing")
    return [attachment.dev.name for attachment in list(found.attachments)] if found is not None else []


BACKINGS: Final[Registry[Callable[[Record, int], Backing]]] = Registry("backing", {"remote": "dmabuf.sharing.remote_backing"})
"""Functions that make the backing of a buffer which doesn't have one yet in this process, from its record and a descriptor of it."""

SERVERS: Final[Registry[Callable[[Domain], object]]] = Registry(
    "server", {"exported": "dmabuf.sharing.serving", "kernel": "dmabuf.sharing.duplicate"}
)
"""Functions that have this process answer requests of others about one kind of buffer."""
