"""The file that buffers are moved to: where it is, that it leaves nothing, and how its ranges are given out."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmabuf.heap import spill_file
from dmabuf.heap.spill_file import SpillFile, default_directory, in_memory
from tests.support.errnos import raises_errno

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SpillFile]:
    made = SpillFile(tmp_path)
    yield made
    made.close()


def blocks(file: SpillFile) -> int:
    """Bytes of disk that the file has."""
    return os.fstat(file.fileno()).st_blocks * 512


def test_the_file_has_no_name(file: SpillFile, tmp_path: Path) -> None:
    assert os.listdir(tmp_path) == []
    assert os.fstat(file.fileno()).st_nlink == 0


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR])
def test_without_o_tmpfile_it_has_no_name_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = os.open

    def refusing(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    made = SpillFile(tmp_path)
    assert os.listdir(tmp_path) == []
    made.write(made.take(PAGE), memoryview(b"x"))
    made.close()


def test_what_is_written_is_read(file: SpillFile) -> None:
    at = file.take(3 * PAGE)
    content = os.urandom(3 * PAGE)
    file.write(at, memoryview(content))
    back = bytearray(3 * PAGE)
    file.read(at, memoryview(back))
    assert back == content


def test_a_range_is_reserved_when_it_is_taken_and_given_back_when_free(file: SpillFile) -> None:
    before = blocks(file)
    at = file.take(64 * PAGE)
    assert blocks(file) >= before + 64 * PAGE
    file.give(at, 64 * PAGE)
    assert blocks(file) == before


def test_ranges_never_overlap_and_free_ones_are_used_again(file: SpillFile) -> None:
    """Against a plain model: a set of the pages that are taken."""
    rng = random.Random(20231101)
    taken: dict[int, int] = {}
    used: set[int] = set()
    highest = 0
    for _ in range(600):
        if taken and (rng.random() < 0.48 or len(taken) > 40):
            at = rng.choice(sorted(taken))
            length = taken.pop(at)
            used -= set(range(at // PAGE, (at + length) // PAGE))
            file.give(at, length)
        else:
            length = rng.randrange(1, 9) * PAGE
            at = file.take(length)
            pages = set(range(at // PAGE, (at + length) // PAGE))
            assert at % PAGE == 0
            assert not pages & used
            used |= pages
            taken[at] = length
            highest = max(highest, at + length)
    assert highest < 41 * 8 * PAGE * 3, "free ranges are not used again"
    for at, length in taken.items():
        file.give(at, length)
    assert file.take(PAGE) == 0, "all ranges together are one again"


def test_a_range_that_cannot_be_reserved_is_not_taken(file: SpillFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, at: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(spill_file, "reserve_range", full)
        with raises_errno(errno.ENOSPC):
            file.take(PAGE)
    assert file.take(PAGE) == 0


def test_a_file_that_became_shorter_is_eio(file: SpillFile) -> None:
    at = file.take(PAGE)
    os.ftruncate(file.fileno(), 0)
    with raises_errno(errno.EIO):
        file.read(at, memoryview(bytearray(PAGE)))


def test_a_directory_that_is_not_there_is_enoent(tmp_path: Path) -> None:
    with raises_errno(errno.ENOENT):
        SpillFile(tmp_path / "missing")


def test_a_directory_that_is_a_file_is_enotdir(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises_errno(errno.ENOTDIR):
        SpillFile(tmp_path / "file")


def test_closing_again_is_nothing(tmp_path: Path) -> None:
    made = SpillFile(tmp_path)
    made.close()
    made.close()
    assert made.fileno() == -1


def test_the_default_directory_is_the_one_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMABUF_SPILL_DIRECTORY", "/somewhere")
    assert default_directory() == "/somewhere"


def test_the_default_directory_is_not_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DMABUF_SPILL_DIRECTORY", raising=False)
    monkeypatch.setattr(spill_file, "in_memory", lambda directory: directory != str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == str(tmp_path)


def test_without_any_directory_it_is_enodev_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DMABUF_SPILL_DIRECTORY", raising=False)
    monkeypatch.setattr(spill_file, "in_memory", lambda directory: True)
    with raises_errno(errno.ENODEV) as caught:
        default_directory()
    assert "DMABUF_SPILL_DIRECTORY" in str(caught.value)


@pytest.mark.parametrize(("kind", "expected"), [("tmpfs", True), ("ramfs", True), ("ext4", False), ("btrfs", False)])
def test_a_file_system_in_memory_is_known_by_its_mount(tmp_path: Path, kind: str, expected: bool) -> None:
    device = os.stat(tmp_path).st_dev
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 0:99999 / /other rw - tmpfs tmpfs rw\n"
        f"23 1 {os.major(device)}:{os.minor(device)} / /here rw,relatime shared:1 - {kind} /dev/x rw\n"
    )
    assert in_memory(str(tmp_path), str(table)) is expected


def test_a_file_system_without_a_mount_line_is_taken_for_a_disk(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text("garbage\n22 1 0:99999 / /other rw - tmpfs tmpfs rw\n")
    assert in_memory(str(tmp_path), str(table)) is False
