"""The five mistakes of hand-written wrappers, each made by a wrapper as one finds them, and not by ours; on a real kernel.

1. SYNC is missing, or left open by an early exit.
2. A descriptor is left open, or closed twice, on an error path (every error path: test_faults.py).
3. The fence of who wrote is not awaited.
4. A buffer is known by the number of its descriptor.
5. The offset of a part is forgotten.

A class is shown by a wrapper that has the bug, so that what finds it is known to find it.
"""

import errno
import gc
import mmap
import os
import select
import signal
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

import dmabuf
from dmabuf.drivers.sw_sync import SwSyncTimeline
from dmabuf.uapi import call, dma_buf, heap
from tests.support.errnos import raises_errno
from tests.support.faults import Canaries, faults
from tests.support.kernel_homes import SIZE, add_fence, brackets, made, needs_sw_sync

PAGE = mmap.PAGESIZE


class Naive:
    """A wrapper as one finds them: right as long as nothing goes wrong."""

    known: ClassVar[dict[int, "Naive"]] = {}

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self.memory = mmap.mmap(fd, size)
        Naive.known[fd] = self

    def write(self, data: bytes) -> None:
        dma_buf.sync(self.fd, dma_buf.START | dma_buf.WRITE)
        self.memory[: len(data)] = data  # raises when the data is longer, and END is never called
        dma_buf.sync(self.fd, dma_buf.END | dma_buf.WRITE)

    def look(self) -> bytes:
        return bytes(self.memory[:4])  # no SYNC, and nobody is waited for

    def part(self, offset: int, length: int) -> tuple[int, int]:
        return self.fd, length  # the other side maps from 0

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


@pytest.fixture
def naive(buf: dmabuf.DmaBuf) -> Iterator[Naive]:
    wrapper = Naive(buf.dup(), SIZE)
    yield wrapper
    wrapper.close()
    Naive.known.clear()


# ---- 1: SYNC ----


def test_1_an_early_exit_leaves_no_bracket_open(buf: dmabuf.DmaBuf, naive: Naive, monkeypatch: pytest.MonkeyPatch) -> None:
    too_long = bytes(SIZE + 1)
    with brackets(monkeypatch) as seen:
        with pytest.raises(IndexError):
            naive.write(too_long)
        assert seen.opened == [dma_buf.WRITE], "the bug"
    with brackets(monkeypatch) as seen:
        with pytest.raises(ValueError, match="the size of a view never changes"), buf.write() as view:
            view[: len(too_long)] = too_long
        assert len(seen.flags) == 2
        assert seen.opened == []


def test_1_no_access_is_without_a_bracket(buf: dmabuf.DmaBuf, naive: Naive, monkeypatch: pytest.MonkeyPatch) -> None:
    with brackets(monkeypatch) as seen:
        naive.look()
        assert seen.flags == [], "the bug"
        with buf.read() as view:
            bytes(view[:4])
        assert seen.flags == [dma_buf.READ, dma_buf.END | dma_buf.READ]


# ---- 2: descriptors ----


def _naive_allocation() -> None:
    """Two ioctls, the second of which may fail."""
    with call.open_node("/dev/dma_heap/system", "test") as device:
        fd = heap.allocate(device.number, SIZE).take()
    dma_buf.set_name(fd, b"frame")
    os.close(fd)


def _ours() -> None:
    dmabuf.allocate(SIZE, heap="dma_heap:system", name="frame").close()


def test_2_a_descriptor_is_not_lost_on_an_error_path() -> None:
    lost: list[str] = []
    for fault in faults(_naive_allocation):
        try:
            fault()
        except AssertionError as e:
            lost.append(str(e))
    assert any("SET_NAME" in one and "more" in one for one in lost), "the bug"
    for name in os.listdir("/proc/self/fd"):  # what the naive one lost
        if os.path.lexists(f"/proc/self/fd/{name}") and os.readlink(f"/proc/self/fd/{name}").startswith("/dmabuf:"):
            os.close(int(name))
    for fault in faults(_ours):
        fault()


def test_2_a_descriptor_is_not_closed_twice(home: str) -> None:
    wrapper = Naive(made(home).detach(), SIZE)
    wrapper.close()
    canaries = Canaries()
    os.close(wrapper.fd)  # what a __del__ after a close() does
    with pytest.raises(AssertionError, match="closed twice"):
        canaries.check("the bug")
    for fd in canaries.fds:
        try:
            os.close(fd)
        except OSError:
            continue
    here = made(home)
    here.close()
    canaries = Canaries()
    here.close()
    del here
    gc.collect()
    canaries.check("ours")


class Stop(Exception):
    """Raised by a signal handler."""


def _stop(*_: object) -> None:
    raise Stop


MAKERS: dict[str, Callable[[int, int], Any]] = {
    "dma-heap": lambda device, _: heap.allocate(device, PAGE),
    "udmabuf": lambda device, memfd: heap.create(device, memfd, 0, PAGE),
    "udmabuf list": lambda device, memfd: heap.create_list(device, [(memfd, 0, PAGE)]),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_2_a_signal_between_the_system_call_and_python_loses_none(maker: str) -> None:
    """The kernel gave the descriptor, and a handler raises before anybody has it."""
    import fcntl

    memfd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.pwrite(memfd, bytes(PAGE), 0)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    before, stopped = signal.signal(signal.SIGALRM, _stop), 0
    with call.open_node("/dev/dma_heap/system" if maker == "dma-heap" else "/dev/udmabuf", "test") as device:
        held = len(os.listdir("/proc/self/fd"))

        def some(seconds: float) -> None:
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                for _ in range(50):
                    assert MAKERS[maker](device.number, memfd).number >= 0
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)

        for turn in range(300):
            try:
                some((turn % 60 + 2) * 1e-5)
            except Stop:
                stopped += 1
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == held
        assert stopped
    signal.signal(signal.SIGALRM, before)
    os.close(memfd)


# ---- 3: the fence ----


@needs_sw_sync
def test_3_what_a_driver_has_not_written_yet_is_not_read(buf: dmabuf.DmaBuf, naive: Naive) -> None:
    with SwSyncTimeline() as timeline, timeline.fence(1) as fence:
        add_fence(buf, fence.number, write=True)
        assert naive.look() == bytes(4), "the bug: it shows what was there before"
        with pytest.raises(TimeoutError), buf.read(timeout=0):
            pass
        naive.memory[:4] = b"done"  # the driver
        timeline.increment()
        with buf.read(timeout=0) as view:
            assert bytes(view[:4]) == b"done"


def test_3_what_another_process_has_not_written_yet_is_not_read(buf: dmabuf.DmaBuf, naive: Naive) -> None:
    timeline = dmabuf.Timeline("writer")
    fence = timeline.fence()
    with buf.resv.locked():
        buf.resv.reserve(1)
        buf.resv.add(fence, dmabuf.Usage.WRITE)
    dma_buf.sync(naive.fd, dma_buf.START | dma_buf.READ)  # SYNC alone knows nothing of it
    dma_buf.sync(naive.fd, dma_buf.END | dma_buf.READ)
    with pytest.raises(TimeoutError), buf.read(timeout=0):
        pass
    assert buf.poll(select.POLLIN) == 0
    fence.signal()
    with buf.read(timeout=0):
        pass
    timeline.close()


# ---- 4: identity ----


def test_4_a_buffer_is_not_known_by_its_number(home: str) -> None:
    first = Naive(made(home).detach(), SIZE)
    first.memory[:4] = b"mine"
    number = first.fd
    os.close(number)
    second = made(home)
    fd = os.dup2(second.fileno(), number)
    assert Naive.known[fd].look() == b"mine", "the bug: another buffer's bytes under this number"
    with dmabuf.get(fd) as again:
        assert again == second
        with again.read() as view:
            assert bytes(view[:4]) == bytes(4)
    os.close(fd)
    first.memory.close()
    second.close()
    Naive.known.clear()


def test_4_two_numbers_of_one_buffer_are_one(buf: dmabuf.DmaBuf) -> None:
    fd = buf.dup()
    with dmabuf.get(fd) as again:
        assert {buf: "frame"}[again] == "frame"
        with buf.read(), raises_errno(errno.EDEADLK), again.write(timeout=0):
            pass
    os.close(fd)


# ---- 5: the offset ----


def test_5_a_part_has_its_offset_with_it(buf: dmabuf.DmaBuf, naive: Naive) -> None:
    with buf.write() as view:
        view[:4] = b"head"
        view[PAGE + 3 : PAGE + 7] = b"part"
    fd, length = naive.part(PAGE + 3, 4)
    with mmap.mmap(fd, length, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:4] == b"head", "the bug"
    part = buf.export_range(PAGE + 3, 4)
    with part.read() as view:
        assert view.tobytes() == b"part"
    with part.mmap(writable=False) as mapping:
        assert mapping.view.tobytes() == b"part"
    with buf.mmap(offset=PAGE, length=PAGE, writable=False) as pages:
        assert pages[3:7] == b"part"
