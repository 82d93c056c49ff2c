"""The spill heap in one process: what is in memory, what stays there, what is waited for, and what every failure leaves."""

import errno
import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractError, Device, Direction, DmaBuf, DmaBufAttachment, Importer, SpillHeap, Timeline, Usage, _native
from dmabuf.core import residence
from dmabuf.core.attachment import moving
from dmabuf.heaps import spill, spill_file, spill_moves
from dmabuf.heaps.spill_file import SpillFile
from tests.support.drivers import Mover
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.spilling import PAGE, ROOM, SIZE, fill, holds, is_here, pattern, resident, use
from tests.support.steps import fork, reap
from tests.support.waiting import Background

FROM, TO, BIDIR = Direction.FROM_DEVICE, Direction.TO_DEVICE, Direction.BIDIRECTIONAL


# -- the budget


def test_ten_times_the_budget_is_held_and_memory_never_exceeds_it(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    rng = random.Random(1)
    who = [(buf.fileno(), buf.ino, buf.size) for buf in bufs]
    newest = list(range(len(bufs)))
    for round_ in range(400):
        i = rng.randrange(len(bufs))
        if rng.random() < 0.5:
            newest[i] = 1000 + round_
            fill(bufs[i], newest[i])
        else:
            assert holds(bufs[i], newest[i])
        assert sum(map(resident, bufs)) == heap.statistics().resident <= heap.budget
    assert all(holds(buf, what) for buf, what in zip(bufs, newest, strict=True))
    assert who == [(buf.fileno(), buf.ino, buf.size) for buf in bufs]
    assert who == [(buf.fileno(), os.fstat(buf.fileno()).st_ino, os.fstat(buf.fileno()).st_size) for buf in bufs]


def test_the_one_used_longest_ago_goes_first(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    a, b, c, d, e = bufs[:5]
    use([a, b, c, d])
    use([a])
    use([e])
    assert [is_here(buf) for buf in (a, b, c, d, e)] == [True, False, True, True, True]


def test_a_large_buffer_takes_the_place_of_several(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    use(bufs[:ROOM])
    with heap.allocate(3 * SIZE) as large:
        fill(large, 99)
        assert [is_here(buf) for buf in bufs[:ROOM]] == [False, False, False, True]
        assert holds(large, 99)
    assert all(holds(buf, i) for i, buf in enumerate(bufs))


def test_a_new_buffer_is_zeroed_takes_no_memory_and_pushes_nobody_out(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    use(bufs[:ROOM])
    with heap.allocate(100) as new:
        assert (new.size, resident(new)) == (PAGE, 0)
        assert all(is_here(buf) for buf in bufs[:ROOM])
        with new.read() as view:
            assert bytes(view) == bytes(PAGE)


def test_room_in_the_file_that_somebody_had_before_reads_as_zeros(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    for buf in bufs[ROOM:]:
        buf.close()
    for new in [heap.allocate(SIZE) for _ in range(2 * ROOM)]:
        with new.read() as view:
            assert bytes(view) == bytes(SIZE)
        use(bufs[:ROOM])
        with new.read() as view:
            assert bytes(view) == bytes(SIZE)
        new.close()


def test_what_nobody_changed_is_not_written_again(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    use(bufs)
    before = heap.statistics()
    use(bufs)
    after = heap.statistics()
    assert after.moves_out == before.moves_out + len(bufs)
    assert (after.written, after.read) == (before.written, before.read + len(bufs) * SIZE)


def test_what_was_never_used_is_neither_written_nor_read(heap: SpillHeap) -> None:
    made = [heap.allocate(SIZE) for _ in range(3 * ROOM)]
    use(made)
    use(made)
    assert (heap.statistics().written, heap.statistics().read) == (0, 0)
    for buf in made:
        buf.close()


@pytest.mark.parametrize("how", ["write", "begin_cpu_access", "mmap", "vmap", "device"])
def test_every_way_to_change_a_buffer_is_kept(heap: SpillHeap, bufs: list[DmaBuf], how: str) -> None:
    buf = bufs[0]
    if how == "write":
        with buf.write() as view:
            view[:3] = b"new"
    elif how == "mmap":
        with buf.mmap() as mapping:
            mapping[:3] = b"new"
    elif how == "begin_cpu_access":
        with buf.mmap() as mapping:  # made before, used in the bracket
            use(bufs[1:])
            buf.begin_cpu_access(TO)
            mapping[:3] = b"new"
            buf.end_cpu_access(TO)
    elif how == "vmap":
        buf.begin_cpu_access(TO)
        made = buf.vmap_unlocked()
        made.memcpy_to(0, b"new")
        buf.vunmap_unlocked(made)
        buf.end_cpu_access(TO)
        del made
    else:
        att = buf.attach(Device("npu0"))
        with att.mapped(FROM) as sgt:
            att.dev.write(next(iter(sgt)).address, b"new")
        att.detach()
    use(bufs[1:])
    assert not is_here(buf)
    with buf.read() as view:
        assert bytes(view) == b"new" + pattern(0, SIZE)[3:]


def test_statistics_count_what_the_kernel_counts(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    said = heap.statistics()
    assert (said.budget, said.buffers, said.resident, said.spilled) == (ROOM * SIZE, 10 * ROOM, ROOM * SIZE, 9 * ROOM * SIZE)
    assert said.pinned == 0
    with bufs[0].mmap(), bufs[1].read():
        assert heap.statistics().pinned == 2 * SIZE


def test_released_buffers_give_back_memory_and_disk(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    assert os.fstat(heap._file.fileno()).st_blocks * 512 >= len(bufs) * SIZE
    for buf in bufs:
        buf.close()
    said = heap.statistics()
    assert (said.buffers, said.resident, said.spilled) == (0, 0, 0)
    assert os.fstat(heap._file.fileno()).st_blocks == 0


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
        part = view[:10]
    yield
    part.release()


@contextmanager
def a_static_device(buf: DmaBuf) -> Iterator[None]:
    att = buf.attach(Device("npu0"))
    yield
    att.detach()


@contextmanager
def a_mapped_importer(buf: DmaBuf) -> Iterator[None]:
    att = buf.attach(Device("npu0"), Mover())
    with att.mapped(TO):
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
    taken, done = threading.Event(), threading.Event()
    use([buf])

    def hold() -> None:
        with buf.resv.locked():
            taken.set()
            done.wait()

    with Background(hold):
        taken.wait()
        yield
        done.set()


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
    a_mapped_importer,
    a_pin,
    its_lock,
    a_mapping_of_a_forked_child,
]
NAMES = [
    "read", "write", "access", "a bracket", "a fence", "mmap", "a read-only mmap of a part", "vmap", "a view of a vmap that ended",
    "an array that outlives its block", "a static device", "a mapped importer", "pin", "its lock", "a forked child's mapping",
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


# -- importers that move


class Remapping(Importer):
    """What a driver does: it remembers that its table is old, and maps again before its next job."""

    def __init__(self) -> None:
        self.moves = 0

    def move_notify(self, attachment: DmaBufAttachment) -> None:
        self.moves += 1


def test_a_dynamic_importer_is_told_with_the_lock_held(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    importer = Mover()
    att = bufs[0].attach(Device("npu0"), importer)
    use(bufs[:1])
    use(bufs[1:])
    assert (importer.moved, importer.locked) == ([att], [True])
    att.detach()


def fault(dev: Device, entry: tuple[int, int]) -> int | None:
    """The errno of reading there; no traceback of it keeps the table, and with it the buffer."""
    try:
        dev.read(*entry)
    except OSError as e:
        return e.errno
    return None


def test_with_move_notify_a_mapped_buffer_moves_and_is_mapped_again(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    importer, dev = Remapping(), Device("npu0")
    with moving():
        att = bufs[0].attach(dev, importer)
        old = att.map_unlocked(TO)
        entry = next(iter(old))
        use(bufs[1:])
        assert importer.moves == 1
        assert not is_here(bufs[0])
        assert fault(dev, entry) == errno.EFAULT  # not zeros: what is left of the old table is no memory any more
        att.unmap_unlocked(old, TO)
        with att.mapped(TO) as sgt:
            assert b"".join(dev.read(*entry) for entry in sgt) == pattern(0, SIZE)
        att.detach()
    assert dev.statistics().windows == 0


def test_unmap_with_another_direction_is_a_contract_error_and_the_table_stays(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    att = bufs[0].attach(Device("npu0"), Mover())
    sgt = att.map_unlocked(TO)
    with pytest.raises(ContractError):
        att.unmap_unlocked(sgt, FROM)
    assert (att.statistics().mapped, att.dev.statistics().windows, heap.statistics().pinned) == (1, 1, SIZE)
    att.unmap_unlocked(sgt, TO)
    assert (att.statistics().mapped, att.dev.statistics().windows, heap.statistics().pinned) == (0, 0, 0)
    att.detach()


def test_what_an_importer_cannot_stop_at_once_is_waited_for(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    line = Timeline("npu0")
    fences = []

    class Busy(Importer):
        def move_notify(self, attachment: DmaBufAttachment) -> None:
            resv = attachment.dmabuf.resv
            resv.reserve(1)
            fences.append(line.fence())
            resv.add(fences[-1], Usage.BOOKKEEP)

    att = bufs[0].attach(Device("npu0"), Busy())
    use([bufs[0], bufs[1], bufs[2], bufs[3]])
    with Background(lambda: holds(bufs[4], 4)) as job:
        job.until_blocked()
        assert is_here(bufs[0])
        fences[0].signal()
        assert job.result()
    assert not is_here(bufs[0])
    att.detach()
    line.close()


def test_an_importer_that_never_stops_costs_patience_and_another_goes(tmp_path: Path) -> None:
    line = Timeline("npu0")
    fences = []

    class Hangs(Importer):
        def move_notify(self, attachment: DmaBufAttachment) -> None:
            attachment.dmabuf.resv.reserve(1)
            fences.append(line.fence())
            attachment.dmabuf.resv.add(fences[-1], Usage.READ)

    with SpillHeap(budget=2 * SIZE, directory=tmp_path, patience=0.01) as heap:
        a, b, c = (heap.allocate(SIZE) for _ in range(3))
        att = a.attach(Device("npu0"), Hangs())
        use([a, b, c])
        assert [is_here(buf) for buf in (a, b, c)] == [True, False, True]
        assert a.resv.test_signaled(Usage.KERNEL)
        fences[0].signal()
        att.detach()
        for buf in (a, b, c):
            buf.close()
    line.close()


# -- a move, seen from outside


def test_a_move_is_a_kernel_fence_and_the_lock_is_free(heap: SpillHeap, bufs: list[DmaBuf], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = SpillFile.write

    def write(file: SpillFile, at: int, view: memoryview) -> None:
        (moved,) = [buf for buf in bufs if not buf.resv.test_signaled(Usage.KERNEL)]
        (fence,) = moved.resv.fences(Usage.KERNEL)
        seen.append((moved.resv.is_locked(), fence.describe()))
        real(file, at, view)

    use(bufs)
    monkeypatch.setattr(SpillFile, "write", write)
    fill(bufs[0], 1)
    use(bufs[1:])
    ((locked, described),) = seen
    assert not locked
    assert "spill" in described


def test_a_reader_that_comes_during_a_move_waits_and_gets_the_content(
    heap: SpillHeap, bufs: list[DmaBuf], monkeypatch: pytest.MonkeyPatch
) -> None:
    moving_now, go_on = threading.Event(), threading.Event()
    real = _native.punch

    def punch(fd: int, start: int, length: int) -> None:
        if os.fstat(fd).st_ino == bufs[0].ino:
            moving_now.set()
            go_on.wait()
        real(fd, start, length)

    use(bufs[:ROOM])
    monkeypatch.setattr(_native, "punch", punch)
    with Background(lambda: use([bufs[ROOM]])) as mover:
        moving_now.wait()
        with Background(lambda: holds(bufs[0], 0)) as reader:
            reader.until_blocked()
            assert not reader.done
            go_on.set()
            assert reader.result()
        mover.result()


def test_two_threads_that_want_one_buffer_bring_it_in_once(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    before = heap.statistics().moves_in
    together = threading.Barrier(4)

    def look() -> bool:
        together.wait()
        return holds(bufs[0], 0)

    with Background(look) as a, Background(look) as b, Background(look) as c:
        assert look()
        assert a.result()
        assert b.result()
        assert c.result()
    assert heap.statistics().moves_in == before + 1


def test_threads_at_random_see_no_wrong_byte(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    """Each buffer says in its first word which pattern the rest is: whoever sees a mixture has found a fault."""

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for n in range(150):
            buf = rng.choice(bufs)
            if rng.random() < 0.5:
                fill(buf, seed * 10_000 + n)
            else:
                with buf.read() as view:
                    what = (int.from_bytes(view[:8], "little") - 1) // 1_000_003
                    assert bytes(view) == pattern(what, SIZE)

    with Background(lambda: work(1)) as a, Background(lambda: work(2)) as b:
        work(3)
        a.result()
        b.result()
    assert sum(map(resident, bufs)) <= heap.budget


# -- memory that isn't there


def test_everything_pinned_is_enomem_after_patience_and_says_so(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    heap._residents.patience = 0.05
    mappings = [buf.mmap() for buf in bufs[:ROOM]]
    with raises_errno(errno.ENOMEM) as caught, bufs[ROOM].read():
        pass
    assert f"{ROOM * SIZE} of them pinned" in str(caught.value)
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


def test_without_patience_memory_in_use_is_enomem(tmp_path: Path) -> None:
    with SpillHeap(budget=SIZE, directory=tmp_path, patience=0) as heap, heap.allocate(SIZE) as a, heap.allocate(SIZE) as b:
        with a_fence(a):
            use([a])
            with raises_errno(errno.ENOMEM), b.read():
                pass
            assert is_here(a)
        assert holds(b, 0) is False
        assert not is_here(a)


def test_who_holds_one_and_wants_another_ends_with_enomem_and_not_in_a_circle(tmp_path: Path) -> None:
    """Two threads with one buffer each, room for two, and each wants a third: no order of theirs could end well."""
    with SpillHeap(budget=2 * SIZE, directory=tmp_path, patience=0.05) as heap:
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


# -- failing calls: everything as it was


class Fails:
    """The nth call of a function fails, or what its block raises."""

    def __init__(self, real: Callable[..., Any], number: int, nth: int = 1) -> None:
        self.real, self.number, self.left = real, number, nth

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*arguments, **more)


def state(heap: SpillHeap, bufs: list[DmaBuf]) -> Any:
    said = heap.statistics()
    return [is_here(buf) for buf in bufs], said.resident, said.pinned, len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("where", "name", "number", "expected"),
    [
        (os, "pwrite", errno.ENOSPC, errno.ENOSPC),
        (os, "pwrite", errno.EIO, errno.EIO),
        (_native, "punch", errno.EPERM, errno.EPERM),
        (spill_moves, "Mapping", errno.ENOMEM, errno.ENOMEM),
        (residence, "take_out", errno.ENOLCK, errno.ENOLCK),
        (spill_moves, "_duplicate", errno.EMFILE, errno.EMFILE),
        (spill.Residents, "_timeline", errno.ENOSPC, errno.ENOSPC),
    ],
)
def test_a_move_out_that_fails_leaves_all_as_it_was(
    heap: SpillHeap, bufs: list[DmaBuf], monkeypatch: pytest.MonkeyPatch, where: Any, name: str, number: int, expected: int
) -> None:
    use(bufs[:ROOM])
    for i in range(ROOM):
        fill(bufs[i], 100 + i)
    before = state(heap, bufs)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, Fails(getattr(where, name), number))
        with raises_errno(expected), bufs[ROOM].read():
            pass
    assert state(heap, bufs) == before
    assert all(buf.resv.test_signaled(Usage.BOOKKEEP) for buf in bufs)
    assert all(holds(buf, 100 + i) for i, buf in enumerate(bufs[:ROOM]))
    assert holds(bufs[ROOM], ROOM)


@pytest.mark.parametrize(
    ("where", "name", "number", "expected"),
    [
        (os, "posix_fallocate", errno.ENOSPC, errno.ENOMEM),
        (os, "posix_fallocate", errno.ENOMEM, errno.ENOMEM),
        (os, "preadv", errno.EIO, errno.EIO),
        (spill_file.SpillFile, "read", errno.EIO, errno.EIO),
        (spill_moves, "Mapping", errno.ENOMEM, errno.ENOMEM),
        (residence, "put_back", errno.ENOLCK, errno.ENOLCK),
    ],
)
def test_a_move_in_that_fails_leaves_the_content_in_the_file(
    heap: SpillHeap, bufs: list[DmaBuf], monkeypatch: pytest.MonkeyPatch, where: Any, name: str, number: int, expected: int
) -> None:
    wanted = bufs[-1]
    use(bufs[:ROOM])
    before = heap.statistics()
    with monkeypatch.context() as patch:
        patch.setattr(where, name, Fails(getattr(where, name), number))
        with raises_errno(expected), wanted.write():
            pass
    after = heap.statistics()
    assert not is_here(wanted)
    assert after.resident == sum(map(resident, bufs)) == before.resident - SIZE  # the one that made room has gone
    assert after.pinned == 0
    assert wanted.resv.test_signaled(Usage.BOOKKEEP)
    assert holds(wanted, len(bufs) - 1)


def test_out_of_descriptors_a_move_is_emfile_and_nothing_moved(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    import resource

    use(bufs[:ROOM])
    before = state(heap, bufs)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 16, hard))
    try:
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                break
        with raises_errno(errno.EMFILE):
            bufs[ROOM].read().__enter__()
        with raises_errno(errno.EMFILE):
            bufs[0].mmap()
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert state(heap, bufs) == before
    assert holds(bufs[ROOM], ROOM)


def test_a_file_that_may_not_grow_is_told_at_allocate(heap: SpillHeap) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))  # Python ignores SIGXFSZ
    try:
        with raises_errno(errno.EFBIG) as caught:
            heap.allocate(2 * SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert heap.directory in str(caught.value)
    assert heap.statistics().buffers == 0


def test_a_full_disk_is_told_at_allocate_and_never_later(heap: SpillHeap, bufs: list[DmaBuf], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", Fails(os.posix_fallocate, errno.ENOSPC))
        with raises_errno(errno.ENOSPC):
            heap.allocate(SIZE)
    assert heap.statistics().buffers == len(bufs)


@pytest.mark.parametrize("step", ["spill_copying", "spill_told", "spill_read"])
def test_whatever_is_raised_in_a_move_leaves_whole_buffers(
    heap: SpillHeap, bufs: list[DmaBuf], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    for i in range(ROOM):
        fill(bufs[i], i)
    real = _native.step

    def interrupted(name: str) -> None:
        if name == step:
            raise KeyError(step)
        real(name)

    with monkeypatch.context() as patch:
        patch.setattr(_native, "step", interrupted)
        with pytest.raises(KeyError), bufs[ROOM].read():
            pass
    assert sum(map(resident, bufs)) == heap.statistics().resident <= heap.budget
    assert heap.statistics().pinned == 0
    assert all(buf.resv.test_signaled(Usage.BOOKKEEP) for buf in bufs)
    assert all(holds(buf, i) for i, buf in enumerate(bufs))


@pytest.mark.parametrize("step", ["spill_told", "spill_copying", "spill_punched", "spill_reserved", "spill_read", "spill_here"])
def test_a_signal_handler_that_raises_ends_the_wait_and_the_move_is_completed(
    heap: SpillHeap, bufs: list[DmaBuf], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    import signal

    class Rung(Exception):
        pass

    def ring(*_: object) -> None:
        if not rung.is_set():
            rung.set()
            raise Rung

    rung, go_on = threading.Event(), threading.Event()
    real = _native.step

    def stop(name: str) -> None:
        if name == step and not rung.is_set():
            while not rung.is_set():  # one that comes just before the wait is seen only after it
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                os.sched_yield()
            go_on.wait()
        real(name)

    fill(bufs[0], 7)
    use(bufs[1:ROOM])
    before = signal.signal(signal.SIGUSR1, ring)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(_native, "step", stop)
            with pytest.raises(Rung), bufs[ROOM].read():
                pass
            go_on.set()
            assert holds(bufs[ROOM], ROOM)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not is_here(bufs[0])
    assert heap.statistics().pinned == 0
    assert heap.statistics().resident == sum(map(resident, bufs)) == heap.budget
    assert holds(bufs[0], 7)


def test_a_signal_handler_may_use_the_buffer_that_is_being_moved(
    heap: SpillHeap, bufs: list[DmaBuf], monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    seen = []
    real = SpillFile.write

    def write(file: SpillFile, at: int, view: memoryview) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        real(file, at, view)

    fill(bufs[0], 7)
    use(bufs[1:ROOM])
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(holds(bufs[0], 7)))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(SpillFile, "write", write)
            use([bufs[ROOM]])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [True]


def test_using_a_buffer_from_its_own_move_notify_is_edeadlk(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    answers = []

    class Nosy(Importer):
        def move_notify(self, attachment: DmaBufAttachment) -> None:
            try:
                attachment.map(TO)
            except OSError as e:
                answers.append(e.errno)

    att = bufs[0].attach(Device("npu0"), Nosy())
    use(bufs)
    assert answers[0] == errno.EDEADLK
    assert holds(bufs[0], 0)
    att.detach()


def test_a_buffer_released_in_the_middle_of_its_move_goes_without_a_trace(
    heap: SpillHeap, bufs: list[DmaBuf], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(bufs[0], 7)
    use(bufs[1:ROOM])
    before = len(os.listdir("/proc/self/fd"))
    real = SpillFile.write

    def write(file: SpillFile, at: int, view: memoryview) -> None:
        bufs[0].close()
        real(file, at, view)

    with monkeypatch.context() as patch:
        patch.setattr(SpillFile, "write", write)
        use(bufs[ROOM : ROOM + 1])
    assert len(os.listdir("/proc/self/fd")) == before - 2  # its handle's and the exporter's
    assert heap.statistics().buffers == len(bufs) - 1
    assert all(holds(buf, i) for i, buf in enumerate(bufs) if i)


# -- descriptors that may only read


def test_a_read_only_descriptor_reads_and_maps_but_does_not_write(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    fd = os.open(f"/proc/self/fd/{bufs[0].fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    with dmabuf.get(fd) as readonly:
        os.close(fd)
        assert holds(readonly, 0)
        with raises_errno(errno.EACCES), readonly.write():
            pass
        with raises_errno(errno.EACCES):
            readonly.mmap()
        with readonly.mmap(writable=False) as mapping:
            assert mapping[:] == pattern(0, SIZE)
        assert heap.statistics().pinned == 0


# -- bad arguments


@pytest.mark.parametrize("budget", [0, -1, PAGE - 1])
def test_a_budget_below_a_page_is_einval(tmp_path: Path, budget: int) -> None:
    with raises_errno(errno.EINVAL):
        SpillHeap(budget=budget, directory=tmp_path)


@pytest.mark.parametrize("budget", ["512M", 1e9])
def test_a_budget_that_is_no_int_is_a_typeerror_that_says_so(tmp_path: Path, budget: Any) -> None:
    with pytest.raises(TypeError, match=r"SpillHeap: budget is a number of bytes, an int, not (str|float)"):
        SpillHeap(budget=budget, directory=tmp_path)


@pytest.mark.parametrize("patience", [-1, -0.001, float("inf"), float("nan")])
def test_a_patience_that_is_none_is_einval(tmp_path: Path, patience: float) -> None:
    with raises_errno(errno.EINVAL):
        SpillHeap(budget=PAGE, directory=tmp_path, patience=patience)


def test_a_directory_that_is_not_there_is_enoent(tmp_path: Path) -> None:
    with raises_errno(errno.ENOENT):
        SpillHeap(budget=PAGE, directory=tmp_path / "missing")


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_einval(heap: SpillHeap, size: int) -> None:
    with raises_errno(errno.EINVAL):
        heap.allocate(size)


@pytest.mark.parametrize("size", ["4096", 1e6])
def test_a_size_that_is_no_int_is_a_typeerror(heap: SpillHeap, size: Any) -> None:
    with pytest.raises(TypeError, match="size is a number of bytes, an int"):
        heap.allocate(size)


@pytest.mark.parametrize("name", ["x" * 32, "a\0b"])
def test_a_bad_name_is_einval(heap: SpillHeap, name: str) -> None:
    with raises_errno(errno.EINVAL):
        heap.allocate(SIZE, name=name)


def test_a_buffer_larger_than_the_budget_is_enomem(heap: SpillHeap) -> None:
    heap.allocate(heap.budget).close()
    with raises_errno(errno.ENOMEM):
        heap.allocate(heap.budget + 1)


def test_a_closed_heap_is_ebadf_and_its_buffers_live_on(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    heap.close()
    heap.close()
    assert heap.closed
    with raises_errno(errno.EBADF):
        heap.allocate(SIZE)
    assert all(holds(buf, i) for i, buf in enumerate(bufs))
    for buf in bufs:
        buf.close()
    assert heap._file.fileno() == -1


def test_a_heap_that_nobody_has_any_more_lives_as_long_as_its_buffers_and_leaves_nothing(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    heap = SpillHeap(budget=2 * SIZE, directory=tmp_path)
    bufs = [heap.allocate(SIZE) for _ in range(5)]
    del heap
    for i, buf in enumerate(bufs):
        fill(buf, i)
    assert all(holds(buf, i) for i, buf in enumerate(bufs))
    for buf in bufs:
        buf.close()
    del buf, bufs
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_in_a_forked_child_the_heap_is_eperm(heap: SpillHeap) -> None:
    def inside() -> None:
        with raises_errno(errno.EPERM):
            heap.allocate(SIZE)
        heap.close()
        heap.statistics()

    assert reap(fork(inside)) == 0
    assert not heap.closed
    heap.allocate(SIZE).close()


def test_an_allocation_that_fails_late_gives_its_room_back(heap: SpillHeap, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(spill, "make", Fails(spill.make, errno.EMFILE))
        with raises_errno(errno.EMFILE):
            heap.allocate(SIZE)
    assert heap.statistics().buffers == 0
    assert os.fstat(heap._file.fileno()).st_blocks == 0


# -- the heap of the process


@pytest.mark.parametrize(
    ("given", "expected"),
    [("4096", 4096), ("64K", 64 << 10), ("512M", 512 << 20), ("2G", 2 << 30), ("2GiB", 2 << 30), ("1t", 1 << 40), (" 3 mb ", 3 << 20)],
)
def test_the_budget_of_the_environment(monkeypatch: pytest.MonkeyPatch, given: str, expected: int) -> None:
    monkeypatch.setenv("DMABUF_SPILL_BUDGET", given)
    assert spill.default_budget() == expected


@pytest.mark.parametrize("given", ["much", "-1", "1.5G", "2X", "G"])
def test_a_budget_of_the_environment_that_is_none_is_einval_and_the_heap_unavailable(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("DMABUF_SPILL_BUDGET", given)
    with raises_errno(errno.EINVAL):
        spill.default_budget()
    (found,) = [h for h in dmabuf.heaps() if h.name == "spill"]
    assert found.unavailable is not None
    assert given in found.unavailable


def test_without_a_budget_it_is_a_quarter_of_what_the_limits_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DMABUF_SPILL_BUDGET", raising=False)
    monkeypatch.setattr(spill.budget, "left", lambda: 1 << 30)
    assert spill.default_budget() == 1 << 28


def test_the_heaps_are_listed_with_memfd_as_the_default() -> None:
    assert [h.name for h in dmabuf.heaps()][:2] == ["memfd", "spill"]


def test_allocate_takes_the_heap_of_the_process(tmp_path: Path) -> None:
    code = (
        "import dmabuf, os\n"
        "bufs = [dmabuf.allocate(16384, heap='spill', name=f'n{i}') for i in range(40)]\n"
        "for i, buf in enumerate(bufs):\n"
        "    with buf.write() as view:\n        view[:] = bytes([i + 1]) * 16384\n"
        "assert sum(os.fstat(b.fileno()).st_blocks * 512 for b in bufs) == 65536\n"
        "for i, buf in enumerate(bufs):\n"
        "    with buf.read() as view:\n        assert bytes(view) == bytes([i + 1]) * 16384\n"
        "print(bufs[3].name, bufs[3].exp_name, bufs[3].is_dynamic)\n"
    )
    environment = {**os.environ, "DMABUF_SPILL_BUDGET": "64K", "DMABUF_SPILL_DIRECTORY": str(tmp_path), "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("n3 spill True\n", "", 0)
    assert os.listdir(tmp_path) == []
