"""A wait for a submission that nobody is left to make: EDEADLK, and only when that is proved."""

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import TimelineSemaphore, wait_semaphores
from dmabuf.core.sync import semaphore as semaphores
from dmabuf.domain.shared_file import SharedFile
from tests.support.children import Child, Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.waiting import until_asleep


@contextlib.contextmanager
def another_thread(sem: TimelineSemaphore, parent: Parent) -> Iterator[None]:
    submit = threading.Event()
    thread = threading.Thread(target=lambda: (submit.wait(), sem.signal(1)))
    thread.start()
    with on_signal(submit.set):
        yield
    thread.join()


@contextlib.contextmanager
def on_signal(call: Callable[[], object], number: int = signal.SIGUSR1) -> Iterator[None]:
    before = signal.signal(number, lambda *_: call())
    yield
    signal.signal(number, before)


def handler(sem: TimelineSemaphore, parent: Parent) -> contextlib.AbstractContextManager[None]:
    return on_signal(lambda: sem.signal(1))


def harmless_handler(sem: TimelineSemaphore, parent: Parent) -> contextlib.AbstractContextManager[None]:
    return on_signal(lambda: None, signal.SIGTERM)


@contextlib.contextmanager
def callback(sem: TimelineSemaphore, parent: Parent) -> Iterator[None]:
    (fence,) = dmabuf.recv(parent.sock)
    fence.add_callback(lambda _: sem.signal(1))
    yield


@contextlib.contextmanager
def duplicate(sem: TimelineSemaphore, parent: Parent) -> Iterator[None]:
    """Nobody uses it, but it could be sent, or be another process's by now."""
    fd = sem.dup()
    with on_signal(lambda: None):  # for the test to end the wait
        yield
    os.close(fd)


@contextlib.contextmanager
def forked_child(sem: TimelineSemaphore, parent: Parent) -> Iterator[None]:
    """A child that inherits the descriptor, and submits when its parent's line ends."""
    here, there = socket.socketpair()
    pid = os.fork()
    if not pid:
        here.close()
        there.recv(1)
        sem.signal(1)
        os._exit(0)
    there.close()
    yield
    here.close()
    os.waitpid(pid, 0)


def nothing(sem: TimelineSemaphore, parent: Parent) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def waits(parent: Parent, beside: Callable[[TimelineSemaphore, Parent], Any], timeout: float | None) -> object:
    """Wait for a submission, and tell the test of each look for somebody who could make it."""
    (sem,) = dmabuf.recv(parent.sock)
    real = semaphores.nobody_left

    def look(file: SharedFile, domain: dmabuf.Domain, listening: int) -> bool:
        answer = real(file, domain, listening)
        parent.send(answer)
        return answer

    semaphores.nobody_left = look  # type: ignore[attr-defined]
    with beside(sem, parent):
        try:
            sem.wait(1, timeout, for_submit=True)
        except OSError as e:
            found: object = e.errno
            # All is as before.
            sem.signal(1)
            sem.wait(1)
        else:
            found = "reached"
    sem.close()
    return found


def started(child: Spawn, beside: Callable[..., Any] = nothing, timeout: float | None = None) -> tuple[Child, TimelineSemaphore]:
    other, sem = child(waits, beside, timeout), TimelineSemaphore()
    dmabuf.send(other.sock, sem)
    return other, sem


@pytest.mark.parametrize("timeout", [None, 100.0])
def test_wait_of_the_last_holder_is_edeadlk(child: Spawn, timeout: float | None) -> None:
    other, sem = started(child, timeout=timeout)
    assert other.recv() is False  # this process has it
    sem.close()
    assert other.result() == errno.EDEADLK


def waits_beside(parent: Parent) -> str:
    (sem,) = dmabuf.recv(parent.sock)
    real = semaphores.nobody_left

    def look(file: SharedFile, domain: dmabuf.Domain, listening: int) -> bool:
        parent.send("looks")
        parent.recv()
        return real(file, domain, listening)

    semaphores.nobody_left = look  # type: ignore[attr-defined]
    sem.wait(1, for_submit=True)
    sem.close()
    return "reached"


def test_wait_ends_by_what_the_last_other_holder_submits_as_it_looks(child: Spawn) -> None:
    other, sem = child(waits_beside), TimelineSemaphore()
    dmabuf.send(other.sock, sem)
    assert other.recv() == "looks"
    sem.signal(1)
    sem.close()
    other.send("look")
    assert other.result() == "reached"


def holds(parent: Parent) -> None:
    (sem,) = dmabuf.recv(parent.sock)
    parent.send("holds")
    parent.recv()
    sem.signal(1)


def test_wait_is_edeadlk_once_the_other_holder_was_killed(child: Spawn) -> None:
    other, sem = started(child)
    holder = child(holds)
    dmabuf.send(holder.sock, sem)
    assert holder.recv() == "holds"
    sem.close()
    assert [other.recv() for _ in range(3)] == [False] * 3
    holder.kill()
    assert other.result() == errno.EDEADLK


def test_wait_goes_on_while_a_message_in_flight_has_it(child: Spawn) -> None:
    other, sem = started(child)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        dmabuf.send(here, sem)
        sem.close()
        del sem
        assert [other.recv() for _ in range(5)] == [False] * 5
        (sem,) = dmabuf.recv(there)
        sem.signal(1)
    assert other.result() == "reached"
    sem.close()


@pytest.mark.parametrize("beside", [another_thread, handler])
def test_wait_goes_on_while_the_process_may_submit(child: Spawn, beside: Callable[..., Any]) -> None:
    other, sem = started(child, beside)
    sem.close()
    assert [other.recv() for _ in range(5)] == [False] * 5
    os.kill(other.pid, signal.SIGUSR1)
    assert other.result() == "reached"


def test_wait_goes_on_while_a_callback_is_registered(child: Spawn) -> None:
    fence = dmabuf.Timeline("work").fence()
    other, sem = child(waits, callback, None), TimelineSemaphore()
    dmabuf.send(other.sock, sem)
    dmabuf.send(other.sock, fence)
    sem.close()
    assert [other.recv() for _ in range(5)] == [False] * 5
    fence.signal()
    assert other.result() == "reached"


def test_wait_ends_by_what_a_forked_child_submits(child: Spawn) -> None:
    other, sem = started(child, forked_child, 1.0)
    sem.close()
    assert [other.recv() for _ in range(2)] == [False] * 2  # a wait looks rarely once it has lasted
    assert other.result() == errno.ETIME  # the child goes on until its parent has left the wait


def test_wait_with_a_duplicate_goes_on_until_its_time_is_over(child: Spawn) -> None:
    other, sem = started(child, duplicate, 0.5)
    sem.close()
    assert other.result() == errno.ETIME


def test_wait_beside_a_handler_that_ends_programs_is_edeadlk(child: Spawn) -> None:
    other, sem = started(child, harmless_handler)
    sem.close()
    assert other.result() == errno.EDEADLK


def either(parent: Parent, all: bool) -> int | None:
    (held,) = dmabuf.recv(parent.sock)
    try:
        with TimelineSemaphore() as own:
            wait_semaphores([own, held], [1, 1], all=all, for_submit=True)
    except OSError as e:
        return e.errno
    finally:
        held.close()
    return 0


def test_wait_for_any_goes_on_while_one_of_them_may_be_submitted(child: Spawn) -> None:
    sem, other = TimelineSemaphore(), child(either, False)
    dmabuf.send(other.sock, sem)
    until_asleep(other.pid)
    sem.signal(1)
    assert other.result() == 0
    sem.close()


def test_wait_for_all_is_edeadlk_though_one_of_them_may_be_submitted(child: Spawn) -> None:
    sem, other = TimelineSemaphore(), child(either, True)
    dmabuf.send(other.sock, sem)
    assert other.result() == errno.EDEADLK
    sem.close()


def transfers(parent: Parent) -> None:
    with TimelineSemaphore() as source, TimelineSemaphore() as target, raises_errno(errno.EDEADLK) as caught:
        target.transfer(source, 3, 1, for_submit=True)
    assert "nobody else has the semaphore, so nobody can submit one" in str(caught.value)


def test_transfer_of_what_nobody_can_submit_is_edeadlk(child: Spawn) -> None:
    child(transfers).result()


def test_file_is_alone_only_without_any_other_descriptor() -> None:
    sem = TimelineSemaphore()
    file = sem._file
    assert file.is_alone()
    fd = sem.dup()
    assert not file.is_alone()
    os.close(fd)
    assert file.is_alone()
    with TimelineSemaphore.from_fd(sem.fileno()):
        assert not file.is_alone()
    assert file.is_alone()
    number = sem.fileno()
    os.close(number)
    assert os.open("/dev/null", os.O_RDONLY) == number
    assert not file.is_alone()  # and somebody else's descriptor stays what it is
    assert os.readlink(f"/proc/self/fd/{number}") == "/dev/null"
    sem.close()
    os.close(number)


def waits_at_the_word(parent: Parent) -> int:
    """The holder that could go on is killed, and the one that waits has the number in the mapped word."""
    (sem,) = dmabuf.recv(parent.sock)
    sem.signal(1)
    sem.signal(2)
    assert sem._points.value() == 2
    parent.send("waits")
    try:
        sem.wait(3, for_submit=True)
    except OSError as e:
        return e.errno or 0
    return 0


def test_wait_at_the_word_for_what_nobody_can_submit_is_edeadlk(child: Spawn) -> None:
    waiter = child(waits_at_the_word)
    sem = TimelineSemaphore()
    dmabuf.send(waiter.sock, sem)
    assert waiter.recv() == "waits"
    until_asleep(waiter.pid)
    sem.close()
    assert waiter.result() == errno.EDEADLK
