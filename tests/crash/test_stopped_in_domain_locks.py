"""A process that is stopped inside a lock of the domain keeps others for a bounded time, and the error names it."""

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from dmabuf import Domain
from dmabuf.domain import place, shared_file
from tests.support.children import Spawn
from tests.support.errnos import raises_errno
from tests.support.interrupts import Interrupt, interrupted
from tests.support.steps import Held

pytestmark = pytest.mark.crash


def test_allocate_is_etimedout_while_a_stopped_process_has_the_table_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    with dmabuf.allocate(4096) as buf:
        shm = buf.domain.shm
        with buf.write():  # the first access of a process takes slots for fences
            pass
        monkeypatch.setattr(shm, "slow_ns", 50_000_000)
        with Held(lambda: dmabuf.allocate(4096).close()) as other:
            assert other.run_to("rec_locked")
            with raises_errno(errno.ETIMEDOUT) as caught:
                dmabuf.allocate(4096)
            assert f"process {other.pid} has held" in str(caught.value)
            # What needs no lock of the table proceeds: accesses, and handles of buffers that are open.
            with buf.write() as view:
                view[0] = 1
            dmabuf.get(buf.fileno()).close()
            other.go_on()
            other.release()
        dmabuf.allocate(4096).close()


def holds_the_lifecycle_lock(parent: Any) -> None:
    with place.lifecycle_lock(Domain.default().fileno()):
        parent.send("has it")
        parent.recv()


def test_join_is_etimedout_while_a_stopped_process_has_the_lifecycle_lock(child: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "LIFECYCLE_S", 0.05)
    other = child(holds_the_lifecycle_lock)
    assert other.recv() == "has it"
    other.stop()
    with raises_errno(errno.ETIMEDOUT) as caught, place.lifecycle_lock(Domain.default().fileno()):
        pass
    assert f"process {other.pid} has held" in str(caught.value)
    # What needs no lifecycle lock proceeds.
    with dmabuf.allocate(4096) as buf, buf.write():
        pass
    other.resume()
    other.send()
    other.result()
    with place.lifecycle_lock(Domain.default().fileno()):
        pass


def holds_the_lock_of_shared_state(parent: Any) -> None:
    (one,) = dmabuf.recv(parent.sock)
    with one._file.locked():
        parent.send("has it")
        parent.recv()


@pytest.mark.parametrize("make", [dmabuf.SwSync, dmabuf.TimelineSemaphore])
def test_shared_state_is_etimedout_while_a_stopped_process_has_its_lock(
    child: Spawn, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    monkeypatch.setattr(shared_file, "LOCK_S", 0.05)
    other = child(holds_the_lock_of_shared_state)
    with make() as one:
        dmabuf.send(other.sock, one)
        assert other.recv() == "has it"
        other.stop()
        for _ in range(2):  # the first one keeps nothing locked
            with raises_errno(errno.ETIMEDOUT) as caught:
                one.statistics()
            assert f"process {other.pid} has held" in str(caught.value)
        other.resume()
        other.send()
        other.result()
        one.statistics()


def test_wait_for_lifecycle_lock_ends_with_a_handlers_exception(child: Spawn) -> None:
    other = child(holds_the_lifecycle_lock)
    assert other.recv() == "has it"
    before = len(os.listdir("/proc/self/fd"))

    def lock() -> None:
        with place.lifecycle_lock(Domain.default().fileno()):
            raise AssertionError("the other process has it")

    assert isinstance(interrupted(lock, raising=True), Interrupt)
    assert len(os.listdir("/proc/self/fd")) == before
    other.send()
    other.result()
