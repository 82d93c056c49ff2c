"""Access across processes: exclusion, order, death, deadlock, and many rounds without a torn read."""

import asyncio
import contextlib
import errno
import os
import re
import signal
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, Usage
from tests.support.children import Child, Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import keys
from tests.support.steps import fork, reap
from tests.support.waiting import until, until_asleep

MODES = pytest.mark.parametrize("mode", ["read", "write"])


def arrived(buf: DmaBuf, count: int) -> None:
    """Until so many accesses are inside or wait: each is a fence from the moment of its arrival."""
    until(lambda: len(buf.resv.fences(Usage.READ)) == count)


def actor(parent: Parent) -> None:
    """Enters and leaves accesses on command: ("read" | "write", number of the buffer), "leave", "raise".

    Inside it says ("in", first byte). A writer sets the first byte to 1 on entering and adds 1 on leaving, so that who is beside it, or
    comes at the wrong time, reads an odd or an old number.
    """
    bufs = dmabuf.recv(parent.sock)
    with contextlib.ExitStack() as stack:
        views: list[tuple[str, Any, contextlib.ExitStack]] = []
        while True:
            command = parent.recv()
            if command == "leave":
                mode, view, block = views.pop()
                if mode == "write":
                    view[0] += 1
                last = view[0]
                del view
                block.close()
                parent.send(("out", last))
            elif command == "raise":
                _, _, block = views.pop()
                error = KeyError("on command")
                block.__exit__(KeyError, error, None)
                parent.send("raised")
            else:
                mode, number = command
                block = stack.enter_context(contextlib.ExitStack())
                try:
                    view = block.enter_context(getattr(bufs[number], mode)())
                except OSError as error:
                    parent.send((error.errno, str(error)))
                    continue
                first = view[0]
                if mode == "write":
                    view[0] += 1
                views.append((mode, view, block))
                del view
                parent.send(("in", first))


def cast(child: Spawn, count: int, *bufs: DmaBuf) -> list[Child]:
    """So many actors that have the buffers."""
    actors = [child(actor) for _ in range(count)]
    for each in actors:
        dmabuf.send(each.sock, *bufs)
    return actors


def enters(one: Child, mode: str, number: int = 0, first: int = 0) -> None:
    """Let an actor enter at once, and see that first byte."""
    one.send((mode, number))
    assert one.recv() == ("in", first)


def leaves(one: Child, last: int) -> None:
    """Let an actor leave; the last it saw."""
    one.send("leave")
    assert one.recv() == ("out", last)


# -- exclusion and order


def test_a_writer_excludes_readers(child: Spawn, buf: DmaBuf) -> None:
    writer, reader = cast(child, 2, buf)
    enters(writer, "write")
    reader.send(("read", 0))
    arrived(buf, 2)
    until_asleep(reader.pid)
    leaves(writer, last=2)
    # 1 would have been beside the writer.
    assert reader.recv() == ("in", 2)


def test_a_writer_excludes_writers(child: Spawn, buf: DmaBuf) -> None:
    one, two = cast(child, 2, buf)
    enters(one, "write")
    two.send(("write", 0))
    arrived(buf, 2)
    until_asleep(two.pid)
    leaves(one, last=2)
    assert two.recv() == ("in", 2)


def test_a_reader_excludes_writers(child: Spawn, buf: DmaBuf) -> None:
    reader, writer = cast(child, 2, buf)
    enters(reader, "read")
    writer.send(("write", 0))
    arrived(buf, 2)
    until_asleep(writer.pid)
    leaves(reader, last=0)
    assert writer.recv() == ("in", 0)


def test_readers_overlap(child: Spawn, buf: DmaBuf) -> None:
    actors = cast(child, 3, buf)
    for reader in actors:
        enters(reader, "read")
    with buf.read():
        assert len(buf.resv.fences(Usage.READ)) == 4


def test_arrival_order_three_overlapping_readers_do_not_starve_a_writer(child: Spawn, buf: DmaBuf) -> None:
    """Each reader asks again before the next one leaves: there is always one inside, and the writer still gets in."""
    *readers, writer = cast(child, 4, buf)
    for reader in readers:
        enters(reader, "read")
    writer.send(("write", 0))
    arrived(buf, 4)
    until_asleep(writer.pid)
    for reader in readers:
        leaves(reader, last=0)
        reader.send(("read", 0))
        # Those still inside, the writer, and those who asked again.
        arrived(buf, 4)
    assert writer.recv() == ("in", 0)
    leaves(writer, last=2)
    # All of them came after the writer.
    assert [reader.recv() for reader in readers] == [("in", 2)] * 3


def test_writers_are_let_in_one_by_one_in_the_order_of_arrival(child: Spawn, buf: DmaBuf) -> None:
    actors = cast(child, 4, buf)
    with buf.read():
        for number, writer in enumerate(actors):
            writer.send(("write", 0))
            arrived(buf, number + 2)
    for number, writer in enumerate(actors):
        assert writer.recv() == ("in", 2 * number)
        leaves(writer, last=2 * number + 2)


# -- torn content


def test_content_torn_by_an_exception_is_torn_everywhere_until_written(child: Spawn, buf: DmaBuf) -> None:
    writer, reader = cast(child, 2, buf)
    enters(writer, "write")
    writer.send("raise")
    assert writer.recv() == "raised"
    with raises_errno(errno.ECANCELED), buf.read():
        pass
    reader.send(("read", 0))
    assert reader.recv()[0] == errno.ECANCELED
    with buf.write() as view:
        view[0] = 9
    enters(reader, "read", first=9)


def test_content_torn_by_death_is_torn_everywhere_until_written(child: Spawn, buf: DmaBuf) -> None:
    writer, reader, healer = cast(child, 3, buf)
    enters(writer, "write")
    writer.kill()
    for _ in range(2):
        with raises_errno(errno.EOWNERDEAD), buf.read():
            pass
    reader.send(("read", 0))
    assert reader.recv()[0] == errno.EOWNERDEAD
    enters(healer, "write", first=1)
    reader.send(("read", 0))
    arrived(buf, 2)
    leaves(healer, last=3)
    assert reader.recv() == ("in", 3)
    with buf.read() as view:
        assert view[0] == 3


def test_the_last_way_of_tearing_is_told(child: Spawn, buf: DmaBuf) -> None:
    first, second = cast(child, 2, buf)
    first.send(("write", 0))
    first.recv()
    first.kill()
    second.send(("write", 0))
    assert second.recv()[0] == "in"
    second.send("raise")
    assert second.recv() == "raised"
    with raises_errno(errno.ECANCELED), buf.read():
        pass


def test_who_waits_for_a_writer_that_is_killed_is_told(child: Spawn, buf: DmaBuf) -> None:
    writer, reader = cast(child, 2, buf)
    enters(writer, "write")
    reader.send(("read", 0))
    arrived(buf, 2)
    until_asleep(reader.pid)
    writer.kill()
    assert reader.recv()[0] == errno.EOWNERDEAD
    assert keys(buf.resv) == []


def test_a_writer_that_waits_for_a_killed_writer_gets_in(child: Spawn, buf: DmaBuf) -> None:
    one, two = cast(child, 2, buf)
    enters(one, "write")
    two.send(("write", 0))
    arrived(buf, 2)
    until_asleep(two.pid)
    one.kill()
    assert two.recv() == ("in", 1)


def test_a_writer_killed_while_it_waits_has_torn_nothing(child: Spawn, buf: DmaBuf) -> None:
    reader, writer, late = cast(child, 3, buf)
    enters(reader, "read")
    writer.send(("write", 0))
    arrived(buf, 2)
    until_asleep(writer.pid)
    late.send(("read", 0))
    arrived(buf, 3)
    until_asleep(late.pid)
    writer.kill()
    # The reader behind it is let in though the first one is still inside.
    assert late.recv() == ("in", 0)
    with buf.read() as view:
        assert view[0] == 0
    for each in (reader, late):
        leaves(each, last=0)
    with buf.write(timeout=0):
        pass


@pytest.mark.parametrize("waiting", [False, True], ids=["inside", "waiting"])
def test_a_killed_reader_tears_nothing_and_is_in_nobodys_way(child: Spawn, buf: DmaBuf, waiting: bool) -> None:
    reader, writer = cast(child, 2, buf)
    if waiting:
        enters(writer, "write")
        reader.send(("read", 0))
        arrived(buf, 2)
        until_asleep(reader.pid)
        reader.kill()
        leaves(writer, last=2)
    else:
        enters(reader, "read")
        writer.send(("write", 0))
        arrived(buf, 2)
        until_asleep(writer.pid)
        reader.kill()
        assert writer.recv() == ("in", 0)
        leaves(writer, last=2)
    with buf.write() as view:
        assert view[0] == 2
    with buf.read() as view:
        assert view[0] == 2


# -- timeouts


@MODES
@pytest.mark.parametrize("timeout", [0, 0.005])
def test_a_timeout_adds_nothing_and_leaves_the_other_alone(child: Spawn, buf: DmaBuf, mode: str, timeout: float) -> None:
    (writer,) = cast(child, 1, buf)
    enters(writer, "write")
    before = keys(buf.resv)
    assert len(before) == 1
    with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught, getattr(buf, mode)(timeout=timeout):
        pass
    assert str(writer.pid) in str(caught.value)
    assert keys(buf.resv) == before
    leaves(writer, last=2)
    with buf.read(timeout=60) as view:
        assert view[0] == 2


def test_timeout_names_blocker_that_is_stopped(child: Spawn, buf: DmaBuf) -> None:
    (writer,) = cast(child, 1, buf)
    enters(writer, "write")
    writer.stop()
    with raises_errno(errno.ETIMEDOUT) as caught, buf.read(timeout=0):
        pass
    writer.resume()
    assert re.search(rf"blocked by write\(\) in process {writer.pid} \(.+, which is stopped\) \(ETIMEDOUT\)", str(caught.value))
    leaves(writer, last=2)


def test_what_a_read_left_in_another_process_gives_way_to_a_writer_that_has_waited(child: Spawn, buf: DmaBuf) -> None:
    other = child(keeps_an_array)
    dmabuf.send(other.sock, buf)
    assert other.recv() == "left"
    with raises_errno(errno.ETIMEDOUT, TimeoutError), buf.write(timeout=0):
        pass
    with buf.write() as view:
        view[0] = 9
    other.send("look")
    assert other.recv() == 0  # a copy of what it had read


def test_what_a_read_left_in_another_process_gives_way_to_a_task_too(child: Spawn, buf: DmaBuf) -> None:
    other = child(keeps_an_array)
    dmabuf.send(other.sock, buf)
    assert other.recv() == "left"

    async def writes() -> None:
        async with buf.write() as view:
            view[0] = 9

    asyncio.run(writes())
    other.send("look")
    assert other.recv() == 0


def test_what_is_gone_in_another_process_is_in_nobodys_way(child: Spawn, buf: DmaBuf) -> None:
    other = child(keeps_an_array)
    dmabuf.send(other.sock, buf)
    assert other.recv() == "left"
    other.send("look")
    assert other.recv() == 0
    with buf.write(timeout=0):
        pass


def test_a_stopped_process_that_kept_something_holds_a_writer_until_it_runs_or_ends(child: Spawn, buf: DmaBuf) -> None:
    other = child(keeps_an_array)
    dmabuf.send(other.sock, buf)
    assert other.recv() == "left"
    os.kill(other.pid, signal.SIGSTOP)
    with raises_errno(errno.ETIMEDOUT, TimeoutError), buf.write(timeout=0.1):
        pass
    os.kill(other.pid, signal.SIGCONT)
    with buf.write():
        pass
    other.send("look")
    assert other.recv() == 0


def test_what_a_read_left_before_a_fork_is_not_taken_away_from_the_child(buf: DmaBuf) -> None:
    with buf.read() as view:
        kept = memoryview(view)
    pid = fork(lambda: writes_within(buf, 0.2))
    assert reap(pid) == errno.ETIMEDOUT
    with raises_errno(errno.EDEADLK), buf.write():
        pass
    kept.release()
    pid = fork(lambda: writes_within(buf, 60))
    assert reap(pid) == 0


def writes_within(buf: DmaBuf, seconds: float) -> None:
    try:
        with buf.write(seconds):
            pass
    except TimeoutError:
        os._exit(errno.ETIMEDOUT)


def keeps_an_array(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    with buf.read() as view:
        kept = memoryview(view)[:16]
    parent.send("left")
    parent.recv()
    seen = kept[0]
    kept.release()
    parent.send(seen)
    parent.recv()


# -- deadlocks


@pytest.mark.parametrize("count", [2, 3])
def test_a_circle_of_processes_is_edeadlk_in_the_youngest(child: Spawn, count: int) -> None:
    with contextlib.ExitStack() as stack:
        bufs = [stack.enter_context(dmabuf.allocate(4096)) for _ in range(count)]
        actors = cast(child, count, *bufs)
        for number, each in enumerate(actors):
            each.send(("write", number))
            assert each.recv() == ("in", 0)
        for number, each in enumerate(actors):
            following = (number + 1) % count
            each.send(("write", following))
            if number < count - 1:
                arrived(bufs[following], 2)
                until_asleep(each.pid)
        number, text = actors[-1].recv()
        assert number == errno.EDEADLK
        assert "access(" in text
        # It is still inside its first one; when it leaves, the others go on one after the other.
        for own in range(count - 1, 0, -1):
            actors[own].send("leave")
            assert actors[own].recv() == ("out", 2 if own == count - 1 else 4)
            if own < count - 1:
                actors[own].send("leave")
                assert actors[own].recv() == ("out", 2)
            assert actors[own - 1].recv() == ("in", 2)
