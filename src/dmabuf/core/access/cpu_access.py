"""``begin_cpu_access`` and ``end_cpu_access``: the bracket around what the CPU does with a buffer (spec 2.15, 2.16, 5.3).

Begin calls the exporter's op, or the kernel's, then waits for the implicit fences in the way; it adds no fence and excludes nobody. An
owner's own access fences are passed over. Nothing counts begin against end but the debug layer, which wants to know whether a vmap may be
used. The caller has checked the lock.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from dmabuf.core.base import debug
from dmabuf.core.base.clock import monotonic_deadline
from dmabuf.core.base.usage import Direction, Usage, checked_direction
from dmabuf.core.buffer.backing import backing_of
from dmabuf.core.resv.resv import pending, wait_until
from dmabuf.core.task.owner import current
from dmabuf.errors import fail

if TYPE_CHECKING:
    from dmabuf.core.dma_buf import DmaBuf

SYNC_READ, SYNC_WRITE, SYNC_RW, SYNC_START, SYNC_END = 1, 2, 3, 0, 4
_SYNC_DIRECTION = {SYNC_READ: Direction.FROM_DEVICE, SYNC_WRITE: Direction.TO_DEVICE, SYNC_RW: Direction.BIDIRECTIONAL}


def begin(buf: DmaBuf, direction: int, timeout: float | None, interruptible: bool) -> None:
    """What ``DmaBuf.begin_cpu_access`` does after the check of the lock."""
    way = checked_direction(direction, "begin_cpu_access", buf)
    until = monotonic_deadline(timeout, "begin_cpu_access", buf)
    usage = Usage.rw(way in (Direction.TO_DEVICE, Direction.BIDIRECTIONAL))
    kernel = buf._kernel()
    if kernel is not None:
        if until >= 0 and not kernel.settle(buf, usage == Usage.READ, until):
            what = "a fence of the kernel's is in the way"
            raise fail(errno.ETIMEDOUT, "begin_cpu_access", buf, "wait for the device that uses it", what=what)
        kernel.begin(buf, way, interruptible)
    elif buf._record.live is not None:
        buf._record.live.begin(buf, way)
    resv, shm = buf.resv, buf._record.shm
    own = current(buf.domain).word
    mine = frozenset(h for h in pending(resv, usage) if (info := shm.fence_info(h)) is not None and info["owner"] == own)
    if not wait_until(resv, usage, until, interruptible=interruptible, but=mine):
        raise fail(errno.ETIMEDOUT, "begin_cpu_access", buf, "`dmabuf ls` shows whose fence is in the way")
    if debug.enabled:
        backing_of(buf._record).brackets += 1


def end(buf: DmaBuf, direction: int) -> None:
    """What ``DmaBuf.end_cpu_access`` does after the check of the lock."""
    way = checked_direction(direction, "end_cpu_access", buf)
    if debug.enabled:
        behind = backing_of(buf._record)
        behind.brackets = max(0, behind.brackets - 1)
    if buf._record.live is not None:
        buf._record.live.end(buf, way)


def sync_direction(flags: int, buf: DmaBuf) -> Direction:
    """What the flags of DMA_BUF_IOCTL_SYNC say. Errors: EINVAL flags that there are not, or neither READ nor WRITE."""
    if flags & ~(SYNC_RW | SYNC_END) or not flags & SYNC_RW:
        raise fail(errno.EINVAL, "sync", buf, "READ 1, WRITE 2 or RW 3, and END 4 for the end")
    return _SYNC_DIRECTION[flags & SYNC_RW]
