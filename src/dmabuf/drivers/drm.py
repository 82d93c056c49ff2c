"""``DrmNode``: dumb buffers, PRIME export and import, and vgem's fences (semantics 5.12, 5.13).

A GEM handle is a number of one open node. Importing a buffer twice gives the same number, and the kernel doesn't count: one close ends the
handle for all. So the node counts, and closes a handle with its last :class:`GemObject`. Closing the node ends all its handles and signals
its vgem fences. A forked child shares the open node and its handles, so closing objects in the child has no effect on them.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from glob import glob
from typing import TypeVar

from dmabuf.core.base.closing import Closing
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.get import from_fd
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import finalizer
from dmabuf.errors import fail
from dmabuf.uapi import call
from dmabuf.uapi import drm as uapi

NODES = "/dev/dri/card*"
_VGEM = "vgem"

_G = TypeVar("_G", bound="GemObject")


class DrmNode(Closing):
    """An open DRM node. ``path``: None for the first card; ``driver``: the name that the kernel gives, as ``"vgem"``."""

    def __init__(self, path: str | None = None) -> None:
        """Open a node. Without a path, open the first one.

        Raises:
            NoDeviceError: There is no node (ENODEV).
            NotFoundError: ``path`` doesn't exist (ENOENT).
            NotPermittedError: The user may not open it (EACCES).
            DmaBufError: It is not a DRM node (ENOTTY), or no descriptor is free (EMFILE).
        """
        if path is None:
            path = next(iter(sorted(glob(NODES))), None)
            if path is None:
                raise fail(errno.ENODEV, "open", NODES, "load a driver: modprobe vgem", what="there is no DRM node")
        remedies = {errno.EACCES: "join the group of the node: `dmabuf doctor` names it", errno.ENOENT: "load its driver"}
        self._fd = call.open_node(path, "open", remedies)
        self.path, self.driver = path, uapi.driver(self._fd.number)
        # The finalizer of an object may run between any two lines of the thread that has the lock, and leaves the handle to that thread.
        self._lock, self._busy = threading.RLock(), False
        self._users: dict[int, int] = {}
        self._ended: deque[int] = deque()  # handles of closed objects, which are counted down

    @classmethod
    def of(cls, driver: str) -> DrmNode:
        """Return the first node of a driver.

        Raises:
            NoDeviceError: There is no such node that this user may open (ENODEV).
        """
        for path in sorted(glob(NODES)):
            try:
                node = cls(path)
            except OSError as e:
                if e.errno in (errno.EACCES, errno.ENOENT, errno.ENODEV):
                    continue
                raise
            if node.driver == driver:
                return node
            node.close()
        raise fail(
            errno.ENODEV, "open", f"driver {driver!r}", f"run: modprobe {driver}; or `dmabuf doctor` for the nodes", what="no such node"
        )

    def __repr__(self) -> str:
        return f"<DrmNode {self.path} {self.driver}{'' if self._fd.number >= 0 else ' closed'}>"

    @property
    def closed(self) -> bool:
        """Whether the node is closed."""
        return self._fd.number < 0

    def fileno(self) -> int:
        """Return the descriptor, which the node keeps.

        Raises:
            ClosedError: The object is closed (EBADF).
        """
        if self._fd.number < 0:
            raise fail(errno.EBADF, "fileno", self, "open it again", what="the node is closed")
        return self._fd.fileno()

    def _check(self, operation: str) -> int:
        return self.fileno()

    def close(self) -> None:
        """Close the node. Closing twice has no effect."""
        self._fd.close()

    def create_dumb(self, width: int, height: int, bpp: int = 32) -> DumbBuffer:
        """Return a buffer that the CPU can fill.

        Raises:
            InvalidError: A number is 0 or too large (EINVAL).
            DmaBufError: The driver has no such buffers (ENOSYS, EOPNOTSUPP).
            NoMemoryError: There is no memory (ENOMEM).
        """

        def make() -> DumbBuffer:
            made = uapi.create_dumb(self.fileno(), width, height, bpp, of=self)
            return DumbBuffer(self, made.handle, width, height, bpp, made.pitch, made.size)

        return self._object(make)

    def import_buffer(self, buf: DmaBuf) -> GemObject:
        """Attach and map a buffer in this device, without a copy.

        Raises:
            InvalidError: The buffer is not a kernel dma-buf, or the device can't reach it (EINVAL).
            ClosedError: The buffer or the node is closed (EBADF).
        """
        if handle_of(buf).kernel() is None:
            what = f"not a kernel dma-buf, its home is {buf.home!r}"
            raise fail(errno.EINVAL, "import", buf, "allocate it with heap='udmabuf', or on a dma-heap", what=what)
        return self._object(lambda: GemObject(self, uapi.fd_to_handle(self.fileno(), buf.fileno(), of=buf)))

    def _object(self, make: Callable[[], _G]) -> _G:
        """Make an object and count its handle before another close can end it, because the kernel may return one that is being closed."""
        try:
            with self._lock:
                self._busy = True
                try:
                    return make()
                finally:
                    self._busy = False
        finally:
            self._close_unused()

    def _close(self, handle: int) -> None:
        self._ended.append(handle)
        self._close_unused()

    def _close_unused(self) -> None:
        """Count down the handles of closed objects, and close those at 0."""
        with self._lock:
            if self._busy:
                return
            self._busy = True
            try:
                self._count_down()
            finally:
                self._busy = False

    def _count_down(self) -> None:
        while self._ended:
            handle = self._ended.popleft()
            self._users[handle] -= 1
            if not self._users[handle]:
                del self._users[handle]
                if self._fd.number >= 0:
                    uapi.gem_close(self._fd.fileno(), handle)


class GemObject(Closing):
    """A handle of a node. ``handle``: its number."""

    def __init__(self, node: DrmNode, handle: int) -> None:
        self.node, self.handle, self._pid = node, handle, os.getpid()
        node._users[handle] = node._users.get(handle, 0) + 1  # under the node's lock
        self._open = True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.handle} of {self.node.path}{'' if self._open else ' closed'}>"

    def _check(self, operation: str) -> int:
        if not self._open:
            raise fail(errno.EBADF, operation, self, "make or import it again", what="the handle is closed")
        return self.handle

    def export(self, *, flags: int = os.O_RDWR, domain: Domain | None = None) -> DmaBuf:
        """Return the memory as a buffer, the same one each time. The first export decides whether it is writable.

        Raises:
            ClosedError: The object is closed (EBADF).
            DmaBufError: No descriptor is left (EMFILE).
        """
        fd = uapi.handle_to_fd(self.node.fileno(), self._check("export"), flags=flags, of=self)
        return from_fd(fd, domain or Domain.default())

    def add_fence(self, *, write: bool = False) -> VgemFence:
        """Add a fence of vgem as a reader's or writer's. vgem signals it after 10 s.

        Raises:
            BusyError: A pending fence conflicts (EBUSY).
            DmaBufError: The driver is not vgem (ENOTTY).
        """
        handle = self._check("fence")
        if self.node.driver != _VGEM:  # the number is another driver's own there, and does something else
            what = f"{self.node.path} is a node of {self.node.driver}"
            raise fail(errno.ENOTTY, "fence", self, "import the buffer into DrmNode.of('vgem')", what=what)
        return VgemFence(self.node, uapi.vgem_attach(self.node.fileno(), handle, write=write, of=self))

    def close(self) -> None:
        """Close the handle. Buffers keep the memory. Closing twice has no effect."""
        if self._open:
            self._open = False
            if os.getpid() == self._pid:
                self.node._close(self.handle)

    @finalizer
    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()


class DumbBuffer(GemObject):
    """A buffer that the CPU can fill. ``pitch``: bytes from line to line; ``size``: bytes."""

    def __init__(self, node: DrmNode, handle: int, width: int, height: int, bpp: int, pitch: int, size: int) -> None:
        super().__init__(node, handle)
        self.width, self.height, self.bpp, self.pitch, self.size = width, height, bpp, pitch, size


class VgemFence:
    """A fence that vgem has put on a buffer."""

    def __init__(self, node: DrmNode, number: int) -> None:
        self.node, self.number = node, number

    def signal(self) -> None:
        """Signal the fence.

        Raises:
            NotFoundError: It is signaled already (ENOENT).
            DmaBufTimeout: The driver has signaled it after 10 s (ETIMEDOUT).
        """
        uapi.vgem_signal(self.node.fileno(), self.number)
