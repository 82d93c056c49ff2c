"""Frames in a row to one or several readers, what readers cost, and other libraries' round trips, all by bench/transports.py."""

from __future__ import annotations

import os
import resource
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache, partial

import dmabuf
from bench.peers import cpus, peer, pinned
from bench.streams import LIMIT, MANY, touch_all
from bench.table import Spec, Timing
from bench.transports import Limit, Make, Ours, Transport, peers

WARM = 100
A_SECOND = 1000  # frames, of those that are paced
IDLE_BOUND_MS = 10.0  # CPU of a reader that waits for a minute
QUEUE, LATEST = partial(Ours, "queue"), partial(Ours, "latest")


def _read(transport: Transport, reader: int, last: int, sock: socket.socket) -> None:
    """Be a reader, until it has had a frame. Tells how many it had, and its CPU time in ns from the first frame on."""
    frames = transport.frames(reader)
    next(frames)
    sock.send(b"r")
    count, start = 0, 0
    for number in frames:
        start = start or _cpu_ns()
        count += 1
        if number >= last:
            break
    sock.send(struct.pack("<QQ", count, _cpu_ns() - start))
    sock.recv(1)


def _cpu_ns() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return int((used.ru_utime + used.ru_stime) * 1e9)


class _Readers:
    """The processes that read."""

    def __init__(self, stack: ExitStack, transport: Transport, readers: int, last: int, split: bool) -> None:
        here, there = cpus(split)
        self._socks = [stack.enter_context(peer(partial(_read, transport, k, last), there)) for k in range(readers)]
        stack.enter_context(pinned(here))
        for sock in self._socks:
            sock.recv(1)

    def told(self) -> Iterator[tuple[int, int]]:
        """Yield what each tells when it has had the last frame: how many frames, and its CPU time in ns."""
        for sock in self._socks:
            yield struct.unpack("<QQ", sock.recv(16))


def in_a_row(make: Make, readers: int, split: bool, count: int, size: int = MANY) -> float:
    """Frames one after the other, until every reader has had the last one, in µs each."""
    transport = make(size, readers, split)
    with ExitStack() as stack:
        stack.callback(transport.close)
        others = _Readers(stack, transport, readers, count - 1, split)
        start = time.perf_counter_ns()
        for number in range(count):
            transport.put(number)
        for _ in others.told():
            pass
        return (time.perf_counter_ns() - start) / count / 1000


def round_trip(make: Make, size: int, split: bool, count: int) -> float:
    """A frame to one reader, and its answer, in µs."""
    transport = make(size, 1, split)
    samples = []
    clock = time.perf_counter_ns
    with ExitStack() as stack:
        stack.callback(transport.close)
        others = _Readers(stack, transport, 1, count - 1, split)
        for number in range(count):
            start = clock()
            transport.put(number)
            transport.back(number)
            samples.append(clock() - start)
        list(others.told())
    return Timing.of(samples[WARM:])


def cpu_of_a_reader(make: Make, seconds: float) -> float:
    """CPU of a reader of 1,000 frames of 8.3 MB a second, in µs a frame."""
    transport, count = make(MANY, 1, True), int(seconds * A_SECOND)
    with ExitStack() as stack:
        stack.callback(transport.close)
        others = _Readers(stack, transport, 1, count - 1, True)
        start = time.monotonic()
        for number in range(count):
            left = start + number / A_SECOND - time.monotonic()
            if left > 0:
                select.select([], [], [], left)
            transport.put(number)
        (told,) = others.told()
        return told[1] / told[0] / 1000


@cache
def cpu_of_an_idle_reader(seconds: float) -> float:
    """CPU of a reader that waits while no frame comes, in µs. Measured once in a run."""
    name = f"idle {os.getpid()}"

    def body(sock: socket.socket) -> None:
        with dmabuf.Stream.open(name) as theirs, theirs.reader(newest=False) as reader:
            sock.send(b"r")
            reader.next()  # starts what a process has once
            sock.send(b"r")
            before = _cpu_ns()
            reader.next()
            sock.send((_cpu_ns() - before).to_bytes(8, "little"))
            sock.recv(1)

    with dmabuf.Stream.create(name, size=4096) as stream, peer(body) as sock:
        touch_all(stream)
        sock.recv(1)
        with stream.produce():
            pass
        sock.recv(1)
        select.select([], [], [], seconds)
        with stream.produce():
            pass
        return int.from_bytes(sock.recv(8), "little") / 1000


def rows(quick: bool) -> list[Spec]:
    """The rows. A quick run takes one CPU placement, few frames, and the peers' rows of one size."""
    found = []
    count, seconds, idle = (2000, 0.3, 1.0) if quick else (20_000, 5.0, 60.0)
    placements = ((True, "two CPUs"),) if quick else ((False, "one CPU"), (True, "two CPUs"))
    for split, where in placements:
        for make, policy in ((QUEUE, "queue"), (LATEST, "latest")):
            for readers in (1, 2, 4):
                bound = round(1 / (0.9 if split else 0.75), 2) if readers == 1 and policy == "queue" else None
                what = f"frames of 8.3 MB in a row to {readers} {policy} reader{'s' * (readers > 1)}, {where}"
                limit = partial(in_a_row, Limit, readers, split, count)
                found.append(Spec(what, partial(in_a_row, make, readers, split, count), limit, LIMIT, bound))
        for name, other in peers():
            limit = partial(round_trip, Limit, MANY, split, count // 10)
            found.append(Spec(f"  frame round trip by {name}, {where}", partial(round_trip, other, MANY, split, count // 10), limit, LIMIT))
            for readers in (1,) if quick else (1, 2, 4):
                what = f"  frames in a row by {name}, {readers} reader{'s' * (readers > 1)}, {where}"
                limit = partial(in_a_row, Limit, readers, split, count // 10)
                found.append(Spec(what, partial(in_a_row, other, readers, split, count // 10), limit, LIMIT))
    limit = partial(cpu_of_a_reader, Limit, seconds)
    found.append(Spec("CPU of a queue reader of 1,000 frames/s, a frame", partial(cpu_of_a_reader, QUEUE, seconds), limit, LIMIT))
    found.append(Spec("CPU of a latest reader of 1,000 frames/s, a frame", partial(cpu_of_a_reader, LATEST, seconds), limit, LIMIT))
    for name, other in peers():
        found.append(Spec(f"  the same by {name}", partial(cpu_of_a_reader, other, seconds), limit, LIMIT))
    what = f"CPU of a reader that waits for {idle:.0f} s while no frame comes"
    found.append(Spec(what, partial(cpu_of_an_idle_reader, idle), lambda: IDLE_BOUND_MS * 1000, f"{IDLE_BOUND_MS:.0f} ms", 1.0))
    return found
