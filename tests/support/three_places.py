"""Content that shows whether it is whole: one number at three places of a frame or a buffer."""

import struct

import dmabuf


def _places(view: dmabuf.View) -> tuple[int, int, int]:
    size = len(view)
    return 0, size // 16 * 8, size - 8


def fill(view: dmabuf.View, number: int) -> None:
    """Write a number of 64 bits at each place."""
    for at in _places(view):
        struct.pack_into("<Q", view, at, number)


def whole(view: dmabuf.View) -> int:
    """Return the number, which is the same at each place."""
    first, *others = (struct.unpack_from("<Q", view, at)[0] for at in _places(view))
    assert others == [first] * len(others), f"torn content: {first:#x} {[hex(other) for other in others]}"
    return int(first)
