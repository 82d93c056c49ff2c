"""The rows S03, S04 and S14 to S16 of the features: what only a real kernel has, by its own lists of tests (semantics 7.5, 7.7)."""

import errno
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import Device, Direction, DmaBuf, Usage
from dmabuf.drivers.drm import DrmNode, DumbBuffer
from dmabuf.drivers.sw_sync import SwSyncTimeline
from dmabuf.uapi import call, drm, heap, table
from dmabuf.uapi.structures import VgemAttach, VgemSignal
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.kernel_homes import HOMES, add_fence, made

IN, OUT = 1, 4  # select.POLLIN, POLLOUT
PAGE, MIB = mmap.PAGESIZE, 1 << 20
HEAP = "/dev/dma_heap/system"
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2  # linux/fcntl.h


def in_the_kernel(buf: DmaBuf) -> int:
    """What poll(2) says: the kernel's fences alone."""
    waiting = select.poll()
    waiting.register(buf.fileno(), IN | OUT)
    return next((found for _, found in waiting.poll(0)), 0)


# -- names


@pytest.mark.parametrize("home", HOMES)
def test_S03_both_numbers_name_a_buffer_that_is_attached(home: str) -> None:
    with made(home) as buf:
        att = buf.attach(Device("npu0"))
        for number in (table.DMA_BUF_SET_NAME_A.number, table.DMA_BUF_SET_NAME_B.number):
            fcntl.ioctl(buf.fileno(), number, b"cam-%x\0" % number)
            assert buf.name == f"cam-{number:x}"
        att.detach()


# -- sync files of buffers that have fences of both kinds


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("home", HOMES)
def test_S04_an_export_of_the_kernels_fences_alone_is_one_of_the_kernels(home: str, write: bool) -> None:
    with made(home) as buf, SwSyncTimeline() as timeline, timeline.fence(1) as fence:
        with buf.export_sync_file(write) as idle:
            assert (idle.kernel, idle.is_signaled()) == (True, True)
        add_fence(buf, fence.number, write=False)
        with buf.export_sync_file(write) as sf:
            assert sf.kernel
            assert sf.kernel_fileno() == sf.fileno()
            assert sf.is_signaled() is not write
            timeline.increment()
            assert sf.wait(60) > 0


@pytest.mark.parametrize("first", ["the kernel's", "the domain's"])
@pytest.mark.parametrize("home", HOMES)
def test_S04_an_export_of_both_kinds_ends_with_the_later(home: str, first: str) -> None:
    ours = dmabuf.Timeline("ours")
    with made(home) as buf, SwSyncTimeline() as timeline, timeline.fence(1) as fence:
        add_fence(buf, fence.number, write=True)
        own = ours.fence()
        add(buf.resv, own, Usage.WRITE)
        with buf.export_sync_file() as sf:
            assert not sf.kernel
            assert sf.info().num_fences == 2
            ends = [timeline.increment, own.signal]
            for end in ends if first == "the kernel's" else reversed(ends):
                assert not sf.is_signaled()
                end()
            assert sf.wait(60) > 0
        assert buf.resv.test_signaled(Usage.WRITE)
    ours.close()


@pytest.mark.parametrize("as_number", [False, True], ids=["SyncFile", "descriptor"])
@pytest.mark.parametrize("home", HOMES)
def test_S04_what_is_imported_goes_into_the_kernel_or_nowhere(home: str, as_number: bool) -> None:
    ours = dmabuf.Timeline("ours")
    with made(home) as buf, SwSyncTimeline() as timeline, timeline.fence(1) as fence, dmabuf.get_sync_file(fence.number) as theirs:
        buf.import_sync_file(theirs.fileno() if as_number else theirs, True)
        assert buf.resv.fences(Usage.BOOKKEEP) == []
        assert in_the_kernel(buf) == buf.poll(IN | OUT) == 0
        timeline.increment()
        assert buf.poll(IN | OUT) == IN | OUT
        own = ours.fence()
        with dmabuf.SyncFile(own) as sf:
            with raises_errno(errno.EINVAL) as caught:
                buf.import_sync_file(sf.fileno() if as_number else sf, True)
            assert "the kernel must not wait" in str(caught.value)
        assert buf.resv.fences(Usage.BOOKKEEP) == []
        assert (in_the_kernel(buf), buf.poll(IN | OUT)) == (IN | OUT, IN | OUT)
        own.signal()
    ours.close()


# -- dma-heap: tools/testing/selftests/dmabuf-heaps


def test_S14_alloc_and_import(node: DrmNode) -> None:
    with dmabuf.allocate(MIB, heap="dma_heap:system") as buf:
        with buf.mmap() as view:
            buf.sync(2)
            view[:] = b"\xaa" * MIB
            buf.sync(2 | 4)
        with node.import_buffer(buf) as gem, gem.export() as same:
            assert same == buf
            with same.read() as seen:
                assert bytes(seen) == b"\xaa" * MIB


@pytest.mark.parametrize("size", [PAGE, MIB])
def test_S14_alloc_zeroed(size: int) -> None:
    dirty = [dmabuf.allocate(size, heap="dma_heap:system") for _ in range(32)]
    for buf in dirty:
        with buf.write() as view:
            view[:] = b"\xff" * size
        buf.close()
    clean = [dmabuf.allocate(size, heap="dma_heap:system") for _ in range(32)]
    for buf in clean:
        with buf.read() as view:
            assert bytes(view) == bytes(size)
        buf.close()


@pytest.mark.parametrize("size", [16, 48])
def test_S14_alloc_compat(size: int) -> None:
    """The kernel takes a structure that is shorter or longer than its own; 16 bytes end before the heap's flags."""
    argument = bytearray(struct.pack("QII", PAGE, 0, os.O_RDWR | os.O_CLOEXEC) + bytes(size - 16))
    number = table.DMA_HEAP_ALLOC.number & ~(0x3FFF << 16) | size << 16
    device = os.open(HEAP, os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(device, number, argument)
    fd = struct.unpack_from("QI", argument)[1]
    with dmabuf.get(fd) as buf:
        assert (buf.home, buf.size) == ("dma_heap:system", PAGE)
    os.close(fd)
    os.close(device)


@pytest.mark.parametrize(
    ("heap_flags", "fd_flags"), [(0x111111, os.O_RDWR | os.O_CLOEXEC), (0, ~(os.O_RDWR | os.O_CLOEXEC) & 0xFFFFFFFF)], ids=["heap", "fd"]
)
def test_S14_alloc_errors(heap_flags: int, fd_flags: int) -> None:
    device = os.open(HEAP, os.O_RDWR | os.O_CLOEXEC)
    with pytest.raises(OSError, match="Invalid argument"):
        fcntl.ioctl(device, table.DMA_HEAP_ALLOC.number, struct.pack("QIIQ", PAGE, 0, fd_flags, heap_flags))
    os.close(device)


def test_S14_alloc_of_another_descriptor_is_refused() -> None:
    read, write = os.pipe()
    with raises_errno(errno.ENOTTY):
        heap.allocate(read, PAGE)
    os.close(read)
    os.close(write)


# -- udmabuf: tools/testing/selftests/drivers/dma-buf/udmabuf.c


@pytest.mark.parametrize(
    ("offset", "size", "found"),
    [(PAGE // 2, PAGE, errno.EINVAL), (0, PAGE // 2, errno.EINVAL), (0, PAGE, errno.EBADFD), (0, 4 * PAGE, 0)],
    ids=["test-1", "test-2", "test-3", "test-4"],
)
def test_S15_a_buffer_is_made_of_whole_pages_of_a_sealed_memfd(offset: int, size: int, found: int) -> None:
    memfd = os.memfd_create("udmabuf", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, 8 * PAGE)
    fcntl.fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK)
    device = os.open("/dev/udmabuf", os.O_RDWR | os.O_CLOEXEC)
    source = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) if found == errno.EBADFD else memfd
    if found:
        with raises_errno(found):
            heap.create(device, source, offset, size)
    else:
        with heap.create(device, source, offset, size) as fd, dmabuf.get(fd.number) as buf:
            assert (buf.home, buf.size) == ("udmabuf", size)
            os.pwrite(memfd, b"through the memfd", 0)
            with buf.write() as view:
                assert bytes(view[:17]) == b"through the memfd"
                view[:17] = b"through the other"
            assert os.pread(memfd, 17, 0) == b"through the other"
    if source != memfd:
        os.close(source)
    os.close(device)
    os.close(memfd)


# -- vgem and PRIME: vgem_basic and vgem_slow of IGT


@pytest.mark.parametrize(
    ("attach", "found"),
    [
        (lambda handle: VgemAttach(handle, 0xFFFFFFFE), errno.EINVAL),
        (lambda handle: VgemAttach(handle, 0, 0, 1), errno.EINVAL),
        (lambda handle: VgemAttach(handle + 0x1000), errno.ENOENT),
    ],
    ids=["bad-flag", "bad-pad", "bad-handle"],
)
def test_S16_bad_flag_bad_pad_and_bad_handle(node: DrmNode, dumb: DumbBuffer, attach: Callable[[int], VgemAttach], found: int) -> None:
    with raises_errno(found):
        call.perform(node.fileno(), table.VGEM_FENCE_ATTACH, attach(dumb.handle))


def test_S16_bad_fence_is_enoent(node: DrmNode) -> None:
    with raises_errno(errno.ENOENT):
        call.perform(node.fileno(), table.VGEM_FENCE_SIGNAL, VgemSignal(0x1000))


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_S16_busy_fence_is_ebusy(dumb: DumbBuffer, first: bool, second: bool) -> None:
    fence = dumb.add_fence(write=first)
    with raises_errno(errno.EBUSY):
        dumb.add_fence(write=second)
    fence.signal()
    dumb.add_fence(write=second).signal()


@pytest.mark.parametrize("before", [False, True], ids=["dmabuf-fence", "dmabuf-fence-before"])
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_S16_dmabuf_fence_before_and_after_the_export(dumb: DumbBuffer, write: bool, before: bool) -> None:
    fence = dumb.add_fence(write=write) if before else None
    with dumb.export() as buf:
        fence = fence or dumb.add_fence(write=write)
        assert buf.poll(IN | OUT) == (0 if write else IN)
        with buf.export_sync_file(write=True) as all_of_it, buf.export_sync_file() as writers:
            assert (all_of_it.is_signaled(), writers.is_signaled()) == (False, not write)
            fence.signal()
            assert all_of_it.is_signaled()
        assert buf.poll(IN | OUT) == IN | OUT


def test_S16_dmabuf_mmap_is_seen_by_the_driver(node: DrmNode, dumb: DumbBuffer) -> None:
    with dumb.export() as buf, buf.mmap() as view:
        view[:4] = b"seen"
    offset = drm.map_dumb(node.fileno(), dumb.handle)
    with mmap.mmap(node.fileno(), dumb.size, offset=offset) as driver:
        assert driver[:4] == b"seen"


def test_S16_one_object_is_one_buffer(node: DrmNode, dumb: DumbBuffer) -> None:
    with dumb.export() as one, dumb.export() as two, node.import_buffer(one) as again:
        assert one == two
        assert again.handle == dumb.handle
        att = one.attach(Device("npu0"))
        with att.mapped(Direction.TO_DEVICE) as sgt:
            assert sgt.size == one.size
        att.detach()


def test_S16_nohang_a_fence_that_nobody_signals_ends(dumb: DumbBuffer) -> None:
    with dumb.export() as buf:
        fence = dumb.add_fence(write=True)
        assert buf.poll(IN, timeout=60) == IN
        with raises_errno(errno.ETIMEDOUT):
            fence.signal()


def still_open(buf: DmaBuf) -> bool:
    """Does the memory of a buffer show what was written into it?"""
    with buf.read() as view:
        return bytes(view[:4]) == b"kept"


def test_S16_unload_waits_for_the_buffer() -> None:
    with DrmNode.of("vgem") as node, node.create_dumb(64, 64) as dumb:
        buf = dumb.export()
        with buf.write() as view:
            view[:4] = b"kept"
    assert still_open(buf)
    buf.close()
