"""Buffers whose every 512 bytes begin with the same number, which each write counts up: a mixture is half of a write."""

from __future__ import annotations

import struct
from collections.abc import Callable

from dmabuf import View

_STEP = 512
_WORD = struct.Struct("<Q")
_MASK = (1 << 56) - 1


class TornError(AssertionError):
    """A read showed half of a write and no error."""


def count_up(view: View | memoryview, linger: Callable[[], None] | None = None) -> None:
    """Write the next number everywhere, one place after the other. ``linger``: what to do in the middle."""
    number = (_WORD.unpack_from(view)[0] + 1) & _MASK
    middle = len(view) // 2
    for at in range(0, middle, _STEP):
        _WORD.pack_into(view, at, number)
    if linger is not None:
        linger()
    for at in range(middle, len(view), _STEP):
        _WORD.pack_into(view, at, number)


def check(view: View | memoryview, what: object) -> int:
    """The number; TornError if there are several."""
    seen = [_WORD.unpack_from(view, at)[0] for at in range(0, len(view), _STEP)]
    if len(set(seen)) != 1:
        first = next(i for i, number in enumerate(seen) if number != seen[0])
        raise TornError(f"a torn read without an error: {what}: {seen[0]} up to byte {first * _STEP}, then {seen[first]}")
    return int(seen[0])
