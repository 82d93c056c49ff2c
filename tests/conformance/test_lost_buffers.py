"""A buffer's descriptor that somebody else closed: the number may be another file's now, which nobody writes, maps, sends or closes."""

import errno
import fcntl
import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

import dmabuf
from dmabuf import Device, DmaBuf, SpillHeap
from dmabuf._native import watch_open
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.export.exported import EXPORTS
from dmabuf.domain.records import InodeWatch
from dmabuf.errors import ClosedError
from tests.support.drivers import Static
from tests.support.errnos import raises_errno
from tests.support.lost import replaced, untouched

F_SETSIG = 10  # linux/fcntl.h


@pytest.fixture
def buf() -> Iterator[DmaBuf]:
    made = dmabuf.allocate(4096, name="lost")
    yield made
    made.close()


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with a, b:
        yield a


def enter(block: Any) -> None:
    with block:
        pass


USES: dict[str, Callable[[DmaBuf, socket.socket], object]] = {
    "read": lambda buf, _: enter(buf.read()),
    "write": lambda buf, _: enter(buf.write()),
    "mmap": lambda buf, _: buf.mmap(),
    "vmap": lambda buf, _: buf.vmap_unlocked(),
    "attach": lambda buf, _: buf.attach(Device("device")).map(dmabuf.Direction.BIDIRECTIONAL),
    "fileno": lambda buf, _: buf.fileno(),
    "dup": lambda buf, _: buf.dup(),
    "get_dma_buf": lambda buf, _: buf.get_dma_buf(),
    "detach": lambda buf, _: buf.detach(),
    "fdinfo": lambda buf, _: buf.fdinfo(),
    "send": lambda buf, sock: dmabuf.send(sock, buf),
    "send with timeout": lambda buf, sock: (sock.settimeout(9), dmabuf.send(sock, buf)),
    "send a range": lambda buf, sock: dmabuf.send(sock, buf.export_range()),
    "send two": lambda buf, sock: dmabuf.send(sock, buf, buf),
    "pickle": lambda buf, _: ForkingPickler.dumps(buf),
}


@pytest.mark.filterwarnings("ignore:vmap:dmabuf.ContractWarning")
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("lose", [os.close, replaced], ids=["closed", "used again"])
def test_use_is_ebadf_and_the_other_file_untouched(
    buf: DmaBuf, sock: socket.socket, use: Callable[[DmaBuf, socket.socket], object], lose: Callable[[int], None]
) -> None:
    fd = buf.fileno()
    lose(fd)
    if use is not USES["attach"]:
        with raises_errno(errno.EBADF, ClosedError) as caught:
            use(buf, sock)
        assert "closed by somebody else" in str(caught.value)
    buf.close()
    assert buf.closed
    if lose is replaced:
        assert untouched(fd)
        os.close(fd)


@pytest.mark.parametrize("end", ["close", "garbage"])
def test_close_leaves_the_other_file_open(end: str) -> None:
    buf = dmabuf.allocate(4096)
    fd = buf.fileno()
    replaced(fd)
    if end == "close":
        buf.close()
    else:
        del buf
        gc.collect()
    assert untouched(fd)
    os.close(fd)


def test_a_mapping_goes_on_without_the_descriptor(buf: DmaBuf) -> None:
    with buf.write() as view:
        view[:4] = b"kept"
    fd = buf.fileno()
    replaced(fd)
    with buf.read() as view:
        assert bytes(view[:4]) == b"kept"
    with buf.write() as view:
        view[:4] = b"more"
    assert untouched(fd)
    os.close(fd)


def test_the_record_stays_while_another_process_of_the_buffer_may_live(buf: DmaBuf) -> None:
    """The end of the other file is not taken for the end of the buffer."""
    other = os.dup(buf.fileno())
    domain, index = buf.domain, handle_of(buf).shared.ensure()
    fd = buf.fileno()
    replaced(fd)
    buf.close()
    os.close(fd)  # its file ends
    domain.sweep()
    assert domain.shm.rec_info(index) is not None
    os.close(other)


def test_an_inotify_descriptor_of_the_program_is_left_alone() -> None:
    watch = InodeWatch(dmabuf.Domain.default())
    assert watch.watch is not None
    number = watch.watch.number
    theirs = watch_open().take()  # every inotify descriptor has the same inode
    fcntl.fcntl(theirs, F_SETSIG, 0)
    os.dup2(theirs, number)
    os.close(theirs)
    with raises_errno(errno.EBADF):
        watch.watch.fileno()
    watch.watch.close()
    os.fstat(number)
    os.close(number)


def test_an_exporter_is_not_asked_to_release_by_the_lock_of_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    exporter = Static()
    buf = dmabuf.export(exporter, 4096)
    other = os.dup(buf.fileno())
    (exported,) = EXPORTS.of(buf.domain).buffers.values()
    number = exported.private.number
    replaced(number)
    buf.close()
    assert not exporter.count("release")
    assert "closed by somebody else" in str(told.pop().exc_value)
    assert untouched(number)
    os.close(number)
    os.close(other)
    EXPORTS.of(buf.domain).forget(exported)
    exporter.close()


@pytest.fixture
def heap(tmp_path: Any) -> Iterator[SpillHeap]:
    with SpillHeap(budget=4096, directory=tmp_path) as made:
        yield made


def test_a_move_out_punches_no_hole_into_another_file(heap: SpillHeap) -> None:
    first, second = heap.allocate(4096), heap.allocate(4096)
    with first.write() as view:
        view[:5] = b"first"
    (exported,) = (one for one in EXPORTS.of(first.domain).buffers.values() if one.record.ino == first.ino)
    number = exported.private.number
    kept = os.dup(number)
    replaced(number)
    with raises_errno(errno.EBADF), second.write():
        pass
    assert untouched(number)
    os.dup2(kept, number)
    os.close(kept)
    with first.read() as view:
        assert bytes(view[:5]) == b"first"
    first.close()
    second.close()


def test_a_spill_file_that_was_closed_loses_no_content(heap: SpillHeap) -> None:
    first, second = heap.allocate(4096), heap.allocate(4096)
    with first.write() as view:
        view[:5] = b"first"
    number = heap._file.fileno()
    kept = os.dup(number)
    replaced(number)
    with raises_errno(errno.EBADF), second.write():
        pass
    with first.read() as view:
        assert bytes(view[:5]) == b"first"
    assert untouched(number)
    os.dup2(kept, number)
    os.close(kept)
    first.close()
    second.close()
