"""A signal handler that raises leaves nothing held, wherever it interrupts an operation; see tests/support/every_stop.py."""

import select
import socket
from collections.abc import Callable, Iterator

import pytest

import dmabuf
from dmabuf import (
    DmaFence,
    DmaFenceArray,
    DmaFenceChain,
    DmaResv,
    Domain,
    FenceOps,
    SwSync,
    SyncFile,
    Timeline,
    TimelineSemaphore,
    Usage,
    WwAcquireContext,
    stub_fence,
    wait_any,
)
from dmabuf.core.resv.ww_mutex import inject_deadlocks
from tests.support.budget import times
from tests.support.every_stop import at_every_stop

Operation = Callable[[], object]


def check(operation: Operation, after: Operation = lambda: None) -> None:
    stops, faults = at_every_stop(operation, after, step=times(quick=3, full=1))
    assert stops > 2
    assert not faults, "\n".join(faults)


# -- locks and contexts


RESVS: list[DmaResv] = []
KEPT: list[DmaFence] = []  # a fence that others wait for is not dropped


@pytest.fixture(autouse=True)
def resvs() -> object:
    RESVS[:] = [DmaResv() for _ in range(3)]
    yield
    RESVS.clear()


def lock() -> None:
    RESVS[0].lock()
    RESVS[0].unlock()


def trylock() -> None:
    if RESVS[0].trylock():
        RESVS[0].unlock()


def locked() -> None:
    with RESVS[0].locked():
        pass


def locked_under_a_context() -> None:
    with WwAcquireContext() as ctx, RESVS[0].locked(ctx), RESVS[1].locked(ctx):
        ctx.done()


def lock_all() -> None:
    with dmabuf.lock_all(RESVS):
        pass


def lock_all_with_back_off() -> None:
    with inject_deadlocks(2), dmabuf.lock_all(RESVS):
        pass


def add_a_fence() -> None:
    KEPT.append(TIMELINE[0].fence())
    with RESVS[0].locked():
        RESVS[0].reserve(1)
        RESVS[0].add(KEPT[-1], Usage.READ)


def nobody_holds() -> None:
    while KEPT:
        left = KEPT.pop()
        if not left.is_signaled():
            left.signal()
    assert not any(resv.is_locked() for resv in RESVS)
    with dmabuf.lock_all(RESVS):
        pass
    with WwAcquireContext():  # a second open one of this thread would be a ContractWarning
        pass


@pytest.mark.parametrize(
    "operation", [lock, trylock, locked, locked_under_a_context, lock_all, lock_all_with_back_off, add_a_fence], ids=lambda f: f.__name__
)
def test_interrupted_locking_leaves_no_lock_or_context(operation: Operation) -> None:
    check(operation, nobody_holds)


# -- fences and timelines


TIMELINE: list[Timeline] = []


@pytest.fixture(autouse=True)
def timeline() -> object:
    with Timeline("interrupted") as made:
        TIMELINE[:] = [made]
        yield
    TIMELINE.clear()


class Ops(FenceOps):
    """Operations of which each is the default."""


def fence() -> None:
    TIMELINE[0].fence().signal()


def custom_fence() -> None:
    made = TIMELINE[0].fence(ops=Ops())
    made.enable_signaling()
    made.signal()


def dropped_fence() -> None:
    TIMELINE[0].fence()


def timeline_with_a_fence() -> None:
    with Timeline("other") as other:
        other.fence()


def array() -> None:
    first, second = TIMELINE[0].fence(), TIMELINE[0].fence()
    made = DmaFenceArray([first, second])
    made.enable_signaling()
    first.signal()
    second.signal()


def chain() -> None:
    first, second = TIMELINE[0].fence(), TIMELINE[0].fence()
    made = DmaFenceChain(DmaFenceChain(None, first, 1), second, 2)
    first.signal()
    second.signal()
    made.is_signaled()


def wait_for_any() -> None:
    first, second = TIMELINE[0].fence(), TIMELINE[0].fence()
    second.signal()
    wait_any([first, second])
    first.signal()


def signal_what_is_pending() -> None:
    """Signal what an interrupted operation has not: an enabled array keeps its members."""
    for left in TIMELINE[0].pending():
        left.signal()


@pytest.mark.parametrize(
    "operation", [fence, custom_fence, dropped_fence, timeline_with_a_fence, array, chain, wait_for_any], ids=lambda f: f.__name__
)
def test_interrupted_fence_leaves_no_fence_or_timeline(operation: Operation) -> None:
    check(operation, signal_what_is_pending)


# -- descriptors


class World:
    """What the operations below use."""

    def __init__(self) -> None:
        self.buf = dmabuf.allocate(4096, name="interrupted")
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def close(self) -> None:
        self.buf.close()
        self.ours.close()
        self.theirs.close()

    def allocate(self) -> None:
        dmabuf.allocate(4096).close()

    def allocate_and_drop(self) -> None:
        dmabuf.allocate(4096)

    def get(self) -> None:
        dmabuf.get(self.buf.fileno()).close()

    def open(self) -> None:
        dmabuf.open("interrupted").close()

    def name(self) -> None:
        self.buf.name = "interrupted"

    def send_and_receive(self) -> None:
        dmabuf.send(self.ours, self.buf)
        dmabuf.recv(self.theirs)[0].close()

    def send_and_receive_several(self) -> None:
        with TimelineSemaphore() as semaphore:
            dmabuf.send(self.ours, self.buf, semaphore, self.buf)
        for made in dmabuf.recv(self.theirs):
            made.close()

    def send_and_receive_a_sync_file(self) -> None:
        with SyncFile(stub_fence()) as sync_file:
            dmabuf.send(self.ours, sync_file)
        dmabuf.recv(self.theirs)[0].close()

    def sync_file(self) -> None:
        with SyncFile(stub_fence()) as made:
            made.fileno()
            with SyncFile.from_fd(made.fileno()) as other, made.merge(other) as merged:
                merged.fileno()

    def sync_file_of_the_buffer(self) -> None:
        with self.buf.export_sync_file() as made:
            self.buf.import_sync_file(made)

    def semaphore(self) -> None:
        with TimelineSemaphore() as made, TimelineSemaphore.from_fd(made.fileno()) as other:
            other.signal(3)
            made.wait(3)

    def sw_sync(self) -> None:
        with SwSync("test") as made, made.create_fence(1) as sync_file:
            made.inc(1)
            assert sync_file.is_signaled()

    def map(self) -> None:
        self.buf.mmap().close()

    def attach(self) -> None:
        attachment = self.buf.attach(dmabuf.Device("npu"))
        sgt = attachment.map_unlocked(dmabuf.Direction.TO_DEVICE)
        attachment.unmap_unlocked(sgt, dmabuf.Direction.TO_DEVICE)
        attachment.detach()

    def cpu_access(self) -> None:
        self.buf.begin_cpu_access(dmabuf.Direction.TO_DEVICE)
        self.buf.end_cpu_access(dmabuf.Direction.TO_DEVICE)

    def private_domain(self) -> None:
        domain = Domain.private()
        dmabuf.allocate(4096, domain=domain).close()
        domain.leave()

    def settle(self) -> None:
        """Receive what was sent and not received."""
        while select.select([self.theirs], [], [], 0)[0]:
            for made in dmabuf.recv(self.theirs):
                made.close()
        self.buf.fileno()
        nobody_holds()


WAYS = [name for name in vars(World) if not name.startswith("_") and name not in ("close", "settle")]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_operation_leaves_no_descriptor_or_record(world: World, way: str) -> None:
    check(getattr(world, way), world.settle)


def test_interrupted_block_of_a_shared_file_leaves_it_unlocked() -> None:
    with TimelineSemaphore() as semaphore:

        def block() -> None:
            with semaphore._file.locked():
                pass

        check(block, lambda: semaphore.signal(semaphore.query(submitted=True) + 1))


def test_signalling_section_is_left() -> None:
    def section() -> None:
        with dmabuf.signalling():
            pass

    check(section, lambda: [RESVS[0].lock(), RESVS[0].unlock()])  # a ContractWarning inside a section
