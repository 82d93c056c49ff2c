"""What a worker does: each operation, how often it comes, and which errors are expected of it, with the reason.

An error that isn't on the list is a fault. So is a warning, an exception in a thread or a finalizer, and a content that nobody wrote.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import dmabuf
from dmabuf import DmaBuf, DmaFence, SwSync, SyncFile, Timeline, TimelineSemaphore, Usage
from tests.soak.board import Outcome
from tests.soak.content import check, count_up
from tests.soak.devices import Vram
from tests.soak.worker import Worker, fail

Run = Callable[[Worker], None]


@dataclass(frozen=True)
class Operation:
    """``expected``: errno -> why it is no fault."""

    name: str
    run: Run
    weight: int
    expected: dict[int, str]


OPERATIONS: list[Operation] = []

# Errors of an exporter's buffer in whichever operation needs the exporter.
EXPORTER_GONE = "the process that exported the buffer has died or released it"
WRITER_DIED = "the last writer was killed in its block, so the content is half written"
WRITER_RAISED = "the last writer raised in its block"
CIRCLE = "two workers, each in a block of one buffer, wait for each other's; this one began its wait last"
NO_ROOM = "all of the spill heap's memory is in use by others, or by this worker"
NAME_GONE = "the last holder of the name has closed its buffer, or died, since the name was chosen"


def operation(weight: int, **expected: str) -> Callable[[Run], Run]:
    """An operation with its weight; ``expected``: names of errnos, and why each is expected."""

    def add(run: Run) -> Run:
        numbers = {getattr(errno, name): why for name, why in expected.items()}
        OPERATIONS.append(Operation(run.__name__, run, weight, numbers))
        return run

    return add


def outcomes() -> list[Outcome]:
    """Every way in which an operation may end."""
    return [Outcome(each.name, number) for each in OPERATIONS for number in (0, *sorted(each.expected))]


def step(worker: Worker) -> None:
    """Do one operation of the worker's choice."""
    (number,) = worker.rng.choices(range(len(OPERATIONS)), [each.weight for each in OPERATIONS])
    chosen = OPERATIONS[number]
    if worker.line is not None:
        worker.line.begins(number)
    ended = 0
    worker.used.clear()
    try:
        chosen.run(worker)
    except OSError as e:
        if e.errno not in chosen.expected or (e.errno == errno.ENODEV and worker.used and all(map(is_plain, worker.used))):
            raise
        ended = e.errno
    if worker.line is not None:
        worker.line.ended(chosen.name, ended)


def is_plain(buf: DmaBuf) -> bool:
    """Has the buffer no exporter that could be gone?"""
    return buf.closed or buf.home == "memfd"


# ---- buffers ----


@operation(24)
def allocate(worker: Worker) -> None:
    name = f"soak {worker.rng.randrange(8)}" if worker.chance(0.4) else None
    worker.keep(dmabuf.allocate(4096 * worker.rng.randint(1, 16), name=name))


@operation(8, ENOMEM=NO_ROOM, ENODEV=EXPORTER_GONE)
def allocate_spilled(worker: Worker) -> None:
    if worker.heap is None:
        worker.heap = dmabuf.SpillHeap(budget=8 * 4096)
    buf = worker.heap.allocate(4096 * worker.rng.randint(1, 4))
    worker.keep(buf)
    with buf.write() as view:
        count_up(view)


@operation(8)
def describe(worker: Worker) -> None:
    buf = worker.buf()
    layout = dmabuf.TensorLayout("uint8", (buf.size,))  # the same from every worker
    assert buf.layout in (None, layout), f"{buf} has the layout of another buffer: {buf.layout}"
    buf.describe(layout)
    assert buf.layout == layout


@operation(8)
def export(worker: Worker) -> None:
    worker.keep(dmabuf.export(Vram(4096 * worker.rng.randint(1, 4)), 4096, exp_name="soak"))


@operation(48, ENODEV=EXPORTER_GONE, ENOMEM=NO_ROOM)
def write(worker: Worker) -> None:
    with worker.buf().write() as view:
        count_up(view, worker.linger)


@operation(56, EOWNERDEAD=WRITER_DIED, ECANCELED=WRITER_RAISED, ENODEV=EXPORTER_GONE, ENOMEM=NO_ROOM)
def read(worker: Worker) -> None:
    buf = worker.buf()
    with buf.read() as view:
        check(view, buf)


@operation(16, EOWNERDEAD=WRITER_DIED, ECANCELED=WRITER_RAISED, ENODEV=EXPORTER_GONE, ENOMEM=NO_ROOM)
def access(worker: Worker) -> None:
    source, *targets = worker.some(3)
    with dmabuf.access(read=[source], write=targets) as views:
        check(views[0], source)
        for view in views[1:]:
            count_up(view, worker.linger)


@operation(12, EDEADLK=CIRCLE, EOWNERDEAD=WRITER_DIED, ECANCELED=WRITER_RAISED, ENODEV=EXPORTER_GONE, ENOMEM=NO_ROOM)
def one_in_another(worker: Worker) -> None:
    outer, *rest = worker.oldest(2)
    with outer.read() as seen:
        number = check(seen, outer)
        worker.linger()
        for inner in rest:
            with inner.write() as view:
                count_up(view, worker.linger)
        assert check(seen, outer) == number, f"somebody wrote {outer} while it was being read"


@operation(8, ENODEV=EXPORTER_GONE, ENOMEM=NO_ROOM)
def raise_in_write(worker: Worker) -> None:
    with contextlib.suppress(KeyError), worker.buf().write() as view:
        view[0] ^= 0xFF
        raise KeyError


@operation(
    12,
    EOWNERDEAD=WRITER_DIED,
    ECANCELED=WRITER_RAISED,
    ETIMEDOUT="another worker was inside for longer",
    ENODEV=EXPORTER_GONE,
    ENOMEM=NO_ROOM,
)
def read_with_timeout(worker: Worker) -> None:
    buf = worker.buf()
    with buf.read(timeout=worker.rng.choice((0, 0.001, 0.05))) as view:
        check(view, buf)


@operation(8, EOWNERDEAD=WRITER_DIED, ECANCELED=WRITER_RAISED, ENODEV=EXPORTER_GONE, ENOMEM=NO_ROOM)
def in_tasks(worker: Worker) -> None:
    bufs, fences = worker.some(3), worker.fences[:3]

    async def use(buf: DmaBuf) -> None:
        async with buf.read() as view:
            check(view, buf)
        async with buf.write() as view:
            count_up(view)

    async def wait(fence: DmaFence) -> None:
        await fence

    async def main() -> None:
        done = await asyncio.gather(*map(use, bufs), *map(wait, fences), return_exceptions=True)
        for error in done:
            if isinstance(error, BaseException):
                raise error

    asyncio.run(main())


@operation(12)
def close(worker: Worker) -> None:
    if worker.bufs:
        buf = worker.bufs.pop(worker.rng.randrange(len(worker.bufs)))
        if worker.chance(0.8):
            buf.close()


@operation(12, ENODEV=EXPORTER_GONE)
def another_handle(worker: Worker) -> None:
    buf = worker.buf()
    other = worker.rng.choice((lambda: dmabuf.get(buf.fileno()), buf.get_dma_buf))()
    assert other == buf
    worker.keep(other)


@operation(8, ENODEV=EXPORTER_GONE, ENOMEM=NO_ROOM, EOPNOTSUPP="the exporter has no mmap")
def map_bare(worker: Worker) -> None:
    buf = worker.buf()
    mapping = buf.mmap()
    mapping[0]
    if worker.chance(0.7):
        mapping.close()


@operation(8, ENODEV=EXPORTER_GONE)
def rename(worker: Worker) -> None:
    worker.buf().name = f"soak {worker.rng.randrange(8)}"


# ---- names and lists ----


@operation(16, ENOENT=NAME_GONE, ENOTUNIQ="several buffers have the name", ENODEV=EXPORTER_GONE)
def open_by_name(worker: Worker) -> None:
    worker.keep(dmabuf.open(f"soak {worker.rng.randrange(8)}"))


@operation(1, ENOENT=NAME_GONE, ENODEV=EXPORTER_GONE)
def open_by_ino(worker: Worker) -> None:
    found = [record for record in dmabuf.buffers() if (record.name or "").startswith("soak")]  # the others are a worker's own
    if found:
        worker.keep(dmabuf.open(worker.rng.choice(found).ino))


@operation(1)
def list_all(worker: Worker) -> None:
    worker.rng.choice((dmabuf.bufinfo, dmabuf.buffers, dmabuf.sync_info))()


# ---- growing ----


@operation(24)
def grow(worker: Worker) -> None:
    """Slots that no other operation needs so many of: the domain gets longer while others join."""
    worker.grown.append([Timeline("grow") for _ in range(worker.rng.randint(32, 320))])
    if len(worker.grown) > 6:
        worker.grown.clear()


@operation(4)
def grow_records(worker: Worker) -> None:
    worker.grown.append([dmabuf.allocate(4096) for _ in range(worker.rng.randint(16, 128))])


# ---- fences ----


def made(worker: Worker) -> DmaFence:
    """A fence that is signaled in a while, sometimes with an error."""
    fence = worker.timeline().fence()
    worker.signaller.take(fence, worker.rng.choice((0, 0, 0, -errno.EIO)))
    return fence


# How a fence may end: well, as its worker said, with its worker, or with the last holder of its SwSync.
ENDS = (1, -errno.EIO, -errno.EOWNERDEAD, -errno.ENOENT, -errno.ECANCELED)


@operation(24)
def submit(worker: Worker) -> None:
    """As a device: a fence on several buffers at once."""
    bufs, usage = worker.some(3), worker.rng.choice((Usage.WRITE, Usage.READ, Usage.BOOKKEEP))
    fence = worker.timeline().fence()
    try:
        with dmabuf.lock_all([buf.resv for buf in bufs]):
            for buf in bufs:
                buf.resv.reserve(1)
                buf.resv.add(fence, usage)
    finally:
        worker.signaller.take(fence, 0)


@operation(16)
def wait_for_buffer(worker: Worker) -> None:
    worker.buf().resv.wait(worker.rng.choice((Usage.WRITE, Usage.READ, Usage.BOOKKEEP)))


@operation(20)
def wait_for_fence(worker: Worker) -> None:
    fence = worker.rng.choice(worker.fences) if worker.fences and worker.chance(0.8) else made(worker)
    fence.wait()
    assert fence.status in ENDS, f"{fence} ended with {fence.status}"


@operation(12)
def wait_for_many(worker: Worker) -> None:
    fences = [*worker.rng.sample(worker.fences, min(3, len(worker.fences))), made(worker)]
    if worker.chance(0.5):
        dmabuf.wait_any(fences)
    else:
        merged = dmabuf.merge(*fences)
        merged.wait()
        worker.keep(merged)


@operation(8)
def callbacks(worker: Worker) -> None:
    """Registered and forgotten; a callback that comes late must do no harm."""
    for fence in (*worker.fences[:3], made(worker)):
        with contextlib.suppress(FileNotFoundError):
            fence.add_callback(lambda _: None)


@operation(16)
def poll(worker: Worker) -> None:
    buf, events = worker.buf(), worker.rng.choice((select.POLLIN, select.POLLOUT))
    if worker.chance(0.5):
        buf.poll(events, worker.rng.choice((0, 0.01)))
        return
    fd = buf.poll_fd(events)
    try:
        select.select([fd], [], [], 0.01)
    finally:
        os.close(fd)


# ---- sync files, software timelines, semaphores ----


@operation(16)
def sync_file(worker: Worker) -> None:
    found = SyncFile(made(worker))
    if worker.files:
        found = found.merge(worker.rng.choice(worker.files))
    if worker.chance(0.5):
        select.select([found], [], [], 0.005)
    worker.keep(found)


@operation(12)
def wait_for_sync_file(worker: Worker) -> None:
    if worker.files:
        with contextlib.suppress(TimeoutError):
            worker.rng.choice(worker.files).wait(0.02)


@operation(12, ENODEV=EXPORTER_GONE)
def implicit_and_explicit(worker: Worker) -> None:
    buf = worker.buf()
    worker.keep(buf.export_sync_file(write=worker.chance(0.5)))
    buf.import_sync_file(SyncFile(made(worker)), write=worker.chance(0.5))


@operation(16)
def software_timeline(worker: Worker) -> None:
    if not worker.shared or worker.chance(0.2):
        worker.keep(SwSync("soak"))
    chosen = worker.rng.choice(worker.shared)
    worker.keep(chosen.create_fence(chosen.value + worker.rng.randint(1, 3)))
    if worker.chance(0.8):
        chosen.inc(worker.rng.randint(1, 2))


@operation(
    16,
    ETIME="nobody reached the point in time",
    EINVAL="another worker has submitted a later point meanwhile",
    EDEADLK="the last of the other workers that had it was killed, so nobody can submit the point",
)
def semaphore(worker: Worker) -> None:
    if not worker.semaphores or worker.chance(0.2):
        worker.keep(TimelineSemaphore())
    chosen = worker.rng.choice(worker.semaphores)
    point = chosen.query(submitted=True) + 1
    if worker.chance(0.5):
        chosen.import_fence(made(worker), point)
    elif worker.chance(0.5):
        chosen.signal(point)
    else:
        chosen.wait(point, 0.02, for_submit=True)


# ---- sharing ----

LOST = "the other worker was killed, or has gone, before it took the message"


@operation(48, EPIPE=LOST, ECONNRESET=LOST)
def send(worker: Worker) -> None:
    things: list[Any] = [worker.buf() for _ in range(worker.rng.randint(1, 4))]
    things += worker.files[:1] + worker.shared[:1] + worker.semaphores[:1] if worker.chance(0.5) else []
    things += [made(worker)] if worker.chance(0.5) else []
    if worker.chance(0.2):
        things.append(dmabuf.BufferRange(worker.buf(), 0, 4096))
    other = worker.peer()
    if other is not None:
        with other:
            dmabuf.send(other, *things)


@operation(64, ECONNRESET="the sender was killed in the middle", ENODEV=EXPORTER_GONE)
def receive(worker: Worker) -> None:
    guest = worker.guest()
    if guest is None:
        return
    with guest, contextlib.suppress(EOFError):  # it was killed before it sent anything
        for thing in dmabuf.recv(guest):
            worker.keep(thing.buf if isinstance(thing, dmabuf.BufferRange) else thing)


# ---- devices ----


@operation(12, ENODEV=EXPORTER_GONE, ENOMEM=NO_ROOM)
def attach(worker: Worker) -> None:
    device, buf = dmabuf.Device("soak"), worker.buf()
    attachment = buf.attach(device)
    try:
        with attachment.mapped(dmabuf.Direction.TO_DEVICE) as table:
            for address, length in table:
                device.read(address, min(length, 512))
    finally:
        attachment.detach()


@operation(8, ENODEV=EXPORTER_GONE, ENOMEM=NO_ROOM)
def copy_by_engine(worker: Worker) -> None:
    """Into a buffer that nobody else has, because what a killed device has written is undefined."""
    source = worker.buf()
    with dmabuf.allocate(source.size) as first, dmabuf.allocate(source.size) as second, dmabuf.sim.Engine("soak") as engine:
        queue = engine.queue()
        queue.copy(source, first).wait()  # perhaps half written, which a device isn't told
        with first.write() as view:
            count_up(view)
            number = check(view, first)
        queue.copy(first, second).wait()
        with second.read() as view:
            assert check(view, second) == number


# ---- forks ----


@contextlib.contextmanager
def forked(worker: Worker) -> Iterator[bool]:
    """True in the child, which ends with the block in one of the ways in which children end."""
    pid = os.fork()
    if pid:
        worker.children.append(pid)
        yield False
        return
    try:
        worker.in_child()
        yield True
        (worker.where / "peers" / str(os.getpid())).unlink()
        worker.signaller.end()
        how = worker.rng.randrange(3)
        if how == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == 1:
            dmabuf.Domain.default().leave()
    except BaseException as e:
        fail(e)
    os._exit(0)


@operation(8)
def fork(worker: Worker) -> None:
    worker.reap()
    if len(worker.children) >= 2 or worker.line is None:
        return
    with forked(worker) as child:
        if child:
            for _ in range(worker.rng.randint(0, 8)):
                step(worker)


@operation(4)
def leave_and_come_again(worker: Worker) -> None:
    """Done with the domain for now. Its buffers and sync files can be used again; the next operation that needs the domain joins."""
    worker.signaller.end()
    worker.timelines.clear()
    worker.grown.clear()
    dmabuf.Domain.default().leave()
