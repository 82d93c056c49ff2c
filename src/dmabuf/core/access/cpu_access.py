"""``begin_cpu_access``, ``end_cpu_access`` and ``sync``: the bracket around the CPU's use of a buffer (semantics 2.15, 2.16, 5.3).

Begin calls the exporter's op, or the kernel's. Then it waits for the implicit fences that block the access. It adds no fence and excludes
nobody. It passes over the fences of the caller's own accesses. Only the debug layer counts begin against end, to know whether a vmap may be
used.

Each function is the verb of its name on ``DmaBuf``, which documents it.
"""

from __future__ import annotations

import errno

from dmabuf.core.base import debug
from dmabuf.core.base.clock import monotonic_deadline
from dmabuf.core.base.usage import Direction, Usage, checked_direction
from dmabuf.core.buffer.handle import Handle
from dmabuf.core.resv.resv import pending, wait_until
from dmabuf.core.task.owner import current
from dmabuf.errors import fail

SYNC_READ, SYNC_WRITE, SYNC_RW, SYNC_START, SYNC_END = 1, 2, 3, 0, 4
_SYNC_DIRECTION = {SYNC_READ: Direction.FROM_DEVICE, SYNC_WRITE: Direction.TO_DEVICE, SYNC_RW: Direction.BIDIRECTIONAL}


def begin_cpu_access(handle: Handle, direction: int, timeout: float | None, interruptible: bool) -> None:
    """Wait for the fences that block a CPU access."""
    handle.check_unlocked("begin_cpu_access")
    way = checked_direction(direction, "begin_cpu_access", handle)
    until = monotonic_deadline(timeout, "begin_cpu_access", handle)
    usage = Usage.rw(way in (Direction.TO_DEVICE, Direction.BIDIRECTIONAL))
    backing = handle.shared.backing
    kernel = handle.kernel()
    if kernel is not None:
        if until >= 0 and not kernel.wait_kernel(handle, usage == Usage.READ, until):
            what = f"timed out after {timeout} s, blocked by a kernel fence"
            raise fail(errno.ETIMEDOUT, "begin_cpu_access", handle, "wait for the device that uses it", what=what)
        kernel.begin(handle, way, interruptible=interruptible)
    elif backing is not None:
        backing.begin(handle.face(), way)
    resv, shm = handle.resv, handle.shared.shm
    own = current(handle.domain).word
    mine = frozenset(h for h in pending(resv, usage) if (info := shm.fence_info(h)) is not None and info["owner"] == own)
    if not wait_until(resv, usage, until, interruptible=interruptible, but=mine):
        what = f"timed out after {timeout} s"
        raise fail(errno.ETIMEDOUT, "begin_cpu_access", handle, "run `dmabuf ls` to see what blocks the buffer", what=what)
    if debug.enabled:
        handle.shared.ensure_backing().brackets += 1


def end_cpu_access(handle: Handle, direction: int) -> None:
    """End a CPU access."""
    handle.check_unlocked("end_cpu_access")
    way = checked_direction(direction, "end_cpu_access", handle)
    if debug.enabled:
        counted = handle.shared.ensure_backing()
        counted.brackets = max(0, counted.brackets - 1)
    backing = handle.shared.backing
    if backing is not None:
        backing.end(handle.face(), way)


def sync(handle: Handle, flags: int) -> None:
    """Begin or end, as the flags of DMA_BUF_IOCTL_SYNC say."""
    handle.check("sync")
    if flags & ~(SYNC_RW | SYNC_END) or not flags & SYNC_RW:
        remedy = "use READ 1, WRITE 2 or RW 3, plus END 4 for the end"
        raise fail(errno.EINVAL, "sync", handle, remedy, what=f"flags {flags} have unknown bits, or neither READ nor WRITE")
    way = _SYNC_DIRECTION[flags & SYNC_RW]
    if flags & SYNC_END:
        end_cpu_access(handle, way)
    else:
        begin_cpu_access(handle, way, None, False)
