"""``Exporter``, ``Importer`` and ``export``: who owns memory, who uses it, and what each promises the other (spec 1.5, 1.6, 2.1, 2.20).

An exporter owns memory and answers for it: it is the kernel's ``dma_buf_ops`` and its private pointer in one object, which the framework
never writes to. It says what it can do by what it overrides. ``map``, ``unmap`` and ``release`` are mandatory; an exporter with ``pin`` and
``unpin`` is *dynamic*: it may move its memory. Failure is an ``OSError``, which reaches the caller as it is.

| op | mandatory | the buffer's reservation lock |
|---|---|---|
| attach, detach | no | not held |
| pin, unpin | both or none | held |
| map, unmap | yes | held |
| release | yes | not held |
| begin_cpu_access, end_cpu_access, mmap | no | not held |
| vmap, vunmap | no | held |

An op that is called with the lock held must not take it, and may call nothing that does. Ops of one buffer may run at the same time in
several threads, as far as that lock doesn't order them.

What an exporter owes and no code enforces: ``attach`` refuses a device that can't reach the memory; a static exporter's ``map`` returns
memory that is ready; ``map`` makes a new table each time (the debug layer tells), which is the importer's until ``unmap``; memory is moved
or freed only after all fences up to BOOKKEEP; the size never changes. A dynamic importer in turn waits for WRITE and KERNEL fences before
its device touches the memory, and adds a fence for what it cannot stop at once.

Behaviour lives in the exporting process. From other processes, and forked children, the ops are called there, in a thread of the
package's, with the same locks held; ``attachment.dev`` is then a stand-in with the device's name and limits (docs/exporters.md). Memory
that others are to map is a mapping of a file that this process keeps open.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Protocol

from dmabuf.core.base.usage import Direction
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import SgTable
from dmabuf.core.resv.resv import DmaResv
from dmabuf.domain.domain import Domain
from dmabuf.errors import contract_warning, fail

if TYPE_CHECKING:
    from dmabuf._native import Mapping
    from dmabuf.core.attach.attachment import DmaBufAttachment
    from dmabuf.core.dma_buf import DmaBuf

EXP_NAME_BYTES = 31  # what a record has room for


class Exporter:
    """Base class of exporters: override what the exporter can do. See the module for locks and promises.

    Kernel: dma_buf_ops.
    """

    __slots__ = ()

    def attach(self, attachment: DmaBufAttachment) -> None:
        """A device is about to attach; look at ``attachment.dev``, keep what is needed in ``attachment.priv``.

        Optional. The lock is not held. May set ``attachment.peer2peer`` to False when it can't do that. Errors: any; EBUSY: the memory is
        where this device can't reach it, and can't move. The attachment then never was. Kernel: dma_buf_ops.attach.
        """
        raise NotImplementedError

    def detach(self, attachment: DmaBufAttachment) -> None:
        """The attachment ends; free what ``attach`` made. Optional. The lock is not held. Has no errors.

        Kernel: dma_buf_ops.detach.
        """
        raise NotImplementedError

    def pin(self, attachment: DmaBufAttachment) -> None:
        """Let the memory stay where it is until as many ``unpin``; it is there and cleared, moves are done, when this returns.

        Optional, only together with ``unpin``; makes the exporter dynamic. The lock is held. Nesting is the exporter's to count; pinning in
        place is fine. Errors: any. Kernel: dma_buf_ops.pin.
        """
        raise NotImplementedError

    def unpin(self, attachment: DmaBufAttachment) -> None:
        """Undo one ``pin``. Optional, only together with ``pin``. The lock is held. Has no errors.

        Kernel: dma_buf_ops.unpin.
        """
        raise NotImplementedError

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
        """Make the memory reachable for ``attachment.dev``; a new table with its DMA side filled (``attachment.dev.map_sgtable``).

        Mandatory. The lock is held. None is ENOMEM. Errors: any; EINTR when a signal ended a wait. Kernel: dma_buf_ops.map_dma_buf.
        """
        raise NotImplementedError

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        """Undo one ``map``, with the direction that it had. Mandatory. The lock is held. Has no errors.

        Kernel: dma_buf_ops.unmap_dma_buf.
        """
        raise NotImplementedError

    def release(self, buf: DmaBuf) -> None:
        """The last reference is gone, everywhere: free the memory. Called once, after everything else.

        Mandatory. No lock is held. ``buf`` tells who it was (``ino``, ``name``, ``size``) and is closed afterwards; it can't be kept. Has
        no errors: what it raises is shown by ``sys.unraisablehook``. Kernel: dma_buf_ops.release.
        """
        raise NotImplementedError

    def begin_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        """The CPU is about to look (FROM_DEVICE) or to change (TO_DEVICE, BIDIRECTIONAL): make it coherent.

        Optional. The lock is not held. Errors: any; then no fence is waited for, and the access does not take place.
        Kernel: dma_buf_ops.begin_cpu_access.
        """
        raise NotImplementedError

    def end_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        """The CPU is done. Optional. The lock is not held. Nothing pairs begin and end but the exporter. Errors: any, passed on.

        Kernel: dma_buf_ops.end_cpu_access.
        """
        raise NotImplementedError

    def mmap(self, buf: DmaBuf, offset: int, length: int) -> Mapping:
        """The bytes for user space: a mapping such as ``DmaBuf.mmap`` of a buffer that holds the memory returns.

        Optional; without it ``mmap()``, ``read()`` and ``write()`` are EINVAL. The lock is not held. The range lies inside of the size.
        The buffer lives until the mapping is closed. Errors: any. Kernel: dma_buf_ops.mmap.
        """
        raise NotImplementedError

    def vmap(self, buf: DmaBuf) -> IosysMap:
        """The whole buffer as a kernel mapping. Optional; without it ``vmap()`` is EINVAL. The lock is held.

        Called once until ``vunmap``: the framework counts. Errors: any. Kernel: dma_buf_ops.vmap.
        """
        raise NotImplementedError

    def vunmap(self, buf: DmaBuf, map: IosysMap) -> None:
        """Undo ``vmap``. Optional. The lock is held. Has no errors. Kernel: dma_buf_ops.vunmap."""
        raise NotImplementedError


class Importer:
    """Base class of what makes an attachment dynamic.

    ``allow_peer2peer``: the importer copes with memory that has no pages, such as another device's.

    Kernel: dma_buf_attach_ops (allow_peer2peer).
    """

    __slots__ = ()

    allow_peer2peer: bool = False

    def move_notify(self, attachment: DmaBufAttachment) -> None:
        """The memory is about to move. Mandatory. The lock is held, and must not be taken.

        What is mapped stays valid during the call but shows the old place: unmap and map again as soon as possible, but not in here; what
        the device can't stop at once is to be on the reservation object as a fence. Has no errors. Kernel: dma_buf_attach_ops.move_notify.
        """
        raise NotImplementedError

    def _revoked(self, attachment: DmaBufAttachment) -> None:
        """For what stands for an importer elsewhere: the memory has moved, and tables that were kept are no memory any more."""


class OwnerReference(Protocol):
    """Who an exporter belongs to: kept from going while a buffer lives (the kernel's module reference)."""

    def try_get(self) -> bool:
        """Take a reference; False when it is going away."""

    def put(self) -> None:
        """Give a reference back."""


class Module:
    """A ready-made :class:`OwnerReference`: something that can be unloaded only when no buffer of its exporters is left.

    ``references``: how many there are. ``alive``: not unloaded.
    """

    def __init__(self, name: str) -> None:
        self.name, self.references, self.alive = name, 0, True
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<dmabuf Module {self.name}>"

    def try_get(self) -> bool:
        with self._lock:
            self.references += self.alive
            return self.alive

    def put(self) -> None:
        with self._lock:
            self.references -= 1

    def unload(self) -> None:
        """No export from now on. Errors: EBUSY a buffer lives."""
        with self._lock:
            if self.references:
                raise fail(errno.EBUSY, "unload", self, "close its buffers and mappings", what=f"{self.references} buffers live")
            self.alive = False


def overrides(exporter: Exporter | Importer, base: type, op: str) -> bool:
    """Does the object bring its own ``op``?"""
    return getattr(type(exporter), op, None) is not getattr(base, op)


def export(
    exporter: Exporter,
    size: int,
    *,
    exp_name: str | bytes | None = None,
    resv: DmaResv | None = None,
    flags: int = os.O_RDWR,
    cache_sgt_mapping: bool = False,
    owner: OwnerReference | None = None,
    name: str | bytes | None = None,
    domain: Domain | None = None,
) -> DmaBuf:
    """A buffer of ``size`` bytes whose memory and behaviour are the exporter's (spec 2.1).

    ``exp_name``: at most 31 bytes, None for the module of the exporter's class. ``resv``: its reservation object, shared with other
    buffers; None for one of its own (accesses
    count by reservation object: two buffers of one are not written in one ``dmabuf.access()``). ``flags``: O_RDWR or O_RDONLY.
    ``cache_sgt_mapping``: one table an attachment, kept until detach. ``owner``: kept from going while the buffer lives. ``size`` is taken
    as it is: 0 and part of a page are allowed.

    The buffer is released once, when its last descriptor, in whatever process, and its last mapping are gone, outside of every lock: by
    ``close()`` of the last handle itself, else by a thread of the package.

    Errors, in this order: ``ContractWarning`` and EINVAL no exporter, or one without map, unmap or release; caching with a dynamic
    exporter; one of pin and unpin; EINVAL a bad name, size or flags; EDEADLK (and ``ContractWarning``) the lock of ``resv`` is held; EXDEV
    it is of another domain; ENOENT the owner is going away; EMFILE, ENOSPC.

    Kernel: dma_buf_export, dma_buf_export_info (exp_name, owner, ops as exporter, size, flags, resv, priv as exporter),
    DEFINE_DMA_BUF_EXPORT_INFO, dma_buf_ops.cache_sgt_mapping as cache_sgt_mapping, dma_buf.owner as owner.
    """
    from dmabuf.core.buffer.backing import checked_ops, make

    ops = checked_ops(exporter, cache_sgt_mapping)
    raw = os.fsencode(type(exporter).__module__.rpartition(".")[2][:EXP_NAME_BYTES] if exp_name is None else exp_name)
    if not raw or len(raw) > EXP_NAME_BYTES or b"\0" in raw:
        raise fail(errno.EINVAL, "export", f"exp_name {exp_name!r}", f"1 to {EXP_NAME_BYTES} bytes without a NUL")
    if not 0 <= size < 1 << 63 or flags & os.O_ACCMODE == os.O_WRONLY:
        raise fail(errno.EINVAL, "export", f"{size} bytes", "0 <= size < 2**63, flags with O_RDWR or O_RDONLY")
    home = (resv.domain if resv is not None else None) if domain is None else domain
    domain = home or Domain.default()
    if resv is not None:
        if resv.domain is not domain:
            raise fail(errno.EXDEV, "export", resv, "the buffer and its reservation object are of one domain")
        if resv.held_here():
            contract_warning(f"export: {resv!r}: its lock is held by this thread or task", 2)
            raise fail(errno.EDEADLK, "export", resv, "unlock the reservation object first")
    if owner is not None and not owner.try_get():
        raise fail(errno.ENOENT, "export", exporter, "it is being unloaded", what=f"{owner!r} is going away")
    try:
        return make(exporter, ops, size, raw, resv, flags, cache_sgt_mapping, owner, name, domain)
    except BaseException:
        if owner is not None:
            owner.put()
        raise
