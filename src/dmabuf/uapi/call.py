"""The call of an ioctl: restarted where the kernel asks for it, with an owner for the descriptor that it may return.

*Restarts.* A call that ends with EINTR is restarted after Python's signal handlers have run, unless one of them raises. EAGAIN is restarted
where the kernel means "again" (dma-buf's SYNC, all of DRM; semantics 5.3), but not where it means "nothing there" (V4L2's DQBUF on a
non-blocking descriptor).

*Descriptors.* An ioctl that makes a descriptor returns an ``OwnedFd``, which closes it with its last reference unless it was passed on. No
Python code runs between the system call and the owner, so no signal handler can raise in between.

``system`` is the system call. Tests replace it by a fake kernel, or by one that fails.
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

Noted = Callable[..., Any]
"""Calls a function with its arguments, and notes that it was called."""

Remedy = str | tuple[str, str]
"""What to do, or what happened and what to do."""

REMEDIES: Final[dict[int, Remedy]] = {
    errno.EMFILE: "raise RLIMIT_NOFILE or close descriptors",
    errno.ENFILE: ("the machine has no descriptor left", "close descriptors"),
    errno.ENOMEM: "free memory, or ask for less",
    errno.EBADF: "pass an open file descriptor",
}
"""For errors that mean the same everywhere."""


def told(error: OSError, operation: str, obj: object, remedies: Mapping[int, Remedy] | None = None) -> DmaBufError:
    """Return the error for an answer of the kernel. ``remedies``: by errno, before those of :data:`REMEDIES`."""
    if isinstance(error, DmaBufError):
        return error
    number = error.errno or errno.EIO
    found = (remedies or {}).get(number) or REMEDIES.get(number)
    what, remedy = found if isinstance(found, tuple) else (None, found)
    return fail(number, operation, obj, remedy, what=what)


def _again(error: OSError, restart: bool, tried: int) -> None:
    """Return if the call must be made again, else raise its error."""
    if error.errno == errno.EINTR:
        return  # Python's handlers have run, or will run before the next call
    if error.errno != errno.EAGAIN or not restart:
        raise error
    select.select([], [], [], min(_PAUSE_MOST, tried * 1e-5))


def _descriptor(fd: int) -> None:
    if not 0 <= fd < 1 << 31:  # for these fcntl.ioctl raises other errors
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def perform(fd: int, ioctl: Ioctl[T], value: T, *, restart: bool = True, interruptible: bool = False, noted: Noted | None = None) -> T:
    """Make an ioctl with a structure, and return the structure as the kernel left it.

    Args:
        fd: A descriptor of the device or file.
        ioctl: The ioctl.
        value: The structure.
        restart: Whether EAGAIN means "again".
        interruptible: Whether EINTR ends the call.
        noted: What calls the system call, and notes that in the same step.

    Raises:
        OSError: The kernel's answer, not yet a DmaBufError; :func:`told` makes one.
        InvalidError: A field doesn't fit into the structure (EINVAL).
    """
    argument = ioctl.layout.pack(value)
    return ioctl.layout.unpack(perform_raw(fd, ioctl.number, argument, restart=restart, interruptible=interruptible, noted=noted))


def perform_raw(
    fd: int, number: int, argument: Any = 0, *, restart: bool = True, interruptible: bool = False, noted: Noted | None = None
) -> Any:
    """Make an ioctl with bytes (returned as the kernel left them), a number, or a buffer that the kernel changes.

    It fails as `perform` does.

    With more than 1,024 bytes Python keeps its lock during the call. No ioctl that waits has such an argument.
    """
    _descriptor(fd)
    tried = 0
    while True:
        try:
            return system(fd, number, argument) if noted is None else noted(system, fd, number, argument)
        except OSError as e:
            if interruptible and e.errno == errno.EINTR:
                raise
            tried += 1
            _again(e, restart, tried)


def obtain(fd: int, ioctl: Ioctl[T], value: T, field: str, *, restart: bool = True) -> OwnedFd:
    """Make an ioctl whose structure returns a new descriptor in ``field``. It fails as `perform` does."""
    pick = itemgetter(ioctl.layout.fields.index(field))
    argument, tried = ioctl.layout.pack(value), 0
    _descriptor(fd)
    while True:
        try:
            # All of this is C, from the system call to the owner, so no signal handler can raise before the descriptor has an owner.
            return next(map(OwnedFd, map(pick, map(ioctl.layout.struct.unpack, map(system, (fd,), (ioctl.number,), (argument,))))))
        except OSError as e:
            tried += 1
            _again(e, restart, tried)


def obtain_result(fd: int, number: int, argument: bytearray, *, restart: bool = True) -> OwnedFd:
    """Make an ioctl with a buffer, whose result is the new descriptor (semantics 5.9). It fails as `perform` does."""
    _descriptor(fd)
    tried = 0
    while True:
        try:
            return next(map(OwnedFd, map(system, (fd,), (number,), (argument,))))  # see obtain()
        except OSError as e:
            tried += 1
            _again(e, restart, tried)


def open_node(path: str, operation: str, remedies: Mapping[int, Remedy] | None = None, *, flags: int = os.O_RDWR) -> OwnedFd:
    """Open a device node.

    Raises:
        NotFoundError: There is no such device (ENOENT).
        NotPermittedError: The user may not open it (EACCES).
        DmaBufError: No descriptor is free (EMFILE), or open(2) failed otherwise.
    """
    try:
        return next(map(OwnedFd, map(opening, (path,), (flags | os.O_CLOEXEC,))))
    except OSError as e:
        raise told(e, operation, path, remedies) from None


opening: Callable[[str, int], int] = os.open
"""open(2), which tests replace as :data:`system`."""
