"""Between implicit and explicit synchronization: a buffer's fences as a sync file, and a sync file's as the buffer's (semantics 5.5).

An export takes a snapshot of the pending fences up to the usage that the access would have to wait for. An import adds every plain fence of
a sync file to the buffer's reservation object, so that later accesses wait for it. Export, submit and import are three steps. A program
that needs them to be one serializes its users itself.

A kernel dma-buf has fences of both kinds, and an export combines the kernel's with the domain's. If none of the domain's is pending, the
result is a kernel sync_file, which a driver can be given. An import takes kernel sync_files only: a user fence can't go into the kernel,
and drivers, which imported fences are for, would not wait for it in the domain.

Each function is the verb of its name on ``DmaBuf``, which documents it.
"""

from __future__ import annotations

import errno

from dmabuf.core.base.usage import Usage
from dmabuf.core.buffer.handle import Handle
from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.stub import stub_fence
from dmabuf.core.fence.unwrap import unwrap
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.errors import DmaBufError, fail

SYNC_READ, SYNC_WRITE = 1, 2  # DMA_BUF_SYNC_*, include/uapi/linux/dma-buf.h


def _writes(handle: Handle, operation: str, write: bool, flags: int | None) -> bool:
    """Return True if the caller means a write. ``flags``, if there are any, count instead of ``write``."""
    if flags is None:
        return bool(write)
    if not 0 < flags <= SYNC_READ | SYNC_WRITE:
        what = f"flags {flags} have unknown bits, or neither READ nor WRITE"
        raise fail(errno.EINVAL, operation, handle, "use READ 1, WRITE 2 or RW 3", what=what)
    return bool(flags & SYNC_WRITE)


def export_sync_file(handle: Handle, write: bool, flags: int | None) -> SyncFile:
    """Return the pending fences that such an access waits for; a signaled sync file if there are none."""
    handle.usable("export_sync_file")
    write = _writes(handle, "export_sync_file", write, flags)
    found = list(dict.fromkeys(handle.resv.fences(Usage.rw(write))))
    kernel = handle.kernel()
    if kernel is not None:
        theirs = SyncFile.from_owned_fd(kernel.export_sync_file(handle, write), handle.domain)
        if not found:
            return theirs
        with theirs:
            if not theirs.is_signaled():
                found.append(theirs.fence)
    if not found:
        return SyncFile(stub_fence(domain=handle.domain))
    return SyncFile(found[0] if len(found) == 1 else DmaFenceArray(found))


def import_sync_file(handle: Handle, sync_file: SyncFile | int, write: bool, flags: int | None) -> None:
    """Add the fences of a sync file, for writing or for reading."""
    handle.check_unlocked("import_sync_file")
    handle.usable("import_sync_file")
    write = _writes(handle, "import_sync_file", write, flags)
    if isinstance(sync_file, DmaFence):
        raise TypeError("import_sync_file: a SyncFile or a descriptor of one is expected, not a fence: dmabuf.SyncFile(fence) makes one")
    if not isinstance(sync_file, SyncFile):
        try:
            sync_file = SyncFile.from_fd(sync_file, domain=handle.domain)
        except DmaBufError as e:
            if e.errno == errno.EBADF:
                raise _not_one(handle, f"fd {sync_file}") from None
            raise
        with sync_file:
            _add(handle, sync_file, write)
        return
    if sync_file.closed:
        raise _not_one(handle, "a closed SyncFile")
    _add(handle, sync_file, write)


def _not_one(handle: Handle, what: str) -> DmaBufError:
    return fail(errno.EINVAL, "import_sync_file", handle, "pass an open SyncFile, or its descriptor", what=f"{what} is not a sync file")


def _add(handle: Handle, sync_file: SyncFile, write: bool) -> None:
    kernel = handle.kernel()
    if kernel is not None:
        kernel.import_sync_file(handle, sync_file.kernel_fileno(), write)
        return
    leaves = tuple(unwrap(sync_file.fence))
    with handle.resv.locked():
        handle.resv.reserve(len(leaves))
        for leaf in leaves:
            handle.resv.add(leaf, Usage.WRITE if write else Usage.READ)
