"""The spill heap in one process: what every failing or interrupted move leaves."""

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dmabuf import Device, Direction, DmaBuf, DmaBufAttachment, Importer, SpillHeap, Usage, _native
from dmabuf.core.buffer import residency
from dmabuf.heap import spill, spill_file, spill_moves
from dmabuf.heap.spill_file import SpillFile
from tests.support.errnos import raises_errno
from tests.support.leaks import descriptors, rest
from tests.support.native import patch_native
from tests.support.spilling import ROOM, SIZE, fill, holds, is_here, resident, use
from tests.support.waiting import until

TO = Direction.TO_DEVICE


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
    return [is_here(buf) for buf in bufs], said.resident, said.pinned, descriptors()


@pytest.mark.parametrize(
    ("where", "name", "number", "expected"),
    [
        (spill_file, "write_at", errno.ENOSPC, errno.ENOSPC),
        (spill_file, "write_at", errno.EIO, errno.EIO),
        (spill_moves, "punch", errno.EPERM, errno.EPERM),
        (spill_moves, "map_same", errno.ENOMEM, errno.ENOMEM),
        (residency, "evict", errno.ENOLCK, errno.ENOLCK),
        (spill_moves, "_duplicate", errno.EMFILE, errno.EMFILE),
        (spill.ResidentSet, "_timeline", errno.ENOSPC, errno.ENOSPC),
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
        (spill_file, "reserve_range", errno.ENOSPC, errno.ENOMEM),
        (spill_file, "reserve_range", errno.ENOMEM, errno.ENOMEM),
        (spill_file, "read_at", errno.EIO, errno.EIO),
        (spill_file.SpillFile, "read", errno.EIO, errno.EIO),
        (spill_moves, "map_same", errno.ENOMEM, errno.ENOMEM),
        (residency, "make_resident", errno.ENOLCK, errno.ENOLCK),
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
    rest()  # no number is another thread's for a moment
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
        patch.setattr(spill_file, "reserve_range", Fails(spill_file.reserve_range, errno.ENOSPC))
        with raises_errno(errno.ENOSPC):
            heap.allocate(SIZE)
    assert heap.statistics().buffers == len(bufs)


def test_an_allocation_that_fails_late_gives_its_room_back(heap: SpillHeap, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(spill, "make", Fails(spill.make, errno.EMFILE))
        with raises_errno(errno.EMFILE):
            heap.allocate(SIZE)
    assert heap.statistics().buffers == 0
    assert os.fstat(heap._file.fileno()).st_blocks == 0


@pytest.mark.parametrize("step", ["spill_copying", "spill_notified", "spill_read"])
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
        patch_native(patch, "step", interrupted)
        with pytest.raises(KeyError), bufs[ROOM].read():
            pass
    assert sum(map(resident, bufs)) == heap.statistics().resident <= heap.budget
    assert heap.statistics().pinned == 0
    assert all(buf.resv.test_signaled(Usage.BOOKKEEP) for buf in bufs)
    assert all(holds(buf, i) for i, buf in enumerate(bufs))


@pytest.mark.parametrize("step", ["spill_notified", "spill_copying", "spill_punched", "spill_reserved", "spill_read", "spill_here"])
def test_move_is_completed_when_a_signal_handler_ends_the_wait(
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
            patch_native(patch, "step", stop)
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
    before = descriptors()
    real = SpillFile.write

    def write(file: SpillFile, at: int, view: memoryview) -> None:
        bufs[0].close()
        real(file, at, view)

    with monkeypatch.context() as patch:
        patch.setattr(SpillFile, "write", write)
        use(bufs[ROOM : ROOM + 1])
    until(lambda: heap.statistics().buffers == len(bufs) - 1)
    assert descriptors() == before - 2  # its handle's and the exporter's
    assert all(holds(buf, i) for i, buf in enumerate(bufs) if i)
