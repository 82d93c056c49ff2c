"""Timeline semaphores: points, and how they are set, moved and asked for (semantics 5.14)."""

import errno
import math
import os
import random
import select
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, DmaFence, DmaFenceArray, SwSync, SyncFile, Timeline, TimelineSemaphore, wait_semaphores
from dmabuf.domain.shared_file import SharedFile
from tests.support.budget import times
from tests.support.errnos import raises_errno
from tests.support.semaphores import points, reached
from tests.support.waiting import Background

# ---- binary use ----


def test_a_new_one_has_no_fence(sem: TimelineSemaphore) -> None:
    with raises_errno(errno.EINVAL):
        sem.wait(0, 0)
    with raises_errno(errno.EINVAL):
        sem.export_fence()
    with raises_errno(errno.ETIME, TimeoutError):
        sem.wait(0, 0, for_submit=True)


def test_one_can_begin_signalled() -> None:
    with TimelineSemaphore(signaled=True) as sem:
        assert sem.wait() == math.inf
        assert sem.export_fence().status == 1


def test_signal_and_reset(sem: TimelineSemaphore) -> None:
    sem.signal()
    assert reached(sem)
    sem.reset()
    with raises_errno(errno.EINVAL):
        sem.wait(0, 0)


def test_a_fence_replaces_the_one_before(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0])
    assert sem.export_fence() is fences[0]
    sem.import_fence(fences[1])
    assert sem.export_fence() is fences[1]
    fences[1].signal()
    assert reached(sem)


def test_binary_use_has_no_points(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0])
    assert points(sem) == (0, 0)
    with raises_errno(errno.EINVAL):
        sem.wait(1, 0)


# ---- points ----


def test_points_are_reached_in_their_order(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    for point, fence in zip((1, 2, 3), fences, strict=False):
        sem.import_fence(fence, point)
    assert points(sem) == (0, 3)
    fences[1].signal()
    assert [reached(sem, point) for point in (1, 2, 3)] == [False] * 3
    fences[0].signal()
    assert points(sem) == (2, 3)
    assert [reached(sem, point) for point in (0, 1, 2, 3)] == [False, True, True, False]
    fences[2].signal()
    assert points(sem) == (3, 3)
    assert reached(sem)


def test_a_point_in_a_gap_is_the_next(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 2)
    sem.import_fence(fences[1], 6)
    fences[0].signal()
    assert [reached(sem, point) for point in (1, 2, 3, 6)] == [True, True, False, False]
    assert sem.export_fence(4) is fences[1]
    fences[1].signal()
    assert reached(sem, 5)


def test_a_point_beyond_the_last_has_no_fence(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 2)
    with raises_errno(errno.EINVAL):
        sem.wait(3, 0)
    with raises_errno(errno.EINVAL):
        sem.export_sync_file(3)


def test_point_that_does_not_rise_is_raised_and_query_begins_again(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 5)
    sem.import_fence(fences[1], 3)
    assert points(sem) == (0, 5)
    fences[1].signal()
    assert not reached(sem, 5)  # what came before belongs to it
    fences[0].signal()
    assert points(sem) == (5, 5)


def test_a_timeline_goes_on_after_a_binary_fence(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0])
    sem.import_fence(fences[1], 1)
    fences[1].signal()
    assert not reached(sem, 1)
    fences[0].signal()
    assert reached(sem, 1)


def test_a_binary_fence_ends_the_timeline(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 7)
    sem.import_fence(fences[1])
    assert (points(sem), sem.export_fence() is fences[1]) == ((0, 0), True)


def test_signal_at_a_point(sem: TimelineSemaphore) -> None:
    sem.signal(4)
    assert points(sem) == (4, 4)
    assert reached(sem, 4)


def test_a_fence_that_failed_counts_as_reached(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 1)
    fences[0].signal(-errno.EIO)
    assert points(sem) == (1, 1)


def test_a_container_is_taken_apart(sem: TimelineSemaphore, tl: Timeline, other_tl: Timeline) -> None:
    a, b = tl.fence(), other_tl.fence()
    sem.import_fence(DmaFenceArray([a, b]), 1)
    assert sem.statistics() == dmabuf.core.sync.semaphore.SemaphoreStatistics(0, 1, 2)
    a.signal()
    assert sem.export_fence(1) is b
    b.signal()
    assert reached(sem, 1)


def test_thousands_of_points(sem: TimelineSemaphore) -> None:
    with SwSync() as sw:
        files = [sw.create_fence(value) for value in range(1, 301)]
        for value, sf in enumerate(files, 1):
            sem.import_sync_file(sf, value)
        sw.inc(100)
        assert points(sem) == (100, 300)
        sw.inc(200)
        assert points(sem) == (300, 300)


# ---- transfer, sync files ----


def test_transfer_takes_a_points_fences(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    with TimelineSemaphore() as other:
        other.import_fence(fences[0], 1)
        other.import_fence(fences[1], 2)
        sem.transfer(other, 1, 10)
        fences[0].signal()
        assert (points(sem), points(other)) == ((10, 10), (1, 2))
        sem.transfer(other, 2)
        assert sem.export_fence() is fences[1]


def test_transfer_of_what_is_not_there_is_einval(sem: TimelineSemaphore) -> None:
    with TimelineSemaphore() as other, raises_errno(errno.EINVAL):
        sem.transfer(other)


def test_transfer_waits_for_submission_if_asked(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    with TimelineSemaphore() as other:
        with Background(lambda: sem.transfer(other, 3, 1, for_submit=True)) as job:
            job.until_blocked()
            assert not job.done
            other.import_fence(fences[0], 3)
            job.result()
        assert sem.export_fence(1) is fences[0]


def test_sync_files_go_in_and_out(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    with SyncFile(fences[0]) as sf:
        sem.import_sync_file(sf, 1)
        sem.import_sync_file(sf.fileno(), 2)
    with sem.export_sync_file(2) as out:
        assert (out.status, out.info().num_fences) == (0, 1)
        fences[0].signal()
        assert select.select([out], [], [], 0)[0] == [out]


# ---- bad arguments ----

USES: dict[str, Callable[[TimelineSemaphore], object]] = {
    "signal": lambda sem: sem.signal(),
    "reset": lambda sem: sem.reset(),
    "query": lambda sem: sem.query(),
    "wait": lambda sem: sem.wait(0, 0),
    "import_fence": lambda sem: sem.import_fence(dmabuf.stub_fence()),
    "export_fence": lambda sem: sem.export_fence(),
    "import_sync_file": lambda sem: sem.import_sync_file(SyncFile(dmabuf.stub_fence())),
    "export_sync_file": lambda sem: sem.export_sync_file(),
    "transfer": lambda sem: sem.transfer(sem),
    "eventfd": lambda sem: sem.eventfd(0),
    "fileno": lambda sem: sem.fileno(),
    "dup": lambda sem: sem.dup(),
    "statistics": lambda sem: sem.statistics(),
    "reached": lambda sem: sem.reached().send(None),
    "with": lambda sem: sem.__enter__(),
}


@pytest.mark.parametrize("use", list(USES.values()), ids=list(USES))
def test_a_closed_one_is_ebadf(sem: TimelineSemaphore, use: Callable[[TimelineSemaphore], object]) -> None:
    sem.close()
    sem.close()
    with raises_errno(errno.EBADF):
        use(sem)


def test_a_closed_one_among_several_is_enoent(sem: TimelineSemaphore) -> None:
    other = TimelineSemaphore()
    other.close()
    with raises_errno(errno.ENOENT):
        wait_semaphores([sem, other], timeout=0)
    with raises_errno(errno.ENOENT):
        sem.transfer(other)


POINTS: dict[str, Callable[[TimelineSemaphore, int], object]] = {
    "signal": lambda sem, point: sem.signal(point),
    "wait": lambda sem, point: sem.wait(point, 0),
    "import_fence": lambda sem, point: sem.import_fence(dmabuf.stub_fence(), point),
    "export_fence": lambda sem, point: sem.export_fence(point),
    "import_sync_file": lambda sem, point: sem.import_sync_file(SyncFile(dmabuf.stub_fence()), point),
    "export_sync_file": lambda sem, point: sem.export_sync_file(point),
    "transfer to": lambda sem, point: sem.transfer(TimelineSemaphore(signaled=True), 0, point),
    "transfer from": lambda sem, point: sem.transfer(TimelineSemaphore(signaled=True), point),
    "eventfd": lambda sem, point: sem.eventfd(0, point),
}


@pytest.mark.parametrize("point", [-1, 1 << 64])
@pytest.mark.parametrize("use", list(POINTS.values()), ids=list(POINTS))
def test_a_point_has_64_bits(sem: TimelineSemaphore, use: Callable[[TimelineSemaphore, int], object], point: int) -> None:
    with raises_errno(errno.EINVAL):
        use(sem, point)


def test_the_last_point_is_one(sem: TimelineSemaphore) -> None:
    sem.signal((1 << 64) - 1)
    assert points(sem) == ((1 << 64) - 1,) * 2


@pytest.mark.parametrize(
    ("points_", "timeout", "deadline"),
    [([], 0, None), ([1, 2], 0, None), ([0], -1, None), ([0], math.nan, None), ([0], 0, -1)],
    ids=["no point", "two points", "negative timeout", "NaN", "negative deadline"],
)
def test_a_wait_with_bad_arguments_is_einval(sem: TimelineSemaphore, points_: list[int], timeout: float, deadline: int | None) -> None:
    sem.signal()
    with raises_errno(errno.EINVAL):
        wait_semaphores([sem], points_, timeout, deadline=deadline)


@pytest.mark.parametrize("what", [None, 3, "x"])
def test_what_is_no_fence_is_a_type_error(sem: TimelineSemaphore, what: Any) -> None:
    with pytest.raises(TypeError):
        sem.import_fence(what)


@pytest.mark.parametrize("what", [None, "x", -1, 99999], ids=["None", "str", "-1", "closed"])
def test_what_is_no_sync_file_is_einval(sem: TimelineSemaphore, what: Any) -> None:
    with raises_errno(errno.EINVAL):
        sem.import_sync_file(what)


def test_a_closed_sync_file_is_einval(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sf = SyncFile(fences[0])
    sf.close()
    with raises_errno(errno.EINVAL):
        sem.import_sync_file(sf)


@pytest.mark.parametrize("what", [None, 3])
def test_what_is_no_semaphore_is_a_type_error(sem: TimelineSemaphore, what: Any) -> None:
    with pytest.raises(TypeError):
        wait_semaphores([what])
    with pytest.raises(TypeError):
        sem.transfer(what)


def test_a_fence_of_another_domain_is_exdev(sem: TimelineSemaphore) -> None:
    elsewhere = Timeline("elsewhere", domain=dmabuf.Domain.private())
    with raises_errno(errno.EXDEV):
        sem.import_fence(elsewhere.fence())


def test_semaphores_of_two_domains_are_not_waited_for_together(sem: TimelineSemaphore) -> None:
    with TimelineSemaphore(domain=dmabuf.Domain.private()) as other, raises_errno(errno.EXDEV):
        wait_semaphores([sem, other], timeout=0)


@pytest.mark.parametrize(("fd", "number"), [(99999, errno.EBADF), (0, errno.EINVAL)], ids=["closed", "no eventfd"])
def test_an_eventfd_is_asked_for(sem: TimelineSemaphore, fd: int, number: int) -> None:
    with raises_errno(number):
        sem.eventfd(fd)


def test_from_fd_of_another_descriptor_is_einval(buf: DmaBuf) -> None:
    with raises_errno(errno.EINVAL):
        TimelineSemaphore.from_fd(buf.fileno())
    with SwSync() as sw, raises_errno(errno.EINVAL):
        TimelineSemaphore.from_fd(sw.fileno())


def test_spoilt_content_is_euclean(sem: TimelineSemaphore, fences: list[DmaFence]) -> None:
    sem.import_fence(fences[0], 1)
    os.pwrite(sem.fileno(), b"\xff" * 1024, 4096)
    with TimelineSemaphore.from_fd(sem.fileno()) as other, raises_errno(errno.EUCLEAN):
        other.query()


def test_it_is_not_pickled_to_bytes(sem: TimelineSemaphore) -> None:
    import pickle

    with pytest.raises(TypeError, match="multiprocessing"):
        pickle.dumps(sem)


# ---- how much work it is, and what a process remembers of it ----


def seen(sem: TimelineSemaphore) -> list[object]:
    waits = []
    for point in (0, 1, 5, 20, 1000):
        try:
            waits.append(sem.wait(point, 0) > 0)
        except OSError as e:
            waits.append(errno.errorcode[e.errno or 0])
    return [sem.query(), sem.query(submitted=True), sem.statistics(), waits]


@pytest.mark.parametrize("seed", range(6))
def test_one_who_remembers_sees_what_one_sees_who_reads_anew(seed: int, tl: Timeline) -> None:
    """Two holders change it in turn, and after each change a third one reads all of it for the first time."""
    chance = random.Random(seed)
    with TimelineSemaphore() as one, TimelineSemaphore.from_fd(one.fileno()) as two:
        pending: list[DmaFence] = []
        point = 0
        for _ in range(times(quick=100, full=300)):
            sem = chance.choice((one, two))
            action = chance.choices(["rising", "signal", "end", "end", "falling", "binary", "reset"], [8, 3, 4, 4, 1, 0.3, 0.3])[0]
            if action in ("rising", "falling", "binary"):
                fences = [tl.fence() for _ in range(chance.randrange(1, 4))]
                pending += fences
                point += chance.randrange(1, 4)
                at = {"rising": point, "falling": max(1, point - 3), "binary": 0}[action]
                sem.import_fence(fences[0] if len(fences) == 1 else dmabuf.DmaFenceArray(fences), at)
            elif action == "signal":
                point += 1
                sem.signal(point)
            elif action == "reset":
                sem.reset()
            elif pending:
                pending.pop(chance.choice((0, 0, 0, chance.randrange(len(pending))))).signal()
            with TimelineSemaphore.from_fd(one.fileno()) as fresh:
                assert seen(one) == seen(fresh) == seen(two)
        for fence in pending:
            fence.signal()


def bytes_for(points: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How much is read and written while so many points become pending, and are then signaled."""
    moved = 0
    read, write = SharedFile.read, SharedFile.write

    def counted_read(file: SharedFile, offset: int, n: int) -> bytes:
        nonlocal moved
        data = read(file, offset, n)
        moved += len(data)
        return data

    def counted_write(file: SharedFile, offset: int, data: bytes) -> None:
        nonlocal moved
        moved += len(data)
        write(file, offset, data)

    fences = [Timeline(f"t{i}").fence() for i in range(points)]
    with monkeypatch.context() as patch, TimelineSemaphore() as sem:
        patch.setattr(SharedFile, "read", counted_read)
        patch.setattr(SharedFile, "write", counted_write)
        for i, fence in enumerate(fences):
            sem.import_fence(fence, i + 1)
        for i, fence in enumerate(fences):
            fence.signal()
            assert sem.query() == i + 1
    return moved


def test_work_is_in_proportion_to_the_points(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = bytes_for(250, monkeypatch), bytes_for(1000, monkeypatch)
    assert many < 4.6 * few
