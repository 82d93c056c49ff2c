"""The kernel's own dma-bufs as buffers: identity, names, memory, brackets (semantics 5.2–5.9; design: one object)."""

import asyncio
import errno
import fcntl
import gc
import mmap
import os
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Direction
from dmabuf.drivers.sw_sync import SwSyncTimeline
from dmabuf.uapi import dma_buf
from tests.support.errnos import raises_errno
from tests.support.kernel_homes import HOMES, SIZE, Boom, add_fence, brackets, made

RW, R, W = dma_buf.RW, dma_buf.READ, dma_buf.WRITE
PAGE = mmap.PAGESIZE


# ---- what it is ----


def test_a_buffer_says_what_it_is(buf: dmabuf.DmaBuf, home: str) -> None:
    assert (buf.home, os.fsencode(buf.exp_name), buf.size) == (home, HOMES[home], SIZE)
    assert buf.ino == os.fstat(buf.fileno()).st_ino
    assert buf.name is None
    assert buf.statistics().home == home


def test_it_is_a_buffer_that_a_plain_descriptor_gives_again(buf: dmabuf.DmaBuf) -> None:
    fd = os.dup(buf.fileno())
    with dmabuf.get(fd) as again:
        assert (again, hash(again), again.resv) == (buf, hash(buf), buf.resv)
        assert again.fileno() not in (fd, buf.fileno())
    os.close(fd)


def test_two_buffers_are_two_whatever_their_numbers(buf: dmabuf.DmaBuf, home: str) -> None:
    with made(home) as other:
        assert other != buf
        assert other.ino != buf.ino
        assert other.resv is not buf.resv


def test_a_number_that_is_used_again_is_another_buffer(home: str) -> None:
    first = made(home)
    number, ino = first.fileno(), first.ino
    with first.write() as view:
        view[:1] = b"1"
    first.close()
    second = made(home)
    fd = fcntl.fcntl(second.fileno(), fcntl.F_DUPFD_CLOEXEC, number)
    with dmabuf.get(fd) as again:
        assert again == second
        assert again.ino != ino
        with again.read() as view:
            assert view[0] == 0
    os.close(fd)
    second.close()


def test_fdinfo_is_the_kernels_text(buf: dmabuf.DmaBuf, home: str) -> None:
    buf.name = "camera"
    lines = Path(f"/proc/self/fdinfo/{buf.fileno()}").read_text().splitlines(keepends=True)
    assert buf.fdinfo() == "".join(line for line in lines if not line.startswith("lock:"))  # the lease is no business of the reader
    assert f"\nsize:\t{SIZE}\n" in buf.fdinfo()
    assert buf.fdinfo().endswith(f"\nexp_name:\t{os.fsdecode(HOMES[home])}\nname:\tcamera\n")


@pytest.mark.parametrize("name", ["camera", "", "x" * 31, "ü" * 15, "two\nlines"])
def test_a_name_is_the_kernels_too(buf: dmabuf.DmaBuf, name: str) -> None:
    buf.name = name
    assert dma_buf.fdinfo(buf.fileno()).name == os.fsencode(name)
    assert buf.name == name
    assert [record.name for record in dmabuf.buffers() if record.ino == buf.ino] == [name]


def test_a_name_that_another_program_gave_is_read(buf: dmabuf.DmaBuf) -> None:
    dma_buf.set_name(buf.fileno(), b"by an ioctl")
    assert buf.name == "by an ioctl"
    with dmabuf.get(buf.fileno()) as again:
        assert again.name == "by an ioctl"


@pytest.mark.parametrize("name", ["x" * 32, "a\0b"])
def test_a_name_that_does_not_fit_is_einval_and_the_old_one_stays(buf: dmabuf.DmaBuf, name: str) -> None:
    buf.name = "old"
    with raises_errno(errno.EINVAL):
        buf.name = name
    assert buf.name == "old"


@pytest.mark.parametrize("name", ["listed", None])
def test_bufinfo_of_ours_has_the_kernels_line(buf: dmabuf.DmaBuf, name: str | None) -> None:
    if name is not None:
        dma_buf.set_name(buf.fileno(), os.fsencode(name))  # by an ioctl of somebody's
    ino = f"\t{buf.ino:08d}\t"
    fds = [buf.dup(), buf.dup()]
    mapping = buf.mmap()

    def row(text: str) -> list[str]:
        return next(line.split("\t") for line in text.splitlines() if ino in line)

    ours, theirs = row(dmabuf.bufinfo()), row(Path("/sys/kernel/debug/dma_buf/bufinfo").read_text())
    # Size, count, exporter, inode, name; flags and mode are the kernel's own business.
    assert [ours[at] for at in (0, 3, 4, 5, 6)] == [theirs[at] for at in (0, 3, 4, 5, 6)]
    assert ours[6] == (name or "<none>")
    mapping.close()
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    ("offset", "whence", "found"),
    [(0, os.SEEK_SET, 0), (0, os.SEEK_END, SIZE), (0, os.SEEK_CUR, None), (1, os.SEEK_SET, None), (1, os.SEEK_END, None), (0, 9, None)],
)
def test_lseek_is_the_kernels(buf: dmabuf.DmaBuf, offset: int, whence: int, found: int | None) -> None:
    if found is None:
        with raises_errno(errno.EINVAL):
            buf.lseek(offset, whence)
    else:
        assert buf.lseek(offset, whence) == found


# ---- memory ----


@pytest.mark.parametrize("heap", ["udmabuf", "dma_heap:system"])
def test_memory_is_zeroed_whatever_was_in_it_before(heap: str) -> None:
    dirty = [dmabuf.allocate(4 << 20) for _ in range(8)]
    for one in dirty:
        with one.write() as view:
            view[:] = b"\xa5" * len(view)
        one.close()
    with dmabuf.allocate(16 << 20, heap=heap) as here, here.read() as view:
        assert not any(view.tobytes())


def test_what_is_written_is_read_through_every_way(buf: dmabuf.DmaBuf) -> None:
    with buf.write() as view:
        assert len(view) == SIZE
        view[PAGE : PAGE + 4] = b"data"
    with buf.read() as view:
        assert view.readonly
        assert bytes(view[PAGE : PAGE + 4]) == b"data"
    with buf.mmap(offset=PAGE, length=PAGE) as mapping:
        assert mapping[:4] == b"data"
    mapped = buf.vmap_unlocked()
    buf.vunmap_unlocked(mapped)


@pytest.mark.parametrize(("offset", "length"), [(PAGE, SIZE), (SIZE, PAGE), (1, PAGE), (0, 0), (0, SIZE + PAGE)])
def test_a_mapping_outside_is_einval(buf: dmabuf.DmaBuf, offset: int, length: int) -> None:
    with raises_errno(errno.EINVAL):
        buf.mmap(offset=offset, length=length)


def test_a_read_only_descriptor_gives_no_writable_mapping() -> None:
    from dmabuf.uapi import call, heap

    with call.open_node("/dev/dma_heap/system", "test") as device, heap.allocate(device.number, SIZE, fd_flags=os.O_RDONLY) as fd:
        with dmabuf.get(fd.number) as readonly:
            with readonly.read() as view:
                assert view[0] == 0
            with raises_errno(errno.EACCES), readonly.write():
                pass
            with raises_errno(errno.EACCES):
                readonly.mmap()
        del readonly


def test_a_descriptor_for_writing_only_is_eacces_with_the_reason() -> None:
    from dmabuf.uapi import call, heap

    with call.open_node("/dev/dma_heap/system", "test") as device, heap.allocate(device.number, SIZE, fd_flags=os.O_WRONLY) as fd:
        with raises_errno(errno.EACCES) as caught:
            dmabuf.get(fd.number)
        assert "writing only" in str(caught.value)


def test_a_device_attaches_and_maps_it(buf: dmabuf.DmaBuf) -> None:
    device = dmabuf.Device("npu0")
    attachment = buf.attach(device)
    with attachment.mapped(Direction.TO_DEVICE) as sgt:
        assert sum(length for _, length in sgt.dma_ranges()) == SIZE if hasattr(sgt, "dma_ranges") else True
    attachment.detach()


# ---- brackets: none is missing, none is left open ----


def test_a_block_is_bracketed_by_sync(buf: dmabuf.DmaBuf, monkeypatch: pytest.MonkeyPatch) -> None:
    with brackets(monkeypatch) as seen:
        with buf.write():
            assert seen.flags == [dma_buf.START | RW]
        with buf.read():
            assert seen.flags[2:] == [dma_buf.START | R]
        assert seen.flags == [RW, dma_buf.END | RW, R, dma_buf.END | R]


@pytest.mark.parametrize("write", [False, True])
def test_a_bracket_is_closed_when_the_block_raises(buf: dmabuf.DmaBuf, monkeypatch: pytest.MonkeyPatch, write: bool) -> None:
    with brackets(monkeypatch) as seen:
        with pytest.raises(Boom), buf.write() if write else buf.read():
            raise Boom
        assert len(seen.flags) == 2
        assert seen.opened == []


@pytest.mark.parametrize("write", [False, True])
def test_a_bracket_is_closed_when_the_function_returns_from_the_block(
    buf: dmabuf.DmaBuf, monkeypatch: pytest.MonkeyPatch, write: bool
) -> None:
    def early() -> int:
        for _ in range(3):
            with buf.write() if write else buf.read() as view:
                return view[0]
        return -1

    with brackets(monkeypatch) as seen:
        assert early() == 0
        assert len(seen.flags) == 2
        assert seen.opened == []


def test_a_bracket_is_closed_when_a_task_is_cancelled_in_the_block(buf: dmabuf.DmaBuf, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        entered = asyncio.Event()

        async def holder() -> None:
            async with buf.write():
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(holder())
        await entered.wait()
        task.cancel()
        await asyncio.wait([task])

    with brackets(monkeypatch) as seen:
        asyncio.run(main())
        assert len(seen.flags) == 2
        assert seen.opened == []


def test_a_bracket_of_several_is_closed_for_each(buf: dmabuf.DmaBuf, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with made(home) as other, brackets(monkeypatch) as seen:
        with pytest.raises(Boom), dmabuf.access(read=[buf], write=[other]):
            raise Boom
        assert len(seen.flags) == 4
        assert seen.opened == []


def test_an_access_that_is_not_granted_opens_no_bracket(
    buf: dmabuf.DmaBuf, monkeypatch: pytest.MonkeyPatch, kernel_timeline: SwSyncTimeline
) -> None:
    fence = kernel_timeline.fence(1)
    add_fence(buf, fence.number, write=True)
    with brackets(monkeypatch) as seen:
        with pytest.raises(TimeoutError), buf.read(timeout=0):
            pass
        with pytest.raises(TimeoutError), dmabuf.access(write=[buf], timeout=0.01):
            pass
        assert seen.flags == []
    kernel_timeline.increment()


def test_array_kept_beyond_block_and_handle_keeps_the_bracket(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = made(home)
    with brackets(monkeypatch) as seen:
        with here.read() as view:
            kept = memoryview(view)
        here.close()
        gc.collect()
        assert seen.opened == [R]
        assert kept[0] == 0
        kept.release()
        del kept, view
        gc.collect()
        assert seen.opened == []


def test_begin_and_end_are_syncs_of_their_own(buf: dmabuf.DmaBuf, monkeypatch: pytest.MonkeyPatch) -> None:
    with brackets(monkeypatch) as seen:
        for direction in (Direction.FROM_DEVICE, Direction.TO_DEVICE, Direction.BIDIRECTIONAL):
            buf.begin_cpu_access(direction)
            buf.end_cpu_access(direction)
        buf.sync(dma_buf.START | W)
        buf.sync(dma_buf.END | W)
        end = dma_buf.END
        assert seen.flags == [R, end | R, W, end | W, RW, end | RW, W, end | W]
