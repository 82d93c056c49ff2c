"""What the kernel's heaps and drivers refuse, argument by argument (semantics 5.8, 5.9, 5.12, 5.13).

Beside the rows of test_features_kernel.py.
"""

import errno
import fcntl
import mmap
import os
import select
from collections.abc import Iterator

import pytest

import dmabuf
from dmabuf.drivers.drm import DrmNode, DumbBuffer
from dmabuf.heap import dma_heap
from dmabuf.uapi import call, drm, heap, table
from dmabuf.uapi.structures import HeapAllocation
from tests.kernel.conftest import GUEST
from tests.support.errnos import raises_errno

PAGE = mmap.PAGESIZE
IN, OUT = select.POLLIN, select.POLLOUT
SYSTEM = "/dev/dma_heap/system"


# ---- dma-heap ----


@pytest.fixture
def device() -> Iterator[int]:
    with call.open_node(SYSTEM, "test") as opened:
        yield opened.number


@pytest.mark.parametrize(
    "wrong",
    [
        HeapAllocation(PAGE, fd=1),
        HeapAllocation(0),
        HeapAllocation((1 << 64) - 1),
        HeapAllocation(PAGE, heap_flags=0x111111),
        HeapAllocation(PAGE, fd_flags=0xFFFFFFFF & ~(os.O_RDWR | os.O_CLOEXEC)),
    ],
    ids=["fd", "nothing", "wraps", "heap flags", "fd flags"],
)
def test_what_the_heap_does_not_take_is_einval(device: int, wrong: HeapAllocation) -> None:
    with raises_errno(errno.EINVAL):
        call.obtain(device, table.DMA_HEAP_ALLOC, wrong, "fd")


@pytest.mark.parametrize("number", [table.DMA_HEAP_ALLOC.number + 1])
def test_another_number_is_einval_on_a_heap(device: int, number: int) -> None:
    with raises_errno(errno.EINVAL):
        call.perform_raw(device, number, bytes(24))


@pytest.mark.parametrize("name", dma_heap.names() if GUEST else ["system"])
def test_every_heap_of_this_kernel_makes_zeroed_buffers(name: str) -> None:
    with dmabuf.allocate(3 * PAGE, heap=f"dma_heap:{name}", name="mine") as buf:
        assert (buf.home, buf.size, buf.name) == (f"dma_heap:{buf.exp_name}", 3 * PAGE, "mine")
        with buf.write() as view:
            assert not any(view)
            view[-4:] = b"last"
        with dmabuf.get(buf.fileno()) as same, same.read() as view:
            assert bytes(view[-4:]) == b"last"


# ---- udmabuf ----


@pytest.fixture
def memfd() -> Iterator[int]:
    """Four pages, sealed as udmabuf wants it."""
    fd = os.memfd_create("test-udmabuf", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.pwrite(fd, bytes(range(256)) * (4 * PAGE // 256), 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    yield fd
    os.close(fd)


@pytest.fixture
def udmabuf() -> Iterator[int]:
    with call.open_node("/dev/udmabuf", "test") as opened:
        yield opened.number


@pytest.mark.parametrize(("offset", "size"), [(PAGE // 2, 2 * PAGE), (0, PAGE // 2), (0, 0), (4 * PAGE, PAGE), (0, 5 * PAGE)])
def test_a_range_that_is_not_of_whole_pages_inside_is_einval(udmabuf: int, memfd: int, offset: int, size: int) -> None:
    with raises_errno(errno.EINVAL):
        heap.create(udmabuf, memfd, offset, size)


def test_what_is_no_memfd_is_ebadfd(udmabuf: int) -> None:
    with open(os.devnull, "rb") as other, raises_errno(errno.EBADFD):
        heap.create(udmabuf, other.fileno(), 0, PAGE)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE])
def test_a_memfd_with_other_seals_is_einval(udmabuf: int, seals: int) -> None:
    fd = os.memfd_create("test-udmabuf", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with raises_errno(errno.EINVAL):
        heap.create(udmabuf, fd, 0, PAGE)
    os.close(fd)


def test_a_buffer_and_its_memfd_are_the_same_memory(udmabuf: int, memfd: int) -> None:
    with heap.create(udmabuf, memfd, 0, 4 * PAGE) as fd, dmabuf.get(fd.number) as buf:
        assert (buf.home, buf.size) == ("udmabuf", 4 * PAGE)
        with buf.write() as view:
            assert view[255] == 255
            view[:3] = b"new"
        assert os.pread(memfd, 3, 0) == b"new"


def test_a_list_of_ranges_is_one_buffer_in_their_order(udmabuf: int, memfd: int) -> None:
    os.pwrite(memfd, b"first", 0)
    os.pwrite(memfd, b"third", 2 * PAGE)
    with heap.create_list(udmabuf, [(memfd, 2 * PAGE, PAGE), (memfd, 0, PAGE)]) as fd, dmabuf.get(fd.number) as buf:
        assert buf.size == 2 * PAGE
        first, second = buf.export_range(PAGE, 5), buf.export_range(0, 5)
        with first.read() as view:
            assert view.tobytes() == b"first"
        with second.read() as view:
            assert view.tobytes() == b"third"


@pytest.mark.parametrize("items", [[], [(0, 0)], [(0, PAGE), (PAGE, 0)]], ids=["none", "of nothing", "one of nothing"])
def test_a_list_with_nothing_in_it_is_einval(udmabuf: int, memfd: int, items: list[tuple[int, int]]) -> None:
    with raises_errno(errno.EINVAL):
        heap.create_list(udmabuf, [(memfd, offset, size) for offset, size in items])


def test_a_list_beyond_the_limit_is_einval(udmabuf: int, memfd: int) -> None:
    from dmabuf.heap.udmabuf import limits

    most = limits().ranges
    assert most is not None
    with raises_errno(errno.EINVAL):
        heap.create_list(udmabuf, [(memfd, 0, PAGE)] * (most + 1))
    with heap.create_list(udmabuf, [(memfd, 0, PAGE)] * 100) as fd, dmabuf.get(fd.number) as buf:
        assert buf.size == 100 * PAGE


def test_a_size_beyond_the_limit_is_einval_with_the_parameter() -> None:
    from dmabuf.heap.udmabuf import limits

    most = limits().size
    assert most is not None
    if most < 1 << 40:
        with raises_errno(errno.EINVAL) as caught:
            dmabuf.allocate(most + 1, heap="udmabuf")
        assert "size_limit_mb" in str(caught.value)


# ---- vgem and PRIME ----


def test_an_export_is_a_snapshot(dumb: DumbBuffer) -> None:
    with dumb.export() as buf, buf.export_sync_file(write=True) as idle:
        fence = dumb.add_fence(write=True)
        assert idle.info().status == 1
        with buf.export_sync_file(write=True) as busy:
            assert busy.info().status == 0
            fence.signal()
            assert busy.info().status == 1


@pytest.mark.parametrize(("flags", "number"), [(os.O_APPEND, errno.EINVAL), (os.O_TRUNC, errno.EINVAL)])
def test_other_flags_of_an_export_are_einval(dumb: DumbBuffer, flags: int, number: int) -> None:
    with raises_errno(number):
        dumb.export(flags=flags)


def test_an_unknown_handle_is_enoent_and_closing_it_einval(node: DrmNode) -> None:
    with raises_errno(errno.ENOENT):
        drm.handle_to_fd(node.fileno(), 9999)
    with raises_errno(errno.EINVAL):
        drm.gem_close(node.fileno(), 9999)


@pytest.mark.parametrize("which", ["closed", "no dma-buf"])
def test_an_import_of_no_dma_buf(node: DrmNode, which: str) -> None:
    with open(os.devnull, "rb") as other, raises_errno(errno.EBADF if which == "closed" else errno.EINVAL):
        drm.fd_to_handle(node.fileno(), 9999 if which == "closed" else other.fileno())


def test_a_buffer_that_was_imported_is_exported_as_itself(node: DrmNode) -> None:
    with dmabuf.allocate(PAGE, heap="udmabuf") as buf, node.import_buffer(buf) as imported, imported.export() as again:
        assert again == buf
        assert again.home == "udmabuf"
