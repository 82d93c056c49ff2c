"""The bytes of a layout, as they stand in a domain and in messages, readable for C programs too.

Every number is little-endian and stands at a fixed place. A header comes first:

====== ===== =======================================================
offset bytes field
====== ===== =======================================================
0      2     ``DL``
2      1     the version of the layout's kind
3      1     the kind: 1 a picture, 2 a tensor
4      2     how many bytes the layout has, with this header
6      2     zero
====== ===== =======================================================

A reader refuses a version that it doesn't know. Bytes that come from elsewhere are checked as the arguments of a constructor are, because
they become offsets into memory.
"""

from __future__ import annotations

import errno
import struct
from enum import IntEnum
from typing import Final

from dmabuf.errors import DmaBufError, fail

MOST: Final = 256  # bytes of the longest layout
HEADER: Final = struct.Struct("<2sBBHH")
_MAGIC: Final = b"DL"


class Kind(IntEnum):
    """What a layout describes."""

    IMAGE = 1
    TENSOR = 2


def packed(kind: Kind, version: int, body: bytes) -> bytes:
    """Return the bytes of a layout."""
    return HEADER.pack(_MAGIC, version, kind, HEADER.size + len(body), 0) + body


def kind_of(data: bytes) -> Kind:
    """Return the kind of a layout from its bytes.

    Raises:
        InvalidError: They are not the bytes of one layout, or of an unknown kind (EINVAL).
    """
    return _header(data)[0]


def body_of(data: bytes, kind: Kind, version: int) -> bytes:
    """Return what follows the header of a layout of this kind.

    Raises:
        InvalidError: The bytes are of something else, or of another version (EINVAL).
    """
    found, given = _header(data)
    if found is not kind:
        raise refused(f"they describe {_NAMES[found]}, not {_NAMES[kind]}")
    if given != version:
        raise refused(f"they have version {given}, and this library reads version {version}")
    return bytes(data[HEADER.size :])


_NAMES: Final = {Kind.IMAGE: "a picture", Kind.TENSOR: "a tensor"}


def _header(data: bytes) -> tuple[Kind, int]:
    if not HEADER.size <= len(data) <= MOST:
        raise refused(f"there are {len(data)} bytes, and a layout has {HEADER.size} to {MOST}")
    magic, version, kind, length, zero = HEADER.unpack_from(data)
    if magic != _MAGIC or zero:
        raise refused("they don't begin as a layout does")
    if length != len(data):
        raise refused(f"there are {len(data)} bytes, and the header says {length}")
    try:
        return Kind(kind), version
    except ValueError:
        raise refused(f"there is no layout of kind {kind}") from None


def refused(what: str) -> DmaBufError:
    """Return the error to raise for bytes that are not a layout."""
    return fail(errno.EINVAL, "unpack", "layout", "pass the bytes that pack() of the same version returned", what=what)
