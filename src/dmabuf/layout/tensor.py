"""``TensorLayout``: the numbers in a buffer as an array with a type, a shape and strides."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from dmabuf.layout import checks, packing
from dmabuf.layout.arrays import ArraySpec, Views, arrays, bytes_of

if TYPE_CHECKING:
    import numpy as np

MAX_DIMENSIONS: Final = 12
# The names are those of numpy and torch. A packed layout has a type's place in this list, so new ones come at its end.
DTYPES: Final = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
_ORDER: Final = tuple(DTYPES)
_PYTHON: Final = {"int": "int64", "float": "float64", "complex": "complex128"}
_SHORT: Final = {  # numpy's codes, which view.array() takes too
    "b1": "bool",
    "u1": "uint8",
    "i1": "int8",
    "u2": "uint16",
    "i2": "int16",
    "u4": "uint32",
    "i4": "int32",
    "u8": "uint64",
    "i8": "int64",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
    "c16": "complex128",
}
_TENSOR: Final = struct.Struct("<BBHIQ")  # type, dimensions, zero, zero, offset
_DIMENSION: Final = struct.Struct("<QQ")  # how many, bytes from one to the next


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The layout of a tensor in one buffer.

    ``dtype``: the name of a type, as ``"float32"`` or ``"<f4"``, or a type of numpy or torch, which becomes its name. ``shape``: how many
    elements in each dimension. ``strides``: the bytes from one element to the next, in each dimension, as numpy counts them; None means
    without gaps, the last dimension innermost. ``offset``: the first byte.

    Raises:
        InvalidError: The type is unknown, a number is out of bounds, or there are too many dimensions (EINVAL).
    """

    VERSION: ClassVar[int] = 1

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        one: object = self.shape
        given: tuple[Any, ...] = tuple(one) if isinstance(one, Iterable) else (one,)
        if len(given) > MAX_DIMENSIONS:
            raise checks.invalid("tensor", f"it has {len(given)} dimensions", f"pass at most {MAX_DIMENSIONS}")
        shape = tuple(checks.number("tensor", "shape", count, 0, checks.END - 1) for count in given)
        object.__setattr__(self, "shape", shape)
        strides = self._contiguous() if self.strides is None else tuple(self.strides)
        if len(strides) != len(shape):
            raise checks.invalid("tensor", f"it has {len(shape)} dimensions and {len(strides)} strides", "pass a stride for each dimension")
        object.__setattr__(self, "strides", tuple(checks.number("tensor", "stride", stride, 0, checks.END - 1) for stride in strides))
        object.__setattr__(self, "offset", checks.number("tensor", "offset", self.offset, 0, checks.END - 1))
        if self.sizes[0] >= checks.END:
            raise checks.invalid("tensor", f"its last byte is at {self.sizes[0] - 1}", "pass a shape and strides that fit into 63 bits")

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    def _contiguous(self) -> tuple[int, ...]:
        strides, step = [], self.itemsize
        for count in reversed(self.shape):
            strides.append(min(step, checks.END - 1))  # what is beyond is refused by its last byte, unless there are no elements
            step *= max(count, 1)
        return tuple(reversed(strides))

    @property
    def itemsize(self) -> int:
        """The bytes of one element."""
        return DTYPES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements follow each other without gaps, the last dimension innermost."""
        return self.strides == self._contiguous()

    @property
    def sizes(self) -> tuple[int]:
        """The least bytes that the buffer has to have, as the only member of a tuple."""
        if 0 in self.shape:
            return (self.offset,)
        last = sum((count - 1) * stride for count, stride in zip(self.shape, self.strides or (), strict=True))
        return (self.offset + last + self.itemsize,)

    def check(self, sizes: int | Iterable[int]) -> None:
        """Return if the tensor is within a buffer of this size.

        Raises:
            InvalidError: The buffer is too small, or there are several (EINVAL).
        """
        checks.holds("tensor", self.sizes, (sizes,) if isinstance(sizes, int) else tuple(sizes))

    def specs(self) -> tuple[ArraySpec]:
        """Return what :meth:`array` makes, without numpy."""
        return (ArraySpec(0, self.dtype, self.shape, self.strides or (), self.offset),)

    def array(self, view: Views) -> np.ndarray[Any, Any]:
        """Return the tensor as an array over the memory as it is. It can be written if the view can.

        Raises:
            ExtraMissingError: numpy is not installed.
            LookupError: numpy doesn't have the type, as ``bfloat16``.
            InvalidError: The view is too small, or there are several (EINVAL).
        """
        bare = bytes_of(view)
        self.check([one.nbytes for one in bare])
        return arrays(self.specs(), bare)[0]

    def pack(self) -> bytes:
        """Return the layout as at most 256 bytes, which :meth:`unpack` reads in any process."""
        body = _TENSOR.pack(_ORDER.index(self.dtype), len(self.shape), 0, 0, self.offset)
        body += b"".join(_DIMENSION.pack(*pair) for pair in zip(self.shape, self.strides or (), strict=True))
        return packing.packed(packing.Kind.TENSOR, self.VERSION, body)

    @classmethod
    def unpack(cls, data: bytes) -> TensorLayout:
        """Return the layout whose bytes these are. Any other bytes are refused.

        Raises:
            InvalidError: They are not the bytes of a tensor's layout, or its numbers don't fit together (EINVAL).
        """
        body = packing.body_of(data, packing.Kind.TENSOR, cls.VERSION)
        if len(body) < _TENSOR.size:
            raise packing.refused("they end too early for a tensor")
        place, count, *zeros, offset = _TENSOR.unpack_from(body)
        if any(zeros) or len(body) != _TENSOR.size + count * _DIMENSION.size:
            raise packing.refused("their length and their number of dimensions differ")
        if place >= len(_ORDER):
            raise packing.refused(f"there is no type number {place}")
        pairs = [_DIMENSION.unpack_from(body, _TENSOR.size + index * _DIMENSION.size) for index in range(count)]
        return cls(_ORDER[place], tuple(shape for shape, _ in pairs), tuple(stride for _, stride in pairs), offset)


def dtype_name(dtype: object) -> str:
    """Return the name of a type that is given by its name, or as numpy or torch have it.

    Raises:
        InvalidError: It is not one of those that a layout can have (EINVAL).
    """
    if isinstance(dtype, str):
        byte_order = ">" if dtype.startswith(">") else "="
        name = _SHORT.get(dtype[1:] if dtype.startswith(("<", "=", "|")) else dtype, dtype)
    else:
        byte_order = getattr(dtype, "byteorder", "=")
        name = str(getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or dtype).removeprefix("torch.")
    if name in DTYPES and byte_order != ">":
        return name
    if name in _PYTHON:
        what = f"{dtype!r} doesn't say how many bits it has"
        raise checks.invalid("tensor", what, f"pass {_PYTHON[name]!r}, which numpy takes it for, or another of: {', '.join(DTYPES)}")
    what = f"there is no dtype {dtype!r}" if byte_order != ">" else f"{dtype!r} is big-endian"
    raise checks.invalid("tensor", what, f"pass one of: {', '.join(DTYPES)}")
