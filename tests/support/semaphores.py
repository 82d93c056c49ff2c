"""Timeline semaphores and what they tell, the way most tests ask them."""

import select

from dmabuf import TimelineSemaphore


def points(sem: TimelineSemaphore) -> tuple[int, int]:
    """The last point that was reached, and the last that was submitted."""
    return sem.query(), sem.query(submitted=True)


def reached(sem: TimelineSemaphore, point: int = 0) -> bool:
    """Return True if the point is reached now. If nothing was submitted, it fails with EINVAL."""
    try:
        return sem.wait(point, 0) > 0
    except TimeoutError:
        return False


def told(eventfd: int) -> bool:
    """Was the eventfd written to, and not read since?"""
    return bool(select.select([eventfd], [], [], 0)[0])
