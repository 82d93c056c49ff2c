"""The disk device among others: its fences, other processes, coroutines."""

import asyncio
import errno
import zlib
from pathlib import Path

import pytest

import dmabuf
from dmabuf import ContractWarning, DiskDevice, DmaBuf, Timeline, Usage, sim
from dmabuf.devices.disk import BLOCK
from tests.devices.conftest import BIG
from tests.support.children import Parent, Spawn
from tests.support.drivers import Dynamic
from tests.support.engines import got, until_it_waits
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.fences import entries, key, the_fence
from tests.support.partners import give, take

# ---- fences ----


def test_a_read_writes_the_buffer_and_a_write_reads_it(plain: DiskDevice, big: DmaBuf, file: Path, tl: Timeline) -> None:
    gate = tl.fence()
    first = plain.submit_read(big, file, wait=[gate])
    second = plain.submit_write(big, file, wait=[gate])
    assert entries(big.resv) == [(key(first.fence), Usage.WRITE), (key(second.fence), Usage.READ)]
    assert first.fence.driver_name == "dmabuf-disk"
    gate.signal()
    second.wait()


def test_cpu_readers_wait_for_the_file_and_the_file_for_cpu_writers(plain: DiskDevice, big: DmaBuf, file: Path) -> None:
    job = plain.submit_read(big, file, delay=0.01)
    with big.read() as view:
        assert bytes(view) == file.read_bytes()[:BIG]
    assert job.done
    with big.write() as view:
        job = plain.submit_write(big, file)
        until_it_waits(plain._io)
        assert not job.done
        view[:] = b"\1" * BIG
    job.wait()
    assert file.read_bytes()[:BIG] == b"\1" * BIG


def test_opting_out_skips_readers_and_writers_but_not_kernel_fences(plain: DiskDevice, big: DmaBuf, file: Path, tl: Timeline) -> None:
    write, kernel = tl.fence(), Timeline("kernel").fence()
    add(big.resv, write, Usage.WRITE)
    assert plain.submit_read(big, file, implicit=False).wait() == BIG
    attached = plain.attach(big, dynamic=True)
    add(big.resv, kernel, Usage.KERNEL)
    job = plain.submit_read(attached, file, implicit=False)
    until_it_waits(plain._io)
    assert not job.done
    assert (key(job.fence), Usage.BOOKKEEP) in entries(big.resv)
    kernel.signal()
    job.wait()
    write.signal()


def test_a_transfer_that_waits_holds_up_no_other(plain: DiskDevice, big: DmaBuf, file: Path, tl: Timeline) -> None:
    gate = tl.fence()
    waits = plain.submit_read(big, file, wait=[gate])
    with dmabuf.allocate(BLOCK) as other:
        assert plain.submit_read(other, file).wait() == BLOCK
        assert not waits.done
        gate.signal()
        assert waits.wait() == BIG
        plain.close()


def test_a_file_goes_through_a_device_to_a_file_by_fences_alone(big: DmaBuf, file: Path, tmp_path: Path) -> None:
    with dmabuf.allocate(BIG) as copy, DiskDevice() as disk, sim.Engine() as engine:
        disk.submit_read(big, file, delay=0.005)
        engine.queue().copy(big, copy, delay=0.005)
        disk.submit_write(copy, tmp_path / "copy").wait()
        engine.close()
        disk.close()
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()[:BIG]


def test_a_dynamic_exporter_is_read_into(plain: DiskDevice, file: Path) -> None:
    exporter = Dynamic(BIG)
    with dmabuf.export(exporter, BIG) as buf:
        assert plain.submit_read(buf, file).wait() == BIG
        assert exporter.whole[:] == file.read_bytes()[:BIG]
        plain.close()
    assert (exporter.tables, exporter.pins) == ([], 0)
    exporter.close()


def reads(parent: Parent, path: str) -> int:
    with take(parent) as buf, DiskDevice() as disk:
        job = disk.submit_read(buf, path, delay=0.02)
        parent.send("submitted")
        count: int = job.wait()
        disk.close()
    return count


def test_another_process_waits_for_the_file_to_be_there(child: Spawn, big: DmaBuf, file: Path) -> None:
    other = child(reads, str(file))
    give(other, big)
    other.recv()
    with big.read() as view:
        assert zlib.crc32(view) == zlib.crc32(file.read_bytes()[:BIG])
    assert other.result() == BIG


def never_reads(parent: Parent, path: str) -> None:
    with take(parent) as buf, DiskDevice() as disk:
        disk.submit_read(buf, path, hang=True)
        parent.send("submitted")
        parent.recv()


def test_a_process_killed_while_reading_holds_up_nobody(child: Spawn, big: DmaBuf, file: Path) -> None:
    other = child(never_reads, str(file))
    give(other, big)
    other.recv()
    fence = the_fence(big)
    other.kill()
    with big.read():
        assert fence.status == -errno.EOWNERDEAD


# ---- coroutines ----


def test_files_are_read_and_written_in_coroutines(plain: DiskDevice, big: DmaBuf, file: Path, tmp_path: Path) -> None:
    async def main() -> tuple[int, int]:
        return await plain.read_into(big, file), await plain.write_from(big, tmp_path / "out", truncate=True)

    assert asyncio.run(main()) == (BIG, BIG)
    assert (tmp_path / "out").read_bytes() == file.read_bytes()[:BIG]


def test_files_are_read_and_written_under_trio(plain: DiskDevice, big: DmaBuf, file: Path, tmp_path: Path, tl: Timeline) -> None:
    trio = pytest.importorskip("trio")
    gate = tl.fence()

    async def main() -> tuple[int, int]:
        async def cancelled() -> None:
            await plain.read_into(big, file, wait=[gate])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancelled)
            while not big.resv.fences(Usage.WRITE):  # submitted: else its thread, left alone, may outlive the test
                await trio.sleep(0)
            nursery.cancel_scope.cancel()
        gate.signal()
        return await plain.read_into(big, file), await plain.write_from(big, tmp_path / "out")

    assert trio.run(main) == (BIG, BIG)
    assert (tmp_path / "out").read_bytes() == file.read_bytes()[:BIG]


def test_an_error_reaches_the_coroutine(plain: DiskDevice, big: DmaBuf, tmp_path: Path) -> None:
    with raises_errno(errno.ENOENT, FileNotFoundError):
        asyncio.run(plain.read_into(big, tmp_path / "none"))


def test_a_loop_goes_on_while_another_holds_the_lock(plain: DiskDevice, big: DmaBuf, file: Path) -> None:
    async def main() -> int:
        async def holder() -> None:
            with big.resv.locked():
                await asyncio.sleep(0)  # the other task runs, and its submission waits
                await asyncio.sleep(0.01)

        held = asyncio.create_task(holder())
        await asyncio.sleep(0)
        count = await plain.read_into(big, file)
        await held
        return count

    assert asyncio.run(main()) == BIG


@pytest.mark.parametrize("kind", ["buffer", "attached", "range"])
def test_a_coroutine_that_holds_the_lock_is_refused(plain: DiskDevice, big: DmaBuf, file: Path, kind: str) -> None:
    attached = plain.attach(big)
    target = {"buffer": big, "attached": attached, "range": attached.range()}[kind]

    async def main() -> None:
        with big.resv.locked(), pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
            await plain.read_into(target, file)

    asyncio.run(main())
    assert entries(big.resv) == []


def test_awaiting_inside_of_an_access_that_is_in_the_way_is_a_deadlock(plain: DiskDevice, big: DmaBuf, file: Path) -> None:
    async def main() -> None:
        async with big.write():
            with raises_errno(errno.EDEADLK):
                await plain.read_into(big, file)

    asyncio.run(main())
    assert big.resv.wait(Usage.BOOKKEEP)
    assert got(big) == file.read_bytes()[:BIG]


def test_a_cancelled_await_leaves_nothing_registered_and_its_fence_ends(plain: DiskDevice, big: DmaBuf, file: Path, tl: Timeline) -> None:
    gate = tl.fence()

    async def main() -> None:
        task = asyncio.create_task(plain.read_into(big, file, wait=[gate]))
        while not big.resv.fences(Usage.WRITE):
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    fence = the_fence(big)
    assert fence.statistics().callbacks == 0
    gate.signal()
    fence.wait()
    assert (fence.status, got(big)) == (1, file.read_bytes()[:BIG])
