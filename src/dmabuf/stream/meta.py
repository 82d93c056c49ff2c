"""The metadata of a frame: bytes, or what JSON can say, in the stream's own memory."""

from __future__ import annotations

import json
from typing import Final, TypeAlias

NONE: Final = 0
BYTES: Final = 1
JSON: Final = 2

Meta: TypeAlias = "bool | int | float | str | bytes | list[Meta] | dict[str, Meta] | None"


def pack(value: object) -> tuple[int, bytes]:
    """Return (kind, bytes) of a value.

    Raises:
        TypeError: JSON can't say it.
    """
    if value is None:
        return NONE, b""
    if isinstance(value, bytes | bytearray | memoryview):
        return BYTES, bytes(value)
    try:
        return JSON, json.dumps(value, separators=(",", ":")).encode()
    except (TypeError, ValueError) as e:
        raise TypeError(f"frame.meta: {e}; give bytes (struct.pack), or what JSON can say") from None


def unpack(kind: int, data: bytes) -> Meta:
    """Return the value of what a producer packed. What makes no sense, as another process may have written it, is its bytes."""
    if kind == JSON:
        try:
            found: Meta = json.loads(data)
        except (ValueError, RecursionError):
            return data
        return found
    return None if kind == NONE else data
