"""Operations that a signal handler interrupts, each of which takes something and gives it back.

``tests/conformance/test_interrupted.py`` interrupts each at every place, ``tests/crash/test_interrupts.py`` all of them at random moments.
"""

import gc
import os
import select
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import dmabuf
from dmabuf import (
    Device,
    Direction,
    DmaBuf,
    DmaBufAttachment,
    DmaFence,
    DmaFenceArray,
    DmaFenceChain,
    DmaResv,
    Domain,
    FenceOps,
    IosysMap,
    SgTable,
    SwSync,
    SyncFile,
    Timeline,
    TimelineSemaphore,
    Usage,
    WwAcquireContext,
    sim,
    stub_fence,
    wait_any,
)
from dmabuf._native import owned
from dmabuf.core.attach import attachment as attachments
from dmabuf.core.attach.attachment import moving, tables_of
from dmabuf.core.base import debug
from dmabuf.core.base.debug import debugging
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.export.exported import EXPORTS
from dmabuf.core.resv import ww_mutex
from dmabuf.core.resv.ww_mutex import inject_deadlocks
from dmabuf.domain.forks import is_mine
from dmabuf.domain.holders import Holder, _look
from dmabuf.heap import budget
from dmabuf.observe import machine
from dmabuf.sharing.server import serve
from tests.support.drivers import Static
from tests.support.waiting import until


class Ops(FenceOps):
    """Operations of which each is the default."""


def lock(world: "World") -> None:
    world.resvs[0].lock()
    world.resvs[0].unlock()


def trylock(world: "World") -> None:
    if world.resvs[0].trylock():
        world.resvs[0].unlock()


def locked(world: "World") -> None:
    with world.resvs[0].locked():
        pass


def locked_under_a_context(world: "World") -> None:
    with WwAcquireContext() as ctx, world.resvs[0].locked(ctx), world.resvs[1].locked(ctx):
        ctx.done()


def lock_all(world: "World") -> None:
    with dmabuf.lock_all(world.resvs):
        pass


def lock_all_with_back_off(world: "World") -> None:
    with inject_deadlocks(2), dmabuf.lock_all(world.resvs):
        pass


def signalling_section(_: "World") -> None:
    with dmabuf.signalling():
        pass


def add_a_fence(world: "World") -> None:
    world.kept.append(world.timeline.fence())
    with world.resvs[0].locked():
        world.resvs[0].reserve(1)
        world.resvs[0].add(world.kept[-1], Usage.READ)


def fence(world: "World") -> None:
    world.timeline.fence().signal()


def custom_fence(world: "World") -> None:
    made = world.timeline.fence(ops=Ops())
    made.enable_signaling()
    made.signal()


def dropped_fence(world: "World") -> None:
    world.timeline.fence()


def dropped_fence_with_a_callback(world: "World") -> None:
    world.timeline.fence().add_callback(repr)


def timeline_with_a_fence(_: "World") -> None:
    with Timeline("other") as other:
        other.fence()


def array(world: "World") -> None:
    first, second = world.timeline.fence(), world.timeline.fence()
    made = DmaFenceArray([first, second])
    made.enable_signaling()
    first.signal()
    second.signal()


def chain(world: "World") -> None:
    first, second = world.timeline.fence(), world.timeline.fence()
    made = DmaFenceChain(DmaFenceChain(None, first, 1), second, 2)
    first.signal()
    second.signal()
    made.is_signaled()


def wait_for_any(world: "World") -> None:
    first, second = world.timeline.fence(), world.timeline.fence()
    second.signal()
    wait_any([first, second])
    first.signal()


def allocate(_: "World") -> None:
    dmabuf.allocate(4096).close()


def allocate_described(_: "World") -> None:
    for buf in dmabuf.allocate_planes(dmabuf.ImageLayout.linear("NV12", 64, 16, apart=True)):
        buf.close()


def describe(_: "World") -> None:
    with dmabuf.allocate(4096) as buf:
        buf.describe(dmabuf.TensorLayout("uint8", (64,)))
        assert buf.layout is not None


def allocate_and_drop(_: "World") -> None:
    dmabuf.allocate(4096)


def get(world: "World") -> None:
    dmabuf.get(world.buf.fileno()).close()


def open_by_name(_: "World") -> None:
    dmabuf.open("interrupted").close()


def open_the_newest(_: "World") -> None:
    with dmabuf.allocate(4096, name="interrupted"):
        dmabuf.open("interrupted", newest=True).close()


def open_or_allocate(_: "World") -> None:
    dmabuf.open_or_allocate("interrupted", 4096).close()
    dmabuf.open_or_allocate("somebody else's", 4096).close()


def name(world: "World") -> None:
    world.buf.name = "interrupted"


def send_and_receive(world: "World") -> None:
    dmabuf.send(world.ours, world.buf)
    dmabuf.recv(world.theirs)[0].close()


def send_and_receive_several(world: "World") -> None:
    with TimelineSemaphore() as semaphore:
        dmabuf.send(world.ours, world.buf, semaphore, world.buf)
    for made in dmabuf.recv(world.theirs):
        made.close()


def send_and_receive_meta(world: "World") -> None:
    dmabuf.send(world.ours, world.buf, meta=["x" * 100])
    dmabuf.recv(world.theirs)[0].close()
    dmabuf.send(world.ours, meta=b"x" * 5000)
    dmabuf.recv(world.theirs)


def send_and_receive_a_sync_file(world: "World") -> None:
    with SyncFile(stub_fence()) as sync_file:
        dmabuf.send(world.ours, sync_file)
    dmabuf.recv(world.theirs)[0].close()


def sync_file_and_merge(_: "World") -> None:
    with SyncFile(stub_fence()) as made:
        made.fileno()
        with SyncFile.from_fd(made.fileno()) as other, made.merge(other) as merged:
            merged.fileno()


def sync_file_of_a_buffer(world: "World") -> None:
    with world.buf.export_sync_file() as made:
        world.buf.import_sync_file(made)


def semaphore(_: "World") -> None:
    with TimelineSemaphore() as made, TimelineSemaphore.from_fd(made.fileno()) as other:
        other.signal(3)
        made.wait(3)


def block_of_a_shared_file(world: "World") -> None:
    with world.semaphore._file.locked():
        pass


def sw_sync(_: "World") -> None:
    with SwSync("test") as made, made.create_fence(1) as sync_file:
        made.inc(1)
        assert sync_file.is_signaled()


def mapping(world: "World") -> None:
    world.buf.mmap().close()


def attachment(world: "World") -> None:
    made = world.buf.attach(Device("npu"))
    sgt = made.map_unlocked(Direction.TO_DEVICE)
    made.unmap_unlocked(sgt, Direction.TO_DEVICE)
    made.detach()


def cpu_access(world: "World") -> None:
    world.buf.begin_cpu_access(Direction.TO_DEVICE)
    world.buf.end_cpu_access(Direction.TO_DEVICE)


def reservation_object(_: "World") -> None:
    DmaResv()


def private_domain(_: "World") -> None:
    domain = Domain.private()
    dmabuf.allocate(4096, domain=domain).close()
    domain.leave()


def new_domain(world: "World") -> None:
    world.names += 1
    Domain.open(world.new / str(world.names)).leave()


def opened_again(_: "World") -> None:
    path = Domain.default().path
    assert path is not None
    assert Domain.open(path.parent / "." / ".." / path.parent.name / path.name) is Domain.default()


def send_what_needs_descriptors(world: "World") -> None:
    for _ in range(2):
        world.kept.append(world.timeline.fence())
    dmabuf.send(world.ours, Domain.default(), DmaFenceArray(world.kept))
    dmabuf.recv(world.theirs)


def who_holds(world: "World") -> None:
    st = os.fstat(world.buf.fileno())
    found: dict[tuple[int, int], list[Holder]] = {}
    with owned(os.open, "/proc/self", os.O_PATH) as process:
        _look(os.getpid(), process.number, [(st.st_dev, st.st_ino)], found)
    assert found


def doctor(_: "World") -> None:
    machine._memfd()
    machine._locks(Path("/proc"))
    machine._inotify()


def detached_descriptor(world: "World") -> None:
    world.numbers.extend(map(DmaBuf.detach, (world.buf.get_dma_buf(),)))


def vmapped(world: "World") -> None:
    world.maps.extend(map(DmaBuf.vmap_unlocked, (world.exported,)))


def exporter(_: "World") -> None:
    dmabuf.export(Static(), 4096).close()


def switched(_: "World") -> None:
    with debugging(not debug.enabled), moving(), inject_deadlocks():
        pass


def mapped(world: "World") -> None:
    with world.attachment.mapped(Direction.TO_DEVICE):
        pass


def map_again(world: "World") -> None:
    world.kept_tables.append(world.attachment.map_unlocked(Direction.TO_DEVICE))


def attached(world: "World") -> None:
    world.exported.attach(world.device)


def views(world: "World") -> None:
    with world.device.views(world.address, 16, Direction.BIDIRECTIONAL):
        pass


def device_access(world: "World") -> None:
    world.device.write(world.address, world.device.read(world.address, 16))


def claim(_: "World") -> None:
    with budget.claim(2 << 20):
        pass


def attached_to_an_engine(world: "World") -> None:
    with world.engine.attach(world.buf) as made:
        world.queue.checksum(made).wait()


def job_of_a_buffer(world: "World") -> None:
    world.queue.checksum(world.buf).wait()


def job(world: "World") -> None:
    world.queue.fill(world.attached, 1).wait()


LOCKS = (lock, trylock, locked, locked_under_a_context, lock_all, lock_all_with_back_off, signalling_section, add_a_fence)
FENCES = (fence, custom_fence, dropped_fence, timeline_with_a_fence, array, chain, wait_for_any)
OBJECTS = (
    allocate, allocate_described, describe, allocate_and_drop, get, open_by_name, open_the_newest, open_or_allocate, name,
    send_and_receive, send_and_receive_several, send_and_receive_meta, send_and_receive_a_sync_file, sync_file_and_merge,
    sync_file_of_a_buffer, semaphore, block_of_a_shared_file, sw_sync, mapping, attachment, cpu_access, reservation_object,
    private_domain, new_domain, opened_again, send_what_needs_descriptors, who_holds, doctor, detached_descriptor, vmapped, exporter,
)  # fmt: skip
BLOCKS = (switched, mapped, map_again, attached, views, device_access, claim, attached_to_an_engine, job_of_a_buffer, job)
OPERATIONS: tuple[Callable[["World"], None], ...] = (*LOCKS, *FENCES, *OBJECTS, *BLOCKS)


class World:
    """What the operations use."""

    def __init__(self) -> None:
        # What one reading of the machine's limits allows lasts for the world, so that each run of an operation has the same stops.
        self._clock, budget._default._clock = budget._default._clock, lambda: 0
        budget.check(4096)
        serve(Domain.default())  # what serves exported buffers stays until the process ends
        # As long as there is one, the thread that releases them stays. Thread.start() turns what a handler raises into a RuntimeError.
        self.exported = dmabuf.export(Static(), 4096)
        dmabuf.export(Static(), 4096)  # released by the thread
        self.until_released()
        self.resvs = [DmaResv() for _ in range(3)]
        self.maps: list[IosysMap] = []
        self.numbers: list[int] = []  # of descriptors that are the program's
        self.kept: list[DmaFence] = []  # a fence that others wait for is not dropped
        self.timeline = Timeline("interrupted")
        self.buf = dmabuf.allocate(4096, name="interrupted")
        self.semaphore = TimelineSemaphore()
        self.switches = debug.enabled, attachments.MOVE_NOTIFY, ww_mutex.deadlock_every
        self.device = Device("interrupted")
        self.attachment = self.exported.attach(self.device)
        self.address = next(iter(self.attachment.map_unlocked(Direction.BIDIRECTIONAL)))[0]
        self.kept_tables: list[SgTable] = []
        self.engine = sim.Engine("interrupted")
        self.queue = self.engine.queue()
        self.attached = self.engine.attach(self.buf)
        self.queue.fill(self.attached, 1).wait()  # its threads stay
        self.names = 0  # of directories made in `new`
        self.new = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="dmabuf-interrupted-"))
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def until_released(self) -> None:
        """Wait until the thread has released the exported buffers that were dropped, at most for a second."""
        exports = EXPORTS.of(Domain.default())
        for _ in range(100):
            if len(exports.buffers) <= 1:
                return
            select.select([], [], [], 0.01)

    def drain(self) -> None:
        """Receive what was sent before an operation was interrupted, which the next one would take for its own."""
        while select.select([self.theirs], [], [], 0)[0]:
            for made in dmabuf.recv(self.theirs):
                if isinstance(made, DmaBuf | SyncFile | TimelineSemaphore):
                    made.close()

    def settle(self) -> None:
        """Give back what an interrupted operation leaves to its caller, and see that everything is usable and nothing is locked."""
        self.drain()
        for left in (*self.kept, *self.timeline.pending()):
            if not left.is_signaled():
                left.signal()
        self.kept.clear()
        while self.maps:
            self.exported.vunmap_unlocked(self.maps.pop())
        backing = handle_of(self.exported).shared.ensure_backing()
        assert (backing.vmaps, backing.mapped) == (0, None)
        while self.numbers:
            os.close(self.numbers.pop())
        self.settle_blocks()
        gc.collect()
        self.until_released()
        os.fstat(self.buf.fileno())
        assert not any(resv.is_locked() for resv in self.resvs)
        with dmabuf.lock_all(self.resvs):
            pass
        with WwAcquireContext():  # a second open one of this thread, or a section that was not left, would be a ContractWarning
            pass
        self.semaphore.signal(self.semaphore.query(submitted=True) + 1)

    def settle_blocks(self) -> None:
        assert (debug.enabled, attachments.MOVE_NOTIFY, ww_mutex.deadlock_every) == self.switches
        assert not budget._default._claims
        assert not self.device._users
        assert not is_mine(self.device._lock)
        while self.kept_tables:
            self.attachment.unmap_unlocked(self.kept_tables.pop(), Direction.TO_DEVICE)
        backings = [handle_of(buf).shared.ensure_backing() for buf in (self.exported, self.buf)]
        for made in [one for backing in backings for one in backing.attachments]:
            assert isinstance(made, DmaBufAttachment)
            if made is not self.attachment and made.dev is not self.engine.device:
                for table, way in tables_of(made):
                    made.unmap_unlocked(table, way)
                made.detach()
        assert len(tables_of(self.attachment)) == 1
        self.queue.drain()
        assert not is_mine(self.queue._order)
        assert self.queue._placing is None
        until(lambda: not self.attached._jobs, limit_s=10)
        for left in list(self.engine._attached):
            if left is not self.attached:
                left.detach()
        until(lambda: len(backings[1].attachments) == 1, limit_s=10)

    def close(self) -> None:
        self.settle()
        budget._default._clock = self._clock
        self.attached.detach()
        self.engine.close()
        self.attachment.unmap_unlocked(tables_of(self.attachment)[0][0], Direction.BIDIRECTIONAL)
        self.attachment.detach()
        self.timeline.close()
        self.buf.close()
        self.exported.close()
        self.semaphore.close()
        self.ours.close()
        self.theirs.close()
        shutil.rmtree(self.new, ignore_errors=True)
