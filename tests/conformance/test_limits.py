"""One more than the most: a clear error where the thing is made, nothing lost, and never a fence that says "signaled" too early."""

import contextlib
import errno
import os
import select
import socket

import pytest

import dmabuf
from dmabuf import DmaFence, DmaFenceArray, SwSync, SyncFile, Timeline, TimelineSemaphore
from dmabuf.core.fence import travel
from dmabuf.core.sync import sw_pending
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.sync_files import open_in_domain, polled

MANY = (1 << 16) + 1  # fences: more than a sync file once could have


def signal_all(fences: list[DmaFence]) -> None:
    for fence in fences:
        fence.signal()


def waits_for_every_one(parent: Parent) -> list[object]:
    timeline = Timeline("many")
    fences = [timeline.fence() for _ in range(MANY)]
    seen: list[object] = []
    with SyncFile(DmaFenceArray(fences)) as sf:
        fd = sf.dup()
        signal_all(fences[:-1])
        seen += [polled(fd), sf.status]
        with SyncFile.from_fd(fd) as found:
            seen += [found.info(0).num_fences, found.status]
        fences[-1].signal(-errno.EIO)
        seen += [polled(fd), sf.info().status]
    os.close(fd)
    return seen


def test_sync_file_of_more_than_65536_fences_waits_for_every_one(child: Spawn) -> None:
    """In a process of its own, which takes the slots of all of them along."""
    assert child(waits_for_every_one).result() == [0, 0, MANY, 0, select.POLLIN, -errno.EIO]
    assert open_in_domain() == 0


@pytest.mark.parametrize("order", ["forward", "backward", "inside out"])
def test_descriptor_of_many_fences_waits_for_the_last(tl: Timeline, order: str) -> None:
    fences = [tl.fence() for _ in range(1000)]  # more than a chunk has slots
    ordered = {"forward": fences, "backward": fences[::-1], "inside out": fences[500:] + fences[:500][::-1]}[order]
    with SyncFile(DmaFenceArray(fences)) as sf:
        sf.fileno()
        for fence in ordered[:-1]:
            fence.signal()
            assert polled(sf) == 0
        ordered[-1].signal()
        assert polled(sf) == select.POLLIN


def test_message_of_a_private_domain_takes_no_sync_file_of_too_many_fences() -> None:
    domain = dmabuf.Domain.private()
    timeline = Timeline("many", domain=domain)
    fences = [timeline.fence() for _ in range(MANY)]
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, SyncFile(DmaFenceArray(fences)) as sf:
        with raises_errno(errno.EMSGSIZE):
            dmabuf.send(here, sf)
        assert (polled(sf), sf.status) == (0, 0)
        signal_all(fences)
        assert polled(sf) == select.POLLIN


def nested(fence: DmaFence, depth: int) -> DmaFence:
    for _ in range(depth):
        with pytest.warns(dmabuf.ContractWarning) if isinstance(fence, DmaFenceArray) else contextlib.nullcontext():
            fence = DmaFenceArray([fence])
    return fence


@pytest.mark.parametrize("more", [0, 1])
def test_containers_in_containers_are_refused_where_they_are_sent(tl: Timeline, more: int) -> None:
    fence = tl.fence()
    container = nested(fence, travel._DEEPEST + more)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        if more:
            with raises_errno(errno.EMSGSIZE):
                dmabuf.send(here, container)
        else:
            dmabuf.send(here, container)
            (got,) = dmabuf.recv(there)
            assert not got.is_signaled()
    fence.signal()


@pytest.mark.parametrize("number", [1 << 63, (1 << 64) - 1, 1 << 64, (1 << 64) + 5])
def test_time_of_a_signal_that_is_out_of_range_is_einval_and_signals_nothing(tl: Timeline, number: int) -> None:
    fence = tl.fence()
    with raises_errno(errno.EINVAL):
        fence.signal_timestamp(number)
    assert fence.status == 0
    fence.signal_timestamp((1 << 63) - 1)
    assert fence.timestamp == (1 << 63) - 1


@pytest.mark.parametrize("number", [1 << 63, (1 << 64) - 1, 1 << 64])
def test_deadline_after_the_end_of_time_does_not_hide_an_earlier_one(tl: Timeline, number: int) -> None:
    fence = tl.fence()
    fence.set_deadline(number)
    assert fence.deadline == (1 << 63) - 1
    fence.set_deadline(5)
    assert fence.deadline == 5
    fence.signal()


def test_software_timeline_with_too_many_pending_fences_is_enospc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sw_pending, "MAX_PENDING", 100)
    with SwSync() as sw:
        files = [sw.create_fence(i + 1) for i in range(100)]
        with raises_errno(errno.ENOSPC):
            sw.create_fence(101)
        assert sw.statistics().pending == 100
        sw.inc(50)
        files.append(sw.create_fence(102))
        assert [sf.status for sf in files] == [1] * 50 + [0] * 51
        sw.inc(52)
        assert [sf.status for sf in files] == [1] * 101


@pytest.mark.parametrize("point", [1 << 64, -1])
def test_point_that_is_out_of_range_is_einval_and_changes_nothing(point: int) -> None:
    with TimelineSemaphore() as sem:
        sem.signal((1 << 64) - 1)
        with raises_errno(errno.EINVAL):
            sem.signal(point)
        with raises_errno(errno.EINVAL):
            sem.wait(point, 0)
        assert sem.query() == (1 << 64) - 1


def test_semaphore_of_many_pending_fences_waits_for_every_one(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(3000)]
    with TimelineSemaphore() as sem:
        sem.import_fence(DmaFenceArray(fences), 1)
        signal_all(fences[:-1])
        assert (sem.query(), sem.statistics().pending) == (0, 1)
        fences[-1].signal()
        assert sem.query() == 1
