"""Each way to put a buffer into each queue, whatever its producer does next: it arrives, or get() says what happened, and all goes on."""

import errno
import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.queues import ANEW, running, stamp, stamped

pytestmark = pytest.mark.usefixtures("keepers_are_reaped")


def _produce(channel: Any, kind: str, how: str, flushed: Any, end: Any) -> None:
    put: Callable[[Any], None] = channel.send if kind == "Pipe" else channel.put
    kept = []
    for i in range(3):
        buf = stamped(i)
        put(buf.give() if how == "given" else buf)
        if how.startswith("closed"):
            buf.close()
        else:
            kept.append(buf)
    put("next")
    if how in ("closed, then ended", "ended"):
        return
    if kind in ("Queue", "JoinableQueue"):
        channel.close()
        channel.join_thread()
    flushed.set()
    end.wait()


# What each of the three buffers may be: its stamp, or an errno.
_OUTCOMES: dict[str, tuple[int | None, ...]] = {
    "open": (None,),
    "given": (None,),
    "ended": (None,),
    "closed": (None, errno.EBADF),
    "closed, then ended": (None, errno.EBADF),
    "killed": (errno.EOWNERDEAD,),
}


@pytest.mark.parametrize("how", _OUTCOMES)
@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue", "Pipe"])
@pytest.mark.parametrize("context", [multiprocessing.get_context("fork"), ANEW], ids=["fork", "anew"])
def test_each_buffer_arrives_or_is_told_and_the_next_item_arrives(context: Any, kind: str, how: str) -> None:
    there: Any
    if kind == "Pipe":
        here, there = context.Pipe()
    else:
        here = there = getattr(context, kind)()
    get: Callable[[], Any] = here.recv if kind == "Pipe" else here.get
    flushed, end = context.Event(), context.Event()
    with running(context.Process(target=_produce, args=(there, kind, how, flushed, end))) as process:
        if "ended" in how:
            process.join()
        else:
            flushed.wait()
        if how == "killed":
            process.kill()
            process.join()
        for i in range(3):
            outcome: int | None = None
            try:
                assert stamp(get()) == i
            except OSError as e:
                outcome = e.errno
            # Only the thread of a queue pickles later than put().
            assert outcome in (_OUTCOMES[how] if kind in ("Queue", "JoinableQueue") or how == "killed" else (None,))
            if kind == "JoinableQueue":
                here.task_done()
        assert get() == "next"
        (there.send if kind == "Pipe" else there.put)(stamped(7).give())
        assert stamp(get()) == 7
        if how != "killed":  # set() would wait for the process that was killed in wait()
            end.set()
    if kind == "JoinableQueue":
        here.task_done()
        here.task_done()
        here.join()
    for one in {here, there}:
        one.close()
    if kind in ("Queue", "JoinableQueue"):
        here.join_thread()
