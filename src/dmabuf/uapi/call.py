"""How an ioctl is called: restarted where the kernel asks for it, and with an owner for the descriptor that it may give.

*Restarts.* EINTR is restarted after Python's signal handlers have run; a handler that raises ends the call. EAGAIN is restarted where the
kernel means "again" (dma-buf's SYNC, all of DRM; semantics 5.3), and not where it means "nothing there" (V4L2's DQBUF on a non-blocking
fd).

*Descriptors.* An ioctl that makes a descriptor hands back an ``OwnedFd``, which closes it with its last reference unless it was given on.
Between the system call and the owner there is no Python code, so no signal handler that raises can come in between.

``system`` is the system call. Tests put another one in its place: a kernel of their own, or one that fails.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, Final, TypeVar

from dmabuf._native import OwnedFd
from dmabuf.errors import DmaBufError, fail
from dmabuf.uapi.layout import Ioctl

T = TypeVar("T")

__all__ = ["REMEDIES", "OwnedFd", "obtain", "obtain_result", "open_node", "perform", "perform_raw", "told"]

system: Callable[..., Any] = fcntl.ioctl

_PAUSE_MOST = 0.001  # seconds between two tries of a call that says EAGAIN

REMEDIES: Final[dict[int, str]] = {
    errno.EMFILE: "raise RLIMIT_NOFILE or close descriptors",
    errno.ENFILE: "close descriptors: the machine has no more",
    errno.ENOMEM: "free memory, or ask for less",
    errno.EBADF: "pass an open file descriptor",
}
"""What to do about errors that mean the same everywhere."""


def told(error: OSError, operation: str, obj: object, remedies: Mapping[int, str] | None = None) -> DmaBufError:
    """The kernel's answer in our words. ``remedies``: by errno, beside those of :data:`REMEDIES`."""
    if isinstance(error, DmaBufError):
        return error
    number = error.errno or errno.EIO
    return fail(number, operation, obj, (remedies or {}).get(number) or REMEDIES.get(number))


def _again(error: OSError, restart: bool, tried: int) -> None:
    """Return when the call is to be made again; else raise what it raised."""
    if error.errno == errno.EINTR:
        return  # Python's handlers have run, or will before the next call
    if error.errno != errno.EAGAIN or not restart:
        raise error
    select.select([], [], [], min(_PAUSE_MOST, tried * 1e-5))


def _descriptor(fd: int) -> None:
    if not 0 <= fd < 1 << 31:  # fcntl.ioctl has errors of its own for these
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def perform(fd: int, ioctl: Ioctl[T], value: T, *, restart: bool = True, interruptible: bool = False) -> T:
    """Call it with a structure, and return the structure as the kernel left it.

    ``restart``: EAGAIN means "again"; ``interruptible``: EINTR does not. Errors: the kernel's, as a plain OSError; EINVAL a field that does
    not fit.
    """
    return ioctl.layout.unpack(perform_raw(fd, ioctl.number, ioctl.layout.pack(value), restart=restart, interruptible=interruptible))


def perform_raw(fd: int, number: int, argument: Any = 0, *, restart: bool = True, interruptible: bool = False) -> Any:
    """Call it with bytes (returned as the kernel left them), a number, or a buffer to be changed in place. Errors: as :func:`perform`.

    Over 1,024 bytes Python keeps its lock during the call: nothing that waits is that long.
    """
    _descriptor(fd)
    tried = 0
    while True:
        try:
            return system(fd, number, argument)
        except OSError as e:
            if interruptible and e.errno == errno.EINTR:
                raise
            tried += 1
            _again(e, restart, tried)


def obtain(fd: int, ioctl: Ioctl[T], value: T, field: str, *, restart: bool = True) -> OwnedFd:
    """Call it with a structure of which ``field`` comes back as a new descriptor. Errors: as :func:`perform`."""
    pick = itemgetter(ioctl.layout.fields.index(field))
    argument, tried = ioctl.layout.pack(value), 0
    _descriptor(fd)
    while True:
        try:
            # All of it is C, from the system call to the owner: no signal handler can raise with the number in nobody's hands.
            return next(map(OwnedFd, map(pick, map(ioctl.layout.struct.unpack, map(system, (fd,), (ioctl.number,), (argument,))))))
        except OSError as e:
            tried += 1
            _again(e, restart, tried)


def obtain_result(fd: int, number: int, argument: bytearray, *, restart: bool = True) -> OwnedFd:
    """Call it with a buffer; the ioctl's own result is the new descriptor (semantics 5.9). Errors: as :func:`perform`."""
    _descriptor(fd)
    tried = 0
    while True:
        try:
            return next(map(OwnedFd, map(system, (fd,), (number,), (argument,))))  # see obtain()
        except OSError as e:
            tried += 1
            _again(e, restart, tried)


def open_node(path: str, operation: str, remedies: Mapping[int, str] | None = None, *, flags: int = os.O_RDWR) -> OwnedFd:
    """Open a device node. Errors: the kernel's, in our words: ENOENT no such device, EACCES, EMFILE, …"""
    try:
        return next(map(OwnedFd, map(opening, (path,), (flags | os.O_CLOEXEC,))))
    except OSError as e:
        raise told(e, operation, path, remedies) from None


opening: Callable[[str, int], int] = os.open
"""open(2), for tests as :data:`system`."""
