"""Whether anybody can still submit a point to a semaphore for which this thread waits.

A wait for a submission ends when some holder of the semaphore makes one. The last holder that waits is the only one that could. That is
proved, or else the wait goes on: nothing else has the descriptor, no other thread of this process can run code of the program, no callback
is registered, and no signal handler is installed that the program may have for such a purpose.
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

from dmabuf._native import closes_heard
from dmabuf.domain import slow_waits
from dmabuf.domain.dispatcher import DISPATCHER
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.domain.shared_file import SharedFile
from dmabuf.errors import fail

_LOOK_NS = 2 * TICK_NS  # at least, from one look to the next; at once after the news of a death

# Threads of this package that run no code of the program, as long as no callback is registered.
_SERVING = frozenset({"dmabuf-dispatcher", "dmabuf-retry"})
# A handler of these is there to end or reload the program. Any other may be what submits: a timer's, a child's, another process's.
_ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH})


class Looks:
    """The looks of one wait for a submission in a domain, which is logged when it has lasted long."""

    __slots__ = ("_domain", "_heard", "_last", "_lasts", "_orphaned")

    def __init__(self, domain: Domain) -> None:
        self._domain, self._last, self._orphaned, self._heard = domain, time.monotonic_ns(), False, closes_heard()
        self._lasts = slow_waits.Wait()

    def look(self, nobody: Sequence[Callable[[], bool]], what: object) -> bool:
        """Look at a tick of the wait. Return False if the caller must look at its semaphores once more, and then call again.

        Args:
            nobody: Say of each semaphore whether nobody is left. Any of them could end the wait.
            what: Names them.

        Raises:
            DeadlockError: Nobody is left who could submit a point (EDEADLK).
        """
        if self._orphaned:  # and the caller has looked since: the last of the others didn't submit before it left
            text = "no point has a fence, and nobody else has the semaphore, so nobody can submit one"
            raise fail(errno.EDEADLK, "wait", what, "submit the point before waiting for it", what=text)
        now = time.monotonic_ns()
        self._lasts.look(self._domain, lambda: f"somebody to submit a point to {what}")
        heard = closes_heard()
        if heard == self._heard and now - self._last < _LOOK_NS:
            return True
        self._last, self._heard, self._orphaned = now, heard, all(call() for call in nobody)
        return not self._orphaned


def nobody_left(file: SharedFile, domain: Domain, listening: int) -> bool:
    """Return True if nobody but the running thread, which waits, could change what is in the file.

    ``listening``: how many callbacks the wait itself has registered.
    """
    return _alone_here(domain, listening) and file.is_alone()


def _alone_here(domain: Domain, listening: int) -> bool:
    me = threading.get_ident()
    serving = {thread.ident for thread in threading.enumerate() if thread.name in _SERVING}
    if not sys._current_frames().keys() <= serving | {me}:
        return False
    dispatcher = DISPATCHER.peek(domain)
    if len(serving) > 2 or (dispatcher is not None and dispatcher.watching > listening):
        return False
    return not any(callable(signal.getsignal(number)) for number in signal.valid_signals() - _ENDING)
