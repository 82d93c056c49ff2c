"""Checks of the numbers in a layout."""

from __future__ import annotations

import errno
import operator
from typing import Final

from dmabuf.errors import DmaBufError, fail

END: Final = 1 << 63  # offsets are signed in C


def invalid(obj: str, what: str, remedy: str) -> DmaBufError:
    """Return the error to raise for an argument of a layout."""
    return fail(errno.EINVAL, "layout", obj, remedy, what=what)


def number(obj: str, name: str, value: int, least: int, most: int) -> int:
    """Return an argument as an int, also of numpy.

    Raises:
        TypeError: It is not an integer.
        InvalidError: It is out of bounds (EINVAL).
    """
    try:
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"layout: {obj}: {name} is {value!r}; pass an integer") from None
    if not least <= found <= most:
        raise invalid(obj, f"{name} is {found}", f"pass a {name} from {least} to {most}")
    return found


def holds(obj: str, needed: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Raise InvalidError unless buffers of these sizes have what a layout needs of each (EINVAL)."""
    if len(sizes) != len(needed):
        raise invalid(obj, f"it is spread over {len(needed)} buffers, not {len(sizes)}", "pass one size or view for each buffer")
    for index, (need, size) in enumerate(zip(needed, sizes, strict=True)):
        if size < need:
            what = f"it needs {need} bytes of buffer {index}, which has {size}"
            raise invalid(obj, what, "allocate a larger buffer, or correct the layout")
