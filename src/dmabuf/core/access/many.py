"""``access``: blocks of several buffers that are granted together."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from dmabuf._native import Access, AccessGroup, access_block
from dmabuf.core.access import access as _rules  # noqa: F401  (C calls its rules)
from dmabuf.core.access.range import BufferRange
from dmabuf.core.buffer.handle import Face, handle_of
from dmabuf.core.contract import Buffer
from dmabuf.errors import fail


def _buffers(which: str, given: object) -> tuple[Face | BufferRange, ...]:
    """Return the buffers and ranges that a keyword of :func:`access` names."""
    found = (given,) if isinstance(given, Face | BufferRange) or not isinstance(given, Iterable) else tuple(given)
    for buf in found:
        if buf is given or not isinstance(buf, Face | BufferRange):
            raise TypeError(
                f"access: {which} is a list of buffers, as {which}=[a, b], not {'one' if buf is given else 'of'} {type(buf).__name__}"
            )
    return found


def access(
    *positional: object,
    read: Sequence[Buffer | BufferRange] = (),
    write: Sequence[Buffer | BufferRange] = (),
    timeout: float | None = None,
) -> AccessGroup:
    """Read and write several buffers at once, without a deadlock whatever other processes do.

    ``with dmabuf.access(read=[a, b], write=[c]) as (x, y, z)``: one view for each buffer, the read ones first, in the order given.
    ``async with`` works too. The errors come when the block is entered.

    Args:
        *positional: Nothing: whether a buffer is read or written must be said.
        read: Buffers to read, or ranges, whose views show their part.
        write: Buffers or ranges to write, which includes reading.
        timeout: Seconds to wait; None waits forever.

    Raises:
        InvalidError: A buffer is named twice, also by two of its ranges (EINVAL).
        CrossDomainError: The buffers belong to several domains (EXDEV).
        ClosedError: A handle is closed (EBADF).
        DmaBufTimeout: A block of another process did not end in time (ETIMEDOUT).
        DeadlockError: This thread or task is already inside a block of one of them, or another task of this thread is, and the wait would
            stop it (EDEADLK).
        OwnerDeadError, CanceledError: The last writer of a buffer to read died or raised (EOWNERDEAD, ECANCELED).
        TypeError: ``read`` or ``write`` is no list of buffers.
    """
    if positional:
        raise TypeError("access: say which buffers are read and which are written, as access(read=[a], write=[b])")
    reads, writes = _buffers("read", read), _buffers("write", write)
    parts = [_part(buf, False, timeout) for buf in reads] + [_part(buf, True, timeout) for buf in writes]
    if len({part.buf for part in parts}) != len(parts):
        remedy = "name each buffer once; write includes reading, and BufferRange.of() takes several ranges out of one view"
        raise fail(errno.EINVAL, "access", "buffers", remedy, what="a buffer is named twice")
    if len({part.handle.domain for part in parts}) > 1:
        remedy = "use one block for the buffers of each domain"
        raise fail(errno.EXDEV, "access", "buffers", remedy, what="they belong to several domains")
    return AccessGroup(tuple(parts), timeout)


def _part(buf: Face | BufferRange, write: bool, timeout: float | None) -> Access:
    if isinstance(buf, BufferRange):
        return access_block(buf.buf, handle_of(buf.buf), write, timeout, buf.offset, buf.length)
    handle = handle_of(buf)
    return access_block(handle.face(), handle, write, timeout)
