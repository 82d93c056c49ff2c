"""The kernel's own dma-bufs as buffers: the kernel's fences and the domain's (semantics 5.2–5.9; design: one object)."""

import errno
import os
import select
import signal

import pytest

import dmabuf
from dmabuf import Direction, Usage
from dmabuf.drivers.sw_sync import SwSyncTimeline
from tests.support.errnos import raises_errno
from tests.support.kernel_homes import add_fence
from tests.support.waiting import Background

IN, OUT = select.POLLIN, select.POLLOUT


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
    assert "kernel fence" in str(caught.value)
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
        assert "kernel sync_file" in str(caught.value)
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
