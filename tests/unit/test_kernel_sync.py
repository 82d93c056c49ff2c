"""The thread that waits for the kernel's sync files, with pipes in their place."""

import os
import threading
from collections.abc import Iterator

import pytest

from dmabuf.core.sync.kernel_fences import _Poller
from tests.support.waiting import until


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_each_is_called_once_and_the_thread_ends_with_the_last(pipe: tuple[int, int]) -> None:
    poller, seen = _Poller(), []
    poller.add(pipe[0], seen.append)
    poller.add(pipe[0], seen.append)
    assert seen == []
    os.write(pipe[1], b"x")
    until(lambda: poller.wake < 0)
    assert len(set(seen)) == len(seen) == 2


def test_watch_leaves_nothing_when_no_thread_can_be_started(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    poller, seen = _Poller(), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError):
            poller.add(pipe[0], seen.append)
    assert (poller.calls, poller.wake) == ({}, -1)
    poller.add(pipe[0], seen.append)
    os.write(pipe[1], b"x")
    until(lambda: poller.wake < 0)
    assert len(seen) == 1


def test_canceled_descriptor_does_not_stop_the_poller(pipe: tuple[int, int]) -> None:
    """Whoever added it was broken off by a signal handler's exception, and its number is used again."""
    poller, seen = _Poller(), []
    other = os.pipe()
    poller.add(pipe[0], seen.append)
    poller.add(other[0], seen.append)
    with poller.lock:
        (taken, _) = poller.calls
        del poller.calls[taken]
    os.write(pipe[1], b"x")
    os.write(other[1], b"x")
    until(lambda: poller.wake < 0)
    assert len(seen) == 1
    for fd in (taken, *other):
        os.close(fd)
