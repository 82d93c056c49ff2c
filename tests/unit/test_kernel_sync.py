"""The thread that waits for the kernel's sync files, with pipes in their place."""

import gc
import os
import select
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import dmabuf
from dmabuf.core.sync import kernel_fences
from dmabuf.core.sync.kernel_fences import _Poller
from tests.support.waiting import until, until_others_sleep


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


def test_removed_descriptor_is_closed_and_the_thread_ends_with_the_last(pipe: tuple[int, int]) -> None:
    poller, seen = _Poller(), []
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        own = [poller.add(pipe[0], seen.append) for _ in range(100)]
        for fd in own:
            poller.remove(fd)
            poller.remove(fd)
        until(lambda: poller.wake < 0)
        assert len(os.listdir("/proc/self/fd")) == before
    os.write(pipe[1], b"x")
    assert seen == []


def test_number_that_is_used_again_is_not_called_for_the_one_before(pipe: tuple[int, int]) -> None:
    """The thread was told of the first one, which was removed before it took the lock."""
    poller, seen = _Poller(), []
    idle = os.pipe()
    kept = poller.add(idle[0], seen.append)
    with poller.lock:
        own = poller.add(pipe[0], seen.append)
        os.write(pipe[1], b"x")
        until_others_sleep()
        poller.remove(own)
        assert poller.add(idle[0], seen.append) == own
    poller.remove(own)
    poller.remove(kept)
    until(lambda: poller.wake < 0)
    assert seen == []
    for fd in idle:
        os.close(fd)


def test_canceled_descriptor_does_not_stop_the_poller(pipe: tuple[int, int]) -> None:
    """Whoever added it was broken off by a signal handler's exception, and its number is used again."""
    poller, seen = _Poller(), []
    other = os.pipe()
    poller.add(pipe[0], seen.append)
    poller.add(other[0], seen.append)
    with poller.lock:
        (taken, _) = poller.calls
        kept = poller.calls.pop(taken)
    os.write(pipe[1], b"x")
    os.write(other[1], b"x")
    until(lambda: poller.wake < 0)
    assert len(seen) == 1
    kept[0].close()
    for fd in other:
        os.close(fd)


# ---- fences that stand for the kernel's ----


class Info(NamedTuple):
    """What the kernel says of a sync file, of which a pipe is in place here."""

    status: int
    fences: tuple[()] = ()


@pytest.fixture
def kernel(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    monkeypatch.setattr(kernel_fences.uapi, "file_info", lambda fd: Info(bool(select.select([fd], [], [], 0)[0])))
    yield pipe
    until(lambda: kernel_fences._poller.wake < 0)


def test_fence_that_nobody_wants_any_more_keeps_no_descriptor(kernel: tuple[int, int]) -> None:
    domain = dmabuf.Domain.default()
    before = len(os.listdir("/proc/self/fd"))
    kept = kernel_fences.fence_of(kernel[0], domain)
    for _ in range(100):
        kernel_fences.fence_of(kernel[0], domain)
    assert len(kernel_fences._poller.calls) == 1
    assert len(os.listdir("/proc/self/fd")) == before + 3
    os.write(kernel[1], b"x")
    assert kept.wait() > 0
    assert kept.status == 1


def test_fence_that_was_dropped_is_signaled_for_those_who_wait(kernel: tuple[int, int]) -> None:
    domain = dmabuf.Domain.default()
    with dmabuf.allocate(4096) as buf, buf.resv.locked():
        buf.resv.reserve(1)
        buf.resv.add(kernel_fences.fence_of(kernel[0], domain), dmabuf.Usage.WRITE)
        gc.collect()
        assert not buf.resv.test_signaled(dmabuf.Usage.READ)
        os.write(kernel[1], b"x")
        assert buf.resv.wait(dmabuf.Usage.READ) > 0


def test_fence_that_was_dropped_calls_its_callbacks(kernel: tuple[int, int]) -> None:
    seen = threading.Event()
    kernel_fences.fence_of(kernel[0], dmabuf.Domain.default()).listen(lambda _: seen.set())
    os.write(kernel[1], b"x")
    seen.wait()
