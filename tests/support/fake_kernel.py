"""A kernel with dma-bufs where there is none: memfds that the package takes for the kernel's own.

It stands in at the places where the package calls the system (``dmabuf.uapi.call.system`` and its like), and knows what the scenarios of
the home tests need: heap, udmabuf, SYNC with the checks of semantics 5.3, names, sync files. It has no fences: polls are always ready.
What it proves is the logic above; that the real kernel answers so is proven in tests/kernel.
"""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from dmabuf import _native
from dmabuf.core.buffer import identity
from dmabuf.heap import devices, dma_heap, udmabuf
from dmabuf.uapi import call, dma_buf, table

_PREFIX = "/memfd:fake dma-buf "


class FakeKernel:
    """``sync``: flags of each DMA_BUF_IOCTL_SYNC, by inode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[int, bytes] = {}
        self.sync: list[tuple[int, int]] = []
        self._real = call.system
        monkeypatch.setattr(call, "system", self.ioctl)
        monkeypatch.setattr(call, "opening", self.open)
        monkeypatch.setattr(identity, "probe", self.probe)
        monkeypatch.setattr(dma_buf, "fdinfo", self.fdinfo)
        homes = {b"udmabuf": identity.UDMABUF, b"system": identity.DMA_HEAP + b"system"}
        monkeypatch.setattr(identity, "home_of", homes.get)
        monkeypatch.setattr(dma_heap, "names", lambda: ["system"])
        monkeypatch.setattr(devices, "examine", lambda node, gives, remedy: devices.Node(True, str(node)))
        monkeypatch.setattr(udmabuf, "limits", lambda _=None: udmabuf.Limits(64 << 20, 1024))

    def open(self, path: str, flags: int) -> int:
        if not path.startswith(("/dev/dma_heap/", "/dev/udmabuf")):
            return os.open(path, flags)
        return os.open("/dev/null", flags)

    def exporter(self, fd: int) -> str | None:
        link = os.readlink(f"/proc/self/fd/{fd}")
        return link.removeprefix(_PREFIX).removesuffix(" (deleted)") if link.startswith(_PREFIX) else None

    def probe(self, fd: int) -> tuple[int, int, int, int, bytes, int]:
        found = _native.probe_fd(fd)
        return (*found[:5], dma_buf.MAGIC) if found[4].startswith(_PREFIX.encode()) else found

    def fdinfo(self, fd: int) -> dma_buf.FdInfo:
        st, exporter = os.fstat(fd), self.exporter(fd)
        assert exporter is not None
        paths = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        count = sum(path.exists() and path.stat().st_ino == st.st_ino for path in paths)
        return dma_buf.FdInfo(st.st_size, count, exporter.encode(), self.names.get(st.st_ino), b"")

    def made(self, exporter: str, size: int) -> int:
        fd = os.memfd_create(f"fake dma-buf {exporter}", os.MFD_CLOEXEC)
        os.truncate(fd, size)
        return fd

    def ioctl(self, fd: int, number: int, argument: Any) -> Any:
        known = table.BY_NUMBER[number]
        if number == table.UDMABUF_CREATE.number:
            return self.made("udmabuf", table.UDMABUF_CREATE.layout.unpack(argument).size)
        value: Any = known.layout.unpack(argument) if number != table.DMA_BUF_SET_NAME_B.number else None
        if number == table.DMA_HEAP_ALLOC.number:
            return known.layout.pack(value._replace(fd=self.made("system", value.len)))
        if self.exporter(fd) is None:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        if number == table.DMA_BUF_SET_NAME_B.number:
            self.names[os.fstat(fd).st_ino] = argument.rstrip(b"\0")
        elif number == table.DMA_BUF_SYNC.number:
            if value.flags & ~7 or not value.flags & 3:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            self.sync.append((os.fstat(fd).st_ino, value.flags))
        elif number == table.DMA_BUF_EXPORT_SYNC_FILE.number:
            return known.layout.pack(value._replace(fd=os.eventfd(1, os.EFD_CLOEXEC)))
        return argument
