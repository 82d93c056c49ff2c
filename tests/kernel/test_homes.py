"""The kernel's own dma-bufs as buffers: identity, names, brackets, fences of both kinds, sharing (spec 5.2–5.9; design: one object)."""

import asyncio
import ctypes
import errno
import fcntl
import gc
import mmap
import multiprocessing
import os
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import Direction, Usage
from dmabuf.drivers.sw_sync import SwSyncTimeline
from dmabuf.uapi import dma_buf, sw_sync
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.kernel_homes import HOMES, SIZE, add_fence, brackets, made
from tests.support.waiting import Background, until_asleep

RW, R, W = dma_buf.RW, dma_buf.READ, dma_buf.WRITE
PAGE = mmap.PAGESIZE


@pytest.fixture
def kernel_timeline() -> Iterator[SwSyncTimeline]:
    if not os.path.exists(sw_sync.PATH):
        pytest.skip("this kernel has no sw_sync: KERNEL=uml or full")
    with SwSyncTimeline() as timeline:
        yield timeline


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


class Boom(Exception):
    """Raised in a block."""


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


def test_an_array_that_outlives_block_and_handle_keeps_the_bracket_until_it_goes(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


# ---- the kernel's fences and the domain's ----


@pytest.mark.parametrize(
    ("access", "fence_of", "waits"), [("read", "write", True), ("read", "read", False), ("write", "write", True), ("write", "read", True)]
)
def test_an_access_waits_for_the_kernels_fences_in_its_way(
    buf: dmabuf.DmaBuf, kernel_timeline: SwSyncTimeline, access: str, fence_of: str, waits: bool
) -> None:
    fence = kernel_timeline.fence(1)
    add_fence(buf, fence.number, write=fence_of == "write")
    if not waits:
        with buf.read(timeout=0):
            return

    def enter() -> None:
        with buf.write() if access == "write" else buf.read():
            pass

    with pytest.raises(TimeoutError) as caught, buf.write(timeout=0) if access == "write" else buf.read(timeout=0):
        pass
    assert "fence of the kernel" in str(caught.value)
    with Background(enter) as other:
        other.until_blocked()
        assert not other.done
        kernel_timeline.increment()
        other.result()


@pytest.mark.parametrize("access", ["read", "write"])
def test_an_access_waits_for_the_domains_fences_too(buf: dmabuf.DmaBuf, access: str) -> None:
    timeline = dmabuf.Timeline("user")
    fence = timeline.fence()
    with buf.resv.locked():
        buf.resv.reserve(1)
        buf.resv.add(fence, Usage.WRITE)
    with pytest.raises(TimeoutError), buf.write(timeout=0) if access == "write" else buf.read(timeout=0):
        pass
    fence.signal()
    with buf.write(timeout=0) if access == "write" else buf.read(timeout=0):
        pass
    timeline.close()


def test_a_timed_out_access_leaves_nothing_on_the_buffer(buf: dmabuf.DmaBuf, kernel_timeline: SwSyncTimeline) -> None:
    fence = kernel_timeline.fence(1)
    add_fence(buf, fence.number, write=True)
    with pytest.raises(TimeoutError), buf.write(timeout=0.01):
        pass
    assert buf.resv.fences(Usage.BOOKKEEP) == []
    kernel_timeline.increment()
    with buf.read(timeout=0):
        pass


FRAMEWORKS = ["asyncio", "trio"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("write", [False, True])
def test_a_task_waits_for_the_kernels_fence_without_holding_up_the_loop(
    buf: dmabuf.DmaBuf, kernel_timeline: SwSyncTimeline, framework: str, write: bool
) -> None:
    anyio = pytest.importorskip("anyio")
    pytest.importorskip(framework)
    fence = kernel_timeline.fence(1)
    add_fence(buf, fence.number, write=True)
    order: list[str] = []

    async def access() -> None:
        async with buf.write() if write else buf.read():
            order.append("in")

    async def awaited() -> None:
        await buf.readable()
        await buf.writable()
        order.append("ready")

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(access)
            tasks.start_soon(awaited)
            await anyio.lowlevel.checkpoint()
            with pytest.raises(TimeoutError):
                async with buf.read(timeout=0.01):
                    pass
            order.append("signal")
            kernel_timeline.increment()

    anyio.run(main, backend=framework)
    assert order[0] == "signal"
    assert sorted(order[1:]) == ["in", "ready"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_cancelled_wait_for_the_kernel_leaves_nothing(buf: dmabuf.DmaBuf, kernel_timeline: SwSyncTimeline, framework: str) -> None:
    anyio = pytest.importorskip("anyio")
    pytest.importorskip(framework)
    fence = kernel_timeline.fence(1)
    add_fence(buf, fence.number, write=True)

    async def main() -> None:
        with anyio.move_on_after(0.02):
            async with buf.write():
                raise AssertionError("not to be reached")

    anyio.run(main, backend=framework)
    assert buf.resv.fences(Usage.BOOKKEEP) == []
    kernel_timeline.increment()
    with buf.read(timeout=0):
        pass


def test_begin_waits_for_both_with_a_timeout(buf: dmabuf.DmaBuf, kernel_timeline: SwSyncTimeline) -> None:
    fence = kernel_timeline.fence(1)
    add_fence(buf, fence.number, write=False)
    buf.begin_cpu_access(Direction.FROM_DEVICE, timeout=0)
    with raises_errno(errno.ETIMEDOUT):
        buf.begin_cpu_access(Direction.TO_DEVICE, timeout=0)
    kernel_timeline.increment()
    buf.begin_cpu_access(Direction.TO_DEVICE, timeout=0)
    buf.end_cpu_access(Direction.TO_DEVICE)


@pytest.mark.parametrize("interruptible", [True, False])
def test_a_signal_ends_begin_only_if_asked_for(buf: dmabuf.DmaBuf, kernel_timeline: SwSyncTimeline, interruptible: bool) -> None:
    fence = kernel_timeline.fence(1)
    add_fence(buf, fence.number, write=True)
    seen: list[int] = []

    def handler(number: int, _: object) -> None:
        seen.append(number)
        if len(seen) == 3 and not interruptible:
            kernel_timeline.increment()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        if interruptible:
            with raises_errno(errno.EINTR):
                buf.begin_cpu_access(Direction.FROM_DEVICE, interruptible=True)
        else:
            buf.begin_cpu_access(Direction.FROM_DEVICE)
            assert len(seen) >= 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen
    kernel_timeline.increment()


IN, OUT = select.POLLIN, select.POLLOUT


@pytest.mark.parametrize(("write", "ready"), [(True, 0), (False, IN)])
def test_poll_and_the_descriptor_tell_of_the_kernels_fences(
    buf: dmabuf.DmaBuf, kernel_timeline: SwSyncTimeline, write: bool, ready: int
) -> None:
    assert buf.poll(IN | OUT) == IN | OUT
    fence = kernel_timeline.fence(1)
    add_fence(buf, fence.number, write=write)
    assert buf.poll(IN | OUT) == ready
    raw, copy = select.poll(), buf.poll_fd(IN | OUT)
    raw.register(buf.fileno(), IN | OUT)
    raw.register(copy, IN | OUT)
    assert dict(raw.poll(0)) == ({buf.fileno(): ready, copy: ready} if ready else {})
    kernel_timeline.increment()
    assert buf.poll(IN | OUT, timeout=None) == IN | OUT
    assert dict(raw.poll(0)) == {buf.fileno(): IN | OUT, copy: IN | OUT}
    os.close(copy)


@pytest.mark.parametrize(("usage", "ready"), [(Usage.WRITE, 0), (Usage.READ, IN)])
def test_poll_tells_of_the_domains_fences(buf: dmabuf.DmaBuf, usage: Usage, ready: int) -> None:
    timeline = dmabuf.Timeline("user")
    fence = timeline.fence()
    with buf.resv.locked():
        buf.resv.reserve(1)
        buf.resv.add(fence, usage)
    assert buf.poll(IN | OUT) == ready
    fence.signal()
    assert buf.poll(IN | OUT) == IN | OUT
    timeline.close()


def test_a_wait_for_both_kinds_ends_with_the_later(buf: dmabuf.DmaBuf, kernel_timeline: SwSyncTimeline) -> None:
    timeline, kernels = dmabuf.Timeline("user"), kernel_timeline.fence(1)
    fence = timeline.fence()
    add_fence(buf, kernels.number, write=True)
    with buf.resv.locked():
        buf.resv.reserve(1)
        buf.resv.add(fence, Usage.WRITE)
    with Background(lambda: buf.poll(IN, timeout=None)) as other:
        other.until_blocked()
        fence.signal()
        other.until_blocked()
        assert not other.done
        kernel_timeline.increment()
        assert other.result() == IN
    timeline.close()


@pytest.mark.parametrize(("write", "pending"), [(False, False), (True, True)])
def test_an_exported_sync_file_is_the_kernels(buf: dmabuf.DmaBuf, kernel_timeline: SwSyncTimeline, write: bool, pending: bool) -> None:
    fence = kernel_timeline.fence(1)
    buf.import_sync_file(fence.number, write=False)
    with buf.export_sync_file(write=write) as exported:
        assert exported.info().status == (0 if pending else 1)
        kernel_timeline.increment()
        assert exported.info().status == 1
        assert exported.kernel_fileno() == exported.fileno()
    with dmabuf.SyncFile.from_fd(fence.number) as wrapped:
        buf.import_sync_file(wrapped, write=True)
    assert buf.poll(IN | OUT) == IN | OUT


def test_a_fence_of_a_process_never_goes_into_the_kernel(buf: dmabuf.DmaBuf) -> None:
    timeline = dmabuf.Timeline("user")
    fence = timeline.fence()
    with dmabuf.SyncFile(fence) as user:
        with raises_errno(errno.EINVAL) as caught:
            buf.import_sync_file(user, write=True)
        assert "fence of a process" in str(caught.value)
        with raises_errno(errno.EINVAL):
            buf.import_sync_file(user.fileno(), write=True)
    with raises_errno(errno.EINVAL):
        buf.import_sync_file(buf.fileno())
    assert buf.poll(IN | OUT) == IN | OUT
    fence.signal()
    timeline.close()


@pytest.mark.parametrize("flags", [0, 4, 8])
def test_other_flags_of_a_sync_file_are_einval(buf: dmabuf.DmaBuf, flags: int) -> None:
    with raises_errno(errno.EINVAL):
        buf.export_sync_file(flags=flags)


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
        until_asleep(other.pid)
        assert [len(record.blocking_readers) for record in dmabuf.buffers()] == [1]
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


def test_a_writer_that_is_killed_before_the_kernels_fence_has_written_nothing(
    child: Spawn, buf: dmabuf.DmaBuf, kernel_timeline: SwSyncTimeline
) -> None:
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
    here = made(home)
    again = here.get_dma_buf()
    here.close()
    assert [record.ino for record in dmabuf.buffers()] == [again.ino]
    shm = dmabuf.Domain.default().shm
    again.close()
    assert shm.rec_list() == []


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
    assert "only by mappings" in str(caught.value)
    mapping.close()
