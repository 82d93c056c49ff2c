"""The arrays that a layout describes, over memory as it is: nothing is copied or repacked."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dmabuf.errors import fail, missing_extra

if TYPE_CHECKING:
    import numpy as np

Views = Any
"""A buffer of bytes, such as ``read()`` and ``write()`` give, or a list or tuple of them, one for each of a picture's buffers."""


class ArraySpec(NamedTuple):
    """One array: in which buffer it is, and what numpy's ``ndarray`` takes for it. ``dtype``: as ``"<u2"`` or ``"float32"``."""

    buffer: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def bytes_of(views: Views) -> list[memoryview]:
    """Return the bytes of each view.

    Raises:
        InvalidError: The bytes of a view are not one behind the other (EINVAL).
    """
    found = []
    for view in views if isinstance(views, (list, tuple)) else (views,):
        bare = memoryview(view)
        if not bare.c_contiguous:
            what = "the bytes of the view are not one behind the other"
            raise fail(errno.EINVAL, "array", "layout", "pass the view that the block gave", what=what)
        found.append(bare if bare.format == "B" and bare.ndim == 1 else bare.cast("B"))
    return found


def arrays(specs: Sequence[ArraySpec], views: Sequence[memoryview]) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the arrays over the views, which are known to be large enough.

    Raises:
        ExtraMissingError: numpy is not installed.
        LookupError: numpy doesn't have the type.
    """
    try:
        import numpy
    except ImportError:
        raise missing_extra("numpy", "numpy") from None
    made = []
    for spec in specs:
        try:
            dtype = numpy.dtype(spec.dtype)
        except TypeError:
            raise LookupError(f"array: layout: numpy has no {spec.dtype}; read the bytes as uint8 or uint16, or use torch") from None
        made.append(numpy.ndarray(spec.shape, dtype, views[spec.buffer], spec.offset, spec.strides))
    return tuple(made)
