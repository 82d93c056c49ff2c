"""Promises 3 and 4: an allocation that fails loses nothing, and descriptors and mappings return to where they were."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import DmaBufError, Usage
from tests.support.fences import attach
from tests.support.leaks import descriptors, rest
from tests.support.steps import fork, reap


def mappings() -> int:
    gc.collect()
    return sum(b"/memfd:dmabuf:" in line for line in Path("/proc/self/maps").read_bytes().splitlines())


@contextlib.contextmanager
def no_more_descriptors(more: int = 0) -> Iterator[None]:
    """Room for `more` descriptors above the highest one in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for name in dmabuf.__all__:  # the first use of a public name imports its module, which takes a descriptor
        getattr(dmabuf, name)
    rest()  # no number is another thread's for a moment
    top = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (top + more, hard))
    try:
        with contextlib.suppress(OSError):
            while True:  # the gaps below
                taken.append(os.dup(0))
        for fd in taken[len(taken) - more :] if more else []:
            os.close(fd)
            taken.remove(fd)
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def buf() -> Iterator[dmabuf.DmaBuf]:
    with dmabuf.allocate(4096, name="before") as made:
        yield made


def records() -> set[int]:
    return set(dmabuf.Domain.default().shm.rec_list())


def test_more_memory_than_the_machine_has_is_enomem_and_loses_nothing(buf: dmabuf.DmaBuf) -> None:
    before = descriptors(), mappings(), records()
    for size in (1 << 50, 1 << 62, 1 << 55):
        with pytest.raises(DmaBufError) as caught:
            dmabuf.allocate(size)
        assert caught.value.errno == errno.ENOMEM
    assert (descriptors(), mappings(), records()) == before
    with buf.write() as view:
        view[0] = 1


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_too_few_descriptors_is_emfile_or_works_and_loses_nothing(buf: dmabuf.DmaBuf, room: int) -> None:
    before = descriptors(), mappings(), records()
    with no_more_descriptors(room):
        try:
            dmabuf.allocate(4096).close()
        except OSError as e:
            if e.errno != errno.EMFILE:
                raise
    assert (descriptors(), mappings()) == before[:2]
    assert records() <= before[2]
    dmabuf.allocate(4096).close()


CALLS: dict[str, Callable[[dmabuf.DmaBuf], object]] = {
    "dup": lambda buf: buf.dup(),
    "get": lambda buf: dmabuf.get(buf.fileno()),
    "get_dma_buf": lambda buf: buf.get_dma_buf(),
    "poll_fd": lambda buf: buf.poll_fd(1),
    "open by number": lambda buf: dmabuf.open(buf.ino),
    "open by name": lambda buf: dmabuf.open("before"),
    "buffers": lambda buf: dmabuf.buffers(),
    "bufinfo": lambda buf: dmabuf.bufinfo(),
    "fdinfo": lambda buf: buf.fdinfo(),
    "a private domain": lambda buf: dmabuf.Domain.private(),
    "a sync file": lambda buf: buf.export_sync_file().fileno(),
    "SwSync": lambda buf: dmabuf.SwSync(),
    "TimelineSemaphore": lambda buf: dmabuf.TimelineSemaphore(),
    "SpillHeap": lambda buf: dmabuf.SpillHeap(budget=4096),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_without_a_descriptor_is_emfile_and_loses_nothing(buf: dmabuf.DmaBuf, call: str) -> None:
    timeline = dmabuf.Timeline("pending")
    fence = timeline.fence()
    attach(buf.resv, fence, Usage.WRITE)
    before = descriptors(), mappings(), records()
    with no_more_descriptors(), pytest.raises(DmaBufError) as caught:
        CALLS[call](buf)
    assert caught.value.errno == errno.EMFILE
    assert "RLIMIT_NOFILE" in str(caught.value)
    assert (descriptors(), mappings()) == before[:2]
    assert records() <= before[2]  # a sweep may free what an earlier test left
    assert [f.handle for f in buf.resv.fences(Usage.BOOKKEEP)] == [fence.handle]
    fence.signal()
    timeline.close()


def test_buffers_without_descriptor_is_emfile_after_a_death(buf: dmabuf.DmaBuf) -> None:
    def dies() -> None:
        with dmabuf.allocate(4096):
            os.kill(os.getpid(), signal.SIGKILL)

    reap(fork(dies))
    domain = dmabuf.Domain.default()
    domain.reap_dead()
    assert domain.shm.rec_orphans()
    with no_more_descriptors(), pytest.raises(DmaBufError) as caught:
        dmabuf.buffers()
    assert caught.value.errno == errno.EMFILE
    assert "RLIMIT_NOFILE" in str(caught.value)


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_with_too_few_descriptors_no_buffer_is_taken_for_gone(buf: dmabuf.DmaBuf, room: int) -> None:
    with no_more_descriptors(room):
        try:
            seen = [(record.ino, len(record.holders)) for record in dmabuf.buffers()]
        except DmaBufError as e:
            if e.errno != errno.EMFILE:
                raise
            seen = [(buf.ino, 1)]
    assert (buf.ino, 1) in seen


def test_an_access_needs_no_descriptor(buf: dmabuf.DmaBuf) -> None:
    with buf.read():
        pass  # the first of the process reads the process's name
    with no_more_descriptors():
        with buf.write() as view:
            view[0] = 1
        with buf.read() as view:
            assert view[0] == 1
        with buf.mmap() as mapping:
            assert mapping[0] == 1


def test_an_access_that_cannot_map_adds_nothing(buf: dmabuf.DmaBuf) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    big = dmabuf.allocate(64 << 20)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), hard))
    try:
        with pytest.raises(OSError) as caught, big.write():
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert caught.value.errno == errno.ENOMEM
    assert big.resv.fences(Usage.BOOKKEEP) == []
    with big.write() as view:
        view[0] = 1
    with big.read() as view:
        assert view[0] == 1
    big.close()


def test_a_thousand_buffers_come_and_go() -> None:
    before = descriptors(), mappings()
    for _ in range(10):
        held = [dmabuf.allocate(4096) for _ in range(100)]
        for made in held:
            with made.write() as view:
                view[0] = 1
        assert descriptors() == before[0] + 100  # one a buffer
        for made in held:
            made.close()
        held.clear()
        del made, view
    assert (descriptors(), mappings()) == before


def test_what_was_allocated_can_be_written_whole(buf: dmabuf.DmaBuf) -> None:
    with dmabuf.allocate(8 << 20) as big:
        assert os.fstat(big.fileno()).st_blocks * 512 >= 8 << 20  # the memory is there before the first write
        with big.write() as view:
            view[:] = b"\1" * len(view)
