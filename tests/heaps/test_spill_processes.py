"""The spill heap across processes: two that write ten times the budget, what another process's use keeps in memory, and its death."""

import contextlib
import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import Device, Direction, DmaBuf, DmaBufAttachment, SpillHeap
from dmabuf.core.attach.attachment import moving
from tests.support.children import Parent, Spawn
from tests.support.drivers import Mover
from tests.support.errnos import raises_errno
from tests.support.spilling import PAGE, ROOM, SIZE, fill, give, given, holds, is_here, number_in, pattern, resident, use
from tests.support.steps import fork, reap
from tests.support.waiting import until, until_asleep

# -- two processes that write at random

STEP = 1 << 20  # numbers that a buffer may go through


def counts_up(parent: Parent, seed: int, rounds: int) -> int:
    """Count random buffers up by one, or look at them; the number of counts."""
    bufs = given(parent)
    rng = random.Random(seed)
    newest = [0] * len(bufs)
    counted = 0
    for _ in range(rounds):
        i = rng.randrange(len(bufs))
        write = rng.random() < 0.5
        with bufs[i].write() if write else bufs[i].read() as view:
            found = number_in(view)
            assert i * STEP <= found < (i + 1) * STEP, "another buffer's content"
            assert found >= newest[i], "older than what was seen before"
            newest[i] = found + write
            if write:
                view[:] = pattern(found + 1, len(view))
                counted += 1
    return counted


@pytest.mark.parametrize("rounds", [600, pytest.param(20_000, marks=pytest.mark.long)])
def test_two_processes_write_ten_times_the_budget_and_lose_nothing(heap: SpillHeap, bufs: list[DmaBuf], child: Spawn, rounds: int) -> None:
    """Every write counts a buffer up, and every access looks at every byte: a lost, stale, torn or strange one is found."""
    for i, buf in enumerate(bufs):
        fill(buf, i * STEP)
    who = [(os.fstat(buf.fileno()).st_ino, buf.size) for buf in bufs]
    writers = [child(counts_up, seed, rounds) for seed in (1, 2)]
    for writer in writers:
        give(writer, bufs)
    most = 0
    while not all(heap.statistics().moves_out > 0 for _ in writers):
        os.sched_yield()
    for _ in range(200):
        said = heap.statistics()
        most = max(most, said.resident)
        assert said.resident <= said.budget
    counted = sum(writer.result() for writer in writers)
    found = 0
    for i, buf in enumerate(bufs):
        with buf.read() as view:
            found += number_in(view) - i * STEP
        assert sum(map(resident, bufs)) <= heap.budget
    assert found == counted > 0
    assert who == [(os.fstat(buf.fileno()).st_ino, buf.size) for buf in bufs]
    assert heap.statistics().moves_out > rounds // 2
    assert most > 0


# -- what another process's use keeps in memory


def does(parent: Parent, how: str) -> Any:
    """Use the one buffer in some way until told to end; then what it shows."""
    (buf,) = given(parent)
    shown: Any = None
    if how == "read":
        with buf.read() as view:
            parent.send("in")
            parent.recv()
            shown = bytes(view) == pattern(0, SIZE)
    elif how == "bracket":
        buf.begin_cpu_access(Direction.FROM_DEVICE)
        parent.send("in")
        parent.recv()
        with buf.mmap() as mapping:
            shown = mapping[:] == pattern(0, SIZE)
        buf.end_cpu_access(Direction.FROM_DEVICE)
    elif how == "mmap":
        mapping = buf.mmap()
        buf.close()
        parent.send("in")
        parent.recv()
        shown = mapping[:] == pattern(0, SIZE)
        mapping.close()
    elif how == "part of it, read-only":
        with buf.mmap(PAGE, PAGE, writable=False) as mapping:
            parent.send("in")
            parent.recv()
            shown = mapping[:] == pattern(0, SIZE)[PAGE : 2 * PAGE]
    elif how == "vmap":
        made = buf.vmap_unlocked()
        parent.send("in")
        parent.recv()
        buf.begin_cpu_access(Direction.FROM_DEVICE)
        shown = bytes(made.vaddr or b"") == pattern(0, SIZE)
        buf.end_cpu_access(Direction.FROM_DEVICE)
        buf.vunmap_unlocked(made)
        del made
    elif how in ("static device", "mapping that pins", "pin"):
        att = buf.attach(Device("npu0"), None if how == "static device" else Mover())
        if how == "pin":
            with buf.resv.locked():
                att.pin()
        with moving(False), att.mapped(Direction.TO_DEVICE) if how != "pin" else contextlib.nullcontext():
            parent.send("in")
            parent.recv()
            with att.mapped(Direction.TO_DEVICE) as sgt:
                shown = b"".join(att.dev.read(*entry) for entry in sgt) == pattern(0, SIZE)
        if how == "pin":
            with buf.resv.locked():
                att.unpin()
        att.detach()
    parent.send("out")
    parent.recv()
    return shown


WAYS = ["read", "bracket", "mmap", "part of it, read-only", "vmap", "static device", "mapping that pins", "pin"]


@pytest.mark.parametrize("how", WAYS)
def test_another_processs_use_keeps_the_memory_and_its_end_lets_it_go(heap: SpillHeap, bufs: list[DmaBuf], child: Spawn, how: str) -> None:
    other = child(does, how)
    give(other, bufs[:1])
    assert other.recv() == "in"
    use(bufs[1:])
    assert is_here(bufs[0])
    assert heap.statistics().pinned == SIZE
    other.send()
    assert other.recv() == "out"
    use(bufs[1:])
    assert not is_here(bufs[0])
    other.send()
    assert other.result() is True


@pytest.mark.parametrize("how", WAYS)
def test_a_user_that_is_killed_lets_the_memory_go(heap: SpillHeap, bufs: list[DmaBuf], child: Spawn, how: str) -> None:
    other = child(does, how)
    give(other, bufs[:1])
    assert other.recv() == "in"
    other.kill()
    until(lambda: not heap.statistics().pinned)

    def gone() -> bool:
        """Its access and its bracket end when its death is noticed; until then others go in its place."""
        use(bufs[1:])
        return not is_here(bufs[0])

    until(gone)
    assert holds(bufs[0], 0)


def imports(parent: Parent) -> Any:
    """A dynamic importer with news of moves, told to look at its table again and again."""
    (buf,) = given(parent)
    told: list[bool] = []

    class Told(Mover):
        def move_notify(self, attachment: DmaBufAttachment) -> None:
            super().move_notify(attachment)
            told.append(True)

    att = buf.attach(Device("npu0"), importer := Told())
    sgt = att.map_unlocked(Direction.TO_DEVICE)
    entry = next(iter(sgt))
    looks = [att.dev.read(*entry) == pattern(0, SIZE)]
    parent.send("in")
    parent.recv()
    try:
        looks.append(att.dev.read(*entry) == pattern(0, SIZE))
        late = 0
    except OSError as e:
        late = e.errno or -1
    att.unmap_unlocked(sgt, Direction.TO_DEVICE)
    with att.mapped(Direction.TO_DEVICE) as again:
        looks.append(b"".join(att.dev.read(*entry) for entry in again) == pattern(0, SIZE))
    parent.send((looks, late, len(told), importer.locked))
    att.detach()
    return att.dev.statistics().windows


def test_remote_importer_maps_again_after_a_move_and_old_table_faults(heap: SpillHeap, bufs: list[DmaBuf], child: Spawn) -> None:
    other = child(imports)
    give(other, bufs[:1])
    assert other.recv() == "in"
    use(bufs[1:])
    assert not is_here(bufs[0])
    other.send()
    looks, late, told, locked = other.recv()
    assert (looks, late, told, locked) == ([True, True], errno.EFAULT, 1, [True])
    assert other.result() == 0
    assert heap.statistics().pinned == 0


def maps_in_its_callback(parent: Parent) -> Any:
    """What an importer must not: map again before its callback has returned."""
    (buf,) = given(parent)
    answers = []

    class Nosy(Mover):
        def move_notify(self, attachment: DmaBufAttachment) -> None:
            try:
                attachment.map(Direction.TO_DEVICE)
            except OSError as e:
                answers.append(e.errno)

    att = buf.attach(Device("npu0"), Nosy())
    with att.mapped(Direction.TO_DEVICE):
        pass
    parent.send("in")
    parent.recv()
    att.detach()
    return answers


def test_remote_importer_that_maps_in_move_notify_gets_edeadlk(heap: SpillHeap, bufs: list[DmaBuf], child: Spawn) -> None:
    other = child(maps_in_its_callback)
    give(other, bufs[:1])
    assert other.recv() == "in"
    use(bufs[1:])
    assert not is_here(bufs[0])
    other.send()
    assert other.result() == [errno.EDEADLK]
    assert holds(bufs[0], 0)


def writes(parent: Parent) -> None:
    (buf,) = given(parent)
    fill(buf, 77)
    mapping = buf.mmap()
    mapping[:4] = b"bare"
    mapping.close()


def test_what_another_process_writes_is_kept(heap: SpillHeap, bufs: list[DmaBuf], child: Spawn) -> None:
    other = child(writes)
    give(other, bufs[:1])
    other.result()
    use(bufs[1:])
    assert not is_here(bufs[0])
    with bufs[0].read() as view:
        assert bytes(view) == b"bare" + pattern(77, SIZE)[4:]


def gets(parent: Parent) -> int:
    (buf,) = given(parent)
    with raises_errno(errno.ENOMEM) as caught, buf.write():
        pass
    assert "pinned" in str(caught.value)
    return buf.resv.test_signaled(dmabuf.Usage.BOOKKEEP)


def test_no_room_is_enomem_in_another_process_too(heap: SpillHeap, bufs: list[DmaBuf], child: Spawn) -> None:
    heap._resident_set.memory_timeout = 0.05
    mappings = [buf.mmap() for buf in bufs[:ROOM]]
    other = child(gets)
    give(other, bufs[ROOM : ROOM + 1])
    assert other.result() is True
    for mapping in mappings:
        mapping.close()
    assert holds(bufs[ROOM], ROOM)


def test_a_forked_child_uses_its_parents_buffers(heap: SpillHeap, bufs: list[DmaBuf]) -> None:
    def inside() -> None:
        assert all(holds(buf, i) for i, buf in enumerate(bufs))
        fill(bufs[3], 33)

    pid = fork(inside)
    assert reap(pid) == 0
    assert holds(bufs[3], 33)
    assert heap.statistics().resident <= heap.budget


# -- the exporter's death


def exports(parent: Parent, directory: str) -> None:
    """Two buffers in memory and one away; then wait for orders: ("hold", step, nth), after which it uses the one that is away."""
    heap = SpillHeap(budget=2 * SIZE, directory=directory, memory_timeout=60)
    bufs = [heap.allocate(SIZE) for _ in range(3)]
    for i in (2, 0, 1):
        fill(bufs[i], i)
    give(parent, bufs)
    step = parent.recv()
    dmabuf._native.step_arm("hold", step, parent.sock.fileno())  # type: ignore[attr-defined]
    with bufs[2].read():
        pass


def outcome(buf: DmaBuf, what: int) -> str:
    """Of reading a buffer: "whole", the name of the errno, or "WRONG"."""
    try:
        with buf.read() as view:
            return "whole" if bytes(view) == pattern(what, SIZE) else "WRONG"
    except OSError as e:
        return errno.errorcode[e.errno or 0]


OUT = ["spill_chosen", "spill_locked", "spill_notified", "spill_waited", "spill_copying", "spill_written", "spill_punched", "spill_left"]
IN = ["spill_claimed", "spill_reserved", "spill_read", "spill_here"]


@pytest.mark.crash
@pytest.mark.parametrize(("step", "nth"), [(step, 1) for step in OUT + IN] + [("spill_copying", 2)])
def test_exporter_killed_in_a_move_leaves_content_or_enodev(child: Spawn, tmp_path: Path, step: str, nth: int) -> None:
    """Buffer 0 goes, for 2 to come, while 1 is read and mapped here and another process waits for 0 and a third for 2."""
    exporter = child(exports, str(tmp_path))
    bufs = given(exporter)  # type: ignore[arg-type]
    mapping = bufs[1].mmap()
    inside = bufs[1].read()
    view = inside.__enter__()
    exporter.send(step)
    for _ in range(nth):
        assert exporter.sock.recv(100) == step.encode() + b"\n"
        if nth > 1:
            nth -= 1
            exporter.sock.send(b"g")
    waiters = []
    for what in (0, 2):
        report, theirs = os.pipe()
        waiters.append((fork(lambda what=what, to=theirs: os.write(to, outcome(bufs[what], what).encode())), report))  # type: ignore[misc]
        os.close(theirs)
    for pid, _ in waiters:
        until_asleep(pid)
    exporter.kill()
    for pid, report in waiters:
        assert os.read(report, 100) in (b"ENODEV", b"whole")
        os.close(report)
        assert reap(pid) == 0
    assert bytes(view) == pattern(1, SIZE) == mapping[:]
    with raises_errno(errno.ENODEV):  # the bracket's end can't be told to anybody
        inside.__exit__(None, None, None)
    assert mapping[:] == pattern(1, SIZE)
    for what, buf in enumerate(bufs):
        assert outcome(buf, what) == "ENODEV"
        with raises_errno(errno.ENODEV):
            buf.mmap()
        with raises_errno(errno.ENODEV):
            buf.begin_cpu_access(Direction.FROM_DEVICE)
        with raises_errno(errno.ENODEV):
            buf.attach(dmabuf.Device("npu0"))
    view.release()
    mapping.close()
    for buf in bufs:
        buf.close()
    assert os.listdir(tmp_path) == []


def churns(parent: Parent, directory: str, nth: int) -> None:
    """Buffers that come and go until this process dies at its nth step of any kind."""
    with SpillHeap(budget=2 * SIZE, directory=directory, memory_timeout=60) as heap:
        bufs = [heap.allocate(SIZE) for _ in range(6)]
        for i, buf in enumerate(bufs):
            fill(buf, i)
        give(parent, bufs)
        parent.recv()
        dmabuf._native.step_arm("kill", "*", nth)  # type: ignore[attr-defined]
        rng = random.Random(nth)
        while True:
            i = rng.randrange(len(bufs))
            if rng.random() < 0.5:
                fill(bufs[i], i)
            else:
                assert holds(bufs[i], i)


def looks(parent: Parent, seed: int) -> int:
    """Look at buffers until they are gone; how many looks."""
    bufs = given(parent)
    parent.send("ready")
    rng = random.Random(seed)
    looks = 0
    gone = 0
    while gone < 20:
        i = rng.randrange(len(bufs))
        answer = outcome(bufs[i], i)
        # A writer that died while writing left its buffer torn, which is told before the exporter is asked.
        assert answer in ("whole", "ENODEV", "EOWNERDEAD"), answer
        looks += 1
        gone += answer != "whole"
    return looks


@pytest.mark.crash
@pytest.mark.parametrize("nth", [*range(150, 250, 20), *(pytest.param(n, marks=pytest.mark.long) for n in range(101, 701, 7))])
def test_exporter_killed_at_any_step_shows_nothing_wrong_to_readers(child: Spawn, tmp_path: Path, nth: int) -> None:
    exporter = child(churns, str(tmp_path), nth)
    bufs = given(exporter)  # type: ignore[arg-type]
    lookers = [child(looks, seed) for seed in (1, 2)]
    for looker in lookers:
        give(looker, bufs)
        assert looker.recv() == "ready"
    for buf in bufs:
        buf.close()
    exporter.send()
    assert all(looker.result() >= 20 for looker in lookers)
    assert exporter.wait() == -9
