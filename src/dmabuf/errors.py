"""The errors and warnings of the package: one tree, every node an ``OSError`` that carries the kernel's errno.

::

    OSError
    └── DmaBufError                  every error of a buffer, fence, lock or domain; ``errno`` says which
        ├── AlreadyHeldError         EALREADY                 also BlockingIOError
        ├── BrokenConnectionError    EPIPE, ESHUTDOWN         also BrokenPipeError
        ├── BusyError                EBUSY
        ├── CanceledError            ECANCELED
        ├── ClosedError              EBADF
        ├── ConnectionAbortError     ECONNABORTED             also ConnectionAbortedError
        ├── ConnectionLostError      ECONNRESET               also ConnectionResetError
        ├── CrossDomainError         EXDEV
        ├── DeadlockError            EDEADLK
        ├── DirectoryExpectedError   ENOTDIR                  also NotADirectoryError
        ├── DmaBufTimeout            ETIMEDOUT, ETIME         also TimeoutError
        ├── ExistsError              EEXIST                   also FileExistsError
        ├── InterruptedWaitError     EINTR                    also InterruptedError
        ├── InvalidError             EINVAL                   (not a ValueError: the kernel's answer, not Python's)
        ├── NoChildError             ECHILD                   also ChildProcessError
        ├── NoDeviceError            ENODEV
        ├── NoListenerError          ECONNREFUSED             also ConnectionRefusedError
        ├── NoMemoryError            ENOMEM                   (not a MemoryError: nothing of the interpreter ran out)
        ├── NoProcessError           ESRCH                    also ProcessLookupError
        ├── NoSpaceError             ENOSPC
        ├── NotFoundError            ENOENT                   also FileNotFoundError
        ├── NotPermittedError        EPERM, EACCES            also PermissionError
        ├── NotUniqueError           ENOTUNIQ
        ├── OwnerDeadError           EOWNERDEAD
        ├── UnexpectedDirectoryError EISDIR                   also IsADirectoryError
        └── WouldBlockError          EAGAIN, EINPROGRESS      also BlockingIOError

    RuntimeError
    └── ContractError                where the kernel would BUG: no defined continuation
    RuntimeWarning
    └── ContractWarning              where the kernel WARNs and goes on as documented; emitted before any side effect
    ImportError
    └── ExtraMissingError            an optional dependency is not installed; names the extra that brings it

:func:`fail` is the one way to make a ``DmaBufError``: it picks the class by errno and writes the message, always of the form
``operation: object: what (ERRNO); remedy``. An errno without a class of its own gives a plain ``DmaBufError``. The number, the
message and the parts of the message survive pickling, so an error means the same in the process that asked.

Source: errno numbers and severities from semantics 0.2; the builtin twins from PEP 3151.
"""

from __future__ import annotations

import contextlib
import errno as _errno
import os
import warnings
from collections.abc import Iterator
from typing import Final

__all__ = [
    "AlreadyHeldError",
    "BrokenConnectionError",
    "BusyError",
    "CanceledError",
    "ClosedError",
    "ConnectionAbortError",
    "ConnectionLostError",
    "ContractError",
    "ContractWarning",
    "CrossDomainError",
    "DeadlockError",
    "DirectoryExpectedError",
    "DmaBufError",
    "DmaBufTimeout",
    "ExistsError",
    "ExtraMissingError",
    "InterruptedWaitError",
    "InvalidError",
    "NoChildError",
    "NoDeviceError",
    "NoListenerError",
    "NoMemoryError",
    "NoProcessError",
    "NoSpaceError",
    "NotFoundError",
    "NotPermittedError",
    "NotUniqueError",
    "OwnerDeadError",
    "UnexpectedDirectoryError",
    "WouldBlockError",
    "contract_warning",
    "errno_name",
    "fail",
    "missing_extra",
    "needing_descriptors",
    "rebuilt",
]


class DmaBufError(OSError):
    """An operation answered with an errno.

    ``errno``: the kernel's positive number. ``strerror`` and ``str()``: the whole message. ``operation``, ``remedy``: its parts, for
    programs; None where it was made without :func:`fail`.
    """

    operation: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        # OSError would put "[Errno N]" in front, which the message already says by name.
        return super().__str__() if self.strerror is None else self.strerror


class AlreadyHeldError(DmaBufError, BlockingIOError):
    """The lock is already held by the same acquire context (EALREADY)."""


class BrokenConnectionError(DmaBufError, BrokenPipeError):
    """The other end of a socket is gone or shut down (EPIPE, ESHUTDOWN)."""


class BusyError(DmaBufError):
    """The object is in use in a way that excludes the operation (EBUSY)."""


class CanceledError(DmaBufError):
    """The work did not complete: its writer raised, or its fence was cancelled (ECANCELED)."""


class ClosedError(DmaBufError):
    """The object is closed, or the number is no open fd (EBADF)."""


class ConnectionAbortError(DmaBufError, ConnectionAbortedError):
    """A connection was aborted (ECONNABORTED)."""


class ConnectionLostError(DmaBufError, ConnectionResetError):
    """The other end of a connection ended with data on its way (ECONNRESET)."""


class CrossDomainError(DmaBufError):
    """The buffer or fence belongs to another domain (EXDEV)."""


class DeadlockError(DmaBufError):
    """Waiting would never end, or an older context holds the lock (EDEADLK)."""


class DirectoryExpectedError(DmaBufError, NotADirectoryError):
    """A path that must be a directory is something else (ENOTDIR)."""


class DmaBufTimeout(DmaBufError, TimeoutError):
    """The time given for a wait is over; nothing was added or changed (ETIMEDOUT; ETIME where the kernel says so)."""


class ExistsError(DmaBufError, FileExistsError):
    """A thing of this name is there already (EEXIST)."""


class InterruptedWaitError(DmaBufError, InterruptedError):
    """A signal ended an interruptible wait (EINTR)."""


class InvalidError(DmaBufError):
    """An argument is outside of what the operation takes (EINVAL)."""


class NoChildError(DmaBufError, ChildProcessError):
    """There is no such child process (ECHILD)."""


class NoDeviceError(DmaBufError):
    """The exporter, heap or holder behind the object is gone or missing (ENODEV)."""


class NoListenerError(DmaBufError, ConnectionRefusedError):
    """Nobody listens at the address (ECONNREFUSED)."""


class NoMemoryError(DmaBufError):
    """The memory can't be promised (ENOMEM)."""


class NoProcessError(DmaBufError, ProcessLookupError):
    """There is no such process (ESRCH)."""


class NoSpaceError(DmaBufError):
    """The domain or its file system is full (ENOSPC)."""


class NotFoundError(DmaBufError, FileNotFoundError):
    """There is no such buffer, fence or file (ENOENT)."""


class NotPermittedError(DmaBufError, PermissionError):
    """The caller is not the owner, or lacks the rights (EPERM, EACCES)."""


class NotUniqueError(DmaBufError):
    """Several buffers bear the name (ENOTUNIQ)."""


class OwnerDeadError(DmaBufError):
    """The process that owned the fence or the access died (EOWNERDEAD)."""


class UnexpectedDirectoryError(DmaBufError, IsADirectoryError):
    """A path that must be a file is a directory (EISDIR)."""


class WouldBlockError(DmaBufError, BlockingIOError):
    """The operation can't complete now and was asked not to wait (EAGAIN, EINPROGRESS)."""


_CLASSES: Final[dict[int, type[DmaBufError]]] = {
    _errno.EACCES: NotPermittedError,
    _errno.EAGAIN: WouldBlockError,
    _errno.EALREADY: AlreadyHeldError,
    _errno.EBADF: ClosedError,
    _errno.EBUSY: BusyError,
    _errno.ECANCELED: CanceledError,
    _errno.ECHILD: NoChildError,
    _errno.ECONNABORTED: ConnectionAbortError,
    _errno.ECONNREFUSED: NoListenerError,
    _errno.ECONNRESET: ConnectionLostError,
    _errno.EDEADLK: DeadlockError,
    _errno.EEXIST: ExistsError,
    _errno.EINPROGRESS: WouldBlockError,
    _errno.EINTR: InterruptedWaitError,
    _errno.EINVAL: InvalidError,
    _errno.EISDIR: UnexpectedDirectoryError,
    _errno.ENODEV: NoDeviceError,
    _errno.ENOENT: NotFoundError,
    _errno.ENOMEM: NoMemoryError,
    _errno.ENOSPC: NoSpaceError,
    _errno.ENOTDIR: DirectoryExpectedError,
    _errno.ENOTUNIQ: NotUniqueError,
    _errno.EOWNERDEAD: OwnerDeadError,
    _errno.EPERM: NotPermittedError,
    _errno.EPIPE: BrokenConnectionError,
    _errno.ESHUTDOWN: BrokenConnectionError,
    _errno.ESRCH: NoProcessError,
    _errno.ETIME: DmaBufTimeout,
    _errno.ETIMEDOUT: DmaBufTimeout,
    _errno.EXDEV: CrossDomainError,
}

# Numbers with two names, of which errno.errorcode knows the one that the kernel doesn't use.
_KERNEL_NAMES: Final = {_errno.EAGAIN: "EAGAIN", _errno.EDEADLK: "EDEADLK", _errno.EOPNOTSUPP: "EOPNOTSUPP"}


def errno_name(errno_value: int) -> str:
    """The name of an errno as the headers spell it, ``errno 4095`` for a number without one."""
    return _KERNEL_NAMES.get(errno_value) or _errno.errorcode.get(errno_value, f"errno {errno_value}")


def fail(errno_value: int, operation: str, obj: object, remedy: str | None = None, *, what: str | None = None) -> DmaBufError:
    """The error to raise when ``operation`` on ``obj`` answers with an errno.

    ``errno_value``: positive. ``obj``: named by its ``str()``; no reference to it is kept. ``what``: says what happened, in place of the C
    library's text. ``remedy``: what the caller can do. Returns the error, so that ``raise fail(...)`` shows the flow to readers and
    type checkers.

    Errors: ValueError for an ``errno_value`` that is not positive (fence errors are negative: negate them).
    """
    if errno_value <= 0:
        raise ValueError(f"an errno is positive, not {errno_value}")
    message = f"{operation}: {obj}: {what or os.strerror(errno_value)} ({errno_name(errno_value)})"
    if remedy:
        message += f"; {remedy}"
    return rebuilt(errno_value, message, operation, remedy)


def rebuilt(errno_value: int, message: str, operation: str | None, remedy: str | None) -> DmaBufError:
    """The error that :func:`fail` made in another process, from its parts."""
    error = _CLASSES.get(errno_value, DmaBufError)(errno_value, message)
    error.operation, error.remedy = operation, remedy
    return error


@contextlib.contextmanager
def needing_descriptors(operation: str, obj: object) -> Iterator[None]:
    """In the block a system call may find no descriptor free; what it says then, EMFILE or ENFILE, is told as by :func:`fail`."""
    try:
        yield
    except DmaBufError:
        raise
    except OSError as e:
        if e.errno not in (_errno.EMFILE, _errno.ENFILE):
            raise
        raise fail(e.errno, operation, obj, "raise RLIMIT_NOFILE or close descriptors") from None


class ContractError(RuntimeError):
    """A rule was broken that leaves the kernel no way to go on (its BUG); nothing was done."""


class ContractWarning(RuntimeWarning):
    """A rule was broken that the kernel reports and survives (its WARN); emitted before any side effect."""


def contract_warning(message: str, stacklevel: int = 1) -> None:
    """Emit a :class:`ContractWarning` that points at a caller.

    ``stacklevel``: 1 is the line that calls this function, 2 its caller, as in :func:`warnings.warn`.
    """
    warnings.warn(message, ContractWarning, stacklevel=stacklevel + 1)


class ExtraMissingError(ImportError):
    """An optional dependency is not installed. ``extra``: what to install; ``name``: the module that was looked for."""

    extra: str | None = None


def missing_extra(extra: str, module: str) -> ExtraMissingError:
    """The error to raise when ``module``, which the extra named ``extra`` brings, can't be imported."""
    error = ExtraMissingError(f"import {module}: it is not installed; install it with: pip install 'dmabuf[{extra}]'", name=module)
    error.extra = extra
    return error
