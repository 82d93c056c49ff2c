"""The disk device: files into buffers and buffers into files, with a fence each."""

import asyncio
import errno
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import DiskDevice, DmaBuf, Domain, SgTable, Timeline
from dmabuf.devices import disk as disks
from dmabuf.devices.disk import BLOCK, CHUNK
from tests.devices.conftest import BIG
from tests.support.children import Parent, Spawn
from tests.support.drivers import PAGE, Bare
from tests.support.engines import got, put
from tests.support.errnos import raises_errno
from tests.support.fences import entries

# ---- the same bytes, whichever way they go ----

# (offset in the file, at in the buffer, length)
RANGES = [
    (0, 0, BIG), (0, 0, BLOCK), (BLOCK, BLOCK, 3 * BLOCK), (0, BLOCK, BLOCK), (100, 100, BIG - 100), (100, 100, BIG - 200), (1, 0, BIG),
    (0, 1, BIG - 1), (5, 5, 10), (BLOCK - 1, BLOCK - 1, 2), (3, BLOCK + 3, BLOCK), (7, 0, 5), (1000, 0, BIG), (BLOCK + 512, 512, 5000),
]  # fmt: skip


@pytest.mark.parametrize(("offset", "at", "length"), RANGES)
def test_read_fills_exactly_its_range_with_the_files_content(
    disk: DiskDevice, big: DmaBuf, file: Path, offset: int, at: int, length: int
) -> None:
    put(big, b"\xee" * BIG)
    assert disk.submit_read(big, file, offset, at=at, length=length).wait() == length
    expected = bytearray(b"\xee" * BIG)
    expected[at : at + length] = file.read_bytes()[offset : offset + length]
    assert got(big) == bytes(expected)


@pytest.mark.parametrize(("offset", "at", "length"), RANGES)
def test_write_changes_exactly_its_range_of_the_file(disk: DiskDevice, big: DmaBuf, file: Path, offset: int, at: int, length: int) -> None:
    data, before = random.Random(2).randbytes(BIG), file.read_bytes()
    put(big, data)
    assert disk.submit_write(big, file, offset, at=at, length=length).wait() == length
    expected = bytearray(before)
    expected[offset : offset + length] = data[at : at + length]
    assert file.read_bytes() == bytes(expected)
    assert got(big) == data


@pytest.mark.parametrize(
    "device", [dmabuf.Device("d"), dmabuf.Device("d", max_segment=PAGE), dmabuf.Device("d", iommu=False)], ids=range(3)
)
@pytest.mark.parametrize("direct", [True, False])
def test_more_than_one_system_call_moves_everything(device: dmabuf.Device, direct: bool, tmp_path: Path) -> None:
    disk = DiskDevice(device, direct=direct)
    data = random.Random(3).randbytes(2 * CHUNK + 12345)
    (tmp_path / "in").write_bytes(data)
    with dmabuf.allocate(3 * CHUNK) as large:
        assert disk.submit_read(large, tmp_path / "in").wait() == len(data)
        assert disk.submit_write(large, tmp_path / "out", length=len(data)).wait() == len(data)
        disk.close()
    assert (tmp_path / "out").read_bytes() == data


class Scattered(Bare):
    """Memory whose pages lie in no order, each an entry, and a table that begins inside of a page."""

    def map(self, attachment: dmabuf.DmaBufAttachment, direction: dmabuf.Direction) -> SgTable:
        start = 512
        ranges = [(start, PAGE - start), (3 * PAGE, PAGE), (PAGE, PAGE)]
        sgt = SgTable.from_ranges(ranges, max_segment=attachment.dev.max_segment, memory=self.whole)
        attachment.dev.map_sgtable(sgt, direction)
        self.tables.append(sgt)
        return sgt


def test_memory_in_pieces_is_filled_in_the_order_of_its_table(disk: DiskDevice, file: Path) -> None:
    exporter, size = Scattered(4 * PAGE), 3 * PAGE - 512
    with dmabuf.export(exporter, size) as buf:
        assert disk.submit_read(buf, file).wait() == size
        data = file.read_bytes()[:size]
        first = PAGE - 512
        assert exporter.whole[512:PAGE] == data[:first]
        assert exporter.whole[3 * PAGE :] == data[first : first + PAGE]
        assert exporter.whole[PAGE : 2 * PAGE] == data[first + PAGE :]
        disk.close()
    exporter.close()


def test_whole_blocks_bypass_the_page_cache_with_o_direct(plain: DiskDevice, big: DmaBuf, file: Path) -> None:
    job = plain.submit_read(big, file, 100, at=100, length=BIG - 200)
    job.wait()
    stats = plain.statistics()
    if job.note is not None:
        assert job.note.startswith("its file system has no O_DIRECT: ")
        assert (stats.direct, stats.buffered) == (0, BIG - 200)
    else:
        assert (stats.direct, stats.buffered) == (BIG - 2 * BLOCK, 2 * BLOCK - 200)
        file.write_bytes(b"x" * (3 * BLOCK + 100))
        plain.submit_read(big, file).wait()
        after = plain.statistics()
        assert (after.direct - stats.direct, after.buffered - stats.buffered) == (3 * BLOCK, 100)


def test_different_alignment_uses_the_page_cache_and_notes_it(plain: DiskDevice, big: DmaBuf, file: Path) -> None:
    job = plain.submit_read(big, file, 1)
    job.wait()
    assert plain.statistics().direct == 0
    assert job.note == plain.statistics().note
    assert job.note is not None
    assert "aligned" in job.note or "has no O_DIRECT" in job.note


@pytest.mark.parametrize("where", ["switching it on", "the first use"])
@pytest.mark.parametrize("write", [False, True])
def test_a_file_system_without_o_direct_is_read_and_written_all_the_same(
    plain: DiskDevice, big: DmaBuf, file: Path, monkeypatch: pytest.MonkeyPatch, where: str, write: bool
) -> None:
    refused: list[str] = []

    def refuse(real: Callable[..., Any], applies: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if applies(*args):
                refused.append(where)
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(*args)

        return call

    if where == "switching it on":
        monkeypatch.setattr(
            disks.fcntl, "fcntl", refuse(disks.fcntl.fcntl, lambda fd, op, flags=0: op == disks.fcntl.F_SETFL and flags & os.O_DIRECT)
        )
    else:
        is_direct = lambda fd, *_: bool(disks.fcntl.fcntl(fd, disks.fcntl.F_GETFL) & os.O_DIRECT)  # noqa: E731
        name = "pwritev" if write else "preadv"
        monkeypatch.setattr(disks.os, name, refuse(getattr(os, name), is_direct))
    put(big, b"\1" * BIG)
    job = plain.submit_write(big, file) if write else plain.submit_read(big, file)
    assert job.wait() == BIG
    assert refused == [where]
    assert job.note == "its file system has no O_DIRECT: Invalid argument"
    assert (plain.statistics().direct, plain.statistics().buffered) == (0, BIG)
    assert file.read_bytes()[:BIG] == got(big)


def test_switched_off_o_direct_is_said(big: DmaBuf, file: Path) -> None:
    with DiskDevice(direct=False) as disk:
        job = disk.submit_read(big, file)
        job.wait()
        assert job.note == "O_DIRECT is switched off"


# ---- results ----


@pytest.mark.parametrize("have", [0, 1, 100, BLOCK, BLOCK + 1, BIG - 1])
def test_a_read_that_meets_the_end_says_how_much_and_leaves_the_rest(disk: DiskDevice, big: DmaBuf, tmp_path: Path, have: int) -> None:
    data = random.Random(4).randbytes(have)
    (tmp_path / "short").write_bytes(data)
    put(big, b"\xee" * BIG)
    job = disk.submit_read(big, tmp_path / "short")
    assert (job.wait(), job.fence.status) == (have, 1)
    assert got(big) == data + b"\xee" * (BIG - have)


def test_a_read_behind_the_end_is_of_no_byte(disk: DiskDevice, big: DmaBuf, file: Path) -> None:
    assert disk.submit_read(big, file, BIG + 1000).wait() == 0
    assert disk.submit_read(big, file, 1 << 40).wait() == 0


def test_a_write_makes_the_file_and_a_hole_before_its_offset(disk: DiskDevice, big: DmaBuf, tmp_path: Path) -> None:
    put(big, b"\1" * BIG)
    assert disk.submit_write(big, tmp_path / "new", BLOCK, length=10).wait() == 10
    assert (tmp_path / "new").read_bytes() == b"\0" * BLOCK + b"\1" * 10


def test_a_truncating_write_ends_the_file_with_its_data(disk: DiskDevice, big: DmaBuf, file: Path) -> None:
    put(big, b"\1" * BIG)
    assert disk.submit_write(big, file, 5, length=10, truncate=True, sync=True).wait() == 10
    assert file.stat().st_size == 15


def test_a_relative_path_is_of_the_directory_at_submission(
    plain: DiskDevice, big: DmaBuf, file: Path, tl: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    gate = tl.fence()
    jobs = [plain.submit_read(big, name, wait=[gate]) for name in ("frames", b"frames", Path("frames"))]
    monkeypatch.chdir("/")
    gate.signal()
    assert [job.wait() for job in jobs] == [BIG] * 3


# ---- what fails, by the fence ----


def nothing_there(path: Path) -> Path:
    return path / "none"


def a_directory(path: Path) -> Path:
    return path


def no_directory(path: Path) -> Path:
    (path / "plain").write_bytes(b"x")
    return path / "plain" / "x"


def an_empty_path(path: Path) -> str:
    return ""


def a_fifo(path: Path) -> Path:
    os.mkfifo(path / "fifo")
    return path / "fifo"


def a_full_device(path: Path) -> str:
    return "/dev/full"


@pytest.mark.parametrize(
    ("number", "where", "write"),
    [
        (errno.ENOENT, nothing_there, False), (errno.ENOENT, an_empty_path, False), (errno.ENOENT, an_empty_path, True),
        (errno.EISDIR, a_directory, False), (errno.EISDIR, a_directory, True), (errno.ENOTDIR, no_directory, False),
        (errno.ENOTDIR, no_directory, True), (errno.ESPIPE, a_fifo, False), (errno.ENXIO, a_fifo, True),
        (errno.ENOSPC, a_full_device, True),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_with_its_name(
    disk: DiskDevice, big: DmaBuf, tmp_path: Path, number: int, where: Callable[[Path], Any], write: bool
) -> None:
    path = where(tmp_path)
    job = disk.submit_write(big, path) if write else disk.submit_read(big, path)
    with raises_errno(number) as caught:
        job.wait()
    assert (job.fence.status, job.moved) == (-number, 0)
    assert caught.value.filename == os.fspath(path)
    assert str(path) in str(caught.value)
    assert disk.submit_read(big, "/dev/zero").wait() == BIG  # the disk goes on


def limited(parent: Parent, path: str, limit: int) -> tuple[int, int, str]:
    with dmabuf.allocate(BIG) as buf, DiskDevice() as disk, Timeline("limit") as line:
        gate = line.fence()
        job = disk.submit_write(buf, path, wait=[gate])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # from now on the domain can't grow either
        gate.signal()
        job.fence.wait()
        try:
            job.wait()
        except OSError as e:
            return job.fence.status, job.moved, str(e)
    return 0, 0, ""


def test_a_limit_met_in_the_middle_says_how_much_was_written(child: Spawn, tmp_path: Path) -> None:
    status, moved, text = child(limited, str(tmp_path / "limited"), 3 * BLOCK).result()
    assert (status, moved) == (-errno.EFBIG, 3 * BLOCK)
    assert f"after {3 * BLOCK} bytes" in text
    assert (tmp_path / "limited").stat().st_size == 3 * BLOCK


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("write", [False, True])
def test_an_error_of_the_disk_in_the_middle_ends_the_fence_with_it(
    plain: DiskDevice, big: DmaBuf, file: Path, monkeypatch: pytest.MonkeyPatch, number: int, write: bool
) -> None:
    name = "pwritev" if write else "preadv"
    real, calls = getattr(os, name), iter(range(10))

    def fails(fd: int, views: list[memoryview], offset: int) -> Any:
        if next(calls):
            raise OSError(number, os.strerror(number))
        return real(fd, [views[0][:BLOCK]], offset)

    monkeypatch.setattr(disks.os, name, fails)
    job = plain.submit_write(big, file) if write else plain.submit_read(big, file)
    with raises_errno(number) as caught:
        job.wait()
    assert (job.fence.status, job.moved) == (-number, BLOCK)
    assert f"after {BLOCK} bytes" in str(caught.value)


def test_a_write_that_writes_nothing_is_an_error(plain: DiskDevice, big: DmaBuf, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks.os, "pwritev", lambda *_: 0)
    with raises_errno(errno.EIO):
        plain.submit_write(big, file).wait()


def test_a_buffer_unplugged_under_a_read_faults(plain: DiskDevice, big: DmaBuf, file: Path, tl: Timeline) -> None:
    attached, gate = plain.attach(big), tl.fence()
    job = plain.submit_read(attached, file, wait=[gate])
    attached.detach(wait=False)
    gate.signal()
    with raises_errno(errno.EFAULT):
        job.wait()
    assert got(big) == b"\0" * BIG


# ---- what is refused at once ----

REFUSED: dict[str, tuple[int, Callable[[DiskDevice, DmaBuf, Path], Any]]] = {
    "a negative offset": (errno.EINVAL, lambda d, b, p: d.submit_read(b, p, -1)),
    "an offset beyond all files": (errno.EINVAL, lambda d, b, p: d.submit_write(b, p, 1 << 63)),
    "an empty range": (errno.EINVAL, lambda d, b, p: d.submit_read(b, p, length=0)),
    "a range outside": (errno.EINVAL, lambda d, b, p: d.submit_read(b, p, length=BIG + 1)),
    "a negative length": (errno.EINVAL, lambda d, b, p: d.submit_read(b, p, length=-1)),
    "a place outside": (errno.EINVAL, lambda d, b, p: d.submit_write(b, p, at=BIG)),
    "a negative place": (errno.EINVAL, lambda d, b, p: d.submit_write(b, p, at=-1)),
    "a place outside of a range": (errno.EINVAL, lambda d, b, p: d.submit_read(d.attach(b).range(0, 10), p, at=10)),
    "a path with a NUL": (errno.EINVAL, lambda d, b, p: d.submit_read(b, "a\0b")),
    "bytes with a NUL": (errno.EINVAL, lambda d, b, p: d.submit_write(b, b"a\0b")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_transfer_that_makes_no_sense_is_refused_and_adds_nothing(plain: DiskDevice, big: DmaBuf, file: Path, case: str) -> None:
    number, submit = REFUSED[case]
    with raises_errno(number):
        submit(plain, big, file)
    assert entries(big.resv) == []
    assert plain.statistics().queues[0].pending == 0


@pytest.mark.parametrize("path", [7, None, 1.5])
def test_a_path_of_the_wrong_type_is_a_type_error(plain: DiskDevice, big: DmaBuf, path: Any) -> None:
    with pytest.raises(TypeError):
        plain.submit_read(big, path)


@pytest.mark.parametrize("wrong", [7, None, b"frame"])
def test_a_target_of_the_wrong_type_is_a_type_error_in_a_coroutine_too(plain: DiskDevice, file: Path, wrong: Any) -> None:
    with pytest.raises(TypeError, match="read_into: expected a DmaBuf"):
        asyncio.run(plain.read_into(wrong, file))


def test_an_option_that_there_is_not_is_a_type_error(plain: DiskDevice, big: DmaBuf, file: Path) -> None:
    options: Any = {"truncat": True}
    with pytest.raises(TypeError, match="truncat"):
        plain.submit_write(big, file, **options)
    assert entries(big.resv) == []


def test_a_part_of_a_buffer_is_read_into_and_written_from(disk: DiskDevice, big: DmaBuf, file: Path, tmp_path: Path) -> None:
    part = big.export_range(BLOCK + 3, 2 * BLOCK)
    assert asyncio.run(disk.read_into(part, file, 10)) == 2 * BLOCK
    assert got(big) == bytes(BLOCK + 3) + file.read_bytes()[10 : 10 + 2 * BLOCK] + bytes(BIG - 3 * BLOCK - 3)
    assert disk.submit_write(part, tmp_path / "out", at=1, length=20).wait() == 20
    assert (tmp_path / "out").read_bytes() == file.read_bytes()[11:31]


def test_an_offset_of_the_wrong_type_is_a_type_error(plain: DiskDevice, big: DmaBuf, file: Path) -> None:
    with pytest.raises(TypeError):
        plain.submit_read(big, file, 1.5)  # type: ignore[arg-type]


def test_a_buffer_of_another_domain_is_refused(plain: DiskDevice, file: Path) -> None:
    with dmabuf.allocate(BIG, domain=Domain.private()) as foreign, raises_errno(errno.EXDEV):
        plain.submit_read(foreign, file)


def test_a_closed_disk_is_refused(plain: DiskDevice, big: DmaBuf, file: Path) -> None:
    plain.close()
    with raises_errno(errno.EBADF):
        plain.submit_read(big, file)
