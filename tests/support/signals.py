"""Signals for a main thread that waits."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tests.support.waiting import until_asleep


class Stop(Exception):
    """What a signal handler raises to end a wait."""


@contextmanager
def on_signal(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """A handler of SIGUSR1 for a block."""
    old = signal.signal(signal.SIGUSR1, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, old)


def raise_stop(*_: object) -> None:
    """A handler that ends the wait."""
    raise Stop


def interrupt_when_asleep(times: int, after: Callable[[], None] = lambda: None) -> None:
    """Send SIGUSR1 to the main thread each time it sleeps, then do something when it sleeps again."""
    main = threading.main_thread()
    assert main.ident is not None
    for _ in range(times):
        until_asleep(os.getpid(), main.native_id)
        signal.pthread_kill(main.ident, signal.SIGUSR1)
    until_asleep(os.getpid(), main.native_id)
    after()
