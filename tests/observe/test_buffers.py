"""dmabuf.buffers(): what one process sees of the buffers of all."""

import dataclasses
import errno
import os
import socket
import time

import pytest

import dmabuf
from dmabuf import Timeline, Usage
from dmabuf.core.buffer.handle import handle_of
from dmabuf.observe.records import BufferRecord, FenceRecord, Torn
from tests.support.children import Parent, Spawn
from tests.support.fences import attach
from tests.support.partners import fences, has, holds, is_inside, locks, started

SIZE = 16384


def seen(ino: int) -> BufferRecord | None:
    found = [record for record in dmabuf.buffers() if record.ino == ino]
    assert len(found) < 2
    return found[0] if found else None


def there(buf: dmabuf.DmaBuf) -> BufferRecord:
    found = seen(buf.ino)
    assert found is not None
    return found


def test_an_empty_domain_has_no_buffers() -> None:
    assert dmabuf.buffers() == []


def test_a_record_says_what_the_buffer_is() -> None:
    before = time.time_ns()
    with dmabuf.allocate(SIZE - 1, name="frame") as buf:
        record = there(buf)
        assert (record.ino, record.name, record.size, record.exp_name, record.home) == (buf.ino, "frame", SIZE, "memfd", "memfd")
        assert before <= record.created <= time.time_ns()
        assert (record.dev, record.pid, record.locked_by) == (os.fstat(buf.fileno()).st_dev, os.getpid(), 0)
        assert (record.accesses, record.blocking_readers, record.blocking_writers, record.torn) == (0, [], [], None)
        (holder,) = record.holders
        assert (holder.pid, holder.fds, holder.maps) == (os.getpid(), 1, 0)
        assert holder.comm


def test_records_are_frozen() -> None:
    with dmabuf.allocate(SIZE) as buf:
        record = there(buf)
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.size = 1  # type: ignore[misc]


def test_the_newest_comes_first() -> None:
    bufs = [dmabuf.allocate(4096) for _ in range(5)]
    inodes = [buf.ino for buf in bufs]
    assert [record.ino for record in dmabuf.buffers()] == inodes[::-1]
    for buf in bufs:
        buf.close()


@pytest.mark.parametrize(
    ("name", "shown"),
    [(None, None), ("", ""), ("a\nb", "a\nb"), (b"\xff\xfe", "\udcff\udcfe"), ("[red]x[/]", "[red]x[/]"), ("é", "é")],
    ids=["never set", "empty", "line feed", "no UTF-8", "markup", "UTF-8"],
)
def test_a_name_comes_back_as_it_was_given(name: str | bytes | None, shown: str | None) -> None:
    with dmabuf.allocate(SIZE, name=name) as buf:
        assert there(buf).name == shown


def test_a_new_name_is_seen() -> None:
    with dmabuf.allocate(SIZE, name="old") as buf:
        buf.name = "new"
        assert there(buf).name == "new"


def test_a_closed_buffer_is_gone_though_its_handle_is_not() -> None:
    buf = dmabuf.allocate(SIZE)
    ino = buf.ino
    buf.close()
    assert seen(ino) is None


def test_a_mapping_alone_keeps_it() -> None:
    buf = dmabuf.allocate(SIZE)
    ino, mapping = buf.ino, buf.mmap()
    buf.close()
    record = seen(ino)
    assert record is not None
    assert [(h.pid, h.fds, h.maps) for h in record.holders] == [(os.getpid(), 0, 1)]
    mapping.close()
    assert seen(ino) is None


def test_a_buffer_in_flight_is_there_and_nobody_holds_it() -> None:
    here, other = socket.socketpair()
    with here, other:
        with dmabuf.allocate(SIZE, name="flying") as buf:
            ino = buf.ino
            socket.send_fds(here, [b"x"], [buf.fileno()])
        del buf
        record = seen(ino)
        assert record is not None
        assert (record.name, record.holders) == ("flying", [])
    assert seen(ino) is None


def test_holders_are_counted_by_descriptors_and_mappings(child: Spawn) -> None:
    with dmabuf.allocate(SIZE) as buf:
        one = started(child, buf, has, 2, 0)
        two = started(child, buf, has, 0, 3)
        held = {h.pid: (h.fds, h.maps) for h in there(buf).holders}
        assert held == {os.getpid(): (1, 0), one.pid: (3, 0), two.pid: (1, 3)}
        one.send()
        one.result()
        assert {h.pid for h in there(buf).holders} == {os.getpid(), two.pid}
        two.send()
        two.result()


def forks(parent: Parent) -> None:
    """A buffer that a forked child has too; the child ends with the test."""
    with dmabuf.allocate(SIZE) as buf:
        ready, told = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(told)
            os.read(ready, 1)
            os._exit(0)
        os.close(ready)
        parent.send((buf.ino, pid))
        parent.recv()
        os.close(told)
        os.waitpid(pid, 0)


def test_a_forked_child_is_a_holder(child: Spawn) -> None:
    other = child(forks)
    ino, forked = other.recv()
    record = seen(ino)
    assert record is not None
    assert {h.pid: h.fds for h in record.holders} == {other.pid: 1, forked: 1}
    other.send()
    other.result()


def blocking(buf: dmabuf.DmaBuf) -> tuple[list[FenceRecord], list[FenceRecord]]:
    record = there(buf)
    return record.blocking_readers, record.blocking_writers


@pytest.mark.parametrize(
    ("usage", "readers", "writers"), [(Usage.KERNEL, 1, 1), (Usage.WRITE, 1, 1), (Usage.READ, 0, 1), (Usage.BOOKKEEP, 0, 0)]
)
def test_a_fence_of_another_process_blocks_by_its_usage(child: Spawn, usage: Usage, readers: int, writers: int) -> None:
    before = time.monotonic_ns()
    with dmabuf.allocate(SIZE) as buf:
        other = started(child, buf, fences, "v4l2", "capture", usage)
        found = blocking(buf)
        assert [len(each) for each in found] == [readers, writers]
        for fence in found[0] + found[1]:
            assert (fence.driver, fence.timeline, fence.seqno, fence.pid) == ("v4l2", "capture", 1, other.pid)
            assert before < fence.since < time.monotonic_ns()
            assert (fence.usage, fence.access, fence.granted, fence.signaled) == (usage.name.lower(), None, False, False)
        other.send()
        other.result()
        assert blocking(buf) == ([], [])


@pytest.mark.parametrize(("write", "readers"), [(True, 1), (False, 0)], ids=["write", "read"])
def test_an_access_of_another_process_blocks_and_is_counted(child: Spawn, write: bool, readers: int) -> None:
    with dmabuf.allocate(SIZE) as buf:
        other = started(child, buf, is_inside, write)
        record = there(buf)
        assert (record.accesses, len(record.blocking_readers), len(record.blocking_writers)) == (1, readers, 1)
        (fence,) = record.blocking_writers
        assert (fence.pid, fence.access, fence.granted) == (other.pid, "write" if write else "read", True)
        assert fence.driver == "dmabuf"
        assert fence.timeline.endswith(f"-{other.pid}")
        other.send()
        other.result()
        assert there(buf).accesses == 0


def test_of_two_fences_the_older_comes_first() -> None:
    with dmabuf.allocate(SIZE) as buf, Timeline("older") as older, Timeline("newer") as newer:
        first, second = older.fence(), newer.fence()
        attach(buf.resv, second, Usage.WRITE)
        attach(buf.resv, first, Usage.WRITE)
        assert [f.timeline for f in there(buf).blocking_readers] == ["older", "newer"]
        first.signal()
        second.signal()


def test_a_fence_on_a_list_of_many_is_seen() -> None:
    with dmabuf.allocate(SIZE) as buf:
        lines = [Timeline(str(i)) for i in range(100)]
        made = [line.fence() for line in lines]
        for fence in made:
            attach(buf.resv, fence, Usage.READ)
        assert [f.timeline for f in there(buf).blocking_writers] == [str(i) for i in range(100)]
        for line in lines:
            line.close()
        assert there(buf).blocking_writers == []


def test_a_killed_writer_leaves_the_content_torn_and_nothing_in_the_way(child: Spawn) -> None:
    with dmabuf.allocate(SIZE) as buf:
        other = started(child, buf, is_inside, True)
        other.kill()
        record = there(buf)
        assert record.torn == Torn(errno.EOWNERDEAD, other.pid)
        assert (record.accesses, record.blocking_readers, record.blocking_writers) == (0, [], [])
        assert [h.pid for h in record.holders] == [os.getpid()]
        with buf.write():
            pass
        assert there(buf).torn is None


def test_a_writer_that_raised_leaves_the_content_torn() -> None:
    with dmabuf.allocate(SIZE) as buf:
        with pytest.raises(ZeroDivisionError), buf.write():
            raise ZeroDivisionError
        assert there(buf).torn == Torn(errno.ECANCELED, os.getpid())


def test_of_a_killed_process_nothing_is_left(child: Spawn) -> None:
    other = child(holds, ["a", "b", None])
    inodes = other.recv()
    assert sorted(record.ino for record in dmabuf.buffers()) == sorted(inodes)
    other.kill()
    assert dmabuf.buffers() == []


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_held_reservation_lock_is_not_waited_for(child: Spawn, stopped: bool) -> None:
    with dmabuf.allocate(SIZE) as buf:
        other = started(child, buf, locks)
        if stopped:
            other.stop()
        assert there(buf).locked_by == other.pid
        other.resume()
        other.send()
        other.result()
        assert there(buf).locked_by == 0


def test_a_thousand_buffers_of_four_processes(child: Spawn) -> None:
    others = [child(holds, [f"{i}-{k}" for k in range(250)]) for i in range(4)]
    inodes = [other.recv() for other in others]
    records = dmabuf.buffers()
    assert {record.ino for record in records} == {ino for part in inodes for ino in part}
    assert len(records) == 1000
    owner = {ino: other.pid for other, part in zip(others, inodes, strict=True) for ino in part}
    assert all([h.pid for h in record.holders] == [owner[record.ino]] for record in records)
    for other in others:
        other.send()
        other.result()


def looks_without_a_life(parent: Parent) -> None:
    """A forked child, which has no life of its own, looks."""
    with dmabuf.allocate(SIZE) as buf:
        ready, answer = os.pipe()
        pid = os.fork()
        if not pid:
            found = [(record.ino, [h.pid for h in record.holders]) for record in dmabuf.buffers()]
            alive = dmabuf.Domain.default().shm.life
            os.write(answer, repr((found, alive)).encode())
            os._exit(0)
        os.close(answer)
        os.waitpid(pid, 0)
        with open(ready) as pipe:
            parent.send((buf.ino, pid, pipe.read()))


def test_looking_needs_no_life(child: Spawn) -> None:
    other = child(looks_without_a_life)
    ino, forked, found = other.recv()
    assert eval(found) == ([(ino, sorted([other.pid, forked]))], 0)  # by pid, and pids begin anew after the last
    other.result()


def looks_into_two_domains(parent: Parent) -> tuple[bool, bool]:
    domain = dmabuf.Domain.private()
    with dmabuf.allocate(SIZE, domain=domain) as buf:
        return [record.ino for record in dmabuf.buffers(domain=domain)] == [buf.ino], dmabuf.buffers() == []


def test_another_domain_is_seen_by_itself(child: Spawn) -> None:
    assert child(looks_into_two_domains).result() == (True, True)


def test_the_domain_is_keyword_only() -> None:
    with pytest.raises(TypeError):
        dmabuf.buffers(dmabuf.Domain.default())  # type: ignore[misc]


def test_layout_is_shown_and_one_that_makes_no_sense_is_not() -> None:
    layout = dmabuf.TensorLayout("uint8", (5,))
    with dmabuf.allocate(layout=layout) as buf, dmabuf.allocate(4096) as bare:
        assert there(buf).layout == layout
        assert there(bare).layout is None
        shared = handle_of(bare).shared
        assert shared.shm.rec_set_layout(shared.index, shared.gen, 0, b"nonsense")
        assert there(bare).layout is None
