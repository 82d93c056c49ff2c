"""What it costs to begin: to import the package, and to join a domain. Each function returns µs, or says otherwise."""

from __future__ import annotations

import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from contextlib import ExitStack

import dmabuf
from bench.peers import peer
from dmabuf import _native

ALLOCATE = "import dmabuf; dmabuf.allocate"  # what a program's first call loads
JOINS = 200
CHUNKS_A_JOIN = 4


def import_cost(code: str = "import dmabuf", runs: int = 15) -> float:
    """CPU time (user and system) of a program above that of the bare interpreter, the median of pairs."""
    _cpu_us(code)  # writes the bytecode, and reads the files into the page cache
    return statistics.median(_cpu_us(code) - _cpu_us("pass") for _ in range(runs))


def bare_interpreter(runs: int = 15) -> float:
    """CPU time of the interpreter's own start and end."""
    return statistics.median(_cpu_us("pass") for _ in range(runs))


def _cpu_us(code: str) -> float:
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"python -c {code!r} ended with {os.waitstatus_to_exitcode(status)}")
    return (usage.ru_utime + usage.ru_stime) * 1e6


def join(growers: int = 0, joins: int = JOINS) -> float:
    """The first operation of a new process, which joins the domain, while so many others make the domain grow; the median.

    It measures, and it is a test: a process that joins must never see a chunk that another is adding half added.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="dmabuf-bench-", dir="/dev/shm"))
        # Of its own, because a domain grows only while no chunk of a process that ended is free.
        domain = dmabuf.Domain.open(directory + "/domain")
        stack.callback(domain.leave)

        def grow(sock: socket.socket) -> None:
            kept = []
            while sock.recv(1):
                kept += [dmabuf.Timeline("grow", domain=domain) for _ in range(CHUNKS_A_JOIN * _native.TIMELINES_PER)]

        def come(sock: socket.socket) -> None:
            start = time.perf_counter_ns()
            with dmabuf.Timeline("first", domain=domain):
                sock.send(struct.pack("q", time.perf_counter_ns() - start))

        samples: list[int] = []
        growing = [stack.enter_context(peer(grow)) for _ in range(growers)]
        for _ in range(joins):
            for sock in growing:
                sock.send(b"g")
            with peer(come) as sock:
                answer = sock.recv(8)
                if len(answer) != 8:
                    raise RuntimeError("a process could not join")
                samples.extend(struct.unpack("q", answer))
    return statistics.median(samples) / 1000
