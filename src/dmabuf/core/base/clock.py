"""Time limits: from the seconds that a caller gives to the time at which its wait is over."""

from __future__ import annotations

import errno
import math
import time

from dmabuf.errors import fail


def monotonic_deadline(timeout: float | None, operation: str, obj: object) -> int:
    """The CLOCK_MONOTONIC ns at which a timeout ends, -1 for never. Errors: EINVAL a negative timeout or a NaN."""
    if timeout is None:
        return -1
    if not timeout >= 0:
        raise fail(errno.EINVAL, operation, obj, "a timeout is seconds >= 0, or None for ever")
    return time.monotonic_ns() + int(min(timeout, 4e9) * 1e9)


def seconds_left(until: int) -> float:
    """What a wait with this end, CLOCK_MONOTONIC ns or -1 for never, has left: always > 0."""
    return math.inf if until < 0 else max((until - time.monotonic_ns()) / 1e9, 1e-9)
