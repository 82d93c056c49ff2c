"""DMA_BUF_IOCTL_SYNC (semantics 5.3): `buf.sync(flags)`."""

import errno
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import dmabuf
from dmabuf import Direction, Usage
from tests.conformance.cases.bench import Bench, add, case
from tests.support.waiting import Background, until_asleep

READ, WRITE, RW, END = 1, 2, 3, 4
TRIES = 20
# In the order in which they were asked of one buffer.
STEPS = {
    "end-first": END | READ,
    "start-r": READ,
    "end-r": END | READ,
    "end-r-again": END | READ,
    "start-w": WRITE,
    "start-w-again": WRITE,
    "end-rw-mismatch": END | RW,
    "start-rw": RW,
    "end-w": END | WRITE,
}


def _steps(bench: Bench, last: str) -> Any:
    buf = bench.buffer()
    for name, flags in STEPS.items():
        if name == last:
            buf.sync(flags)
            return 0
        try:
            buf.sync(flags)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
    raise AssertionError(last)


def _refused(bench: Bench, flags: int) -> Any:
    bench.buffer().sync(flags)
    return 0


def _blocks(bench: Bench, usage: Usage, flags: int) -> Any:
    buf = bench.buffer()
    if flags & END:
        buf.sync(flags & ~END)
    end = bench.busy(buf, usage)
    with Background(lambda: buf.sync(flags)) as job:
        job.until_blocked()
        slept = not job.done
        end()
        job.result()
    return [0, "blocked" if slept else "did not block"]


for _step in STEPS:
    add(f"sync/*-{_step}", lambda bench, last=_step: _steps(bench, last))
for _flags in (0, 4, 8, 9, 0x10, 1 << 32 | 1, 1 << 63 | 1, (1 << 64) - 1):
    add(f"sync/*-flags-{_flags:#x}", lambda bench, flags=_flags: _refused(bench, flags))
for _kind, _usage in (("write", Usage.WRITE), ("read", Usage.READ)):
    for _name, _flags in (("READ", READ), ("WRITE", WRITE), ("RW", RW)):
        add(f"sync/*-block-{_kind}-{_name}", lambda bench, usage=_usage, flags=_flags: _blocks(bench, usage, flags))


@case("sync/*-end-noblock")
def _(bench: Bench) -> Any:
    return _blocks(bench, Usage.WRITE, END | RW)


@case("sync/closed")
def _(bench: Bench) -> Any:
    buf = dmabuf.allocate(4096, heap=bench.heap)
    buf.close()
    buf.sync(READ)
    return 0


def _signalled(end: Callable[[], object], interruptible: bool, bench: Bench, buf: dmabuf.DmaBuf) -> Any:
    """A signal comes while the main thread sleeps; then the fence ends."""
    main = threading.main_thread()
    assert main.ident is not None
    thread = main.ident, main.native_id
    handled: list[int] = []
    again: list[bool] = []

    def poke() -> None:
        until_asleep(os.getpid(), thread[1])
        for _ in range(TRIES if interruptible else 1):  # it may have slept on its way to the wait, where a signal ends nothing
            signal.pthread_kill(thread[0], signal.SIGUSR1)
            until_asleep(os.getpid(), thread[1], over=lambda: bool(over))
            if over:
                break
        again.append(not over)
        end()

    over: list[bool] = []
    old = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
    try:
        with Background(poke):
            try:
                buf.begin_cpu_access(Direction.BIDIRECTIONAL, interruptible=interruptible)
            finally:
                over.append(True)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert handled
    return [0, "until the fence" if again == [True] else "interrupted early"]


@case("sync/*-eintr")
def _(bench: Bench) -> Any:
    buf = bench.buffer()
    return _signalled(bench.busy(buf, Usage.WRITE), True, bench, buf)


@case("sync/*-restart")
def _(bench: Bench) -> Any:
    buf = bench.buffer()
    return _signalled(bench.busy(buf, Usage.WRITE), False, bench, buf)
