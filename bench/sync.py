"""Sync files, software timelines and semaphores: each function returns µs.

The rows of many are of twice as many as their limit: what grows faster than the number shows there.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from functools import partial

import dmabuf
from bench import floor
from bench.peers import cpus, median_us, peer, pinned, timed
from bench.table import Spec

MANY = 5_000
ROUNDS = 2000
PING = "futex ping-pong in C, one CPU"
HALF = "the same of half as many"


def descriptor() -> float:
    """Make a fence and its sync file with the descriptor, signal it, poll the descriptor, and close it."""
    timeline = dmabuf.Timeline("bench")
    poll = select.poll

    def once() -> None:
        fence = timeline.fence()
        with dmabuf.SyncFile(fence) as sf:
            asked = poll()
            asked.register(sf.fileno(), select.POLLIN)
            fence.signal()
            if not asked.poll(0):
                raise RuntimeError("the descriptor is not readable")

    with pinned(cpus(False)[0]):
        return timed(once, 1000, 2)


def descriptor_across() -> float:
    """signal → the other process's poll of the bare descriptor returns, and it signals → our poll returns; one CPU."""
    here, there = cpus(False)
    clock, samples = time.perf_counter_ns, []

    def side(sock: socket.socket) -> tuple[list[dmabuf.DmaFence], list[dmabuf.SyncFile], list[int]]:
        timeline = dmabuf.Timeline("bench")
        fences = [timeline.fence() for _ in range(200)]
        files = [dmabuf.SyncFile(fence) for fence in fences]
        for sf in files:
            socket.send_fds(sock, [b"d"], [sf.fileno()])
        return fences, files, [socket.recv_fds(sock, 1, 1)[1][0] for _ in fences]

    def wait(fd: int) -> None:
        asked = select.poll()
        asked.register(fd, select.POLLIN)
        asked.poll()

    def body(sock: socket.socket) -> None:
        fences, _files, theirs = side(sock)
        for fd, fence in zip(theirs, fences, strict=True):
            wait(fd)
            fence.signal()
        sock.recv(1)

    with peer(body, there) as sock, pinned(here):
        fences, files, theirs = side(sock)
        for fence, fd in zip(fences, theirs, strict=True):
            start = clock()
            fence.signal()
            wait(fd)
            samples.append(clock() - start)
        for sf in files:
            sf.close()
    for fd in theirs:
        os.close(fd)
    return median_us(samples[len(samples) // 10 :])


def semaphore() -> float:
    """A point is signaled → the other process's wait returns, and it signals the next → our wait returns; one CPU."""
    here, there = cpus(False)
    clock, samples = time.perf_counter_ns, []

    def body(sock: socket.socket) -> None:
        (sem,) = dmabuf.recv(sock)
        sock.send(b"r")
        for point in range(1, 2 * ROUNDS, 2):
            sem.wait(point, for_submit=True)
            sem.signal(point + 1)
        sock.recv(1)

    with dmabuf.TimelineSemaphore() as sem, peer(body, there) as sock, pinned(here):
        dmabuf.send(sock, sem)
        sock.recv(1)
        for point in range(1, 2 * ROUNDS, 2):
            start = clock()
            sem.signal(point)
            sem.wait(point + 1, for_submit=True)
            samples.append(clock() - start)
    return median_us(samples[ROUNDS // 10 :])


def _each(count: int, work: Callable[[int], Callable[[], object]]) -> float:
    """CPU time of some work on so many things, a thing. The work is prepared first."""
    run = work(count)
    start = time.process_time_ns()
    run()
    return (time.process_time_ns() - start) / count / 1000


def _fences(count: int) -> list[dmabuf.DmaFence]:
    timelines = [dmabuf.Timeline("bench") for _ in range(count)]
    return [timeline.fence() for timeline in timelines]


def merged(count: int) -> Callable[[], object]:
    """Signal all fences of a sync file whose descriptor was asked for."""
    fences = _fences(count)
    sf = dmabuf.SyncFile(dmabuf.merge(*fences))
    sf.fileno()

    def run() -> None:
        for fence in fences:
            fence.signal()
        if sf.status != 1:
            raise RuntimeError("it is not signaled")
        sf.close()

    return run


def software(count: int) -> Callable[[], object]:
    """Make fences of a software timeline, and count up one by one."""
    sw = dmabuf.SwSync()

    def run() -> None:
        files = [sw.create_fence(i + 1) for i in range(count)]
        for _ in range(count):
            sw.inc()
        if files[-1].status != 1:
            raise RuntimeError("it is not signaled")
        sw.close()

    return run


def points(count: int) -> Callable[[], object]:
    """Put pending fences at rising points of a semaphore, and signal them one by one."""
    sem, fences = dmabuf.TimelineSemaphore(), _fences(count)

    def run() -> None:
        for i, fence in enumerate(fences):
            sem.import_fence(fence, i + 1)
        for fence in fences:
            fence.signal()
        if sem.query() != count:
            raise RuntimeError("it is not signaled")
        sem.close()

    return run


def polled(count: int) -> Callable[[], object]:
    """Ask for descriptors of a busy buffer, and close them."""
    fence = dmabuf.Timeline("bench").fence()
    buf = dmabuf.allocate(4096)
    with buf.resv.locked():
        buf.resv.reserve(1)
        buf.resv.add(fence, dmabuf.Usage.WRITE)

    def run() -> None:
        for _ in range(count):
            os.close(buf.poll_fd(select.POLLIN))
        fence.signal()
        buf.close()

    return run


def rows(quick: bool) -> list[Spec]:
    """The rows of the table."""
    count = 1000 if quick else MANY
    futex = partial(floor.run, "futex", "--pin", "same")
    found = [
        Spec("SyncFile descriptor: make + signal + poll", descriptor, futex, PING, 12.0),
        Spec("SyncFile descriptor: signal → poll → answer, one CPU", descriptor_across, futex, PING),
        Spec("semaphore signal → wake round trip, one CPU", semaphore, futex, PING, 2.0),
    ]
    for text, work in (
        ("merged fences, signaled, a fence", merged),
        ("fences of a SwSync, made and signaled, a fence", software),
        ("points of a semaphore, put and signaled, a point", points),
        ("poll_fd() and close, a descriptor", polled),
    ):
        found.append(Spec(f"{count:,} {text}", partial(_each, count, work), partial(_each, count // 2, work), HALF, 1.15))
    return found
