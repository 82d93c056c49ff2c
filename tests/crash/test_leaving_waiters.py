"""Who waits through the dispatcher for a fence of another process, while this process leaves the domain."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import threading
from collections.abc import Callable

import pytest

import dmabuf
from tests.support.steps import fork, reap
from tests.support.waiting import Background

pytestmark = [pytest.mark.crash, pytest.mark.timeout(60)]

GONE = -130  # EOWNERDEAD


def callback(fence: dmabuf.DmaFence, left: Callable[[], None]) -> int:
    called = threading.Event()
    fence.add_callback(lambda _: called.set())
    left()
    called.wait()
    return fence.status


def callback_after_joining_again(fence: dmabuf.DmaFence, left: Callable[[], None]) -> int:
    called = threading.Event()
    token = fence.add_callback(lambda _: None)
    fence.add_callback(lambda _: called.set())
    left()
    called.wait()
    assert token is not None
    assert not fence.remove_callback(token)
    return fence.status


def callback_that_is_removed_in_another_life(fence: dmabuf.DmaFence, left: Callable[[], None]) -> int:
    wrong, last = threading.Event(), threading.Event()
    token = fence.add_callback(lambda _: wrong.set())
    fence.add_callback(lambda _: last.set())
    dmabuf.Domain.default().leave()
    assert token is not None
    assert fence.remove_callback(token)
    left()
    last.wait()
    assert not wrong.is_set()
    return fence.status


def awaited(fence: dmabuf.DmaFence, left: Callable[[], None]) -> int:
    async def main() -> None:
        task = asyncio.create_task(waits())
        await asyncio.sleep(0)
        left()
        await task

    async def waits() -> None:
        await fence

    asyncio.run(main())
    return fence.status


def any_of_them(fence: dmabuf.DmaFence, left: Callable[[], None]) -> int:
    other = dmabuf.Timeline("never", domain=dmabuf.Domain.private()).fence()
    with Background(lambda: dmabuf.wait_any([other, fence])) as job:
        job.until_blocked()
        left()
        index, _ = job.result()
    assert index == 1
    return fence.status


def descriptor(fence: dmabuf.DmaFence, left: Callable[[], None]) -> int:
    with dmabuf.allocate(4096) as buf, dmabuf.SyncFile(fence) as sync_file:
        buf.import_sync_file(sync_file, write=True)
        fd = buf.poll_fd(select.POLLIN)
        left()
        assert select.select([fd], [], [])[0] == [fd]
        os.close(fd)
    return fence.status


WAYS = [callback, callback_after_joining_again, callback_that_is_removed_in_another_life, awaited, any_of_them, descriptor]


def leaves(sock: socket.socket, way: Callable[[dmabuf.DmaFence, Callable[[], None]], int], expected: int) -> None:
    domain = dmabuf.Domain.default()
    (fence,) = dmabuf.recv(sock)

    def left() -> None:
        domain.leave()
        if way is callback_after_joining_again:
            domain.join()
        sock.send(b"l")

    assert way(fence, left) == expected


@pytest.mark.parametrize("dies", [False, True], ids=["signals", "dies"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_waiter_hears_of_a_fence_after_its_process_has_left(way: Callable[..., int], dies: bool) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def own() -> None:
        fence = dmabuf.Timeline("owner").fence()
        dmabuf.send(ours, fence)
        assert ours.recv(1) == b"l"
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        fence.signal()
        assert ours.recv(1) == b""  # its process lives until the other has ended

    with ours, theirs:
        owner = fork(own, theirs.close)
        waiter = fork(lambda: leaves(theirs, way, GONE if dies else 1), ours.close)
        ours.close()
        theirs.close()
        assert reap(waiter) == 0
        assert reap(owner) == (-signal.SIGKILL if dies else 0)
