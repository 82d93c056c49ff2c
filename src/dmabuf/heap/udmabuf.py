"""The udmabuf heap: memfds of ours that the kernel makes real dma-bufs of (``/dev/udmabuf``; semantics 5.9).

For buffers that go to a driver. Memory as in the memfd heap: zeroed, whole pages, promised, accounted to this cgroup. The kernel pins the
pages, and limits the size of a buffer and the number of its ranges by parameters of its module; root can raise them.

Steps: the memfd with its memory and seals, the dma-buf, its name, its lease, its record. A death anywhere leaves nothing but, at the end,
a record that nobody holds, which the next sweep takes.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final, NamedTuple

from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.get import from_fd
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail
from dmabuf.heap import budget, devices, memfd
from dmabuf.uapi import call, dma_buf
from dmabuf.uapi import heap as uapi

NAME: Final = "udmabuf"
DEVICE: Final = Path("/dev/udmabuf")
PARAMETERS: Final = Path("/sys/module/udmabuf/parameters")
GIVES: Final = "kernel dma-bufs out of memfds"
REMEDY: Final = "modprobe udmabuf"
MIB: Final = 1 << 20


class Limits(NamedTuple):
    """What the module allows. ``size``: bytes a buffer; ``ranges``: of memfds that one is made of. None: it doesn't say, or none."""

    size: int | None
    ranges: int | None


def limits(parameters: Path = PARAMETERS) -> Limits:
    """The module's limits now."""
    size, ranges = _number(parameters / "size_limit_mb"), _number(parameters / "list_limit")
    return Limits(None if size is None or size < 0 else size * MIB, ranges)  # below 0 lifts it: multiplied as unsigned


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def node(device: Path = DEVICE) -> devices.Node:
    """The device."""
    return devices.examine(device, GIVES, REMEDY)


def unavailable() -> str | None:
    """Why this heap can't be used here, None when it can."""
    return devices.why_not(node(DEVICE))


def allocate(size: int, *, name: str | bytes | None = None, domain: Domain | None = None) -> DmaBuf:
    """A new zeroed buffer of ``size`` bytes, rounded up to pages. See :func:`dmabuf.allocate`."""
    size, raw, domain = memfd.asked(size, name, domain)
    most = limits(PARAMETERS).size
    if most is not None and size > most:
        raise fail(
            errno.EINVAL, "allocate", f"{size} bytes", f"as root: echo {-(-size // MIB)} > {PARAMETERS / 'size_limit_mb'}; or make several",
            what=f"udmabuf makes buffers of at most {most // MIB} MiB here",
        )  # fmt: skip
    with call.open_node(str(DEVICE), "allocate", {errno.ENOENT: REMEDY, errno.EACCES: node(DEVICE).remedy}) as device:
        with budget.claim(size), memfd.promised("dmabuf-udmabuf", size, filled=True) as memory:
            fd = uapi.create(device.number, memory.number, 0, size)
        if raw is not None:
            dma_buf.set_name(fd.number, raw)
        return from_fd(fd, domain)
