"""What the bytes of a buffer mean: its layout, which lives in the domain beside its record and so in every process that has the buffer.

A buffer gets a layout when it is allocated, or later by ``describe``, and keeps it: as its size, it never changes. A picture may be spread
over several buffers. Each of them has the whole layout, and knows which part it is.
"""

from __future__ import annotations

import errno

from dmabuf.core.buffer.handle import Handle
from dmabuf.errors import InvalidError, fail
from dmabuf.layout.image import ImageLayout
from dmabuf.layout.stored import Layout, unpack
from dmabuf.layout.tensor import TensorLayout


def layout_of(handle: Handle) -> Layout | None:
    """Return the layout of a buffer, None if it has none.

    Raises:
        ClosedError: The handle is closed (EBADF).
        DmaBufError: The domain's file makes no sense (EUCLEAN).
    """
    handle.check("layout")
    shared = handle.shared
    if shared.layout is None or shared.described is None:
        found = shared.find_layout()
        if found is not None:
            shared.described = _believed(handle, *found)
    return shared.described


def part_of(handle: Handle) -> int:
    """Return which of its picture's buffers a buffer is."""
    return handle.shared.layout[0] if layout_of(handle) is not None and handle.shared.layout is not None else 0


def describe(handle: Handle, layout: Layout, part: int) -> None:
    """Give a buffer its layout.

    Raises:
        ClosedError: The handle is closed (EBADF).
        InvalidError: The buffer is too small for it, or there is no such part (EINVAL).
        ExistsError: It has another layout (EEXIST).
        NoSpaceError, NoMemoryError: The domain is full, or its file can't grow (ENOSPC, ENOMEM).
        TypeError: It is not a layout.
    """
    handle.check("describe")
    packed = fitting(layout, part, handle.size, handle)
    if not handle.shared.set_layout(part, packed):
        what = f"it has another layout: {layout_of(handle)}"
        raise fail(errno.EEXIST, "describe", handle, "allocate a buffer for each layout", what=what)


def fitting(layout: Layout, part: int, size: int, obj: object) -> bytes:
    """Return the bytes of a layout that a buffer of this size can have as that part.

    Raises:
        InvalidError: The buffer is too small for it, or there is no such part (EINVAL).
        TypeError: It is not a layout.
    """
    if not isinstance(layout, (ImageLayout, TensorLayout)):
        raise TypeError(f"describe: {obj}: pass an ImageLayout or a TensorLayout, not {type(layout).__name__}")
    sizes = layout.sizes
    if not 0 <= part < len(sizes):
        what = f"the layout has {len(sizes)} buffers, and there is no part {part}"
        raise fail(errno.EINVAL, "describe", obj, f"pass a part from 0 to {len(sizes) - 1}", what=what)
    if sizes[part] > size:
        what = f"the layout needs {sizes[part]} bytes, and the buffer has {size}"
        raise fail(errno.EINVAL, "describe", obj, "allocate a larger buffer, or correct the layout", what=what)
    return layout.pack()


def _believed(handle: Handle, part: int, data: bytes) -> Layout:
    """Return a layout from what the domain's file says, which any process of the user can write."""
    try:
        found = unpack(data)
        fitting(found, part, handle.size, handle)
    except InvalidError as e:
        what = f"the domain file was changed from outside: {e}"
        raise fail(errno.EUCLEAN, "layout", handle, "end the processes that use the domain", what=what) from None
    return found
