"""Any layout, from the bytes that it was packed into."""

from __future__ import annotations

from dmabuf.layout.image import ImageLayout
from dmabuf.layout.packing import Kind, kind_of
from dmabuf.layout.tensor import TensorLayout

Layout = ImageLayout | TensorLayout


def unpack(data: bytes) -> Layout:
    """Return the layout whose bytes these are.

    Raises:
        InvalidError: They are not the bytes of a layout, or its numbers don't fit together (EINVAL).
    """
    return ImageLayout.unpack(data) if kind_of(data) is Kind.IMAGE else TensorLayout.unpack(data)
