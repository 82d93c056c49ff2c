"""What /proc/PID/fdinfo/FD would say of a buffer (spec 5.7)."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dmabuf.domain.holders import holders
from dmabuf.errors import needing_descriptors

if TYPE_CHECKING:
    from dmabuf.core.dma_buf import DmaBuf

# The kernel's own, which a dma-buf has not got and C libraries of 64 bits call 0; arm64 has some flags in another order (asm/fcntl.h).
_O_LARGEFILE = 0o400000 if os.uname().machine == "aarch64" else 0o100000


def text(buf: DmaBuf, fd: int) -> str:
    """The lines. ``count``: what this user may see of descriptors and mappings."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~_O_LARGEFILE | (os.O_CLOEXEC if fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC else 0)
    with needing_descriptors("fdinfo", buf):
        own = Path(f"/proc/self/fdinfo/{fd}").read_text()
    mount = next((line.split()[1] for line in own.splitlines() if line.startswith("mnt_id")), "0")
    key = (buf._record.dev, buf._record.ino)
    count = sum(h.fds + h.maps for h in holders({key}).get(key, ()))
    if buf._record.live is not None:
        count -= buf._record.live.own_descriptions
    lines = {"pos": 0, "flags": f"0{flags:o}", "mnt_id": mount, "ino": buf.ino, "size": buf.size, "count": count}
    lines["exp_name"] = buf.exp_name
    if buf.name is not None:
        lines["name"] = buf.name
    return "".join(f"{key}:\t{value}\n" for key, value in lines.items())
