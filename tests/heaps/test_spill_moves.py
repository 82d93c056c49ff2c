"""The spill heap in one process: importers that are told of a move, and what others see of it."""

import errno
import random
import threading
from pathlib import Path

import pytest

from dmabuf import ContractError, Device, Direction, DmaBuf, DmaBufAttachment, Importer, SpillHeap, Timeline, Usage
from dmabuf._native import OwnedFd
from dmabuf.core.attach.attachment import moving
from dmabuf.heap import spill_moves
from dmabuf.heap.spill_file import SpillFile
from tests.support.drivers import Mover
from tests.support.spilling import ROOM, SIZE, fill, holds, is_here, pattern, resident, use
from tests.support.waiting import Background

FROM, TO = Direction.FROM_DEVICE, Direction.TO_DEVICE


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


@pytest.mark.parametrize("moves", [True, False])
def test_unmap_with_other_direction_is_contract_error_and_table_stays(heap: SpillHeap, bufs: list[DmaBuf], moves: bool) -> None:
    att = bufs[0].attach(Device("npu0"), Mover())
    with moving(moves):
        sgt = att.map_unlocked(TO)
    with pytest.raises(ContractError):
        att.unmap_unlocked(sgt, FROM)
    assert (att.statistics().mapped, att.dev.statistics().windows, heap.statistics().pinned) == (1, 1, 0 if moves else SIZE)
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


def test_importer_that_never_stops_costs_timeout_and_another_moves(tmp_path: Path) -> None:
    line = Timeline("npu0")
    fences = []

    class Hangs(Importer):
        def move_notify(self, attachment: DmaBufAttachment) -> None:
            attachment.dmabuf.resv.reserve(1)
            fences.append(line.fence())
            attachment.dmabuf.resv.add(fences[-1], Usage.READ)

    with SpillHeap(budget=2 * SIZE, directory=tmp_path, memory_timeout=0.01) as heap:
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
    real = spill_moves.punch

    def punch(fd: OwnedFd, start: int, length: int) -> None:
        if fd.ino == bufs[0].ino:
            moving_now.set()
            go_on.wait()
        real(fd, start, length)

    use(bufs[:ROOM])
    monkeypatch.setattr(spill_moves, "punch", punch)
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
