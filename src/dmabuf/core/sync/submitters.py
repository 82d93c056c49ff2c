"""Whether anybody can still submit a point to a semaphore for which this thread waits.

A wait for a submission ends when some holder of the semaphore makes one. The last holder that waits is the only one that could. That is
proved, or else the wait goes on: nothing else has the descriptor, no other thread of this process can run code of the program, no callback
is registered, and no signal handler is installed that the program may have for such a purpose.
"""

from __future__ import annotations

import signal
import sys
import threading

from dmabuf.domain.dispatcher import DISPATCHER
from dmabuf.domain.domain import Domain
from dmabuf.domain.shared_file import SharedFile

LOOK_S = 0.08  # seconds between two looks: two ticks, as for a death

# Threads of this package that run no code of the program, as long as no callback is registered.
_SERVING = frozenset({"dmabuf-dispatcher", "dmabuf-retry"})
# A handler of these is there to end or reload the program. Any other may be what submits: a timer's, a child's, another process's.
_ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH})


def nobody_left(file: SharedFile, domain: Domain) -> bool:
    """Return True if nobody but the running thread, which waits, could change what is in the file."""
    return _alone_here(domain) and file.is_alone()


def _alone_here(domain: Domain) -> bool:
    me = threading.get_ident()
    serving = {thread.ident for thread in threading.enumerate() if thread.name in _SERVING}
    if not sys._current_frames().keys() <= serving | {me}:
        return False
    dispatcher = DISPATCHER.peek(domain)
    if len(serving) > 2 or (dispatcher is not None and dispatcher.watching):
        return False
    return not any(callable(signal.getsignal(number)) for number in signal.valid_signals() - _ENDING)
