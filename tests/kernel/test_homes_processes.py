"""The kernel's own dma-bufs as buffers: other processes, and the end (semantics 5.2–5.9; design: one object)."""

import ctypes
import errno
import multiprocessing
import os
import socket
from typing import Any

import pytest

import dmabuf
from dmabuf.domain import records
from dmabuf.drivers.sw_sync import SwSyncTimeline
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.kernel_homes import Boom, add_fence, made
from tests.support.waiting import until, until_asleep

# ---- other processes ----


def _reader(parent: Parent) -> tuple[str, str | None, bytes]:
    (buf,) = dmabuf.recv(parent.sock)
    with buf, buf.read() as view:
        return buf.home, buf.name, bytes(view[:3])


def test_it_travels_over_a_socket(child: Spawn, buf: dmabuf.DmaBuf, home: str) -> None:
    buf.name = "sent"
    with buf.write() as view:
        view[:3] = b"abc"
    other = child(_reader)
    dmabuf.send(other.sock, buf)
    assert other.result() == (home, "sent", b"abc")


def _by_argument(buf: dmabuf.DmaBuf, answers: Any) -> None:
    with buf, buf.write() as view:
        view[:3] = b"new"
    answers.send(None)


def test_it_travels_through_multiprocessing(buf: dmabuf.DmaBuf) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_by_argument, args=(buf, there))
    process.start()
    here.recv()
    process.join()
    with buf.read() as view:
        assert bytes(view[:3]) == b"new"
    here.close()
    there.close()
    process.close()


def _opener(parent: Parent, what: str | int) -> tuple[int, str, bytes]:
    with dmabuf.open(what) as buf, buf.read() as view:
        return buf.ino, buf.home, bytes(view[:3])


@pytest.mark.parametrize("by_name", [True, False])
def test_another_process_opens_it(child: Spawn, buf: dmabuf.DmaBuf, home: str, by_name: bool) -> None:
    buf.name = "shared"
    with buf.write() as view:
        view[:3] = b"old"
    assert child(_opener, "shared" if by_name else buf.ino).result() == (buf.ino, home, b"old")


def _blocked(parent: Parent, what: int) -> str:
    with dmabuf.open(what) as buf:
        parent.send("there")
        with buf.write():
            return "written"


def test_accesses_of_two_processes_exclude_each_other(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    with buf.read():
        other = child(_blocked, buf.ino)
        assert other.recv() == "there"
        until(lambda: [len(record.blocking_readers) for record in dmabuf.buffers()] == [1])
    assert other.result() == "written"


def _torn(parent: Parent, what: int) -> None:
    with dmabuf.open(what) as buf, buf.write():
        parent.send("inside")
        parent.recv()


def test_a_writer_that_is_killed_leaves_it_torn(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = child(_torn, buf.ino)
    other.recv()
    other.kill()
    with raises_errno(errno.EOWNERDEAD), buf.read():
        pass
    with buf.write():
        pass
    with buf.read():
        pass


def test_writer_killed_before_the_kernel_fence_wrote_nothing(child: Spawn, buf: dmabuf.DmaBuf, kernel_timeline: SwSyncTimeline) -> None:
    fence = kernel_timeline.fence(1)
    add_fence(buf, fence.number, write=True)
    other = child(_blocked, buf.ino)
    other.recv()
    until_asleep(other.pid)
    other.kill()
    kernel_timeline.increment()
    with buf.read():
        pass


# ---- the end ----


def test_the_last_close_leaves_no_record(home: str) -> None:
    domain = dmabuf.Domain.default()
    until(lambda: not records.sweep(domain) and not domain.shm.rec_orphans())  # what a killed process of an earlier test had
    here = made(home)
    again = here.get_dma_buf()
    here.close()
    assert [record.ino for record in dmabuf.buffers()] == [again.ino]
    again.close()
    assert domain.shm.rec_list() == []


def test_what_was_detached_keeps_what_the_domain_knows_of_it(home: str) -> None:
    here = made(home)
    with pytest.raises(Boom), here.write():
        raise Boom
    fd = here.detach()
    with dmabuf.get(fd) as again:
        with raises_errno(errno.ECANCELED), again.read():
            pass
        with again.write():
            pass
    os.close(fd)
    assert dmabuf.buffers() == []


def test_a_mapping_keeps_it_until_it_goes(home: str) -> None:
    here = made(home)
    mapping = here.mmap()
    here.close()
    assert [(record.holders[0].fds, record.holders[0].maps) for record in dmabuf.buffers()] == [(0, 1)]
    mapping.close()
    assert dmabuf.buffers() == []


def test_a_buffer_in_flight_lives(home: str) -> None:
    here = made(home)
    here.name = "in flight"
    ino = here.ino
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dmabuf.send(left, here)
    here.close()
    assert [record.ino for record in dmabuf.buffers()] == [ino]
    (again,) = dmabuf.recv(right)
    assert (again.ino, again.name) == (ino, "in flight")
    again.close()
    left.close()
    right.close()
    assert dmabuf.buffers() == []


def _holder(parent: Parent, home: str) -> None:
    with made(home) as here:
        parent.send(here.ino)
        parent.recv()


def test_what_a_killed_process_held_is_gone(child: Spawn, home: str) -> None:
    other = child(_holder, home)
    ino = other.recv()
    assert [record.ino for record in dmabuf.buffers()] == [ino]
    other.kill()
    assert dmabuf.buffers() == []
    with raises_errno(errno.ENOENT):
        dmabuf.open(ino)


def test_a_forked_child_uses_it_and_its_parent_too(buf: dmabuf.DmaBuf) -> None:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with buf.write() as view:
                view[:5] = b"child"
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    with buf.read() as view:
        assert bytes(view[:5]) == b"child"


def test_a_holder_that_nobody_may_look_into_hands_it_over_all_the_same(child: Spawn, home: str) -> None:
    other = child(_undumpable, home)
    ino = other.recv()
    with dmabuf.open(ino) as again, again.read() as view:
        assert bytes(view[:3]) == b"old"


def _undumpable(parent: Parent, home: str) -> None:
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/PID/fd is root's
    with made(home) as here:
        with here.write() as view:
            view[:3] = b"old"
        parent.send(here.ino)
        parent.recv()


def test_what_is_only_mapped_cannot_be_opened(home: str) -> None:
    here = made(home)
    ino, mapping = here.ino, here.mmap()
    here.close()
    with raises_errno(errno.ENODEV) as caught:
        dmabuf.open(ino)
    assert "only mapped" in str(caught.value)
    mapping.close()
