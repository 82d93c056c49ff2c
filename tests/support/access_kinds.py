"""Every kind of access, on every backing, for tests that interrupt them.

A :class:`Bench` has two buffers of one backing. ``KINDS`` use both, or one; each of them leaves everything that it enters.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import trio

import dmabuf
from dmabuf import BufferRange, Direction, DmaBuf, DmaBufAttachment, Exporter, SgTable, Usage
from dmabuf.core.buffer.handle import handle_of
from tests.support.children import Parent, Spawn
from tests.support.waiting import until

SIZE = 16384
LONG = 3600.0


class Counting(Exporter):
    """Memory of its own. ``open``: accesses that have begun and not ended. The last act of an op, and the first, is the count."""

    def __init__(self) -> None:
        self.memory = dmabuf.allocate(SIZE)
        self.open = 0

    def mmap(self, buf: DmaBuf, offset: int, length: int) -> Any:
        return self.memory.mmap(offset, length)

    def begin_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.open += 1

    def end_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.open -= 1

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
        raise NotImplementedError

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        raise NotImplementedError

    def release(self, buf: DmaBuf) -> None:
        pass


def exports_two(parent: Parent) -> None:
    """The process of the backing `elsewhere`: answers how many accesses are open."""
    exporters = [Counting(), Counting()]
    bufs = [dmabuf.export(one, SIZE) for one in exporters]
    dmabuf.send(parent.sock, *bufs)
    while parent.recv():
        parent.send(sum(one.open for one in exporters))
    for buf in bufs:
        buf.close()
    for one in exporters:
        until(lambda: gc.collect() >= 0)
        one.memory.close()


class Bench:
    """Two buffers. ``open``: the exporter's accesses that have begun and not ended."""

    def __init__(self, bufs: list[DmaBuf], open: Callable[[], int] = lambda: 0, also: DmaBuf | None = None) -> None:
        self.a, self.b = bufs
        self.also = also  # used in between. A move that it caused may go on for a moment, and has a fence of its own
        self.part: BufferRange = self.a.export_range(100, 5000)
        self.open = open

    def held(self) -> str:
        """What of it is held, as text; empty: nothing."""
        if self.also is not None:
            with contextlib.suppress(AssertionError):
                until(lambda: not self._held(), limit_s=1)
        return self._held()

    def _held(self) -> str:
        found = {}
        for name, buf in (("a", self.a), ("b", self.b)):
            if fences := len(buf.resv.fences(Usage.BOOKKEEP)):
                found[f"fences of {name}"] = fences
            if accesses := handle_of(buf).accesses:
                found[f"accesses of {name}"] = accesses
        if brackets := self.open():
            found["brackets"] = brackets
        return ", ".join(f"{key}: {value}" for key, value in found.items())

    def settle(self) -> None:
        """Write both, so that nothing is torn, and at once: nobody is in the way."""
        with dmabuf.access(write=[self.a, self.b], timeout=0 if self.also is None else LONG) as views:
            for view in views:
                view[0] = 1
        if self.also is not None:
            with self.also.read():
                pass


@contextlib.contextmanager
def memfd(_: Spawn) -> Iterator[Bench]:
    with dmabuf.allocate(SIZE) as a, dmabuf.allocate(SIZE) as b:
        yield Bench([a, b])


@contextlib.contextmanager
def here(_: Spawn) -> Iterator[Bench]:
    exporters = [Counting(), Counting()]
    with dmabuf.export(exporters[0], SIZE) as a, dmabuf.export(exporters[1], SIZE) as b:
        yield Bench([a, b], lambda: sum(one.open for one in exporters))
    for one in exporters:
        one.memory.close()


@contextlib.contextmanager
def elsewhere(child: Spawn) -> Iterator[Bench]:
    other = child(exports_two)
    a, b = dmabuf.recv(other.sock)

    def ask() -> int:
        other.send(True)
        return int(other.recv())

    def count() -> int:
        found = ask()
        for _ in range(200):  # what a call that was cut short has begun is ended there a moment later
            if not found:
                break
            found = ask()
        return found

    with a, b:
        yield Bench([a, b], count)
    other.send(None)
    other.result()


@contextlib.contextmanager
def spill(_: Spawn) -> Iterator[Bench]:
    """A heap with room for two of three buffers: with each :meth:`Bench.settle` one of them is moved out."""
    with tempfile.TemporaryDirectory(prefix="dmabuf-interrupted-") as where:
        heap = dmabuf.SpillHeap(budget=2 * SIZE, directory=where)
        with heap.allocate(SIZE) as a, heap.allocate(SIZE) as b, heap.allocate(SIZE) as c:
            yield Bench([a, b], lambda: sum(one.uses for one in heap._resident_set.buffers), also=c)
        heap.close()


BACKINGS = {"memfd": memfd, "here": here, "elsewhere": elsewhere, "spill": spill}


# ---- the kinds ----


def read(on: Bench) -> None:
    with on.a.read():
        pass


def write(on: Bench) -> None:
    with on.a.write() as view:
        view[:4] = b"abcd"


def read_with_timeout(on: Bench) -> None:
    with on.a.read(timeout=LONG) as view:
        bytes(view[:10])


def write_with_timeout(on: Bench) -> None:
    with on.a.write(LONG) as view:
        view[5] = 1


def several(on: Bench) -> None:
    with dmabuf.access(read=[on.a], write=[on.b]) as (x, y):
        y[0] = x[0]


def several_with_timeout(on: Bench) -> None:
    with dmabuf.access(write=[on.b, on.a], timeout=LONG) as (x, y):
        y[0] = x[0]


def range_read(on: Bench) -> None:
    with on.part.read() as view:
        bytes(view[:10])


def range_write(on: Bench) -> None:
    with on.part.write(timeout=LONG) as view:
        view[0] = 1


def nested(on: Bench) -> None:
    with on.a.read() as x, on.b.write() as y:
        y[0] = x[0]


def array(on: Bench) -> None:
    with on.a.write() as view:
        view.array("<f4", (16, 16), offset=64)[:] = 1.5


def memory_kept(on: Bench) -> None:
    with on.a.read() as view:
        kept = memoryview(view)
    del kept


def array_kept_in_a_write(on: Bench) -> None:
    with on.a.write() as view:
        kept = view.array()
        kept[:4] = 1
        del kept


def step_slice(on: Bench) -> None:
    with on.a.read() as view:
        memoryview(view[::3]).tobytes()


KINDS: tuple[Callable[[Bench], None], ...] = (
    read, write, read_with_timeout, write_with_timeout, several, several_with_timeout, range_read, range_write, nested, array, memory_kept,
    array_kept_in_a_write, step_slice,
)  # fmt: skip


async def in_task(on: Bench) -> None:
    async with on.a.read():
        pass
    async with on.a.write(timeout=LONG) as view:
        view[0] = 1
    async with dmabuf.access(read=[on.a], write=[on.b]) as (x, y):
        y[0] = x[0]
    async with on.part.read() as view:
        bytes(view[:4])


def with_asyncio(on: Bench) -> None:
    asyncio.run(in_task(on))


def with_trio(on: Bench) -> None:
    trio.run(in_task, on)


ASYNC: tuple[Callable[[Bench], None], ...] = (with_asyncio, with_trio)
