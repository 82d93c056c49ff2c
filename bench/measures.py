"""What is measured: each function returns a median in µs."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import dmabuf
from bench.peers import cpus, median_us, peer, pinned, timed
from dmabuf import Direction, Usage

ROUND_TRIPS = 3000
A_MESSAGE = 200
HAND_OVERS = 1500


def _send_all(sock: socket.socket, fences: list[dmabuf.DmaFence]) -> None:
    for i in range(0, len(fences), A_MESSAGE):
        dmabuf.send(sock, *fences[i : i + A_MESSAGE])


def _recv_all(sock: socket.socket, count: int) -> list[dmabuf.DmaFence]:
    found: list[dmabuf.DmaFence] = []
    while len(found) < count:
        found += dmabuf.recv(sock)
    return found


def _row(name: str) -> list[dmabuf.DmaFence]:
    timeline = dmabuf.Timeline(name)
    return [timeline.fence() for _ in range(ROUND_TRIPS)]


def fence_round_trip(split: bool) -> float:
    """signal → the other wakes and signals → we wake. The fences are made beforehand, as a pipeline makes them."""
    here, there = cpus(split)

    def body(sock: socket.socket) -> None:
        own = _row("pong")
        theirs = _recv_all(sock, ROUND_TRIPS)
        _send_all(sock, own)
        for wait, signal in zip(theirs, own, strict=True):
            wait.wait()
            signal.signal()
        sock.recv(1)

    samples = []
    clock = time.perf_counter_ns
    with peer(body, there) as sock, pinned(here):
        own = _row("ping")
        _send_all(sock, own)
        theirs = _recv_all(sock, ROUND_TRIPS)
        for wait, signal in zip(theirs, own, strict=True):
            start = clock()
            signal.signal()
            wait.wait()
            samples.append(clock() - start)
    return median_us(samples[ROUND_TRIPS // 10 :])


def write_uncontended(size: int = 4096) -> float:
    """Entering and leaving `with buf.write()` with nobody in the way."""
    with dmabuf.allocate(size) as buf, pinned(cpus(False)[0]):

        def once() -> None:
            with buf.write():
                pass

        return timed(once)


def read_uncontended(size: int = 4096) -> float:
    """Entering and leaving `with buf.read()` with nobody in the way."""
    with dmabuf.allocate(size) as buf, pinned(cpus(False)[0]):

        def once() -> None:
            with buf.read():
                pass

        return timed(once)


def array_of_read() -> float:
    """`view.array()` in a read() block, above the block alone."""
    with dmabuf.allocate(4096) as buf, pinned(cpus(False)[0]):

        def alone() -> None:
            with buf.read():
                pass

        def with_array() -> None:
            with buf.read() as view:
                view.array()

        return timed(with_array) - timed(alone)


def fence_made() -> float:
    """A fence that is made, signaled and dropped, in one process."""
    timeline = dmabuf.Timeline("bench")
    with pinned(cpus(False)[0]):

        def once() -> None:
            timeline.fence().signal()

        return timed(once)


def fence_received(count: int = 150, messages: int = 60) -> float:
    """A fence of another process that is received among others in one message, and dropped; each."""
    here, there = cpus(False)

    def body(sock: socket.socket) -> None:
        timeline = dmabuf.Timeline("bench")
        fences = [timeline.fence() for _ in range(count)]
        for _ in range(messages):
            dmabuf.send(sock, *fences)
            sock.recv(1)
        for fence in fences:
            fence.signal()

    samples = []
    clock = time.perf_counter_ns
    with peer(body, there) as sock, pinned(here):
        for _ in range(messages):
            select.select([sock], [], [])
            start = clock()
            got = dmabuf.recv(sock)
            del got
            samples.append((clock() - start) // count)
            sock.send(b"x")
    return median_us(samples)


def attach_cycle(size: int = 4096) -> float:
    """attach, map, unmap and detach of a plain buffer, which has a static exporter, for a static device."""
    device = dmabuf.Device("bench")
    with dmabuf.allocate(size) as buf, pinned(cpus(False)[0]):

        def once() -> None:
            attachment = buf.attach(device)
            sgt = attachment.map_unlocked(Direction.TO_DEVICE)
            attachment.unmap_unlocked(sgt, Direction.TO_DEVICE)
            attachment.detach()

        return timed(once)


def map_cycle(size: int) -> float:
    """map and unmap of a plain buffer, whose pages are in one piece."""
    device = dmabuf.Device("bench")
    with dmabuf.allocate(size) as buf, pinned(cpus(False)[0]):
        attachment = buf.attach(device)

        def once() -> None:
            with attachment.mapped(Direction.TO_DEVICE):
                pass

        try:
            return timed(once)
        finally:
            attachment.detach()


class _Idle(dmabuf.Exporter):
    """Its CPU access costs nothing; nobody maps it."""

    def map(self, attachment: dmabuf.DmaBufAttachment, direction: Direction) -> None:
        return None

    def unmap(self, attachment: dmabuf.DmaBufAttachment, sgt: dmabuf.SgTable, direction: Direction) -> None:
        pass

    def begin_cpu_access(self, buf: dmabuf.DmaBuf, direction: Direction) -> None:
        pass

    def end_cpu_access(self, buf: dmabuf.DmaBuf, direction: Direction) -> None:
        pass

    def release(self, buf: dmabuf.DmaBuf) -> None:
        pass


def carried_access() -> float:
    """begin_cpu_access and end_cpu_access with the exporter in another process: two calls. The C twin is `limits seqpacket`."""
    here, there = cpus(False)

    def body(sock: socket.socket) -> None:
        with dmabuf.export(_Idle(), 4096) as buf:
            dmabuf.send(sock, buf)
            sock.recv(1)

    with peer(body, there) as sock, pinned(here):
        (buf,) = dmabuf.recv(sock)

        def once() -> None:
            buf.begin_cpu_access(Direction.FROM_DEVICE)
            buf.end_cpu_access(Direction.FROM_DEVICE)

        with buf:
            return timed(once, 100)


def hand_over(size: int, split: bool) -> float:
    """Send a buffer; the other receives, maps, touches both ends, unmaps, closes and acknowledges. The C twin is `limits scm`."""
    here, there = cpus(split)

    def body(sock: socket.socket) -> None:
        recv = dmabuf.recv
        for _ in range(HAND_OVERS):
            (buf,) = recv(sock)
            with buf.mmap(writable=False) as view:
                if view[0] + view[size - 1] != 2:
                    raise RuntimeError("wrong bytes")
            buf.close()
            sock.send(b"a")
        sock.recv(1)

    samples = []
    clock = time.perf_counter_ns
    with dmabuf.allocate(size) as buf, peer(body, there) as sock, pinned(here):
        with buf.write() as view:
            view[0] = view[size - 1] = 1
        send, recv = dmabuf.send, sock.recv
        for _ in range(HAND_OVERS):
            start = clock()
            send(sock, buf)
            recv(8)
            samples.append(clock() - start)
    return median_us(samples[HAND_OVERS // 10 :])


@contextmanager
def many_buffers(count: int, processes: int = 4) -> Iterator[None]:
    """`count` other buffers in the domain, spread over processes."""

    def body(sock: socket.socket) -> None:
        held = [dmabuf.allocate(4096) for _ in range(count // processes)]
        sock.send(b"r")
        sock.recv(1)
        del held

    with ExitStack() as stack:
        socks = [stack.enter_context(peer(body)) for _ in range(processes if count else 0)]
        for sock in socks:
            if sock.recv(1) != b"r":
                raise RuntimeError("a holder of buffers ended")
        yield


@contextmanager
def many_fences(count: int) -> Iterator[None]:
    """`count` pending fences in the domain, on reservation objects of another process."""

    def body(sock: socket.socket) -> None:
        fences: list[dmabuf.DmaFence] = []
        resvs = []
        timeline = dmabuf.Timeline("pending")
        while len(fences) < count:
            resv = dmabuf.DmaResv()
            resvs.append(resv)
            with resv.locked():
                resv.reserve(1)
                fence = timeline.fence()
                resv.add(fence, Usage.BOOKKEEP)
            fences.append(fence)
        sock.send(b"r")
        sock.recv(1)
        timeline.close()

    with ExitStack() as stack:
        if count:
            sock = stack.enter_context(peer(body))
            if sock.recv(1) != b"r":
                raise RuntimeError("the holder of fences ended")
        yield


def wake_after_kill(kills: int = 100) -> list[float]:
    """Milliseconds from SIGKILL of a fence's owner to the end of a wait for it, sorted."""
    found = []
    for _ in range(kills):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if not pid:
            try:
                timeline = dmabuf.Timeline("doomed")
                fence = timeline.fence()
                dmabuf.send(theirs, fence)
                theirs.recv(1)
            finally:
                os._exit(1)
        (fence,) = dmabuf.recv(ours)
        start = time.perf_counter_ns()
        os.kill(pid, signal.SIGKILL)
        fence.wait()
        found.append((time.perf_counter_ns() - start) / 1e6)
        os.waitpid(pid, 0)
        ours.close()
        theirs.close()
    return sorted(found)


def idle_wakes(seconds: float) -> float:
    """How often a second the threads of a process wake up, of which one waits for a fence while nothing happens."""

    def body(sock: socket.socket) -> None:
        timeline = dmabuf.Timeline("idle")
        fence = timeline.fence()
        dmabuf.send(sock, fence)
        sock.recv(1)
        fence.signal()

    def wakes() -> int:
        found = 0
        for tid in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{tid}/status") as status:
                found += sum(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))
        return found

    with ExitStack() as stack:
        sock = stack.enter_context(peer(body))
        (fence,) = dmabuf.recv(sock)
        waiter = threading.Thread(target=fence.wait)
        waiter.start()
        select.select([], [], [], 1)  # the first ticks of a wait are more frequent
        before, start = wakes(), time.monotonic()
        select.select([], [], [], seconds)
        found = (wakes() - before - 1) / (time.monotonic() - start)  # this thread's one is not the waiter's
        sock.send(b"e")
        waiter.join()
    return found
