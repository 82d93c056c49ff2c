"""Our devices on the kernel's own dma-bufs: the kernel's fences are waited for, and every access is bracketed."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import sim
from dmabuf.core.sync import kernel_fences as kernel_sync
from dmabuf.drivers.sw_sync import SwSyncTimeline
from tests.support.engines import until_it_waits
from tests.support.kernel_homes import HOMES, SIZE, add_fence, brackets, made
from tests.support.waiting import until


@pytest.fixture(params=HOMES)
def buf(request: pytest.FixtureRequest) -> Iterator[dmabuf.DmaBuf]:
    with made(request.param) as here:
        yield here
    until(lambda: kernel_sync._poller.wake < 0)  # it closes its copies of the kernel's fences a little later


@pytest.fixture
def engine(buf: dmabuf.DmaBuf) -> Iterator[sim.Engine]:
    made = sim.Engine("dma0")
    yield made
    made.close(cancel=True)


def test_a_device_works_on_the_kernels_memory(engine: sim.Engine, buf: dmabuf.DmaBuf, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = engine.queue()
    with brackets(monkeypatch) as seen:
        assert queue.fill(buf, 7).wait() == SIZE
        assert queue.checksum(buf).wait() == zlib.crc32(b"\7" * SIZE)
    assert len(seen.flags) == 4
    assert seen.opened == []
    with buf.read() as view:
        assert bytes(view) == b"\7" * SIZE
    engine.close()


def test_a_disk_reads_into_the_kernels_memory_and_writes_from_it(buf: dmabuf.DmaBuf, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(range(256)) * (SIZE // 256))
    with dmabuf.DiskDevice() as disk:
        assert disk.submit_read(buf, tmp_path / "in").wait() == SIZE
        assert disk.submit_write(buf, tmp_path / "out").wait() == SIZE
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()


@pytest.mark.parametrize(
    ("operation", "implicit", "write", "waits"),
    [
        ("checksum", True, True, True),
        ("checksum", True, False, False),
        ("fill", True, True, True),
        ("fill", True, False, True),
        ("fill", False, True, True),
    ],
)
def test_a_job_waits_for_the_kernels_fences_in_its_way(
    engine: sim.Engine, buf: dmabuf.DmaBuf, operation: str, implicit: bool, write: bool, waits: bool
) -> None:
    with SwSyncTimeline() as timeline:
        fence = timeline.fence(1)
        add_fence(buf, fence.number, write=write)
        queue = engine.queue()
        job = getattr(queue, operation)(buf, implicit=implicit)
        if waits:
            until_it_waits(queue)
            assert not job.done
        else:
            job.wait()
        timeline.increment()
        job.wait()
        fence.close()
    assert job.fence.status == 1


def test_a_job_that_waits_for_the_kernel_can_be_cancelled(engine: sim.Engine, buf: dmabuf.DmaBuf) -> None:
    with SwSyncTimeline() as timeline:
        fence = timeline.fence(1)
        add_fence(buf, fence.number, write=True)
        job = engine.queue().fill(buf, 1)
        engine.close(cancel=True)
        assert job.fence.status < 0
        timeline.increment()
        fence.close()
