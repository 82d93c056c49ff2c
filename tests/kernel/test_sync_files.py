"""The kernel's sync_files as `SyncFile`: waited for, awaited, merged, made dependencies of ours; and ours never the kernel's."""

import asyncio
import errno
import math
import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

import dmabuf
from dmabuf import SyncFile, Timeline, TimelineSemaphore
from dmabuf.core.sync import kernel_fences as kernel_sync
from dmabuf.drivers.sw_sync import SwSyncTimeline
from dmabuf.uapi import dma_buf
from dmabuf.uapi import sync_file as uapi
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.kernel_homes import HOMES, made
from tests.support.waiting import Background, until


@pytest.fixture
def timeline() -> Iterator[SwSyncTimeline]:
    with SwSyncTimeline() as here:
        yield here
    until(lambda: kernel_sync._poller.wake < 0)


def wrapped(timeline: SwSyncTimeline, value: int) -> SyncFile:
    fence = timeline.fence(value)
    made = SyncFile.from_fd(fence.number)
    fence.close()
    return made


def readable(sf: SyncFile) -> bool:
    return bool(select.select([sf], [], [], 0)[0])


def test_it_is_known_as_the_kernels(timeline: SwSyncTimeline) -> None:
    with wrapped(timeline, 1) as sf:
        told = uapi.file_info(sf.fileno())
        assert (sf.kernel, sf.name, sf.status) == (True, told.name.decode(), 0)
        info = sf.info()
        assert (info.num_fences, info.fences[0].driver_name, info.fences[0].status) == (1, "sw_sync", 0)
        assert info.fences[0].obj_name == told.fences[0].obj_name.decode()
        assert sf.kernel_fileno() == sf.fileno()
        assert not readable(sf)
        timeline.increment()
        assert (readable(sf), sf.status, sf.is_signaled()) == (True, 1, True)
        assert sf.info().fences[0].timestamp_ns > 0


def test_wait_ends_with_the_kernels_fence(timeline: SwSyncTimeline) -> None:
    with wrapped(timeline, 1) as sf:
        assert sf.wait(0) == 0.0
        with Background(sf.wait) as job:
            job.until_blocked()
            assert not job.done
            timeline.increment()
            assert job.result() == math.inf


def test_await_ends_with_the_kernels_fence(timeline: SwSyncTimeline) -> None:
    async def main() -> int:
        asyncio.get_running_loop().call_soon(timeline.increment)
        return await sf

    with wrapped(timeline, 1) as sf:
        assert asyncio.run(main()) == 1


def test_the_error_of_the_kernels_fence_is_that_of_ours() -> None:
    timeline = SwSyncTimeline()
    with wrapped(timeline, 1) as sf:
        fence = sf.fence
        assert (fence.status, fence.driver_name) == (0, "sw_sync")
        timeline.close()
        assert fence.wait() == math.inf
        assert (fence.status, sf.status, sf.info().status) == (-errno.ENOENT,) * 3
    until(lambda: kernel_sync._poller.wake < 0)


def test_what_has_ended_is_known_to_have(timeline: SwSyncTimeline) -> None:
    with wrapped(timeline, 0) as sf:
        assert (sf.fence.status, sf.wait(0) > 0) == (1, True)


def test_it_is_a_dependency_of_our_buffers(timeline: SwSyncTimeline) -> None:
    with dmabuf.allocate(4096) as buf, wrapped(timeline, 1) as sf:
        buf.import_sync_file(sf, write=True)
        assert buf.poll(select.POLLIN) == 0
        with raises_errno(errno.ETIMEDOUT), buf.read(timeout=0.01):
            pass
        timeline.increment()
        with buf.read():
            pass
        with buf.export_sync_file(write=True) as out:
            assert (out.kernel, out.status) == (False, 1)


def test_it_is_a_point_of_a_semaphore(timeline: SwSyncTimeline) -> None:
    with TimelineSemaphore() as sem, wrapped(timeline, 1) as sf:
        sem.import_sync_file(sf.fileno(), 3)
        with Background(lambda: sem.wait(3)) as job:
            job.until_blocked()
            timeline.increment()
            job.result()


def test_two_of_the_kernels_merge_in_the_kernel(timeline: SwSyncTimeline) -> None:
    with SwSyncTimeline() as other, wrapped(timeline, 1) as a, wrapped(other, 1) as b, a.merge(b, "both") as both:
        assert (both.kernel, both.name, both.info().num_fences) == (True, "both", 2)
        timeline.increment()
        assert (readable(both), [one.status for one in both.info().fences].count(1)) == (False, 1)
        other.increment()
        assert (readable(both), both.fence.wait()) == (True, math.inf)


def test_one_of_ours_and_one_of_the_kernels_merge_here(timeline: SwSyncTimeline) -> None:
    ours = Timeline("ours").fence()
    with wrapped(timeline, 1) as theirs, SyncFile(ours) as sf, theirs.merge(sf) as a, sf.merge(theirs.fileno()) as b:
        assert [(both.kernel, both.info().num_fences) for both in (a, b)] == [(False, 2)] * 2
        ours.signal()
        assert not readable(a)
        timeline.increment()
        for both in (a, b):
            assert both.wait() == math.inf
            select.select([both], [], [])


def test_a_deadline_reaches_the_kernels_fence(timeline: SwSyncTimeline) -> None:
    with wrapped(timeline, 1) as sf:
        sf.set_deadline(9000)
        sf.set_deadline(5000)
        assert timeline.deadline(sf.fileno()) == 5000


def test_the_kernel_takes_none_of_ours(timeline: SwSyncTimeline) -> None:
    ours = Timeline("ours").fence()
    with wrapped(timeline, 1) as theirs, SyncFile(ours) as sf:
        with raises_errno(errno.EINVAL):
            sf.kernel_fileno()
        with raises_errno(errno.ENOENT):
            uapi.merge(theirs.fileno(), sf.fileno())
        for home in HOMES:
            with made(home) as buf, raises_errno(errno.EINVAL):
                dma_buf.import_sync_file(buf.fileno(), 1, sf.fileno())
        ours.signal()


def receives(parent: Parent) -> tuple[bool, int, float, int]:
    (sf,) = dmabuf.recv(parent.sock)
    parent.send(sf.status)
    left = sf.wait()
    try:
        return sf.kernel, sf.status, left, sf.fence.status
    finally:
        sf.close()


def test_it_travels_as_the_kernels(child: Spawn, timeline: SwSyncTimeline) -> None:
    with wrapped(timeline, 1) as sf:
        other = child(receives)
        dmabuf.send(other.sock, sf)
        assert other.recv() == 0
        timeline.increment()
        assert other.result() == (True, 1, math.inf, 1)


def test_a_bare_one_is_received_as_the_kernels(timeline: SwSyncTimeline) -> None:
    here, there = socket.socketpair()
    with here, there, wrapped(timeline, 1) as sf:
        socket.send_fds(here, [b"x"], [sf.fileno()])
        _, (fd,), _, _ = socket.recv_fds(there, 1, 1)
        with dmabuf.get_sync_file(fd) as again:
            assert (again.kernel, again.info()) == (True, sf.info())
        os.close(fd)


def test_thousands_are_waited_for_by_one_thread(timeline: SwSyncTimeline) -> None:
    files = [wrapped(timeline, value) for value in range(1, 201)]
    fences = [sf.fence for sf in files]
    assert sum(thread.name == "dmabuf-kernel-sync" for thread in threading.enumerate()) == 1
    timeline.increment(200)
    for fence in fences:
        assert fence.wait() == math.inf
    for sf in files:
        sf.close()
    until(lambda: kernel_sync._poller.wake < 0)
