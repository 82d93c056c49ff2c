"""The udmabuf heap: memfds from which the kernel makes dma-bufs (``/dev/udmabuf``; semantics 5.9).

For buffers that go to a driver. The memory is that of the memfd heap: zeroed, in whole pages, reserved, and accounted to this cgroup. The
kernel pins the pages. Parameters of its module limit the size of a buffer and the number of its ranges, and root can raise them.

The steps are: the memfd with its memory and seals, the dma-buf, its name, its reference lock, its record. A process that dies in between
leaves nothing, or a record that no process references, which the next sweep frees.
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
REMEDY: Final = "run: modprobe udmabuf"
MIB: Final = 1 << 20


class Limits(NamedTuple):
    """The module's limits. ``size``: bytes of a buffer; ``ranges``: of memfds in one buffer. None if unknown, or if there is no limit."""

    size: int | None
    ranges: int | None


def limits(parameters: Path = PARAMETERS) -> Limits:
    """Return the module's present limits."""
    size, ranges = _number(parameters / "size_limit_mb"), _number(parameters / "list_limit")
    return Limits(None if size is None or size < 0 else size * MIB, ranges)  # below 0: no limit, as it is unsigned


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def node(device: Path = DEVICE) -> devices.Node:
    """Return the device."""
    return devices.examine(device, GIVES, REMEDY)


def unavailable() -> str | None:
    """Return why this heap can't be used here, None if it can."""
    return devices.why_not(node(DEVICE))


def allocate(size: int, *, name: str | bytes | None = None, domain: Domain | None = None) -> DmaBuf:
    """Return a new zeroed buffer of ``size`` bytes, rounded up to pages. See :func:`dmabuf.allocate`."""
    size, raw, domain = memfd.asked(size, name, domain)
    most = limits(PARAMETERS).size
    if most is not None and size > most:
        raise fail(
            errno.EINVAL, "allocate", f"{size} bytes", f"as root: echo {-(-size // MIB)} > {PARAMETERS / 'size_limit_mb'}; or make several",
            what=f"udmabuf makes buffers of at most {most // MIB} MiB here",
        )  # fmt: skip
    with call.open_node(str(DEVICE), "allocate", {errno.ENOENT: REMEDY, errno.EACCES: node(DEVICE).remedy}) as device:
        with budget.claim(size), memfd.reserved("dmabuf-udmabuf", size, filled=True) as memory:
            fd = uapi.create(device.number, memory.number, 0, size)
        if raw is not None:
            dma_buf.set_name(fd.number, raw)
        return from_fd(fd, domain)
