"""Between implicit and explicit sync: a buffer's fences as a sync file, and the other way (spec 5.5).

Export takes a snapshot: what is pending now and up to the usage that the access would have to wait for. Import adds every plain fence of a
sync file to the buffer's reservation object, so that later accesses wait for it. Export, submit and import are three steps; whoever
needs them to be one serialises his users himself.

A real dma-buf has fences of both kinds. Exported are the kernel's and the domain's, in one; with none of the domain's pending it is a
sync_file of the kernel's, which a driver can be given. Import takes a sync_file of the kernel's only: one of ours can't go into the
kernel, and in the domain alone the drivers, which imported fences are for, would not wait for it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from dmabuf.core.base.usage import Usage
from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.stub import stub_fence
from dmabuf.core.fence.unwrap import unwrap
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.errors import DmaBufError, fail

if TYPE_CHECKING:
    from dmabuf.core.dma_buf import DmaBuf

SYNC_READ, SYNC_WRITE = 1, 2  # DMA_BUF_SYNC_*, include/uapi/linux/dma-buf.h


def writes(buf: DmaBuf, operation: str, write: bool, flags: int | None) -> bool:
    """Does the caller want to write? Errors: EINVAL flags that are neither READ, WRITE nor both."""
    if flags is None:
        return bool(write)
    if not 0 < flags <= SYNC_READ | SYNC_WRITE:
        raise fail(errno.EINVAL, operation, buf, "flags are READ 1, WRITE 2 or RW 3")
    return bool(flags & SYNC_WRITE)


def export_sync_file(buf: DmaBuf, write: bool) -> SyncFile:
    """The pending fences that such an access waits for, as a sync file; signalled if there are none. Errors: EMFILE."""
    found = list(dict.fromkeys(buf.resv.fences(Usage.rw(write))))
    kernel = buf._kernel()
    if kernel is not None:
        with kernel.export_sync_file(buf, write) as fd:
            theirs = SyncFile.from_owned_fd(fd.number, buf.domain)
            fd.take()
        if not found:
            return theirs
        with theirs:
            if not theirs.is_signaled():
                found.append(theirs.fence)
    if not found:
        return SyncFile(stub_fence(domain=buf.domain))
    return SyncFile(found[0] if len(found) == 1 else DmaFenceArray(found))


def import_sync_file(buf: DmaBuf, sync_file: SyncFile | int, write: bool) -> None:
    """Add the fences of a sync file, for writing or for reading. Errors: EINVAL no sync file; EXDEV of another domain; ENOMEM, ENOSPC."""
    if isinstance(sync_file, DmaFence):
        raise TypeError("import_sync_file: a SyncFile or a descriptor of one is expected, not a fence: dmabuf.SyncFile(fence) makes one")
    if not isinstance(sync_file, SyncFile):
        try:
            sync_file = SyncFile.from_fd(sync_file, domain=buf.domain)
        except DmaBufError as e:
            if e.errno == errno.EBADF:
                raise _not_one(buf, f"fd {sync_file}") from None
            raise
        with sync_file:
            _add(buf, sync_file, write)
        return
    if sync_file.closed:
        raise _not_one(buf, "a closed SyncFile")
    _add(buf, sync_file, write)


def _not_one(buf: DmaBuf, what: str) -> DmaBufError:
    return fail(errno.EINVAL, "import_sync_file", buf, "pass an open SyncFile, or its descriptor", what=f"{what} is not a sync file")


def _add(buf: DmaBuf, sync_file: SyncFile, write: bool) -> None:
    kernel = buf._kernel()
    if kernel is not None:
        kernel.import_sync_file(buf, sync_file.kernel_fileno(), write)
        return
    leaves = tuple(unwrap(sync_file.fence))
    with buf.resv.locked():
        buf.resv.reserve(len(leaves))
        for leaf in leaves:
            buf.resv.add(leaf, Usage.WRITE if write else Usage.READ)
