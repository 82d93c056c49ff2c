"""``BufferRange``: a part of a buffer as one value, (buffer, offset, length), so that no caller forgets the offset.

A pool gives out parts of one buffer, a picture has its planes at offsets, and a driver fills only a part of a frame. A holder of the part
gets its bytes and no others, from ``read()``, ``write()`` and ``mmap()``, in this process and in another one: a range is sent as a buffer
is.

Fences belong to the buffer: accesses to two ranges of one buffer exclude each other like accesses to all of it. A range borrows the handle
that it was made of, and closes nothing. To close a range that was received, close its ``.buf``.
"""

from __future__ import annotations

import errno
from typing import Any, Self

from dmabuf._native import Access, Mapping, View, access_block
from dmabuf.core.access import access as _rules  # noqa: F401  (C calls its rules)
from dmabuf.core.buffer.handle import PAGE, Face, handle_of
from dmabuf.core.contract import AnyBuffer
from dmabuf.domain.guards import finished
from dmabuf.errors import fail


class BufferRange:
    """A part of a buffer, made by ``DmaBuf.export_range`` and by slicing another range.

    ``buf``: the ``DmaBuf``. ``offset``, ``length``: bytes, which need no alignment.
    """

    __slots__ = ("buf", "length", "offset")

    def __init__(self, buf: AnyBuffer, offset: int = 0, length: int | None = None) -> None:
        """Make a range.

        Args:
            buf: A handle of the buffer, which the range borrows.
            offset: The first byte.
            length: The number of bytes; None means the rest of the buffer.

        Raises:
            ClosedError: The handle is closed (EBADF).
            InvalidError: The range is empty, or not within the buffer (EINVAL).
        """
        given: object = buf
        if not isinstance(given, Face):
            raise TypeError(f"range: buf is a DmaBuf, not {type(given).__name__}")
        size = buf.size
        length = size - offset if length is None else length
        if not (offset >= 0 and length > 0 and offset + length <= size):
            what = f"bytes {offset} to {offset + length} are not inside of its {size}"
            raise fail(errno.EINVAL, "range", buf, f"choose 0 <= offset < offset + length <= {size}", what=what)
        self.buf, self.offset, self.length = buf, offset, length

    def __repr__(self) -> str:
        return f"<dmabuf.BufferRange {self.length} bytes at {self.offset} of {self.buf!r}>"

    def __len__(self) -> int:
        return self.length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BufferRange) and (self.buf, self.offset, self.length) == (other.buf, other.offset, other.length)

    def __hash__(self) -> int:
        return hash((self.buf, self.offset, self.length))

    def __reduce__(self) -> Any:
        return BufferRange, (self.buf, self.offset, self.length)

    def __getitem__(self, part: slice) -> BufferRange:
        """Return a part of the range, by offsets from its start.

        Raises:
            InvalidError: The part is empty, or the slice has a step (EINVAL).
            TypeError: ``part`` is not a slice.
        """
        if not isinstance(part, slice):
            raise TypeError(f"a range is sliced, as r[16:32], not indexed by {type(part).__name__}: read its bytes in a read() block")
        start, stop, step = part.indices(self.length)
        if step != 1 or stop <= start:
            what = f"the slice has the step {step}" if step != 1 else "the slice is empty"
            raise fail(errno.EINVAL, "range", self, "take a slice with at least one byte, and without a step", what=what)
        return BufferRange(self.buf, self.offset + start, stop - start)

    def of(self, view: View) -> View:
        """Return this range of a view of the whole buffer, such as ``dmabuf.access`` gives.

        Raises:
            InvalidError: ``view`` is not a view of the whole buffer (EINVAL).
        """
        if view.nbytes != self.buf.size or view.ndim != 1 or view.itemsize != 1:
            raise fail(
                errno.EINVAL, "range", self, "pass the view that the block gave", what=f"a view of {view.nbytes} bytes is not its buffer's"
            )
        return view[self.offset : self.offset + self.length]

    def read(self, timeout: float | None = None) -> Access:
        """Return what ``DmaBuf.read`` returns, with a view of the range."""
        return self._block(False, timeout)

    def write(self, timeout: float | None = None) -> Access:
        """Return what ``DmaBuf.write`` returns, with a view of the range. An exception leaves the whole buffer torn."""
        return self._block(True, timeout)

    def _block(self, write: bool, timeout: float | None) -> Access:
        return access_block(self.buf, handle_of(self.buf), write, timeout, self.offset, self.length)

    def mmap(self, writable: bool = True) -> RangeMapping:
        """Map the pages that the range lies in; ``view`` is the range. Raises what ``DmaBuf.mmap`` raises."""
        return RangeMapping(self, writable)


class RangeMapping:
    """A mapping of the pages of a range. ``view``: the range; ``mapping``: the pages, from ``page_offset`` of the buffer on."""

    def __init__(self, part: BufferRange, writable: bool) -> None:
        self.page_offset = part.offset // PAGE * PAGE
        lead = part.offset - self.page_offset
        whole = part.buf.size // PAGE * PAGE
        end = min(-(-(part.offset + part.length) // PAGE) * PAGE, max(whole, part.offset + part.length))
        self.mapping: Mapping = part.buf.mmap(self.page_offset, end - self.page_offset, writable)
        self.view = memoryview(self.mapping)[lead : lead + part.length]

    def close(self) -> None:
        """Unmap the pages. Closing twice has no effect.

        Raises:
            BufferError: The view, or an object made from it, is in use.
        """
        self.view.release()
        self.mapping.close()

    def __enter__(self) -> Self:
        return self

    @finished
    def __exit__(self, *_: object) -> None:
        self.close()
