"""What exporters and importers promise each other: ``ExporterOps``, ``ImporterOps``, and what each is handed (semantics 1.5, 1.6, 2.20).

An exporter owns memory and answers for it: it is the kernel's ``dma_buf_ops`` and its private pointer in one object, which the framework
never writes to. It says what it can do by what it overrides. ``map``, ``unmap`` and ``release`` are mandatory; an exporter with ``pin`` and
``unpin`` is *dynamic*: it may move its memory. An op fails by raising an ``OSError``, which reaches the caller unchanged.

| op | mandatory | the buffer's reservation lock |
|---|---|---|
| attach, detach | no | not held |
| pin, unpin | both or none | held |
| map, unmap | yes | held |
| release | yes | not held |
| begin_cpu_access, end_cpu_access, mmap | no | not held |
| vmap, vunmap | no | held |

An op that is called with the lock held must not take it, and must not call anything that does. Several threads may run ops of one buffer at
the same time, unless that lock orders them.

No code enforces the following duties of an exporter. ``attach`` refuses a device that can't reach the memory. A static exporter's ``map``
returns memory that is ready. ``map`` makes a new table each time (the debug layer warns otherwise), which belongs to the importer until
``unmap``. Memory is moved or freed only after all fences up to BOOKKEEP. The size never changes. A dynamic importer in turn waits for WRITE
and KERNEL fences before its device touches the memory, and adds a fence for work that it cannot stop at once.

The ops run in the exporting process. When another process, or a forked child, needs one, a thread of this package calls it there with the
same locks held; ``attachment.dev`` is then a proxy with the device's name and limits (docs/exporters.md). Memory that other processes
map must be a mapping of a file that the exporting process keeps open.

Programs derive from ``dmabuf.Exporter`` and ``dmabuf.Importer``, whose ops are handed a ``DmaBuf`` and a ``DmaBufAttachment``. Both classes
stand above this module, which names what it needs of them: the protocols ``Buffer`` and ``Attachment``.
"""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from dmabuf._native import Mapping
from dmabuf.core.base.usage import Direction
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.memory.device import Device
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import SgTable
from dmabuf.domain.domain import Domain
from dmabuf.errors import contract_warning, fail

OPS = ("attach", "detach", "pin", "unpin", "map", "unmap", "release", "begin_cpu_access", "end_cpu_access", "mmap", "vmap", "vunmap")
_MANDATORY = {"map", "unmap", "release"}


# ---- what the two sides see of a buffer ----


class Reservation(Protocol):
    """A buffer's reservation object, as an exporter or importer uses it; a ``DmaResv``."""

    def lock(self) -> None: ...
    def trylock(self) -> bool: ...
    def unlock(self) -> None: ...
    def locked(self) -> AbstractContextManager[object]: ...
    def held_here(self) -> bool: ...
    def reserve(self, n: int) -> None: ...
    def add(self, fence: DmaFence, usage: int) -> None: ...
    def fences(self, usage: int) -> list[DmaFence]: ...
    def test_signaled(self, usage: int) -> bool: ...


class Buffer(Protocol):
    """A handle of a buffer, as an exporter or importer is given it; a ``DmaBuf``."""

    @property
    def domain(self) -> Domain: ...
    @property
    def size(self) -> int: ...
    @property
    def ino(self) -> int: ...
    @property
    def exp_name(self) -> str: ...
    @property
    def home(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def resv(self) -> Reservation: ...
    @property
    def is_dynamic(self) -> bool: ...
    def fileno(self) -> int: ...
    def dup(self, cloexec: bool = True) -> int: ...
    def close(self) -> None: ...
    def get_dma_buf(self) -> Buffer: ...
    def mmap(self, offset: int = 0, length: int | None = None, writable: bool = True) -> Mapping: ...
    def vmap(self, into: IosysMap | None = None) -> IosysMap: ...
    def vunmap(self, map: IosysMap) -> None: ...
    def move_notify(self) -> None: ...


class Attachment(Protocol):
    """One device's use of a buffer, as an exporter or importer is given it; a ``DmaBufAttachment``."""

    dev: Device
    peer2peer: bool
    priv: Any  # the exporter's own
    attached: bool

    @property
    def dmabuf(self) -> Buffer: ...
    @property
    def importer(self) -> AnyImporter | None: ...
    @property
    def is_dynamic(self) -> bool: ...


AnyBuffer: TypeAlias = Any  # a DmaBuf, for those below it who give one to their callers

BufferT = TypeVar("BufferT", bound=Buffer, contravariant=True)
AttachmentT = TypeVar("AttachmentT", bound=Attachment, contravariant=True)


# ---- the exporter ----


class ExporterOps(Generic[BufferT, AttachmentT]):
    """Base class of exporters: override what the exporter can do. The module says which locks are held and what is promised.

    Kernel: dma_buf_ops.
    """

    __slots__ = ()

    def attach(self, attachment: AttachmentT) -> None:
        """Accept a device that is about to attach: look at ``attachment.dev``, and keep what is needed in ``attachment.priv``.

        Optional. The lock is not held. May set ``attachment.peer2peer`` to False if the exporter can't do that. If it raises, the
        attachment never existed.

        Raises:
            OSError: Any. EBUSY says that this device can't reach the memory, and that the memory can't move.

        Kernel: dma_buf_ops.attach.
        """
        raise NotImplementedError

    def detach(self, attachment: AttachmentT) -> None:
        """End the attachment, and free what ``attach`` made. Optional. The lock is not held. Must not fail.

        Kernel: dma_buf_ops.detach.
        """
        raise NotImplementedError

    def pin(self, attachment: AttachmentT) -> None:
        """Keep the memory where it is until as many ``unpin``. It is present and cleared, and moves are done, when this returns.

        Optional, only together with ``unpin``; makes the exporter dynamic. The lock is held. The exporter counts nested pins. It may pin
        the memory where it is.

        Raises:
            OSError: Any.

        Kernel: dma_buf_ops.pin.
        """
        raise NotImplementedError

    def unpin(self, attachment: AttachmentT) -> None:
        """Undo one ``pin``. Optional, only together with ``pin``. The lock is held. Must not fail.

        Kernel: dma_buf_ops.unpin.
        """
        raise NotImplementedError

    def map(self, attachment: AttachmentT, direction: Direction) -> SgTable | None:
        """Make the memory reachable for ``attachment.dev``. Mandatory. The lock is held.

        Returns:
            A new table with its DMA side filled (``attachment.dev.map_sgtable``). None means ENOMEM.

        Raises:
            OSError: Any. EINTR says that a signal ended a wait.

        Kernel: dma_buf_ops.map_dma_buf.
        """
        raise NotImplementedError

    def unmap(self, attachment: AttachmentT, sgt: SgTable, direction: Direction) -> None:
        """Undo one ``map``, with the direction that it had. Mandatory. The lock is held. Must not fail.

        Kernel: dma_buf_ops.unmap_dma_buf.
        """
        raise NotImplementedError

    def release(self, buf: BufferT) -> None:
        """Free the memory: the last reference is gone, in every process. Called once, after everything else.

        Mandatory. No lock is held. ``buf`` tells which buffer it was (``ino``, ``name``, ``size``). It is closed afterwards and can't be
        kept. Must not fail: ``sys.unraisablehook`` reports what it raises.

        Kernel: dma_buf_ops.release.
        """
        raise NotImplementedError

    def begin_cpu_access(self, buf: BufferT, direction: Direction) -> None:
        """Make the memory coherent: the CPU is about to read (FROM_DEVICE) or to change it (TO_DEVICE, BIDIRECTIONAL).

        Optional. The lock is not held.

        Raises:
            OSError: Any. No fence is waited for then, and the access does not take place.

        Kernel: dma_buf_ops.begin_cpu_access.
        """
        raise NotImplementedError

    def end_cpu_access(self, buf: BufferT, direction: Direction) -> None:
        """End the CPU access. Optional. The lock is not held. Only the exporter pairs begin and end.

        Raises:
            OSError: Any; it reaches the caller.

        Kernel: dma_buf_ops.end_cpu_access.
        """
        raise NotImplementedError

    def mmap(self, buf: BufferT, offset: int, length: int) -> Mapping:
        """Return a mapping of the bytes, such as ``DmaBuf.mmap`` of a buffer that holds the memory returns.

        Optional; without it ``mmap()``, ``read()`` and ``write()`` are EINVAL. The lock is not held. The range lies within the size.
        The buffer lives until the mapping is closed, so return a new one each time: one that the exporter keeps open is never closed,
        and the buffer never released. A ``ContractWarning`` tells of one that is returned twice.

        Raises:
            OSError: Any.

        Kernel: dma_buf_ops.mmap.
        """
        raise NotImplementedError

    def vmap(self, buf: BufferT) -> IosysMap:
        """Return the whole buffer as a kernel mapping. Optional; without it ``vmap()`` is EINVAL. The lock is held.

        Called once until ``vunmap``: the framework counts.

        Raises:
            OSError: Any.

        Kernel: dma_buf_ops.vmap.
        """
        raise NotImplementedError

    def vunmap(self, buf: BufferT, map: IosysMap) -> None:
        """Undo ``vmap``. Optional. The lock is held. Must not fail.

        Kernel: dma_buf_ops.vunmap.
        """
        raise NotImplementedError


AnyExporter: TypeAlias = ExporterOps[Any, Any]  # one that is handed a DmaBuf or a DmaBufAttachment


# ---- the importer ----


class ImporterOps(Generic[AttachmentT]):
    """Base class of what makes an attachment dynamic.

    ``allow_peer2peer``: the importer copes with memory that has no pages, such as another device's.

    Kernel: dma_buf_attach_ops (allow_peer2peer).
    """

    __slots__ = ()

    allow_peer2peer: bool = False

    def move_notify(self, attachment: AttachmentT) -> None:
        """React to the memory being about to move. Mandatory. The lock is held, and must not be taken.

        A mapped table stays valid during the call but shows the old place: unmap it and map again as soon as possible, but not in here.
        Work that the device can't stop at once must be on the reservation object as a fence. Must not fail.

        Kernel: dma_buf_attach_ops.move_notify.
        """
        raise NotImplementedError


AnyImporter: TypeAlias = ImporterOps[Any]  # one that is handed a DmaBufAttachment


class RevocableImporter(ImporterOps[AttachmentT]):
    """The proxy of an importer in another process, whose device must be kept away from memory that has moved."""

    __slots__ = ()

    def revoke(self, attachment: AttachmentT) -> None:
        """Make tables that the importer has kept unreachable: the memory has moved. No lock is held."""
        raise NotImplementedError


class OwnerReference(Protocol):
    """The owner of an exporter, which can't go while a buffer lives (the kernel's module reference)."""

    def try_get(self) -> bool:
        """Take a reference; return False if the owner is going away."""

    def put(self) -> None:
        """Drop a reference."""


# ---- checks ----


def overrides(exporter: object, base: type, op: str) -> bool:
    """Return True if the object's class defines ``op`` itself."""
    return getattr(type(exporter), op, None) is not getattr(base, op)


def checked_ops(exporter: object, cache: bool) -> frozenset[str]:
    """Return the names of the ops that the exporter has.

    Raises:
        InvalidError: It is not an exporter, or its ops exclude each other (EINVAL, with a ``ContractWarning``).
    """
    ops = frozenset(op for op in OPS if overrides(exporter, ExporterOps, op)) if isinstance(exporter, ExporterOps) else frozenset()
    what = remedy = ""
    if not _MANDATORY <= ops:
        what, remedy = "not an exporter with map, unmap and release", "pass a dmabuf.Exporter that overrides all three"
    elif cache and ops & {"pin", "unpin"}:
        what, remedy = "cache_sgt_mapping excludes pin and unpin, since what is cached can't move", "choose one of the two"
    elif ("pin" in ops) != ("unpin" in ops):
        what, remedy = "one of pin and unpin is missing", "override both or none"
    if what:
        contract_warning(f"export: {exporter!r}: {what}", 3)
        raise fail(errno.EINVAL, "export", repr(exporter), remedy, what=what)
    return ops
