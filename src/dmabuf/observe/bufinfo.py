"""``bufinfo()``: the text of debugfs ``dma_buf/bufinfo`` (semantics 6.1), as far as user space knows it.

The lines, columns and order are the kernel's, so one parser reads both. These parts have another meaning:

- ``flags``: 00000002 (O_RDWR), with which every buffer is made. A descriptor that was opened again may have others.
- ``mode``: 00000007, for read, write and seek. The kernel adds its own bits (0x80000 is "opened"), which say nothing about a buffer.
- ``count``: descriptors and mappings of the processes that /proc shows, at least 1. The kernel also counts those in flight. For a kernel
  dma-buf of which one of these processes has a descriptor, this is the kernel's count, and the name is the kernel's. The kernel's fences on
  it are only in debugfs.
- Attached devices are those of this process, and for buffers that it exports those of all processes, the newest first as in the kernel. The
  listing makes no remote call, so it never waits.
- The listing takes no reservation lock, so each buffer's fences are a snapshot. A signaled fence is listed until its slot is used again.

Names are as in their bytes (``os.fsdecode``), even with a line feed. ``dmabuf ls`` shows them escaped.
"""

from __future__ import annotations

import contextlib
import os

from dmabuf.core.buffer.identity import is_kernel_home
from dmabuf.core.buffer.shared import devices_of
from dmabuf.domain.domain import Domain
from dmabuf.observe.records import BufferRecord, BufferSnapshot, FenceRecord, snapshots
from dmabuf.uapi.dma_buf import FdInfo, fdinfo

_HEADER = "\nDma-buf Objects:\nsize    \tflags   \tmode    \tcount   \texp_name\tino     \tname\n"
_FLAGS = 0o2  # O_RDWR, include/uapi/asm-generic/fcntl.h
_MODE = 0x7  # FMODE_READ | FMODE_WRITE | FMODE_LSEEK, include/linux/fs.h


def bufinfo(*, domain: Domain | None = None) -> str:
    """Return the text of every buffer of a domain, the newest first, as the kernel's debugfs prints them (semantics 6.1).

    Args:
        domain: The domain; None means the user's default domain.

    Raises:
        DmaBufError: As :func:`dmabuf.buffers`.
    """
    domain = domain or Domain.default()
    seen = snapshots(domain)
    total = sum(one.record.size for one in seen)
    return (
        _HEADER
        + "".join(_buffer(one, devices_of(domain, one.record.dev, one.record.ino)) for one in seen)
        + f"\nTotal {len(seen)} objects, {total} bytes\n"
    )


def _buffer(seen: BufferSnapshot, devices: list[str]) -> str:
    record = seen.record
    count, named = max(1, sum(holder.fds + holder.maps for holder in record.holders)), record.name
    info = _by_the_kernel(record)
    if info is not None:
        count, named = info.references, None if info.name is None else os.fsdecode(info.name)
    name = "<none>" if named is None else named
    line = f"{record.size:08d}\t{_FLAGS:08x}\t{_MODE:08x}\t{count:08d}\t{record.exp_name}\t{record.ino:08d}\t{name}\n"
    fences = "".join(_fence(fence) for fence in seen.fences if fence.usage != "bookkeep")
    attached = "".join(f"\t{name}\n" for name in devices)
    return line + fences + f"\tAttached Devices:\n{attached}Total {len(devices)} devices attached\n\n"


def _by_the_kernel(record: BufferRecord) -> FdInfo | None:
    """Return the kernel's text about a kernel dma-buf, through a descriptor of one of its holders."""
    if not is_kernel_home(os.fsencode(record.home)):
        return None
    for holder in record.holders:
        with contextlib.suppress(OSError):  # the process ended meanwhile
            for name in os.listdir(f"/proc/{holder.pid}/fd"):
                path = f"/proc/{holder.pid}/fd/{name}"
                with contextlib.suppress(OSError):  # it was closed meanwhile
                    if _inode(path) == (record.dev, record.ino):
                        found = fdinfo(int(name), process=str(holder.pid))
                        if _inode(path) == (record.dev, record.ino):  # else the number was used again, and the text may be another's
                            return found
    return None


def _inode(path: str) -> tuple[int, int]:
    st = os.stat(path)
    return st.st_dev, st.st_ino


def _fence(fence: FenceRecord) -> str:
    state = "signalled" if fence.signaled else "unsignalled"
    return f"\t{fence.usage} fence:{fence.driver} {fence.timeline} seq {fence.seqno} {state}\n"
