"""``run_shielded``: run a call that no signal handler can cut short.

Python runs signal handlers in the main thread, between any two instructions of what runs there, and an exception of a handler
(KeyboardInterrupt) ends that code. A change that must not stay half done therefore runs in another thread, and the main thread waits. A
handler may end the wait, but not the change. In every other thread no handler runs, so there the call is made directly.

The process has one such thread. It starts at first use and sleeps without a time limit. A forked child starts its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

_Answer = SimpleQueue[BaseException | None]
_calls: SimpleQueue[tuple[Callable[[], object], _Answer]] | None = None


def run_shielded(call: Callable[[], object]) -> None:
    """Run ``call`` to its end and raise what it raises. If a signal handler raises, that comes at once, and the call goes on."""
    global _calls
    if threading.current_thread() is not threading.main_thread():
        call()
        return
    if _calls is None:
        made: SimpleQueue[tuple[Callable[[], object], _Answer]] = SimpleQueue()
        try:
            threading.Thread(target=_serve, args=(made,), name="dmabuf-shielded", daemon=True).start()
        except RuntimeError:  # no thread can be started, or the interpreter is ending
            call()
            return
        _calls = made
    answer: _Answer = SimpleQueue()
    _calls.put((call, answer))
    error = answer.get()
    try:
        if error is not None:
            raise error
    finally:
        del error, answer  # its traceback keeps this frame


def _serve(calls: SimpleQueue[tuple[Callable[[], object], _Answer]]) -> None:
    while True:
        call, answer = calls.get()
        try:
            call()
        except BaseException as e:
            answer.put(e)
        else:
            answer.put(None)
        del call, answer


def _after_fork() -> None:
    global _calls
    _calls = None


os.register_at_fork(after_in_child=_after_fork)
