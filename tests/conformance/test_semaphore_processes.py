"""Timeline semaphores across processes, deaths and threads (semantics 5.14)."""

import contextlib
import errno
import gc
import math
import os
import select
import signal
import socket
import threading

import pytest

import dmabuf
from dmabuf import DmaFence, Timeline, TimelineSemaphore
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.semaphores import points, told
from tests.support.steps import Held, fork, killed_at, reap, trace
from tests.support.waiting import Background, until_asleep
from tests.support.ways import WAYS, received, sent


def submits(parent: Parent, way: str) -> None:
    """Submits point 1, then signals it as told."""
    with received(parent, TimelineSemaphore, way) as sem:
        fence = Timeline("other").fence()
        parent.send("ready")
        parent.recv()
        sem.import_fence(fence, 1)
        parent.send("submitted")
        parent.recv()
        fence.signal()


@pytest.mark.usefixtures("sharer_ends")
@WAYS
def test_points_are_seen_by_every_holder(child: Spawn, sem: TimelineSemaphore, way: str) -> None:
    other = child(submits, way)
    sent(other, sem, way)
    assert other.recv() == "ready"
    with Background(lambda: sem.wait(1, available=True)) as job:
        job.until_blocked()
        other.send("submit")
        assert job.result() == math.inf
    assert (other.recv(), points(sem)) == ("submitted", (0, 1))
    with Background(lambda: sem.wait(1)) as job:
        job.until_blocked()
        other.send("signal")
        assert job.result() == math.inf
    assert points(sem) == (1, 1)
    other.result()


def test_death_of_submitter_ends_the_wait(child: Spawn, sem: TimelineSemaphore) -> None:
    other = child(submits, "dmabuf.send")
    sent(other, sem, "dmabuf.send")
    assert other.recv() == "ready"
    other.send("submit")
    assert other.recv() == "submitted"
    with Background(lambda: sem.wait(1)) as job:
        job.until_blocked()
        other.kill()
        assert job.result() == math.inf


def waits(parent: Parent) -> None:
    (sem,) = dmabuf.recv(parent.sock)
    parent.send("waiting")
    sem.wait(1, for_submit=True)
    sem.close()


def test_death_of_first_waiter_leaves_the_others_waiting(child: Spawn, sem: TimelineSemaphore) -> None:
    first, second = child(waits), child(waits)
    for other in (first, second):
        dmabuf.send(other.sock, sem)
        assert other.recv() == "waiting"
        until_asleep(other.pid)
    first.kill()
    with Background(lambda: sem.wait(1, for_submit=True)) as job:
        job.until_blocked()
        sem.signal(1)
        assert job.result() == math.inf
    second.result()


def test_a_forked_child_submits(sem: TimelineSemaphore) -> None:
    assert reap(fork(lambda: sem.signal(3))) == 0
    assert points(sem) == (3, 3)


def test_eventfd_is_written_for_signal_of_another_process(child: Spawn, sem: TimelineSemaphore, event: int) -> None:
    sem.eventfd(event, 1)
    other = child(submits, "dmabuf.send")
    dmabuf.send(other.sock, sem)
    assert other.recv() == "ready"
    other.send("submit")
    assert other.recv() == "submitted"
    assert not told(event)
    other.send("signal")
    select.select([event], [], [])
    other.result()


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_wherever_a_change_is_killed_it_is_done_or_not(sem: TimelineSemaphore) -> None:
    steps = trace(lambda: sem.signal(7))
    assert {"file_written", "file_switched"} <= set(steps)
    for count in range(1, len(steps) + 2):
        with TimelineSemaphore() as other:
            other.signal(1)
            with Background(lambda other=other: other.wait(9, for_submit=True)) as job:  # type: ignore[misc]
                job.until_blocked()
                killed_at(lambda other=other: other.signal(7), count)  # type: ignore[misc]
                assert points(other) in ((1, 1), (7, 7))
                other.signal(9)
                assert job.result() == math.inf
            assert points(other) == (9, 9)


@pytest.mark.crash
@pytest.mark.parametrize("step", ["sem_woken", "file_written", "file_switched"])
def test_who_is_killed_with_the_lock_leaves_it_free(sem: TimelineSemaphore, step: str) -> None:
    with Background(lambda: sem.wait(2, for_submit=True)) as waiting:
        waiting.until_blocked()
        with Held(lambda: sem.signal(1), only=step) as other:
            assert other.run_to(step)
            with Background(lambda: sem.signal(2)) as job:
                job.until_blocked()
                assert not job.done
                other.kill()
                job.result()
        assert waiting.result() == math.inf
    assert sem.query() == 2


# ---- the word and the record ----


def pending_then_plain(sem: TimelineSemaphore) -> None:
    """From the word into the record, and back: a fence that ends in between, and a higher point."""
    fence = Timeline("doomed").fence()
    sem.import_fence(fence, 3)
    fence.signal()
    sem.signal(5)
    sem.signal(7)


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_wherever_it_dies_between_word_and_record_one_of_them_counts() -> None:
    with TimelineSemaphore() as sem:
        sem.signal(2)
        steps = trace(lambda: pending_then_plain(sem))
    assert {"sem_folded", "sem_left", "file_written", "file_appended", "file_longer", "sem_pointed"} <= set(steps)
    for count in range(1, len(steps) + 2):
        with TimelineSemaphore() as sem:
            sem.signal(2)
            with Background(lambda sem=sem: sem.wait(9, for_submit=True)) as job:  # type: ignore[misc]
                job.until_blocked()
                killed_at(lambda sem=sem: pending_then_plain(sem), count)  # type: ignore[misc]
                dmabuf.Domain.default().reap_dead()
                assert points(sem) in ((2, 2), (3, 3), (5, 5), (7, 7))
                sem.signal(9)
                assert job.result() == math.inf
            assert points(sem) == (9, 9)


@pytest.mark.parametrize("step", ["sem_folded", "sem_left"])
def test_point_signaled_while_another_folds_is_not_lost(sem: TimelineSemaphore, fences: list[DmaFence], step: str) -> None:
    sem.signal(2)

    def imports() -> None:
        sem.import_fence(fences[0], 9)

    with Held(imports, only=step) as other:
        assert other.run_to(step)
        with Background(lambda: sem.signal(12)) as job:
            if step == "sem_folded":
                job.result()  # the word still counts
            else:
                job.until_blocked()  # the record counts, and the other has its lock
            other.go_on()
            other.release()
            assert other.wait() == 0
            job.result()
    assert sem.query(submitted=True) == 12
    assert sem.query() < 12  # the fence is still pending, whichever of the two came first
    fences[0].signal()
    assert points(sem) == (12, 12)


def test_waiter_at_the_word_goes_on_with_the_record(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.signal(1)
    with Background(lambda: sem.wait(3, for_submit=True)) as job:
        job.until_blocked()
        sem.import_fence(fences[0], 3)
        job.until_blocked()
        assert not job.done
        fences[0].signal()
        assert job.result() == math.inf
    sem.signal(4)
    assert (points(sem), sem._points.value()) == ((4, 4), 4)


def test_wait_at_the_word_ends_with_its_time(sem: TimelineSemaphore) -> None:
    sem.signal(1)
    with raises_errno(errno.ETIME, TimeoutError):
        sem.wait(2, 0.05, for_submit=True)
    with raises_errno(errno.EINVAL):
        sem.wait(2, 0.05)


def test_wait_at_the_word_ends_when_the_semaphore_is_closed(sem: TimelineSemaphore) -> None:
    sem.signal(1)
    with Background(lambda: sem.wait(2, for_submit=True)) as job:
        job.until_blocked()
        sem.close()
        with raises_errno(errno.EBADF):
            job.result()


@pytest.mark.parametrize("point", [(1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_points_of_64_bits_are_signaled_and_waited_for(child: Spawn, sem: TimelineSemaphore, point: int) -> None:
    sem.signal(1)
    with Background(lambda: sem.wait(point, for_submit=True)) as job:
        job.until_blocked()
        sem.signal(point)
        assert job.result() == math.inf
    assert points(sem) == (point, point)


@pytest.mark.parametrize("length", [0, 64, 4095, 4096, 8192])
def test_file_that_may_shrink_is_not_mapped(length: int) -> None:
    """Another program's, of the right name: it could be truncated under a mapping."""
    fd = os.memfd_create(f"dmabuf-semaphore:{dmabuf.Domain.default().id}:{'0' * 16}", os.MFD_CLOEXEC)
    os.pwrite(fd, b"dmabufT\2".ljust(length, b"\0")[:length], 0)
    with raises_errno(errno.EUCLEAN):
        TimelineSemaphore.from_fd(fd)
    os.close(fd)


def test_mapping_in_a_forked_child_keeps_no_lock(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    """A child that inherits the mapping lives on when a process dies that holds the lock."""
    sem.signal(1)
    here, there = os.pipe()
    told, tell = os.pipe()

    def dies() -> None:
        with sem._file.locked():
            pid = fork(lambda: (os.close(there), os.read(here, 1)))
            os.write(tell, pid.to_bytes(8, "little"))
            os.kill(os.getpid(), signal.SIGKILL)

    assert reap(fork(dies)) == -signal.SIGKILL
    child = int.from_bytes(os.read(told, 8), "little")
    sem.import_fence(fences[0], 2)
    fences[0].signal()
    assert sem.query() == 2
    os.close(there)
    with contextlib.suppress(ChildProcessError):  # unless it came to this process as an orphan
        os.waitpid(child, 0)
    for fd in (here, told, tell):
        os.close(fd)


def test_a_private_domains_travels_with_its_domain() -> None:
    domain = dmabuf.Domain.private()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, TimelineSemaphore(domain=domain) as sem:
        dmabuf.send(here, domain, sem)
        _, again = dmabuf.recv(there)
        with again:
            again.signal(5)
        assert points(sem) == (5, 5)
    gc.collect()


def test_many_threads_submit_and_wait(sem: TimelineSemaphore) -> None:
    """Each waits for the point before its own, and signals its own."""

    def run(at: int) -> None:
        for point in range(at, 41, 4):
            if point > 1:
                sem.wait(point - 1, for_submit=True)
            sem.signal(point)

    running = [threading.Thread(target=run, args=(at,)) for at in (1, 2, 3, 4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert points(sem) == (40, 40)
