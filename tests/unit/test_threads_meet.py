"""Two threads that come to the same place at once: what is made once for all of them, and sets that some walk while others add."""

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf.core.access import poll
from dmabuf.core.buffer import shared
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.resv import resv as resvs
from dmabuf.domain import records, shared_file
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.weak_objects import WeakObjects
from tests.support.budget import times
from tests.support.waiting import Background


class Thing:
    """Something that a weak reference can name."""


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads that take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def meeting(monkeypatch: pytest.MonkeyPatch, where: object, name: str, call: Callable[[], object]) -> list[Any]:
    """What two threads get from ``call`` when the first stands in ``where.name`` until the second has come as far, or is through."""
    real, here, results, turn = getattr(where, name), threading.Event(), list[Any](), threading.Lock()
    second: list[Background] = []

    def held(*args: object, **names: object) -> object:
        if turn.acquire(blocking=False):  # the first to come here
            second.append(Background(lambda: (results.append(call()), here.set())))
            second[0].__enter__()
            here.wait(0.2)  # it may have to wait for this thread
        return real(*args, **names)

    monkeypatch.setattr(where, name, held)
    results.append(call())
    second[0].__exit__(None, None, None)
    assert len(results) == 2
    return results


@pytest.fixture
def fd() -> Iterator[int]:
    """A descriptor of a buffer of which this process has no record."""
    buf = dmabuf.allocate(4096)
    fd = buf.detach()
    records._WARM.of(Domain.default()).clear()
    del buf
    yield fd
    os.close(fd)


def test_get_in_two_threads_makes_one_record(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one bit for each record: the end of a second object would take it from the first."""
    first, second = meeting(monkeypatch, shared.SharedBuffer, "__init__", lambda: dmabuf.get(fd))
    assert handle_of(first).shared is handle_of(second).shared
    first.close()
    second.name = "still referenced"
    second.close()


def test_reference_in_two_threads_makes_one_record(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = meeting(monkeypatch, records.Record, "reference", lambda: dmabuf.get(fd))
    assert handle_of(first).shared is handle_of(second).shared
    assert first.resv is second.resv
    first.close()
    second.close()


def test_resv_in_two_threads_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    with dmabuf.allocate(4096) as buf, dmabuf.get(buf.fileno()) as other:
        handles = iter([buf, other])
        first, second = meeting(monkeypatch, resvs.DmaResv, "__init__", lambda: next(handles).resv)
        assert first is second


def test_shared_file_in_two_threads_has_one_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    semaphore = dmabuf.TimelineSemaphore()
    fd = semaphore.dup()
    semaphore.close()
    del semaphore
    first, second = meeting(monkeypatch, shared_file, "_ProcessLock", lambda: dmabuf.TimelineSemaphore.from_fd(fd))
    assert first._file._process_lock is second._file._process_lock
    first.close()
    second.close()
    os.close(fd)


def test_poll_fd_in_two_threads_is_canceled_by_close(monkeypatch: pytest.MonkeyPatch) -> None:
    buf, fence = dmabuf.allocate(4096), dmabuf.Timeline("work").fence()
    with buf.resv.locked() as resv:
        resv.reserve(1)
        resv.add(fence, dmabuf.Usage.WRITE)
    before = set(os.listdir("/proc/self/fd"))
    fds = meeting(monkeypatch, poll, "_PollFds", lambda: buf.poll_fd(1))
    buf.close()
    for fd in fds:
        os.close(fd)
    assert set(os.listdir("/proc/self/fd")) <= before
    fence.signal()


@pytest.mark.parametrize("beside", ["detach", "close"])
def test_detach_beside_another_thread_gives_the_descriptor_once(beside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are past their checks when the first takes the descriptor."""
    buf = dmabuf.allocate(4096)
    calls = iter([buf.detach, getattr(buf, beside)])

    def either() -> int | None:
        try:
            return next(calls)()
        except OSError as e:
            return -e.errno if e.errno else None

    given = meeting(monkeypatch, records.Record, "leave", either)
    fds = [fd for fd in given if fd is not None and fd >= 0]
    assert len(fds) <= 1
    if beside == "detach":
        assert sorted(fd for fd in given if fd is not None)[0] == -errno.EBADF
    for fd in fds:
        os.close(fd)


def test_domains_can_be_looked_up_while_others_are_made(switching: None) -> None:
    keep = [Domain.private() for _ in range(5)]
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            assert known("0123456789abcdef") is None

    with Background(look):
        for _ in range(times(quick=200, full=2000)):
            Domain.private()
        over.set()
    del keep


def test_weak_objects_can_be_walked_while_others_come_and_go(switching: None) -> None:
    found: WeakObjects[Thing] = WeakObjects()
    keep = [Thing() for _ in range(50)]
    for thing in keep:
        found.add(thing)
    over = threading.Event()

    def walk() -> None:
        while not over.is_set():
            assert [thing for thing in found if thing in keep] == keep

    with Background(walk):
        for _ in range(times(quick=3000, full=30000)):
            found.add(Thing())
        over.set()
    assert len(found) == len(keep)


def test_weak_objects_forget_what_is_gone() -> None:
    found: WeakObjects[Thing] = WeakObjects()
    thing, other = Thing(), Thing()
    for added in (thing, other, thing):
        found.add(added)
    del added
    assert list(found) == [thing, other]
    del thing
    assert list(found) == [other]
    found.discard(other)
    found.discard(other)
    assert not found
