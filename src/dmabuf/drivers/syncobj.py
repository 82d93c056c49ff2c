"""``Syncobj``: a container of the kernel's fences on a DRM node, binary or a timeline of points (semantics 5.14).

Point 0 is the binary use. Fences are imported and exported as sync_files. A handle belongs to the node's descriptor, which a forked child
shares. In the child, closing and garbage collection therefore have no effect on it.
"""

from __future__ import annotations

import errno
import os

from dmabuf.core.base.clock import monotonic_deadline, seconds_left
from dmabuf.core.base.closing import Closing
from dmabuf.domain.guards import finalizer
from dmabuf.drivers.drm import DrmNode
from dmabuf.errors import fail
from dmabuf.uapi import syncobj as uapi
from dmabuf.uapi.call import OwnedFd

_FOR_EVER = (1 << 63) - 1


class Syncobj(Closing):
    """A sync object. ``signaled``: whether it begins with a signaled fence.

    Raises:
        DmaBufError: The node's driver has no sync objects (EOPNOTSUPP).
        NoMemoryError: There is no memory (ENOMEM).
    """

    def __init__(self, node: DrmNode, *, signaled: bool = False) -> None:
        self.node, self._pid = node, os.getpid()
        self.handle = uapi.create(node.fileno(), signaled=signaled)

    @classmethod
    def from_fd(cls, node: DrmNode, fd: int) -> Syncobj:
        """Return the object behind a descriptor of :meth:`export`, which the caller keeps.

        Raises:
            InvalidError: The descriptor is not a sync object (EINVAL).
        """
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
        """Signal the object, or a point.

        Raises:
            ClosedError: The object is closed (EBADF).
        """
        handle = self._check("signal")
        if point:
            uapi.timeline_signal(self.node.fileno(), [handle], [point])
        else:
            uapi.signal(self.node.fileno(), [handle])

    def reset(self) -> None:
        """Take the fence out.

        Raises:
            ClosedError: The object is closed (EBADF).
        """
        uapi.reset(self.node.fileno(), [self._check("reset")])

    def wait(self, point: int = 0, timeout: float | None = None, *, submit: bool = False) -> float:
        """Wait until the object, or the point, is signaled.

        Args:
            point: The point, 0 for the object.
            timeout: Seconds to wait; None waits forever.
            submit: Whether to wait also until there is a fence.

        Returns:
            The seconds left (> 0; inf for None), 0.0 after a timeout.

        Raises:
            ClosedError: The object is closed (EBADF).
            InvalidError: There is no fence (without ``submit``), or the timeout is negative (EINVAL).
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
        """Return the last signaled point, or with ``submitted`` the last that has a fence.

        Raises:
            ClosedError: The object is closed (EBADF).
        """
        return uapi.query(self.node.fileno(), [self._check("point")], submitted=submitted)[0]

    def transfer(self, point: int, into: Syncobj, at: int = 0) -> None:
        """Copy the fence of a point (0: of the object) into another object of the node.

        Raises:
            ClosedError: The object is closed (EBADF).
            InvalidError: There is no fence (EINVAL).
        """
        uapi.transfer(self.node.fileno(), (self._check("transfer"), point), (into._check("transfer"), at))

    def export(self) -> OwnedFd:
        """Return the object as a descriptor, for other processes.

        Raises:
            ClosedError: The object is closed (EBADF).
            DmaBufError: No descriptor is left (EMFILE).
        """
        return uapi.handle_to_fd(self.node.fileno(), self._check("export"))

    def export_sync_file(self) -> OwnedFd:
        """Return a sync_file of its present fence.

        Raises:
            ClosedError: The object is closed (EBADF).
            InvalidError: There is no fence (EINVAL).
            DmaBufError: No descriptor is left (EMFILE).
        """
        return uapi.handle_to_fd(self.node.fileno(), self._check("export_sync_file"), sync_file=True)

    def import_sync_file(self, fd: int) -> None:
        """Put the fence of a sync_file of the kernel in.

        Raises:
            ClosedError: The object is closed (EBADF).
            InvalidError: The descriptor is not a sync_file of the kernel (EINVAL).
        """
        uapi.import_sync_file(self.node.fileno(), self._check("import_sync_file"), fd)

    def on_eventfd(self, eventfd: int, point: int = 0) -> None:
        """Have the kernel write to an eventfd once the object, or the point, is signaled.

        Raises:
            ClosedError: The object is closed (EBADF).
            DmaBufError: The kernel is older than Linux 6.6 (ENOTTY).
        """
        uapi.on_eventfd(self.node.fileno(), self._check("on_eventfd"), point, eventfd)

    def close(self) -> None:
        """Close the object. Closing twice has no effect."""
        handle, self.handle = self.handle, 0
        if handle and not self.node.closed and os.getpid() == self._pid:
            uapi.destroy(self.node.fileno(), handle)

    @finalizer
    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self.close()
