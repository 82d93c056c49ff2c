"""``aside``: to do something where no signal handler can raise in the middle.

Python runs signal handlers in the main thread, between any two instructions of whatever runs there, and what they raise (KeyboardInterrupt)
ends it. A change that must not stand half done is made in another thread, for which the main thread waits; that wait a handler may end,
and then the change is completed all the same. In every other thread nothing raises, so there the call is made directly.

One thread a process, started on first use, which sleeps without a bound. A forked child begins anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

_Answer = SimpleQueue[BaseException | None]
_orders: SimpleQueue[tuple[Callable[[], object], _Answer]] | None = None


def aside(call: Callable[[], object]) -> None:
    """Do it, whatever signals come. Errors: those of the call; what a handler raises, and then the call goes on without us."""
    global _orders
    if threading.current_thread() is not threading.main_thread():
        call()
        return
    if _orders is None:
        made: SimpleQueue[tuple[Callable[[], object], _Answer]] = SimpleQueue()
        try:
            threading.Thread(target=_serve, args=(made,), name="dmabuf-aside", daemon=True).start()
        except RuntimeError:  # no thread to be had, or the interpreter is ending
            call()
            return
        _orders = made
    answer: _Answer = SimpleQueue()
    _orders.put((call, answer))
    error = answer.get()
    try:
        if error is not None:
            raise error
    finally:
        del error, answer  # its traceback keeps this frame


def _serve(orders: SimpleQueue[tuple[Callable[[], object], _Answer]]) -> None:
    while True:
        call, answer = orders.get()
        try:
            call()
        except BaseException as e:
            answer.put(e)
        else:
            answer.put(None)
        del call, answer


def _after_fork() -> None:
    global _orders
    _orders = None


os.register_at_fork(after_in_child=_after_fork)
