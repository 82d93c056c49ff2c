"""``StreamReader``: the frames of a stream, one after the other."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final, Self

from dmabuf._native import SR_LATEST, SR_MEMBER, SR_QUEUE, SR_REDELIVER, Frame
from dmabuf.errors import DmaBufError, fail
from dmabuf.stream import awaited
from dmabuf.stream import rules as _rules  # noqa: F401  (C calls its rules)
from dmabuf.stream.parts import Part, Ring
from dmabuf.stream.readable import Readable
from dmabuf.stream.refusals import failed

if TYPE_CHECKING:
    from types import TracebackType

_ROLES: Final = {"queue": SR_QUEUE, "latest": SR_LATEST}


class StreamReader(Part):
    """A reader of a stream, made by ``Stream.reader()``: an iterator of frames.

    A frame is over when the next one is taken, when its block ends (``with reader.next() as frame``), or when the reader is closed. One
    thread at a time uses a reader.

    Attributes:
        lost: Frames that it has passed over: of a "latest" reader those that it came too late for, of another one those that were gone.
        lag: Frames that are published and that it has not had.
    """

    def __init__(
        self, ring: Ring, policy: str, group: str | None, group_redeliver: bool, history: int, newest: bool, wait_for_producer: bool
    ) -> None:
        self._readable: Readable | None = None
        self.waits_for_producer = wait_for_producer
        self.attach(ring)
        self.policy = policy
        self.group = group
        role = _ROLES[policy] if group is None else SR_REDELIVER if group_redeliver else SR_MEMBER
        number = 0 if group is None else group_number(group)
        error = self._join(role, number, newest, history, wait_for_producer)
        if error in (errno.EUSERS, errno.ENOSPC) and self.domain.reap_dead():
            error = self._join(role, number, newest, history, wait_for_producer)
        if error == errno.EINVAL:
            what = f"group {group!r} has members with group_redeliver={not group_redeliver}"
            raise fail(error, "reader", self, "have all members of a group agree on group_redeliver", what=what)
        if error:
            failed(self, "reader", error)

    if TYPE_CHECKING:

        def __iter__(self) -> Self: ...
        def __next__(self) -> Frame: ...
        def next(self, timeout: float | None = None) -> Frame: ...

    # ---- in any loop ----

    def fileno(self) -> int:
        """Return a descriptor that is readable while ``next()`` would not wait, for ``select`` and any loop. The reader closes it."""
        if self.closed:
            failed(self, "fileno", errno.EBADF)
        if self._readable is None:
            self._readable = Readable(self)
        if not self._watched:  # last, so that the next call goes on where a signal handler raised in this one
            self._readable.look()
            self._watched = True
        return self._readable.fileno()

    def told_taken(self, vain: int) -> None:
        """See the rule: a frame was taken, or there was none."""
        if self._readable is not None:
            self._readable.taken(vain)

    def anext(self, timeout: float | None = None) -> Awaitable[Frame]:
        """Return the next frame, in a task of asyncio or trio; otherwise as :meth:`next`."""
        return awaited.next_frame(self, timeout)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Frame:
        try:
            return await awaited.next_frame(self, None)
        except DmaBufError as e:
            if e.errno != errno.ENODATA:
                raise
            raise StopAsyncIteration from None

    def close(self) -> None:
        """Give everything back, and leave the stream. What is kept of frames gets a private copy."""
        self._close()
        readable, self._readable = self._readable, None
        if readable is not None:
            readable.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a StreamReader belongs to one process: pass the Stream on, and make a reader there")


def group_number(name: str) -> int:
    """Return the number by which a group of this name is known in the stream, never 0."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") or 1
