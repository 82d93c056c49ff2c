"""The errors and warnings of the package. Every error is an ``OSError`` with the kernel's errno, and all have one base class.

::

    OSError
    └── DmaBufError                  every error of a buffer, fence, lock or domain; ``errno`` tells them apart
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
    └── ContractError                where the kernel has a BUG: there is no defined way to go on
    RuntimeWarning
    ├── KeptWarning                  something that was made from a view outlives its block, and was given a private copy
    └── ContractWarning              where the kernel has a WARN and goes on as documented; emitted before any side effect
    ImportError
    └── ExtraMissingError            an optional dependency is not installed; names the extra that installs it

:func:`fail` makes every ``DmaBufError``. It chooses the class by errno, and writes a message of the form ``operation: object: what happened
(ERRNO); what to do``. An errno without its own class gives a plain ``DmaBufError``. The errno, the message and the parts of the message
survive pickling, so an error means the same in another process.

Source: errno numbers and severities from semantics 0.2; the builtin twins from PEP 3151.
"""

from __future__ import annotations

import contextlib
import errno as _errno
import os
import warnings
from collections.abc import Iterator
from typing import Final

from dmabuf._native import errors_by

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
    "KeptWarning",
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
    "text_of",
]


class DmaBufError(OSError):
    """An operation failed with an errno.

    ``errno``: the kernel's positive number. ``strerror`` and ``str()``: the whole message. ``operation`` and ``remedy``: its parts, for
    programs; None if the error was not made by :func:`fail`.
    """

    operation: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        # OSError would add "[Errno N]", but the message has the name of the errno.
        return super().__str__() if self.strerror is None else self.strerror


class AlreadyHeldError(DmaBufError, BlockingIOError):
    """The same acquire context holds the lock already (EALREADY)."""


class BrokenConnectionError(DmaBufError, BrokenPipeError):
    """The other end of a socket is closed or shut down (EPIPE, ESHUTDOWN)."""


class BusyError(DmaBufError):
    """The object is in use in a way that excludes the operation (EBUSY)."""


class CanceledError(DmaBufError):
    """The work is not complete, because its writer raised or its fence was canceled (ECANCELED)."""


class ClosedError(DmaBufError):
    """The object is closed, or the number is not an open descriptor (EBADF)."""


class ConnectionAbortError(DmaBufError, ConnectionAbortedError):
    """A connection was aborted (ECONNABORTED)."""


class ConnectionLostError(DmaBufError, ConnectionResetError):
    """The other end of a connection was closed while data was in flight (ECONNRESET)."""


class CrossDomainError(DmaBufError):
    """The buffer or fence belongs to another domain (EXDEV)."""


class DeadlockError(DmaBufError):
    """The wait would never end, or an older context holds the lock (EDEADLK)."""


class DirectoryExpectedError(DmaBufError, NotADirectoryError):
    """A path that must be a directory is something else (ENOTDIR)."""


class DmaBufTimeout(DmaBufError, TimeoutError):
    """A wait timed out, and nothing was added or changed (ETIMEDOUT; ETIME where the kernel says so)."""


class ExistsError(DmaBufError, FileExistsError):
    """An object of this name exists already (EEXIST)."""


class InterruptedWaitError(DmaBufError, InterruptedError):
    """A signal ended an interruptible wait (EINTR)."""


class InvalidError(DmaBufError):
    """The operation refuses an argument (EINVAL)."""


class NoChildError(DmaBufError, ChildProcessError):
    """There is no such child process (ECHILD)."""


class NoDeviceError(DmaBufError):
    """The exporter, heap or process behind the object is gone or missing (ENODEV)."""


class NoListenerError(DmaBufError, ConnectionRefusedError):
    """No process listens at the address (ECONNREFUSED)."""


class NoMemoryError(DmaBufError):
    """There is not enough memory (ENOMEM)."""


class NoProcessError(DmaBufError, ProcessLookupError):
    """There is no such process (ESRCH)."""


class NoSpaceError(DmaBufError):
    """The domain or its file system is full (ENOSPC)."""


class NotFoundError(DmaBufError, FileNotFoundError):
    """There is no such buffer, fence or file (ENOENT)."""


class NotPermittedError(DmaBufError, PermissionError):
    """The caller is not the owner, or doesn't have the rights (EPERM, EACCES)."""


class NotUniqueError(DmaBufError):
    """Several buffers have this name (ENOTUNIQ)."""


class OwnerDeadError(DmaBufError):
    """The process that owned the fence or the access died (EOWNERDEAD)."""


class UnexpectedDirectoryError(DmaBufError, IsADirectoryError):
    """A path that must be a file is a directory (EISDIR)."""


class WouldBlockError(DmaBufError, BlockingIOError):
    """The operation can't complete now, and the caller asked it not to wait (EAGAIN, EINPROGRESS)."""


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

# Numbers with two names, for which errno.errorcode has the name that the kernel doesn't use.
_KERNEL_NAMES: Final = {_errno.EAGAIN: "EAGAIN", _errno.EDEADLK: "EDEADLK", _errno.EOPNOTSUPP: "EOPNOTSUPP"}


def errno_name(errno_value: int) -> str:
    """Return the name of an errno as in the headers, ``errno 4095`` for a number without a name."""
    return _KERNEL_NAMES.get(errno_value) or _errno.errorcode.get(errno_value, f"errno {errno_value}")


def fail(errno_value: int, operation: str, obj: object, remedy: str | None = None, *, what: str | None = None) -> DmaBufError:
    """Return the error to raise when ``operation`` on ``obj`` fails with an errno.

    Args:
        errno_value: The errno, positive. The errors of fences are negative: negate them.
        operation: What the caller asked for.
        obj: The object, named by its ``str()``. No reference to it is kept.
        remedy: What the caller can do, beginning with an imperative verb.
        what: What happened, a clause without a period, instead of the C library's text. Every EINVAL needs it, because "Invalid argument"
            does not tell which argument is wrong.

    Returns:
        The error, so that ``raise fail(...)`` shows the flow to readers and type checkers.

    Raises:
        ValueError: ``errno_value`` is not positive.
    """
    if errno_value <= 0:
        raise ValueError(f"fail: errno {errno_value}: not a positive number; negate the errors of fences")
    if what is None:  # what a program passes says what; this is an answer of the kernel that is passed on
        what = "the kernel refuses an argument" if errno_value == _errno.EINVAL else os.strerror(errno_value)
    message = f"{operation}: {obj}: {what} ({errno_name(errno_value)})"
    if remedy:
        message += f"; {remedy}"
    return rebuilt(errno_value, message, operation, remedy)


def rebuilt(errno_value: int, message: str, operation: str | None, remedy: str | None) -> DmaBufError:
    """Return the error that :func:`fail` made in another process, from its parts."""
    error = _CLASSES.get(errno_value, DmaBufError)(errno_value, message)
    error.operation, error.remedy = operation, remedy
    return error


errors_by(fail)


def text_of(error: BaseException) -> str:
    """Return ``str(error)``, or that it has no text: the ``__str__`` of a program's exception may itself raise."""
    try:
        return str(error)
    except (Exception, SystemExit) as e:
        return f"(its str() raised {type(e).__name__})"


@contextlib.contextmanager
def needing_descriptors(operation: str, obj: object) -> Iterator[None]:
    """Raise EMFILE and ENFILE of the system calls in the block as :func:`fail` would."""
    try:
        yield
    except DmaBufError:
        raise
    except OSError as e:
        if e.errno not in (_errno.EMFILE, _errno.ENFILE):
            raise
        raise fail(e.errno, operation, obj, "raise RLIMIT_NOFILE or close descriptors") from None


class ContractError(RuntimeError):
    """The caller broke a rule after which the kernel can't go on (its BUG). Nothing was done."""


class ContractWarning(RuntimeWarning):
    """The caller broke a rule that the kernel reports and survives (its WARN). It is emitted before any side effect."""


class KeptWarning(ResourceWarning):
    """Something that was made from the view of a block outlived it: it was given a private copy. The text names who keeps it."""


def contract_warning(message: str, stacklevel: int = 1) -> None:
    """Emit a :class:`ContractWarning` that points at a caller.

    Args:
        message: The text.
        stacklevel: 1 for the line that calls this function, 2 for its caller, as in :func:`warnings.warn`.
    """
    warnings.warn(message, ContractWarning, stacklevel=stacklevel + 1)


class ExtraMissingError(ImportError):
    """An optional dependency is not installed. ``extra``: the extra to install; ``name``: the module that is missing."""

    extra: str | None = None


def missing_extra(extra: str, module: str) -> ExtraMissingError:
    """Return the error to raise when ``module``, which the extra named ``extra`` installs, can't be imported."""
    remedy = f"install it with: pip install 'dmabuf[{extra}]' (in a clone: pip install '.[{extra}]')"
    error = ExtraMissingError(f"import {module}: it is not installed; {remedy}", name=module)
    error.extra = extra
    return error
