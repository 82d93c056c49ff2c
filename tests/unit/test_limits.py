"""A limit of the process that is in the way is named, with what to do."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Domain
from dmabuf.domain import limits
from dmabuf.errors import DmaBufError
from dmabuf.heap.budget import Budget
from tests.support.places import in_process
from tests.support.steps import fork, reap

MIB = 1 << 20


def addresses_in_use() -> int:
    with open("/proc/self/statm", "rb") as f:
        return int(f.read().split()[0]) * resource.getpagesize()


def refused(number: int, says: str, call: Callable[[], object]) -> None:
    with pytest.raises(DmaBufError, match=says) as caught:
        call()
    assert caught.value.errno == number
    assert caught.value.remedy


def test_mapping_beyond_the_limit_of_addresses_names_it(where: Path) -> None:
    def look() -> None:
        with dmabuf.allocate(64 * MIB, domain=Domain.open(where)) as buf:
            resource.setrlimit(resource.RLIMIT_AS, (addresses_in_use() + 32 * MIB,) * 2)
            refused(errno.ENOMEM, f"mmap.*RLIMIT_AS allows this process .* and {64 * MIB} more are needed.*ulimit -v", buf.mmap)
            refused(errno.ENOMEM, "RLIMIT_AS", lambda: buf.write().__enter__())
            refused(errno.ENOMEM, "open domain: its file.*RLIMIT_AS", Domain.private)

    assert reap(fork(look)) == 0


def test_full_address_space_of_mappings_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = tmp_path / "max_map_count"
    few.write_text("10\n")
    monkeypatch.setattr(limits, "_MAPS", str(few))
    assert "vm.max_map_count" in str(limits.cant_map("mmap", "a buffer", 4096))
    few.write_text("1000000000\n")
    assert "the kernel has no room for the mapping" in str(limits.cant_map("mmap", "a buffer", 4096))
    few.unlink()
    assert "the kernel has no room for the mapping" in str(limits.cant_map("mmap", "a buffer", 4096))


def test_file_of_a_domain_beyond_the_limit_of_sizes_names_it(where: Path) -> None:
    def look() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)
        refused(errno.EFBIG, "make domain.*RLIMIT_FSIZE allows a file of 100000 bytes.*ulimit -f", lambda: Domain.open(where))
        refused(errno.EFBIG, "RLIMIT_FSIZE", Domain.private)

    assert reap(fork(look)) == 0


def test_domain_that_grows_beyond_the_limit_of_sizes_names_it(where: Path) -> None:
    def look() -> None:
        domain = Domain.open(where)
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(domain.fileno()).st_size + 1000,) * 2)
        refused(errno.ENOMEM, "RLIMIT_FSIZE doesn't allow its file to become larger.*ulimit -f", lambda: fences(domain))

    def fences(domain: Domain) -> None:
        timelines = [dmabuf.Timeline(f"t{i}", domain=domain) for i in range(100)]
        kept = [timelines[0].fence() for _ in range(10_000)]
        assert not kept

    in_process(look)


def test_proc_that_shows_processes_only_is_named(tmp_path: Path) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "stat").touch()
    refused(errno.ENOENT, "/proc shows processes only.*subset=pid", lambda: Budget(tmp_path / "proc", tmp_path).check(1))
