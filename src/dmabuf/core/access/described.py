"""The bytes of a view as its buffer's layout says: ``View.array()`` and ``View.tensor()`` without arguments, and ``View.planes()``."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from dmabuf._native import View
from dmabuf.core.buffer.description import layout_of, part_of
from dmabuf.core.buffer.handle import handle_of
from dmabuf.errors import fail
from dmabuf.layout.arrays import ArraySpec
from dmabuf.layout.image import ImageLayout
from dmabuf.layout.tensor import TensorLayout

if TYPE_CHECKING:
    import numpy as np


def _made(view: View, spec: ArraySpec) -> np.ndarray[Any, Any]:
    try:
        return view.array(spec.dtype, spec.shape, spec.offset, spec.strides)
    except TypeError:
        raise LookupError(f"array: numpy has no {spec.dtype}; give a dtype, such as uint16 for the bits, or use view.tensor()") from None


def array(view: View) -> np.ndarray[Any, Any]:
    """Return the array that the layout of the view's buffer describes, which is known to have one."""
    handle = handle_of(view.obj)
    layout = layout_of(handle)
    if layout is None:
        return view.array("u1")
    specs = layout.specs() if isinstance(layout, TensorLayout) else [spec for spec in layout.specs() if spec.buffer == part_of(handle)]
    if len(specs) != 1:
        raise ValueError(f"array: {handle}: its picture has {len(specs)} planes here: use view.planes()")
    return _made(view, specs[0])


def planes(view: View) -> tuple[np.ndarray[Any, Any], ...]:
    """Return an array for each plane of the picture that is in the view's buffer; ``View.planes`` documents it."""
    handle = handle_of(view.obj)
    layout = layout_of(handle)
    if not isinstance(layout, ImageLayout):
        remedy = "allocate it with layout=, or describe() it"
        raise fail(errno.ENODATA, "planes", handle, remedy, what="it has no layout of a picture")
    if view.nbytes < handle.size:
        raise ValueError("planes: this is a part of the view: take the planes of the whole view")
    return tuple(_made(view, spec) for spec in layout.specs() if spec.buffer == part_of(handle))


def tensor_layout_of(view: View) -> TensorLayout | None:
    """Return the layout of the view's buffer if it is a tensor's, and the view shows the whole buffer."""
    handle = handle_of(view.obj)
    layout = layout_of(handle)
    return layout if isinstance(layout, TensorLayout) and view.nbytes >= handle.size else None
