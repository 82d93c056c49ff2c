"""What ``SwSync`` and ``TimelineSemaphore`` have in common: an object that is a descriptor of shared state, a :class:`SharedFile`."""

from __future__ import annotations

import errno
import os
from typing import Any, ClassVar, Self

from dmabuf.core.base.closing import Closing
from dmabuf.domain.domain import Domain
from dmabuf.domain.shared_file import SharedFile
from dmabuf.errors import fail


class SharedObject(Closing):
    """An object whose state every holder of its descriptor shares. Closed: EBADF, except ``close()``, ``closed`` and ``repr``."""

    __slots__ = ("__weakref__", "_file", "closed", "domain")

    KIND: ClassVar[str]  # of the file
    NOUN: ClassVar[str]  # in messages

    _file: SharedFile
    domain: Domain
    closed: bool

    def _set(self, file: SharedFile) -> None:
        """Begin with a file, which is ours from now on."""
        self._file, self.domain, self.closed = file, file.domain, False

    @classmethod
    def _of(cls, file: SharedFile, *, callers_fd: bool) -> Self:
        self = cls.__new__(cls)
        try:
            self._set(file)
        except BaseException:
            if callers_fd:
                file.fd = -1
            file.close()
            raise
        return self

    @classmethod
    def from_fd(cls, fd: int, *, domain: Domain | None = None) -> Self:
        """The object behind a descriptor that came as a plain number; the caller keeps the descriptor.

        Errors: EBADF no open fd; EINVAL something else; EXDEV one of another domain; EUCLEAN somebody else wrote to it; EMFILE.
        """
        return cls._of(SharedFile.of_fd(fd, cls.KIND, domain, "from_fd"), callers_fd=False)

    @classmethod
    def from_owned_fd(cls, fd: int, domain: Domain | None = None) -> Self:
        """:meth:`from_fd` that takes over the fd, unless it raises."""
        return cls._of(SharedFile.from_owned_fd(fd, cls.KIND, domain, "from_fd"), callers_fd=True)

    def _check(self, operation: str) -> None:
        if self.closed:
            raise fail(errno.EBADF, operation, self, "make or receive it again", what=f"the {self.NOUN} is closed")

    def fileno(self) -> int:
        """The descriptor, borrowed. It is for handing on, not for polling. Errors: EBADF."""
        self._check("fileno")
        return self._file.fd

    def dup(self) -> int:
        """A new descriptor, owned by the caller. Errors: EBADF; EMFILE."""
        self._check("dup")
        try:
            return os.dup(self._file.fd)
        except OSError as e:
            raise fail(e.errno or errno.EIO, "dup", self, "raise RLIMIT_NOFILE or close descriptors") from None

    def __reduce__(self) -> Any:
        name = type(self).__name__
        raise TypeError(f"a {name} can't be pickled to bytes: pass it through multiprocessing, or send it with dmabuf.send()")
