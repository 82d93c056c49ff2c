"""``access``: blocks of several buffers that are granted together."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from dmabuf.core.access.access import Access, arrive_async, locked_here, wait, wait_async
from dmabuf.core.base.clock import monotonic_deadline
from dmabuf.core.buffer.handle import Face, handle_of
from dmabuf.core.contract import Buffer
from dmabuf.core.resv.lock import held_by
from dmabuf.core.resv.ww_mutex import lock_all_until
from dmabuf.core.task.owner import Owner, current
from dmabuf.errors import fail


class ManyAccesses:
    """What :func:`access` returns: a context manager, sync or async, for one use at a time."""

    __slots__ = ("_parts", "_timeout")

    def __init__(self, parts: Sequence[Access], timeout: float | None) -> None:
        self._parts = parts
        self._timeout = timeout

    def __enter__(self) -> tuple[memoryview, ...]:
        until = self._begin()
        owner = current(self._parts[0].handle.domain) if self._parts else None
        try:
            if owner is not None:
                wait(self._parts, owner, self._add(owner, until), until)
                for part in self._parts:
                    part.grant()
            return self._show()
        except BaseException:
            self._abandon()
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: object) -> None:
        failed: Exception | None = None
        for part in reversed(self._parts):
            failed = part.finish(-errno.ECANCELED if kind is not None and part.write else 0) or failed
        if failed is not None:
            try:
                raise failed
            finally:
                del failed

    async def __aenter__(self) -> tuple[memoryview, ...]:
        until = self._begin()
        owner = current(self._parts[0].handle.domain) if self._parts else None
        try:
            if owner is not None:
                pending = await arrive_async(self._parts, owner, until, lambda limit: self._add(owner, limit))
                await wait_async(self._parts, owner, pending, until)
                for part in self._parts:
                    part.grant()
                for part in self._parts:
                    await part.bring(owner)
            return self._show()
        except BaseException:
            self._abandon()
            raise

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        self.__exit__(kind, value, trace)

    def _begin(self) -> int:
        until = monotonic_deadline(self._timeout, "access", "buffers")
        for part in self._parts:
            part.begin()
        return until

    def _add(self, owner: Owner, until: int) -> list[int]:
        for part in self._parts:
            if held_by(part.handle.resv, owner) is not None:
                locked_here(part)
        pending: dict[int, None] = {}
        with lock_all_until((part.handle.resv for part in self._parts), until):
            own: set[int] = set()
            for part in self._parts:
                pending.update(dict.fromkeys(part.add(owner, until, locked=True) or ()))
                own.add(part.fence)
        return [fence for fence in pending if fence not in own]

    def _show(self) -> tuple[memoryview, ...]:
        return tuple(part.show() for part in self._parts)

    def _abandon(self) -> None:
        for part in reversed(self._parts):
            part.abandon()


def _buffers(which: str, given: object) -> tuple[Face, ...]:
    """Return the buffers that a keyword of :func:`access` names."""
    found = (given,) if isinstance(given, Face) or not isinstance(given, Iterable) else tuple(given)
    for buf in found:
        if buf is given or not isinstance(buf, Face):
            hint = ": take range.buf, and range.of(view) in the block" if hasattr(buf, "of") else ""
            raise TypeError(
                f"access: {which} is a list of buffers, as {which}=[a, b], not {'one' if buf is given else 'of'} {type(buf).__name__}{hint}"
            )
    return found


def access(*, read: Sequence[Buffer] = (), write: Sequence[Buffer] = (), timeout: float | None = None) -> ManyAccesses:
    """Read and write several buffers at once, without a deadlock whatever other processes do.

    ``with dmabuf.access(read=[a, b], write=[c]) as (x, y, z)``: one view for each buffer, the read ones first, in the order given.
    ``async with`` works too. The errors come when the block is entered.

    Args:
        read: Buffers to read.
        write: Buffers to write, which includes reading.
        timeout: Seconds to wait; None waits forever.

    Raises:
        InvalidError: A buffer is named twice (EINVAL).
        CrossDomainError: The buffers belong to several domains (EXDEV).
        ClosedError: A handle is closed (EBADF).
        DmaBufTimeout: A block of another process did not end in time (ETIMEDOUT).
        DeadlockError: This thread or task is already inside a block of one of them, or another task of this thread is, and the wait would
            stop it (EDEADLK).
        OwnerDeadError, CanceledError: The last writer of a buffer to read died or raised (EOWNERDEAD, ECANCELED).
        TypeError: ``read`` or ``write`` is no list of buffers. For ranges see ``BufferRange.of``.
    """
    reads, writes = _buffers("read", read), _buffers("write", write)
    parts = [_part(buf, False, timeout) for buf in reads] + [_part(buf, True, timeout) for buf in writes]
    if len({part.buf for part in parts}) != len(parts):
        raise fail(errno.EINVAL, "access", "buffers", "name each buffer once; write includes reading", what="a buffer is named twice")
    if len({part.handle.domain for part in parts}) > 1:
        remedy = "use one block for the buffers of each domain"
        raise fail(errno.EXDEV, "access", "buffers", remedy, what="they belong to several domains")
    return ManyAccesses(parts, timeout)


def _part(buf: Face, write: bool, timeout: float | None) -> Access:
    handle = handle_of(buf)
    return Access(handle.face(), handle, write, timeout)
