"""Time limits: from the seconds that a caller gives to the time at which its wait is over."""

from __future__ import annotations

import errno
import math
import time

from dmabuf.errors import fail


def monotonic_deadline(timeout: float | None, operation: str, obj: object) -> int:
    """Return the CLOCK_MONOTONIC ns at which a timeout ends, -1 for never.

    Args:
        timeout: Seconds, or None.
        operation: Named by the error.
        obj: Named by the error.

    Raises:
        InvalidError: The timeout is negative or a NaN (EINVAL).
        TypeError: The timeout is neither a number nor None.
    """
    if timeout is None:
        return -1
    try:
        valid = timeout >= 0
    except TypeError:
        raise TypeError(f"{operation}: a timeout is a number of seconds or None, not {type(timeout).__name__}") from None
    if not valid:
        raise fail(errno.EINVAL, operation, obj, "pass 0 or more seconds, or None for no limit", what=f"the timeout is {timeout}")
    return time.monotonic_ns() + int(min(timeout, 4e9) * 1e9)


def seconds_left(until: int) -> float:
    """Return what is left of a wait until a CLOCK_MONOTONIC time in ns (-1: without a limit): always more than 0."""
    return math.inf if until < 0 else max((until - time.monotonic_ns()) / 1e9, 1e-9)
