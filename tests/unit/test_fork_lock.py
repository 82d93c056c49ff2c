"""Locks that are free in a forked child."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import pytest

from dmabuf._native import free_fork_locks
from dmabuf.domain.forks import ForkLock  # which frees them in a child
from tests.support.steps import fork, reap
from tests.support.waiting import Background, held_by_another_thread, until_asleep


def test_fork_lock_is_reentrant() -> None:
    lock = ForkLock()
    with lock, lock:
        assert lock._is_owned()
    assert not lock._is_owned()


def test_fork_lock_keeps_other_threads_out_until_its_last_exit() -> None:
    lock, order, numbers = ForkLock(), list[str](), list[int]()
    begun = threading.Event()

    def other() -> None:
        numbers.append(threading.get_native_id())
        begun.set()
        with lock:
            order.append("other")

    lock.__enter__()
    with Background(other) as job:
        with lock:
            begun.wait()
            until_asleep(os.getpid(), numbers[0])
            order.append("inner")
        until_asleep(os.getpid(), numbers[0])
        order.append("outer")
        lock.__exit__(None, None, None)
        job.result()
    assert order == ["inner", "outer", "other"]


def test_fork_lock_of_another_thread_is_not_owned_and_free_afterwards() -> None:
    lock = ForkLock()
    with held_by_another_thread(lock):
        assert not lock._is_owned()
        with pytest.raises(RuntimeError, match="doesn't hold"):
            lock.__exit__(None, None, None)
    with lock:
        assert lock._is_owned()


def test_release_of_a_free_fork_lock_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="doesn't hold"):
        ForkLock().__exit__(None, None, None)


def test_wait_for_a_fork_lock_ends_when_a_signal_handler_raises() -> None:
    class Raised(BaseException):
        pass

    def handler(_: int, frame: FrameType | None) -> None:
        raise Raised

    lock, main, pid = ForkLock(), threading.get_native_id(), os.getpid()
    before = signal.signal(signal.SIGUSR1, handler)

    def interrupt() -> None:
        until_asleep(pid, main)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    try:
        with held_by_another_thread(lock), pytest.raises(Raised), Background(interrupt), lock:
            pass
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not lock._is_owned()


def test_fork_lock_of_another_thread_is_free_in_the_child() -> None:
    lock, free = ForkLock(), ForkLock()

    def child() -> None:
        with lock, free:
            assert lock._is_owned()

    with held_by_another_thread(lock):
        assert reap(fork(child)) == 0


def test_fork_lock_of_the_forking_thread_stays_held_in_the_child() -> None:
    lock = ForkLock()

    def child() -> None:
        assert lock._is_owned()
        lock.__exit__(None, None, None)
        assert not lock._is_owned()
        with lock:
            pass

    with lock:
        assert reap(fork(child)) == 0
        assert lock._is_owned()


def test_fork_locks_that_are_gone_are_not_freed() -> None:
    locks = [ForkLock() for _ in range(5)]
    for number in (2, 0, 2):  # from the middle, and from both ends
        del locks[number]
        free_fork_locks()
    for lock in locks:
        with lock:
            pass


def test_fork_lock_that_is_held_may_go() -> None:
    ForkLock().__enter__()
    free_fork_locks()


@pytest.mark.parametrize("arguments", [((1,), {}), ((), {"name": 1})], ids=["argument", "keyword"])
def test_fork_lock_takes_no_arguments(arguments: Any) -> None:
    with pytest.raises(TypeError, match="no arguments"):
        ForkLock(*arguments[0], **arguments[1])
