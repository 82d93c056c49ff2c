"""``Mappable``: the verbs of a ``DmaBuf`` that map it by hand (semantics 2.17, 2.18, 5.2). ``mapping`` has what they do."""

from __future__ import annotations

import os

from dmabuf._native import Mapping
from dmabuf.core.buffer import mapping
from dmabuf.core.buffer.handle import Handle
from dmabuf.core.memory.iosys_map import IosysMap


class Mappable:
    """A face that can be mapped."""

    __slots__ = ()

    _handle: Handle

    def mmap(self, offset: int = 0, length: int | None = None, writable: bool = True) -> Mapping:
        """Return the bare mapping, MAP_SHARED, which waits for nobody and excludes nobody (semantics 2.17, 5.2).

        The mapping outlives ``close()``; close it yourself.

        Args:
            offset: A multiple of the page size.
            length: The number of bytes; None means the rest of the buffer. Only whole pages can be mapped.
            writable: The mapping can be written through.

        Raises:
            InvalidError: The range is out of bounds, unaligned or empty, or the exporter offers no mmap (EINVAL).
            DmaBufError: The offset is negative (EOVERFLOW, as in the kernel).
            NotPermittedError: The descriptor, or the exporter's memory, is read-only (EACCES).
            NoMemoryError: The process can't map more (ENOMEM).
            DeadlockError: The caller holds the lock (EDEADLK, with a ``ContractWarning``).
            OSError: What the exporter raised.
        """
        return mapping.mmap(self._handle, offset, length, writable)

    def dma_mmap(self, offset: int, length: int) -> Mapping:
        """Return the mapping for an importer that redirects its own mmap to the buffer (semantics 2.17).

        Raises:
            DmaBufError: ``offset + length`` passes the address range (EOVERFLOW).
            OSError: As :meth:`mmap`.

        Kernel: dma_buf_mmap.
        """
        return mapping.dma_mmap(self._handle, offset, length)

    def lseek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Answer as the kernel's lseek on a dma-buf: (0, SEEK_SET) is 0, (0, SEEK_END) the size. No position moves (semantics 5.2).

        Raises:
            InvalidError: Any other offset or whence (EINVAL).
        """
        return mapping.lseek(self._handle, offset, whence)

    def vmap(self, into: IosysMap | None = None) -> IosysMap:
        """Return the whole buffer as a kernel mapping, counted: n calls need n ``vunmap`` (semantics 2.18). The reservation lock is held.

        Args:
            into: A map to fill and return; it is NULL after every failure.

        Raises:
            ContractError: The lock isn't held.
            InvalidError: The exporter offers no vmap (EINVAL).
            OSError: What the exporter raised, with a ``ContractWarning``.

        Kernel: dma_buf_vmap.
        """
        return mapping.vmap(self._handle, into)

    def vmap_unlocked(self, into: IosysMap | None = None) -> IosysMap:
        """Take the lock, and :meth:`vmap`.

        Raises:
            DeadlockError: The caller holds the lock (EDEADLK, with a ``ContractWarning``).
            OSError: As :meth:`vmap`.

        Kernel: dma_buf_vmap_unlocked.
        """
        return mapping.vmap_unlocked(self._handle, into)

    def vunmap(self, map: IosysMap) -> None:
        """End one ``vmap``. The reservation lock is held.

        Args:
            map: A map that is equal to what ``vmap`` gave.

        Raises:
            ContractError: The lock isn't held; ``map`` is another map; or the buffer is not mapped (semantics 2.18: BUG).

        Kernel: dma_buf_vunmap.
        """
        mapping.vunmap(self._handle, map)

    def vunmap_unlocked(self, map: IosysMap) -> None:
        """Take the lock, and :meth:`vunmap`.

        Raises:
            DeadlockError: The caller holds the lock (EDEADLK, with a ``ContractWarning``).
            ContractError: As :meth:`vunmap`.

        Kernel: dma_buf_vunmap_unlocked.
        """
        mapping.vunmap_unlocked(self._handle, map)
