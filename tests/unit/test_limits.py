"""A limit of the process that is in the way is named, with what to do."""

import ctypes
import errno
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Domain
from dmabuf.domain import limits
from dmabuf.errors import DmaBufError
from dmabuf.heap.budget import Budget
from dmabuf.observe import machine
from tests.support.places import in_process
from tests.support.seccomp import needs_filters, refuse
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


# ---- system calls that a sandbox refuses ----


class Memory(dmabuf.Exporter):
    def map(self, attachment: object, direction: object) -> None:
        return None

    def unmap(self, attachment: object, sgt: object, direction: object) -> None:
        pass

    def release(self, buf: object) -> None:
        pass


@needs_filters
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_refused_memfd_create_is_named(where: Path, number: int) -> None:
    def look() -> None:
        domain = Domain.open(where)
        refuse("memfd_create", number)
        says = "a filter of system calls .seccomp. refuses memfd_create.*allow memfd_create in the sandbox"
        for call in (
            lambda: dmabuf.allocate(4096, domain=domain),
            Domain.private,
            lambda: dmabuf.SwSync("x", domain=domain).close(),
            lambda: dmabuf.TimelineSemaphore(domain=domain).close(),
        ):
            refused(number, says, call)
        refused(number, "export.*seccomp. refuses memfd_create, ftruncate or fcntl", lambda: dmabuf.export(Memory(), 4096, domain=domain))

    in_process(look)


@needs_filters
@pytest.mark.parametrize("call", ["fallocate", "socket"])
def test_refused_call_of_a_new_domain_is_named(where: Path, call: str) -> None:
    def look() -> None:
        refuse(call, errno.EPERM)
        refused(errno.ENOTSUP, "or a filter of system calls .seccomp., can't .*: EPERM", lambda: Domain.open(where))

    assert reap(fork(look)) == 0


@needs_filters
def test_refused_fchmod_is_named(where: Path) -> None:
    def look() -> None:
        refuse("fchmod", errno.EPERM)
        refused(errno.EPERM, "seccomp. refuses open or fchmod", lambda: Domain.open(where))

    assert reap(fork(look)) == 0


@needs_filters
def test_refused_ftruncate_is_named(where: Path) -> None:
    def look() -> None:
        domain = Domain.open(where)
        refuse("ftruncate", errno.EPERM)
        refused(errno.EPERM, "refuses ftruncate, fallocate or fcntl", lambda: dmabuf.allocate(4096, domain=domain))

    in_process(look)


@needs_filters
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("call", ["getdents64", "pread64"])
def test_refused_reading_of_a_new_domain_is_named(where: Path, call: str, number: int) -> None:
    def look() -> None:
        refuse(call, number)
        refused(number, f"open domain.*seccomp. refuses {call}.*allow {call} in the sandbox", lambda: Domain.open(where))

    assert reap(fork(look)) == 0


@needs_filters
def test_refused_getdents64_is_named_where_processes_are_looked_for(where: Path) -> None:
    def look() -> None:
        domain = Domain.open(where)
        with dmabuf.allocate(4096, name="camera", domain=domain):
            dmabuf.buffers(domain=domain)  # imports what it needs, which the importer lists directories for
            refuse("getdents64", errno.EPERM)
            for call in (lambda: dmabuf.buffers(domain=domain), lambda: dmabuf.open("camera", domain=domain)):
                refused(errno.EPERM, "/proc: .*seccomp. refuses getdents64", call)

    in_process(look)


@needs_filters
def test_refused_pread64_is_named_by_what_reads_files(where: Path) -> None:
    def look() -> None:
        domain = Domain.open(where)
        ours, theirs = socket.socketpair()
        dmabuf.send(ours, meta=b"x" * MIB)
        timeline = dmabuf.SwSync(domain=domain)
        refuse("pread64", errno.EPERM)
        says = "read: fd .*seccomp. refuses pread64.*allow pread64 in the sandbox"
        refused(errno.EPERM, says, lambda: dmabuf.recv(theirs))
        refused(errno.EPERM, says, lambda: timeline.value)

    in_process(look)


@needs_filters
def test_refused_prlimit64_is_no_limit(where: Path) -> None:
    def look() -> None:
        domain = Domain.open(where)
        refuse("prlimit64", errno.EPERM)
        dmabuf.allocate(4096, domain=domain).close()
        assert limits.limit_of(resource.RLIMIT_FSIZE) == resource.RLIM_INFINITY
        assert limits.descriptor_limit() == "unknown"
        (check,) = [check for check in machine.checks() if check.name == "descriptors"]
        assert (check.status, check.remedy) == (machine.WARNING, "allow prlimit64 in the sandbox")

    in_process(look)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can unmount /proc")
def test_what_needs_a_proc_that_is_gone_says_to_mount_it(where: Path, tmp_path: Path) -> None:
    def look() -> None:
        domain = Domain.open(where)
        buf = dmabuf.allocate(4096, domain=domain)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None) or libc.umount2(b"/proc", 2):
            os._exit(77)  # CLONE_NEWNS; MS_REC | MS_PRIVATE; MNT_DETACH
        for call in (lambda: dmabuf.SwSync(domain=domain), lambda: dmabuf.TimelineSemaphore(domain=domain), Domain.private):
            refused(errno.ENOSYS, "there is no /proc .ENOSYS.; mount it", call)
        refused(errno.ENOSYS, "there is no /proc .ENOSYS.; mount it", lambda: dmabuf.export(Memory(), 4096, domain=domain))
        refused(errno.ENOENT, "/proc/self/mountinfo.*mount /proc", lambda: dmabuf.SpillHeap(budget=MIB, directory=tmp_path))
        refused(errno.ENOENT, "/proc/meminfo.*mount /proc", dmabuf.SpillHeap)
        with buf.write() as view:
            view[0] = 1
        buf.close()

    if reap(fork(look)) == 77:
        pytest.skip("the namespace can't be unshared here")


def test_setting_that_refuses_memfds_is_named() -> None:
    assert "vm.memfd_noexec" in str(limits.no_memfd("allocate", "4096 bytes", errno.EACCES))
    assert "RLIMIT_NOFILE" in str(limits.no_memfd("allocate", "4096 bytes", errno.EMFILE))


def test_spill_file_beyond_the_limit_of_sizes_names_it(where: Path, tmp_path: Path) -> None:
    def look() -> None:
        domain, heap = Domain.open(where), dmabuf.SpillHeap(budget=4 * MIB, directory=tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB,) * 2)
        refused(errno.EFBIG, "RLIMIT_FSIZE allows a file of 1048576 bytes.*ulimit -f", lambda: heap.allocate(2 * MIB, domain=domain))
        heap.close()

    in_process(look)


# ---- paths ----


@pytest.mark.parametrize("path", ["x" * 300, "/".join(["xxxxxxxxx"] * 500)])
def test_path_that_is_too_long_says_how_long(where: Path, path: str) -> None:
    where.mkdir()
    refused(
        errno.ENAMETOOLONG, f"its path has {len(str(where)) + 1 + len(path)} bytes, and a name in it", lambda: Domain.open(where / path)
    )


def test_path_without_a_parent_names_it(where: Path) -> None:
    refused(errno.ENOENT, f"its parent directory doesn't exist.*make {where}/none", lambda: Domain.open(where / "none" / "domain"))


@pytest.mark.parametrize("path", ["a\0b", b"a\0b"])
def test_path_with_a_nul_is_refused(path: str) -> None:
    refused(errno.EINVAL, "the path has a NUL", lambda: Domain.open(path))
