"""A callback that waits for what its own thread has to do meanwhile: EDEADLK. A wait for anything else works."""

import errno
import threading
from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import DmaFence, DmaFenceArray, DmaFenceChain
from tests.support.children import Parent, Spawn


def signals(parent: Parent) -> None:
    timeline, other = dmabuf.Timeline("theirs"), dmabuf.Timeline("theirs too")
    first, second = timeline.fence(), other.fence()
    dmabuf.send(parent.sock, first, second)
    parent.recv()
    first.signal()
    parent.recv()
    second.signal()
    parent.recv()


def in_a_callback(fence: DmaFence, call: Callable[[], object]) -> Callable[[], object]:
    """Add a callback that calls ``call``. Return what waits for the result, an errno if it raised."""
    results: list[object] = []
    over = threading.Event()

    def callback(_: DmaFence) -> None:
        try:
            results.append(call())
        except OSError as e:
            results.append(e.errno)
        over.set()

    def result() -> object:
        over.wait()
        return results[0]

    fence.add_callback(callback)
    return result


WAITS: list[tuple[str, Callable[[DmaFence], object]]] = [
    ("wait_any", lambda fence: dmabuf.wait_any([fence])),
    ("wait_any with a timeout", lambda fence: dmabuf.wait_any([fence], 30)),
    ("array", lambda fence: DmaFenceArray([fence]).wait()),
    ("chain", lambda fence: DmaFenceChain(None, fence, 1).wait()),
    ("chain of an array", lambda fence: DmaFenceChain(None, DmaFenceArray([fence]), 1).wait(30)),
]


@pytest.mark.parametrize("wait", [pytest.param(wait, id=name) for name, wait in WAITS])
def test_wait_in_a_callback_for_other_callbacks_is_edeadlk(child: Spawn, wait: Callable[[DmaFence], object]) -> None:
    other = child(signals)
    first, second = dmabuf.recv(other.sock)
    result = in_a_callback(first, lambda: wait(second))
    other.send("signal the first")
    assert result() == errno.EDEADLK
    other.send("signal the second")
    second.wait()
    other.send("end")
    other.result()


def test_poll_in_a_callback_works(child: Spawn) -> None:
    other = child(signals)
    first, second = dmabuf.recv(other.sock)
    array = DmaFenceArray([second])
    result = in_a_callback(first, lambda: (dmabuf.wait_any([second], 0), array.wait(0)))
    other.send("signal the first")
    assert result() == ((None, 0.0), 0.0)
    for order in ("signal the second", "end"):
        other.send(order)
    other.result()
    array.wait()


def test_wait_in_a_callback_for_fences_of_this_process_works(child: Spawn) -> None:
    """Their callbacks run in the threads that signal them."""
    other = child(signals)
    first, second = dmabuf.recv(other.sock)
    mine, inside = dmabuf.Timeline("mine").fence(), threading.Event()
    result = in_a_callback(first, lambda: (inside.set(), dmabuf.wait_any([mine])[0], DmaFenceArray([mine]).wait() > 0)[1:])
    other.send("signal the first")
    inside.wait()
    mine.signal()
    assert result() == (0, True)
    for order in ("signal the second", "end"):
        other.send(order)
    other.result()
    second.wait()
