"""``Backing``: what stands behind a buffer in this process: its exporter's ops, its attachments, its vmap count (semantics 1.2, 2.18).

There is one kind for each kind of memory. ``shared.BACKINGS`` has those that a buffer gets when this process meets it for the first time:

| kind | module | memory |
|---|---|---|
| memfd | core/buffer/backing_memfd.py | plain memory that every process can map; made when a device attaches or somebody vmaps |
| kernel | core/buffer/backing_kernel.py | a kernel dma-buf |
| remote | sharing/remote_backing.py | an exporter's in another process, where its ops are called |

``Exported`` (core/export/exported.py) is a fourth: the exporter is in this process, and ``export`` makes the backing, because only its
caller has the exporter. Buffers of the spill heap are exported too.

Every method that takes a buffer takes a :class:`~dmabuf.core.contract.Buffer`, the handle that the exporter is given.
"""

from __future__ import annotations

import errno
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, Protocol

from dmabuf._native import Access, Mapping
from dmabuf.core.base import debug
from dmabuf.core.base.registry import Registry
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer import residency
from dmabuf.core.contract import AnyExporter, Attachment, Buffer
from dmabuf.core.memory.checked import CheckedMap
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.resv.lock import record_of
from dmabuf.core.resv.resv import resv_of
from dmabuf.core.task.owner import current
from dmabuf.domain.domain import Domain
from dmabuf.domain.records import Record
from dmabuf.errors import ContractError, contract_warning, fail, text_of
from dmabuf.uapi.call import OwnedFd


class Descriptor(Protocol):
    """Anything with a descriptor of the buffer: a handle, or a duplicate that was kept."""

    def fileno(self) -> int: ...


class KernelSide(ABC):
    """What a kernel dma-buf has in addition: fences, a name and answers of the kernel's own."""

    @abstractmethod
    def begin(self, buf: Descriptor, direction: Direction, access: Access | None = None, *, interruptible: bool = False) -> None:
        """Start the bracket of a CPU access, which waits for the kernel's fences too. ``access``: see :meth:`Backing.begin`."""

    @abstractmethod
    def end(self, buf: Descriptor, direction: Direction, access: Access | None = None) -> None:
        """End the bracket."""

    @abstractmethod
    def ready(self, buf: Descriptor, events: int) -> int:
        """Return those of POLLIN and POLLOUT in ``events`` that no fence of the kernel blocks."""

    @abstractmethod
    def wait_kernel(self, buf: Descriptor, write: bool, until: int) -> bool:
        """Wait for the kernel's fences that block a reader or writer. ``until``: CLOCK_MONOTONIC ns, -1 for ever; False: timed out."""

    @abstractmethod
    async def wait_kernel_async(self, buf: Descriptor, write: bool, until: int) -> bool:
        """:meth:`wait_kernel` in a coroutine."""

    @abstractmethod
    def export_sync_file(self, buf: Descriptor, write: bool) -> OwnedFd:
        """Return a kernel sync_file of what a reader (or writer) would wait for in the kernel."""

    @abstractmethod
    def import_sync_file(self, buf: Descriptor, sync_file: int, write: bool) -> None:
        """Add the fences of a kernel sync_file."""

    @abstractmethod
    def name(self, buf: Descriptor) -> bytes | None:
        """Return the kernel's name of the buffer."""

    @abstractmethod
    def set_name(self, buf: Descriptor, name: bytes) -> None:
        """Set the kernel's name of the buffer."""

    @abstractmethod
    def fdinfo(self, buf: Descriptor) -> str:
        """Return the text of the kernel's /proc/PID/fdinfo/FD."""

    @abstractmethod
    def lseek(self, buf: Descriptor, offset: int, whence: int) -> int:
        """Ask the kernel's lseek."""


class Backing(ABC):
    """The driver side of one buffer in this process.

    ``dynamic``: the exporter may move the memory. ``in_file``: the memory is the buffer's own file, which every handle maps for itself.
    ``own_descriptions``: open file descriptions of the buffer that are no references.
    """

    in_file = False
    own_descriptions = 0

    def __init__(self, exporter: AnyExporter, ops: frozenset[str], record: Record, cache: bool) -> None:
        self.exporter, self.ops, self.record, self.cache = exporter, ops, record, cache
        self.dynamic = "pin" in ops
        self.attachments: list[Attachment] = []  # newest first; under the reservation lock
        self.vmaps = 0
        self.mapped: IosysMap | None = None
        self.brackets = 0  # open begin_cpu_access calls of this process, counted by the debug layer

    @property
    def kernel(self) -> KernelSide | None:
        """The kernel's side of a kernel dma-buf; None for every other buffer."""
        return None

    @abstractmethod
    def check_reachable(self, operation: str) -> None:
        """Fail unless this process can reach the exporter.

        Raises:
            NoDeviceError: The exporter's process is gone, or this is of before a fork (ENODEV).
        """

    # ---- the handles of this process ----

    @abstractmethod
    def before_close(self, handle: object) -> None:
        """Note that a handle of this process is about to be closed."""

    @abstractmethod
    def after_close(self, handle: object, quiet: bool) -> None:
        """React to a handle of this process being closed. ``quiet``: by the garbage collector. Raises what a release raises."""

    # ---- CPU access ----

    def begin(self, buf: Buffer, direction: Direction, access: Access | None = None) -> None:
        """Start a CPU access. ``access``: the block that it is for, which notes the op in the same step that calls it."""
        self.check_reachable("begin_cpu_access")
        if "begin_cpu_access" not in self.ops:
            return
        if access is None:
            self.exporter.begin_cpu_access(buf, direction)
        else:
            access.begun(self.exporter.begin_cpu_access, buf, direction)

    def end(self, buf: Descriptor, direction: Direction, access: Access | None = None) -> None:
        """End a CPU access. ``buf``: the handle, or what :meth:`keep_open` gave."""
        self.check_reachable("end_cpu_access")
        if "end_cpu_access" not in self.ops:
            return
        if access is None:
            self.exporter.end_cpu_access(buf, direction)
        else:
            access.told(self.exporter.end_cpu_access, buf, direction)

    def keep_open(self, buf: Buffer) -> Descriptor | None:
        """Return what :meth:`end` can be called with once the handle may be closed; None: nothing, so it must be called before."""
        return buf

    def mappable(self, buf: Buffer, operation: str) -> None:
        """Fail unless the memory can be mapped.

        Raises:
            NoDeviceError: As :meth:`check_reachable` (ENODEV).
            InvalidError: The exporter offers no mmap (EINVAL).
        """
        self.check_reachable(operation)
        if "mmap" not in self.ops and not self.in_file:
            raise fail(errno.EINVAL, operation, buf, "use vmap(), or attach a device", what="its exporter offers no mmap")

    def mmap(self, buf: Buffer, operation: str, offset: int, length: int, writable: bool) -> Mapping:
        """Return the exporter's mapping.

        Raises:
            InvalidError: It offers none (EINVAL).
            NotPermittedError: The caller wants to write, and the memory is read-only (EACCES).
        """
        self.mappable(buf, operation)
        if self.in_file:
            return self._map_file(buf, operation, offset, length, writable)
        mapping = self.exporter.mmap(buf, offset, length)
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{operation}: the exporter's mmap returned {type(mapping).__name__}, not what DmaBuf.mmap() returns")
        if writable and not mapping.writable:
            mapping.close()
            raise fail(errno.EACCES, operation, buf, "map it with writable=False", what="the exporter's memory is read-only")
        self.keep(mapping)
        return mapping

    def _map_file(self, buf: Buffer, operation: str, offset: int, length: int, writable: bool) -> Mapping:
        direction = Direction.BIDIRECTIONAL if writable else Direction.FROM_DEVICE
        self.begin(buf, direction)  # keeps the memory there until the end, and from then on the mapping does
        try:
            mapping = residency.mapping(buf.fileno(), (self.record.dev, self.record.ino), operation, buf, offset, length, writable)
        finally:
            self.end(buf, direction)
        self.keep(mapping)
        return mapping

    def keep(self, mapping: Mapping) -> None:
        """Count a mapping as a reference until it is closed; the descriptor of most kinds of memory does so by itself."""
        return

    # ---- vmap, the lock is held ----

    def vmap(self, buf: Buffer, *, tell: bool = True) -> IosysMap:
        """Count a vmap, and map the buffer if it is the first (semantics 2.18, from step 2 on). ``tell``: warn when the exporter fails."""
        self.check_reachable("vmap")
        if "vmap" not in self.ops:
            raise fail(errno.EINVAL, "vmap", buf, "use mmap(), or attach a device", what="its exporter offers no vmap")
        if self.vmaps:
            if self.mapped is None:
                raise ContractError(f"vmap: {buf!r}: it is counted as mapped and has no map; close it")
        else:
            try:
                made = self.exporter.vmap(buf)
                if not isinstance(made, IosysMap):
                    raise TypeError(f"vmap: the exporter's vmap returned {type(made).__name__}, not an IosysMap")
                if made.is_null():
                    raise fail(errno.ENOMEM, "vmap", buf, what="its exporter returned no map")
            except OSError as e:
                if tell:
                    contract_warning(f"vmap: {buf!r}: its exporter failed: {text_of(e)}", 5)
                raise
            if debug.enabled:
                made = CheckedMap.of(made, self.bracketed, debug.place(sys._getframe(1)))
            self.mapped = made
        assert self.mapped is not None
        try:
            given = self.mapped.copy()
            self.vmaps += 1
        except BaseException:  # a signal handler raised, and nobody knows of the map
            if not self.vmaps:
                self._end_vmap(buf, self.mapped)
            raise
        return given

    def vunmap(self, buf: Buffer, map: IosysMap) -> None:
        """Uncount a vmap, and unmap the buffer if it was the last (semantics 2.18)."""
        self.check_reachable("vunmap")
        if not self.vmaps or self.mapped is None:
            raise ContractError(f"vunmap: {buf!r}: it is not mapped; call vunmap() once for each vmap()")
        if not self.mapped.is_equal(map):
            raise ContractError(f"vunmap: {buf!r}: this is not the map that vmap() gave; pass that one")
        self.vmaps -= 1
        if not self.vmaps:
            self._end_vmap(buf, map)

    def _end_vmap(self, buf: Buffer, map: IosysMap) -> None:
        kept, self.mapped = self.mapped, None
        try:
            if "vunmap" in self.ops:
                self.exporter.vunmap(buf, map)
        finally:
            if kept is not None:
                kept.clear()

    def bracketed(self) -> bool:
        """Return True if the CPU may access the buffer: between begin and end, or in an access block of this thread or task."""
        if self.brackets > 0:
            return True
        shm, word = self.record.shm, current(self.record.domain).word
        target = record_of(resv_of(self.record))
        entries = (shm.fence_info(handle) for handle in shm.resv_pending(target.index, 3, 0))
        return any(info is not None and info["owner"] == word for info in entries)


SERVERS: Final[Registry[Callable[[Domain], object]]] = Registry(
    "server",
    {"exported": "dmabuf.sharing.serving", "kernel": "dmabuf.sharing.duplicate", "memfd": "dmabuf.sharing.duplicate"},
)
"""Functions that have this process answer requests of others about one kind of buffer."""
