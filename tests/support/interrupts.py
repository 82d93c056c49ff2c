"""A signal that arrives while the main thread waits."""

import errno
import os
import signal
import threading
from collections.abc import Callable

from tests.support.waiting import Background, until_asleep


class Interrupt(Exception):
    """What a signal handler of a test raises."""


def interrupted(call: Callable[[], object], *, raising: bool) -> BaseException | None:
    """Run call in this thread and send it a signal when it waits; what it raised."""
    found: BaseException | None = None

    def handler(*_: object) -> None:
        if raising:
            raise Interrupt

    before = signal.signal(signal.SIGUSR1, handler)
    me = threading.get_native_id()
    over = threading.Event()

    def poke() -> None:
        while True:
            until_asleep(os.getpid(), me, over=over.is_set)
            if over.is_set():
                return
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            if raising:
                return
            # It may have slept on its way to the wait; what came there ended nothing, so it is sent again.

    try:
        with Background(poke):
            try:
                call()
            except (OSError, Interrupt) as e:
                found = e
            finally:
                over.set()
    finally:
        signal.signal(signal.SIGUSR1, before)
    return found


def ended_by_a_signal(call: Callable[[], object]) -> None:
    """Assert that a signal whose handler returns ends the call with EINTR."""
    error = interrupted(call, raising=False)
    assert isinstance(error, InterruptedError), error
    assert error.errno == errno.EINTR
