"""``View.tensor()``: a tensor of torch over the bytes of a view."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from dmabuf._native import View
from dmabuf.core.access.described import tensor_layout_of
from dmabuf.errors import missing_extra


def tensor(
    view: View,
    dtype: Any = None,
    shape: Sequence[int] | int | None = None,
    offset: int = 0,
    strides: Sequence[int] | int | None = None,
    *,
    copy: bool = False,
) -> Any:
    """Return a tensor of a view's bytes; ``View.tensor`` documents it."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise missing_extra("torch", "torch") from None
    if dtype is None and shape is None and strides is None and not offset and (layout := tensor_layout_of(view)) is not None:
        spec = layout.specs()[0]
        shape, strides, offset, dtype = spec.shape, spec.strides, spec.offset, getattr(torch, layout.dtype, None)
        if dtype is None:
            raise LookupError(f"tensor: torch has no {layout.dtype}; give a dtype")
    kind = torch.uint8 if dtype is None else dtype
    if not isinstance(kind, torch.dtype):
        raise TypeError(f"tensor: dtype is a torch.dtype, as torch.float32, not {type(dtype).__name__}")
    if view.readonly and not copy:
        raise BufferError("tensor: the view is read-only, and torch has no read-only tensors: pass copy=True, or use a write() block")
    if not 0 <= offset <= view.nbytes:
        raise ValueError(f"tensor: the offset {offset} is not within the {view.nbytes} bytes of the view: give one that is")
    flat = torch.frombuffer(bytearray(view), dtype=torch.uint8) if copy else torch.from_dlpack(view)
    item = kind.itemsize
    # torch wants an offset in items of the type, and whole items; the bytes before and behind are none of the tensor's.
    flat = flat[offset : offset + (view.nbytes - offset) // item * item].view(kind)
    if shape is None and strides is None:
        return flat
    sizes = [shape] if isinstance(shape, int) else [len(flat)] if shape is None else list(shape)
    if min(sizes, default=0) < -1 or sizes.count(-1) > (strides is None):
        raise ValueError(f"tensor: the shape {tuple(sizes)} has negative dimensions: give the whole shape")
    if strides is None:
        count = 1
        for size in sizes:
            count *= size
        if -1 in sizes:
            return flat.reshape(sizes)
        if not 0 <= count <= len(flat):
            raise ValueError(f"tensor: the shape {tuple(sizes)} reaches beyond the {view.nbytes} bytes of the view: give a smaller one")
        return flat[:count].reshape(sizes)
    ways = [strides] if isinstance(strides, int) else list(strides)
    if len(ways) != len(sizes):
        raise ValueError(f"tensor: {len(ways)} strides for {len(sizes)} dimensions: give one for each")
    if any(way % item or way < 0 for way in ways):
        raise ValueError(f"tensor: torch takes strides that are positive multiples of the {item} bytes of an item; take view.array()")
    if all(sizes) and sum((size - 1) * (way // item) for size, way in zip(sizes, ways, strict=True)) >= len(flat):
        raise ValueError(f"tensor: this shape, with its strides, reaches beyond the {view.nbytes} bytes of the view: give a smaller one")
    return flat.as_strided(sizes, [way // item for way in ways])
