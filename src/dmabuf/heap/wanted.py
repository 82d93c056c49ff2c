"""What a caller of ``allocate`` asks for: a number of bytes, a layout, or a shape and a type."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from dmabuf.errors import fail
from dmabuf.heap import budget
from dmabuf.layout.image import ImageLayout
from dmabuf.layout.stored import Layout
from dmabuf.layout.tensor import TensorLayout


def wanted(size: int | None, layout: Layout | None, shape: Sequence[int] | int | None, dtype: Any) -> tuple[int, Layout]:
    """Return the bytes and the layout of one buffer.

    Raises:
        InvalidError: Two layouts, half of one, one of several buffers, or a size that is too small for it (EINVAL).
        TypeError: The layout is not a layout.
    """
    if layout is not None and (shape is not None or dtype is not None):
        raise _refused("a layout", "pass a layout, or shape= and dtype=", "a shape or a dtype is given too")
    if layout is None:
        if shape is None or dtype is None:
            missing = "shape" if shape is None else "dtype"
            raise _refused("a tensor", f"pass {missing}= too, as in allocate(shape=(3, 224, 224), dtype='float32')", f"it has no {missing}")
        layout = TensorLayout(dtype, shape)  # type: ignore[arg-type]  # checked there
    if not isinstance(layout, (ImageLayout, TensorLayout)):
        raise TypeError(f"allocate: layout is an ImageLayout or a TensorLayout, not {type(layout).__name__}")
    if len(layout.sizes) > 1:
        raise _refused(
            "a layout", "call dmabuf.allocate_planes(), which makes one for each", f"it is spread over {len(layout.sizes)} buffers"
        )
    need = layout.sizes[0]
    if need == 0 and size is None:
        what = "it has no elements, and a buffer has a byte at least"
        raise _refused(f"shape {getattr(layout, 'shape', ())}", "give each dimension at least 1, or pass a size too", what)
    if size is None:
        return need, layout
    size = budget.whole(size, "allocate: size")
    if size < need:
        raise _refused(f"{size} bytes", f"ask for at least {need} bytes, or leave the size out", f"the layout needs {need} bytes")
    return size, layout


def _refused(obj: str, remedy: str, what: str) -> OSError:
    return fail(errno.EINVAL, "allocate", obj, remedy, what=what)
