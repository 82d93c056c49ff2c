"""The text that /proc/PID/fdinfo/FD would have for a buffer (semantics 5.7)."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from dmabuf.core.buffer.handle import Handle
from dmabuf.domain.holders import holders
from dmabuf.errors import needing_descriptors

# A flag of the kernel's own, which a dma-buf doesn't have and 64-bit C libraries call 0. arm64 orders some flags otherwise (asm/fcntl.h).
_O_LARGEFILE = 0o400000 if os.uname().machine == "aarch64" else 0o100000


def fdinfo(handle: Handle) -> str:
    """Return the lines. ``count``: the descriptors and mappings that this user may see."""
    fd = handle.descriptor("fdinfo")
    kernel = handle.kernel()
    if kernel is not None:
        return kernel.fdinfo(handle)
    shared = handle.shared
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~_O_LARGEFILE | (os.O_CLOEXEC if fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC else 0)
    with needing_descriptors("fdinfo", handle):
        own = Path(f"/proc/self/fdinfo/{fd}").read_text()
    mount = next((line.split()[1] for line in own.splitlines() if line.startswith("mnt_id")), "0")
    key = (shared.dev, shared.ino)
    count = sum(h.fds + h.maps for h in holders({key}).get(key, ()))
    if shared.backing is not None:
        count -= shared.backing.own_descriptions
    lines: dict[str, object] = {"pos": 0, "flags": f"0{flags:o}", "mnt_id": mount, "ino": shared.ino, "size": handle.size, "count": count}
    lines["exp_name"] = os.fsdecode(shared.exp_name)
    name = handle.name()
    if name is not None:
        lines["name"] = os.fsdecode(name)
    return "".join(f"{key}:\t{value}\n" for key, value in lines.items())
