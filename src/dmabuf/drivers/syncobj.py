"""``Syncobj``: a container of the kernel's fences on a DRM node, binary or a timeline of points (semantics 5.14).

Point 0 is the binary use. A sync_file goes in and out as a descriptor. A handle belongs to the node's descriptor, which a fork shares: in a
forked child, closing and garbage collection leave it to the parent.
"""

from __future__ import annotations

import errno
import os

from dmabuf.core.base.clock import monotonic_deadline, seconds_left
from dmabuf.core.base.closing import Closing
from dmabuf.drivers.drm import DrmNode
from dmabuf.errors import fail
from dmabuf.uapi import syncobj as uapi
from dmabuf.uapi.call import OwnedFd

_FOR_EVER = (1 << 63) - 1


class Syncobj(Closing):
    """A sync object. ``signaled``: it begins with a signalled fence instead of none."""

    def __init__(self, node: DrmNode, *, signaled: bool = False) -> None:
        """Errors: EOPNOTSUPP the node's driver has none; ENOMEM."""
        self.node, self._pid = node, os.getpid()
        self.handle = uapi.create(node.fileno(), signaled=signaled)

    @classmethod
    def from_fd(cls, node: DrmNode, fd: int) -> Syncobj:
        """The object behind a descriptor of :meth:`export`; the descriptor stays the caller's. Errors: EINVAL no syncobj."""
        made = object.__new__(cls)
        made.node, made._pid = node, os.getpid()
        made.handle = uapi.fd_to_handle(node.fileno(), fd)
        return made

    def __repr__(self) -> str:
        return f"<Syncobj {self.handle or 'closed'} of {self.node.path}>"

    def _check(self, operation: str) -> int:
        if not self.handle:
            raise fail(errno.EBADF, operation, self, "make a new one", what="the object is closed")
        return self.handle

    def signal(self, point: int = 0) -> None:
        """Signal it, or a point. Errors: EBADF."""
        handle = self._check("signal")
        if point:
            uapi.timeline_signal(self.node.fileno(), [handle], [point])
        else:
            uapi.signal(self.node.fileno(), [handle])

    def reset(self) -> None:
        """Take the fence out. Errors: EBADF."""
        uapi.reset(self.node.fileno(), [self._check("reset")])

    def wait(self, point: int = 0, timeout: float | None = None, *, submit: bool = False) -> float:
        """Wait until it, or the point, is signalled; the seconds left (> 0; inf for None), 0.0 when timed out.

        ``submit``: wait for a fence to be put in, too. Errors: EBADF; EINVAL no fence is in it (without ``submit``), a negative timeout.
        """
        handle, flags = self._check("wait"), uapi.WAIT_FOR_SUBMIT if submit else 0
        until = monotonic_deadline(timeout, "wait", self)
        at = 0 if timeout == 0 else _FOR_EVER if until < 0 else until
        try:
            if point:
                uapi.timeline_wait(self.node.fileno(), [handle], [point], at, flags)
            else:
                uapi.wait(self.node.fileno(), [handle], at, flags)
        except OSError as e:
            if e.errno == errno.ETIME:
                return 0.0
            raise
        return seconds_left(until)

    def point(self, *, submitted: bool = False) -> int:
        """The last signalled point, or the last that has a fence. Errors: EBADF."""
        return uapi.query(self.node.fileno(), [self._check("point")], submitted=submitted)[0]

    def transfer(self, point: int, into: Syncobj, at: int = 0) -> None:
        """Put the fence of a point (0: of the object) into another object of the node. Errors: EBADF; EINVAL there is none."""
        uapi.transfer(self.node.fileno(), (self._check("transfer"), point), (into._check("transfer"), at))

    def export(self) -> OwnedFd:
        """The object as a descriptor, for other processes. Errors: EBADF, EMFILE."""
        return uapi.handle_to_fd(self.node.fileno(), self._check("export"))

    def export_sync_file(self) -> OwnedFd:
        """A sync_file of the fence in it now. Errors: EBADF; EINVAL none is; EMFILE."""
        return uapi.handle_to_fd(self.node.fileno(), self._check("export_sync_file"), sync_file=True)

    def import_sync_file(self, fd: int) -> None:
        """Put the fence of a kernel's sync_file in. Errors: EBADF; EINVAL no sync_file."""
        uapi.import_sync_file(self.node.fileno(), self._check("import_sync_file"), fd)

    def on_eventfd(self, eventfd: int, point: int = 0) -> None:
        """Have an eventfd written to once it, or the point, is signalled. Errors: EBADF; ENOTTY before Linux 6.6."""
        uapi.on_eventfd(self.node.fileno(), self._check("on_eventfd"), point, eventfd)

    def close(self) -> None:
        """Let go of it; again: nothing."""
        handle, self.handle = self.handle, 0
        if handle and self.node._fd.number >= 0 and os.getpid() == self._pid:
            uapi.destroy(self.node._fd.number, handle)

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self.close()
