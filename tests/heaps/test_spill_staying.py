"""The spill heap in one process: what stays in memory while it is used, and what is waited for when nothing can go."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import Device, Direction, DmaBuf, SpillHeap, Timeline, Usage
from dmabuf.core.attach.attachment import moving
from tests.support.drivers import Mover
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.spilling import PAGE, ROOM, SIZE, holds, is_here, pattern, resident, use
from tests.support.steps import fork, reap
from tests.support.waiting import Background, held_by_another_thread

FROM, TO = Direction.FROM_DEVICE, Direction.TO_DEVICE


# -- what stays in memory


@contextmanager
def a_fence(buf: DmaBuf) -> Iterator[None]:
    use([buf])
    with Timeline("device") as line:
        fence = line.fence()
        add(buf.resv, fence, Usage.BOOKKEEP)
        yield
        fence.signal()


@contextmanager
def a_bracket(buf: DmaBuf) -> Iterator[None]:
    buf.begin_cpu_access(FROM)
    yield
    buf.end_cpu_access(FROM)


@contextmanager
def a_vmap(buf: DmaBuf) -> Iterator[None]:
    made = buf.vmap_unlocked()
    yield
    buf.vunmap_unlocked(made)


@contextmanager
def a_view_of_a_vmap_that_ended(buf: DmaBuf) -> Iterator[None]:
    made = buf.vmap_unlocked()
    view = made.vaddr
    buf.vunmap_unlocked(made)
    del made
    yield
    del view


@contextmanager
def an_array_that_outlives_its_block(buf: DmaBuf) -> Iterator[None]:
    with buf.read() as view:
        part = memoryview(view)[:10]
    yield
    part.release()


@contextmanager
def a_static_device(buf: DmaBuf) -> Iterator[None]:
    att = buf.attach(Device("npu0"))
    yield
    att.detach()


@contextmanager
def a_mapping_that_pins(buf: DmaBuf) -> Iterator[None]:
    att = buf.attach(Device("npu0"), Mover())
    with moving(False), att.mapped(TO):
        yield
    att.detach()


@contextmanager
def a_pin(buf: DmaBuf) -> Iterator[None]:
    att = buf.attach(Device("npu0"), Mover())
    with buf.resv.locked():
        att.pin()
    yield
    with buf.resv.locked():
        att.unpin()
    att.detach()


@contextmanager
def its_lock(buf: DmaBuf) -> Iterator[None]:
    use([buf])
    with held_by_another_thread(buf.resv.locked()):
        yield


@contextmanager
def a_mapping_of_a_forked_child(buf: DmaBuf) -> Iterator[None]:
    mapping = buf.mmap()
    ours, theirs = os.pipe()
    pid = fork(lambda: None if os.close(theirs) is None and not os.read(ours, 1) and mapping[:] == pattern(0, SIZE) else 1 / 0)
    os.close(ours)
    mapping.close()
    yield
    os.close(theirs)
    assert reap(pid) == 0, "the child's mapping lost the content"


STAY: list[Callable[[DmaBuf], AbstractContextManager[Any]]] = [
    lambda buf: buf.read(),
    lambda buf: buf.write(),
    lambda buf: dmabuf.access(read=[buf]),
    a_bracket,
    a_fence,
    lambda buf: buf.mmap(),
    lambda buf: buf.mmap(PAGE, PAGE, writable=False),
    a_vmap,
    a_view_of_a_vmap_that_ended,
    an_array_that_outlives_its_block,
    a_static_device,
    a_mapping_that_pins,
    a_pin,
    its_lock,
    a_mapping_of_a_forked_child,
]
NAMES = [
    "read", "write", "access", "a bracket", "a fence", "mmap", "a read-only mmap of a part", "vmap", "a view of a vmap that ended",
    "an array that outlives its block", "a static device", "an importer's mapping that pins", "pin", "its lock", "a forked child's mapping",
]  # fmt: skip


@pytest.mark.parametrize("holding", STAY, ids=NAMES)
def test_what_is_used_stays_in_memory_as_long_and_others_go(heap: SpillHeap, bufs: list[DmaBuf], holding: Any) -> None:
    buf = bufs[0]
    with holding(buf):
        use(bufs[1:])
        assert is_here(buf)
        assert sum(map(resident, bufs)) == heap.budget
    use(bufs[1:])
    assert not is_here(buf)
    assert holds(buf, 0)


def test_a_static_device_reads_the_right_bytes_whatever_others_do(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    att = bufs[0].attach(Device("npu0"))
    use(bufs[1:])
    with att.mapped(TO) as sgt:
        assert b"".join(att.dev.read(*entry) for entry in sgt) == pattern(0, SIZE)
    att.detach()


def test_a_brackets_end_without_a_begin_is_nothing(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    bufs[0].end_cpu_access(FROM)
    with a_bracket(bufs[0]):
        use(bufs[1:])
        assert is_here(bufs[0])


# -- memory that isn't there


def test_everything_pinned_is_enomem_after_memory_timeout_and_says_so(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    heap._resident_set.memory_timeout = 0.05
    mappings = [buf.mmap() for buf in bufs[:ROOM]]
    with raises_errno(errno.ENOMEM) as caught, bufs[ROOM].read():
        pass
    assert f"{ROOM * SIZE} pinned" in str(caught.value)
    assert bufs[ROOM].resv.test_signaled(Usage.BOOKKEEP)
    mappings.pop().close()
    assert holds(bufs[ROOM], ROOM)
    for mapping in mappings:
        mapping.close()


def test_memory_held_by_ones_own_accesses_is_enomem_at_once(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    with dmabuf.access(read=bufs[:ROOM]), raises_errno(errno.ENOMEM), bufs[ROOM].write():
        pass
    with raises_errno(errno.ENOMEM), dmabuf.access(read=bufs[: ROOM + 1]):
        pass
    assert all(buf.resv.test_signaled(Usage.BOOKKEEP) for buf in bufs)
    assert heap.statistics().pinned == 0
    assert all(holds(buf, i) for i, buf in enumerate(bufs))


@pytest.mark.parametrize(
    "holding", [lambda buf: buf.read(), a_bracket, a_fence, its_lock], ids=["read", "a bracket", "a fence", "its lock"]
)
def test_memory_in_use_by_others_is_waited_for(heap: SpillHeap, bufs: list[DmaBuf], holding: Any) -> None:
    inside, leave = threading.Event(), threading.Event()
    mappings = [buf.mmap() for buf in bufs[1:ROOM]]

    def hold() -> None:
        with holding(bufs[0]) as held:
            inside.set()
            leave.wait()
        del held  # of an mmap: what is not closed stays mapped

    with Background(hold) as other:
        inside.wait()
        with Background(lambda: holds(bufs[ROOM], ROOM)) as job:
            job.until_blocked()
            assert not job.done
            leave.set()
            assert job.result()
        other.result()
    for mapping in mappings:
        mapping.close()


def test_without_memory_timeout_memory_in_use_is_enomem(tmp_path: Path) -> None:
    with SpillHeap(budget=SIZE, directory=tmp_path, memory_timeout=0) as heap, heap.allocate(SIZE) as a, heap.allocate(SIZE) as b:
        with a_fence(a):
            use([a])
            with raises_errno(errno.ENOMEM), b.read():
                pass
            assert is_here(a)
        assert holds(b, 0) is False
        assert not is_here(a)


def test_process_that_uses_one_buffer_and_wants_another_gets_enomem(tmp_path: Path) -> None:
    """Two threads with one buffer each, room for two, and each wants a third: no order of theirs could end well."""
    with SpillHeap(budget=2 * SIZE, directory=tmp_path, memory_timeout=0.05) as heap:
        bufs = [heap.allocate(SIZE) for _ in range(4)]
        together = threading.Barrier(2)

        def greedy(first: DmaBuf, second: DmaBuf) -> int:
            with first.write():
                together.wait()
                try:
                    with second.write():
                        return 0
                except OSError as e:
                    return e.errno or -1

        with Background(lambda: greedy(bufs[0], bufs[1])) as other:
            answers = {greedy(bufs[2], bufs[3]), other.result()}
        assert errno.ENOMEM in answers
        assert answers <= {0, errno.ENOMEM}
        for buf in bufs:
            buf.close()
