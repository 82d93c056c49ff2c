"""Allocation (semantics 5.8): `dmabuf.allocate()`, and what a descriptor's access mode allows."""

import os
from collections.abc import Callable
from typing import Any

import dmabuf
from dmabuf import DmaBuf
from tests.conformance.cases.bench import PAGE, Bench, NotHere, add, case, flags_of, no_descriptor_left


def _size(bench: Bench, asked: int) -> Any:
    return bench.buffer(asked).lseek(0, os.SEEK_END)


def _made(bench: Bench, asked: int) -> Any:
    bench.buffer(asked)
    return "fd"


add("heap/alloc", lambda bench: _made(bench, PAGE))
add("heap/len-1M", lambda bench: _made(bench, 1 << 20))
add("heap/len-0", lambda bench: _made(bench, 0))
add("heap/len-1-size", lambda bench: _size(bench, 1))
add("heap/len-4097-size", lambda bench: _size(bench, 4097))
add("heap/len-2^63", lambda bench: _made(bench, 1 << 63))
add("heap/len-max", lambda bench: _made(bench, (1 << 64) - 1))
add("heap/len-max-page", lambda bench: _made(bench, (1 << 64) - PAGE))
add("limits/heap-1.01-ram", lambda bench: _made(bench, os.sysconf("SC_PHYS_PAGES") * PAGE // 100 * 101))


@case("limits/emfile-heap")
def _(bench: Bench) -> Any:
    bench.buffer().close()  # what the process opens once is open
    with no_descriptor_left():
        return _made(bench, PAGE)


@case("heap/fl")
def _(bench: Bench) -> Any:
    return flags_of(bench.buffer().fileno())


@case("heap/zeroed")
def _(bench: Bench) -> Any:
    with bench.buffer().read() as view:
        return view == bytes(len(view))


def through(bench: Bench, mode: int, do: Callable[[DmaBuf], Any]) -> Any:
    """What `do` gives for a buffer through a descriptor of that access mode."""
    fd = bench.opened(mode)
    if fd is None:
        raise NotHere
    try:
        buf = dmabuf.get(fd)
    finally:
        os.close(fd)
    with buf:
        return do(buf)


def _map(buf: DmaBuf, writable: bool) -> Any:
    buf.mmap(writable=writable).close()
    return "ok"


def _rename(buf: DmaBuf) -> Any:
    buf.name = "n"
    return 0


for _mode, _flag in (("rdonly", os.O_RDONLY), ("wronly", os.O_WRONLY), ("rdwr", os.O_RDWR)):
    add(f"heap/mmap-{_mode}-shared-r", lambda bench, mode=_flag: through(bench, mode, lambda buf: _map(buf, False)))
    add(f"heap/mmap-{_mode}-shared-rw", lambda bench, mode=_flag: through(bench, mode, lambda buf: _map(buf, True)))
    add(f"heap/sync-{_mode}-w", lambda bench, mode=_flag: through(bench, mode, lambda buf: buf.sync(2) or 0))
    add(f"heap/sync-{_mode}-r", lambda bench, mode=_flag: through(bench, mode, lambda buf: buf.sync(1) or 0))
    add(f"heap/setname-{_mode}", lambda bench, mode=_flag: through(bench, mode, _rename))
