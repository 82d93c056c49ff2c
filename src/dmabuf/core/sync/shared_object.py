"""What ``SwSync`` and ``TimelineSemaphore`` have in common: an object that is a descriptor of shared state, a :class:`SharedFile`."""

from __future__ import annotations

import errno
from typing import Any, ClassVar, Self

from dmabuf._native import OwnedFd
from dmabuf.core.base.closing import Closing
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import numbered
from dmabuf.domain.shared_file import SharedFile
from dmabuf.errors import DmaBufError, fail


class SharedObject(Closing):
    """An object whose state all holders of its descriptor share.

    Using a closed one raises ClosedError (EBADF), except ``close()``, ``closed`` and ``repr``.
    """

    __slots__ = ("__weakref__", "_file", "closed", "domain")

    KIND: ClassVar[str]  # of the file
    NOUN: ClassVar[str]  # in messages

    _file: SharedFile
    domain: Domain
    closed: bool

    def _set(self, file: SharedFile) -> None:
        """Begin with a file, which this object owns from now on."""
        self._file, self.domain, self.closed = file, file.domain, False

    @classmethod
    def _of(cls, file: SharedFile) -> Self:
        self = cls.__new__(cls)
        try:
            self._set(file)
        except BaseException:
            file.close()
            raise
        return self

    @classmethod
    def from_fd(cls, fd: int, *, domain: Domain | None = None) -> Self:
        """Return the object behind a descriptor that came as a plain number. The caller keeps the descriptor.

        Args:
            fd: The descriptor.
            domain: The domain to look in; None means one that this process has open, or the user's default domain.

        Raises:
            ClosedError: ``fd`` is not open (EBADF).
            InvalidError: It is something else (EINVAL).
            CrossDomainError: It belongs to another domain (EXDEV).
            DmaBufError: Another program wrote to it (EUCLEAN), or no descriptor is free (EMFILE).
        """
        return cls._of(SharedFile.of_fd(fd, cls.KIND, domain, "from_fd"))

    @classmethod
    def from_owned_fd(cls, fd: OwnedFd, domain: Domain | None = None) -> Self:
        """Return the object behind a descriptor as :meth:`from_fd` does, which keeps the descriptor unless this raises."""
        return cls._of(SharedFile.from_owned_fd(fd, cls.KIND, domain, "from_fd"))

    def _check(self, operation: str) -> None:
        if self.closed:
            raise fail(errno.EBADF, operation, self, "make or receive it again", what=f"the {self.NOUN} is closed")

    def fileno(self) -> int:
        """Return the descriptor, which the object keeps owning. It is for passing on, not for polling.

        Raises:
            ClosedError: The object is closed (EBADF).
        """
        self._check("fileno")
        return self._file.fd

    @numbered
    def dup(self) -> OwnedFd:
        """Return a new descriptor, which the caller owns.

        Raises:
            ClosedError: The object is closed (EBADF).
            DmaBufError: No descriptor is free (EMFILE).
        """
        self._check("dup")
        try:
            return self._file.dup()
        except DmaBufError:
            raise
        except OSError as e:
            raise fail(e.errno or errno.EIO, "dup", self, "raise RLIMIT_NOFILE or close descriptors") from None

    def __reduce__(self) -> Any:
        name = type(self).__name__
        raise TypeError(f"a {name} can't be pickled to bytes: pass it through multiprocessing, or send it with dmabuf.send()")
