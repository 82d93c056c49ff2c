"""``pending``: a buffer in the place of one that could not be received, where an error would stop a pool.

The threads of a ``multiprocessing.Pool`` that read results, and its workers, end at an OSError while they unpickle, and then all callers
wait for ever. An executor breaks. So there an object stands for the buffer. Its first use asks for the descriptor again, and raises what
happened if that fails: nothing is lost when only a descriptor was missing, and the error of a worker that was killed names it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from dmabuf.core.buffer.handle import face_of, handle_of
from dmabuf.core.buffer.ref import BufferRef
from dmabuf.core.buffer.shared import MEMFD, SharedBuffer
from dmabuf.core.dma_buf import BufHandle, DmaBuf
from dmabuf.domain.domain import Domain
from dmabuf.domain.records import KIND_BUFFER
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.fetching import said


class _PendingHandle(BufHandle):
    """A handle whose descriptor is missing: every use of it asks for it."""

    __slots__ = ("_again", "_what")

    _again: Callable[[], DmaBuf] | None
    _what: str

    def check(self, operation: str) -> int:
        if self.fd < 0 and self._again is not None:
            self._receive(operation, self._again)
        return super().check(operation)

    def _receive(self, operation: str, again: Callable[[], DmaBuf]) -> None:
        try:
            made = again()
        except DmaBufError as e:
            raise fail(e.errno or errno.EIO, operation, self._what, e.remedy, what=said(e)) from None
        other = handle_of(made)
        other.shared.enter(self)
        self.shared, self.size, self._life = other.shared, other.size, other.shared.shm.life
        self.fd, self.left = other.detach().take(), False
        self._again = None

    def close(self) -> None:
        self._again = None
        super().close()


def pending(domain: Domain, token: BufferRef, again: Callable[[], DmaBuf]) -> DmaBuf:
    """Return a buffer that calls ``again`` when it is used."""
    handle = object.__new__(_PendingHandle)
    handle.shared = SharedBuffer(domain, token.dev, token.ino, token.size, token.nonce, MEMFD, MEMFD, KIND_BUFFER)
    handle.size, handle.domain, handle.fd, handle.left = token.size, domain, -1, True
    handle.path = handle.device_view = handle.known_resv = handle.polls = None
    handle.leaving, handle.ending, handle._life = False, None, 0
    handle._again, handle._what = again, str(token)
    return face_of(DmaBuf, handle)
