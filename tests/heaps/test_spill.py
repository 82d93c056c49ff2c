"""The spill heap in one process: what is in memory, what bad arguments are told, and the heap of the process."""

import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import Device, Direction, DmaBuf, SpillHeap
from dmabuf.heap import spill
from tests.support.errnos import raises_errno
from tests.support.leaks import descriptors
from tests.support.spilling import PAGE, ROOM, SIZE, fill, holds, is_here, pattern, resident, use
from tests.support.steps import fork, reap

FROM, TO = Direction.FROM_DEVICE, Direction.TO_DEVICE


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


@pytest.mark.parametrize("memory_timeout", [-1, -0.001, float("inf"), float("nan")])
def test_bad_memory_timeout_is_einval(tmp_path: Path, memory_timeout: float) -> None:
    with raises_errno(errno.EINVAL):
        SpillHeap(budget=PAGE, directory=tmp_path, memory_timeout=memory_timeout)


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


def test_dropped_heap_lives_as_long_as_its_buffers(tmp_path: Path) -> None:
    before = descriptors()
    heap = SpillHeap(budget=2 * SIZE, directory=tmp_path)
    bufs = [heap.allocate(SIZE) for _ in range(5)]
    del heap
    for i, buf in enumerate(bufs):
        fill(buf, i)
    assert all(holds(buf, i) for i, buf in enumerate(bufs))
    for buf in bufs:
        buf.close()
    del buf, bufs
    assert descriptors() == before


def test_in_a_forked_child_the_heap_is_eperm(heap: SpillHeap) -> None:
    def inside() -> None:
        with raises_errno(errno.EPERM):
            heap.allocate(SIZE)
        heap.close()
        heap.statistics()

    assert reap(fork(inside)) == 0
    assert not heap.closed
    heap.allocate(SIZE).close()


# -- the heap of the process


@pytest.mark.parametrize(
    ("given", "expected"),
    [("4096", 4096), ("64K", 64 << 10), ("512M", 512 << 20), ("2G", 2 << 30), ("2GiB", 2 << 30), ("1t", 1 << 40), (" 3 mb ", 3 << 20)],
)
def test_the_budget_of_the_environment(monkeypatch: pytest.MonkeyPatch, given: str, expected: int) -> None:
    monkeypatch.setenv("DMABUF_SPILL_BUDGET", given)
    assert spill.default_budget() == expected


@pytest.mark.parametrize("given", ["much", "-1", "1.5G", "2X", "G"])
def test_bad_budget_in_environment_is_einval_and_heap_unavailable(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
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
