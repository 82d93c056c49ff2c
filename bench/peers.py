"""Two processes that take turns: a forked peer, a socket pair, and where each runs."""

from __future__ import annotations

import os
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ONE_CPU, TWO_CPUS = (0, 0), (0, 1)


def cpus(split: bool) -> tuple[int, int]:
    """The CPUs to pin (this process, the peer) to."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[0], usable[-1]) if split else (usable[0], usable[0])


@contextmanager
def pinned(cpu: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def peer(body: Callable[[socket.socket], None], cpu: int | None = None) -> Iterator[socket.socket]:
    """Fork a process that runs body(sock); yields our end. It must end by itself once our end is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            ours.close()
            if cpu is not None:
                os.sched_setaffinity(0, {cpu})
            body(theirs)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise RuntimeError(f"the peer ended with {status}")


def median_us(samples: list[int]) -> float:
    """Median of nanosecond samples, in µs."""
    return statistics.median(samples) / 1000


def timed(call: Callable[[], object], batches: int = 200, batch: int = 50) -> float:
    """Median time of one call, in µs: batches are timed, so that the clock does not count."""
    for _ in range(batch):
        call()
    samples = []
    clock = time.perf_counter_ns
    for _ in range(batches):
        start = clock()
        for _ in range(batch):
            call()
        samples.append((clock() - start) // batch)
    return median_us(samples)
