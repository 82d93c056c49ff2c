"""Where a domain lives, whom it refuses, what becomes of a file that makes no sense, and what is left when everybody has gone."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import DmaBufError, _native
from dmabuf.domain import place
from tests.support.steps import Held, fork, killed_at, reap, trace

FILE = place.FILE
MIB = 1 << 20


@pytest.fixture
def where() -> Iterator[Path]:
    """A path for a domain, in memory where there is such a mount."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="place-", dir=base) as directory:
        yield Path(directory) / "domain"


def in_process(function: object) -> None:
    """Run a function in a process of its own, so that its domain is opened and left for good."""
    assert callable(function)
    assert reap(fork(function)) == 0


def visit(path: Path) -> None:
    """Open the domain, use it and leave it."""
    domain = dmabuf.Domain.open(path)
    with dmabuf.allocate(4096, domain=domain) as buf, buf.write() as view:
        view[0] = 1
    domain.leave()


def die_inside(path: Path) -> None:
    domain = dmabuf.Domain.open(path)
    buf = dmabuf.allocate(4096, domain=domain)
    with buf.write():
        os.kill(os.getpid(), signal.SIGKILL)


def left(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def refused(path: Path) -> DmaBufError:
    with pytest.raises(DmaBufError) as caught:
        dmabuf.Domain.open(path)
    return caught.value


# ---- where ----


def test_the_environment_names_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMABUF_DOMAIN", "/somewhere/else")
    assert place.default_path() == Path("/somewhere/else")


def test_an_empty_variable_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMABUF_DOMAIN", "")
    assert place.default_path().name in ("dmabuf", f"dmabuf-{os.geteuid()}")


def test_the_environment_is_ignored_with_more_rights_than_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMABUF_DOMAIN", "/somewhere/else")
    monkeypatch.setattr(place, "_secure", lambda: True)
    assert place.default_path() != Path("/somewhere/else")


def test_the_kernels_word_on_rights_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for secure in (0, 1):
        vector = tmp_path / f"auxv{secure}"
        vector.write_bytes(struct.pack("8L", 6, 4096, 23, secure, 11, 0, 0, 0))
        monkeypatch.setattr(place, "Path", lambda _, vector=vector: vector)
        assert place._secure() is bool(secure)


def test_this_process_has_no_more_rights_than_its_caller() -> None:
    assert not place._secure()


def test_the_runtime_directory_comes_first_if_it_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DMABUF_DOMAIN", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    run = Path(f"/run/user/{os.geteuid()}")
    ours = run.is_dir() and run.stat().st_uid == os.geteuid()
    assert place.default_path() == (run / "dmabuf" if ours else Path(f"/dev/shm/dmabuf-{os.geteuid()}"))


def test_the_directory_is_made_for_us_alone(where: Path) -> None:
    old = os.umask(0)
    try:
        in_process(lambda: visit(where))
    finally:
        os.umask(old)
    assert stat.S_IMODE(where.stat().st_mode) == 0o700
    assert stat.S_IMODE((where / FILE).stat().st_mode) == 0o600


def test_a_directory_that_cannot_be_made_is_its_own_errno(where: Path) -> None:
    error = refused(where / "deeper" / "still")
    assert error.errno == errno.ENOENT
    assert "DMABUF_DOMAIN" in str(error)


# ---- whom it refuses ----


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777, 0o701, 0o1700, 0o500])
def test_a_directory_of_another_mode_is_eacces(where: Path, mode: int) -> None:
    where.mkdir()
    where.chmod(mode)
    error = refused(where)
    assert error.errno == errno.EACCES
    assert f"uid {os.geteuid()}" in str(error)
    assert f"{mode:04o}" in str(error)
    assert left(where) == []
    where.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_eacces_and_says_whose(where: Path) -> None:
    where.mkdir(mode=0o700)
    os.chown(where, 12345, 12345)
    error = refused(where)
    assert error.errno == errno.EACCES
    assert "uid 12345" in str(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused_what_is_ours(where: Path) -> None:
    where.parent.chmod(0o711)
    in_process(lambda: visit(where))

    def as_somebody() -> None:
        os.setgroups([])
        os.setresgid(12345, 12345, 12345)
        os.setresuid(12345, 12345, 12345)
        assert refused(where).errno == errno.EACCES

    in_process(as_somebody)


def test_a_link_to_a_directory_is_refused(where: Path) -> None:
    real = where.with_name("real")
    real.mkdir(mode=0o700)
    where.symlink_to(real)
    assert refused(where).errno in (errno.ELOOP, errno.ENOTDIR)
    assert left(real) == []


def test_a_dangling_link_is_refused(where: Path) -> None:
    where.symlink_to(where.with_name("nothing"))
    assert refused(where).errno in (errno.ELOOP, errno.ENOTDIR)


def test_a_file_in_place_of_the_directory_is_enotdir(where: Path) -> None:
    where.write_text("a file")
    assert refused(where).errno == errno.ENOTDIR
    assert where.read_text() == "a file"


def test_a_link_in_place_of_the_domains_file_is_eloop(where: Path) -> None:
    where.mkdir(mode=0o700)
    target = where.with_name("target")
    target.write_text("somebody's")
    (where / FILE).symlink_to(target)
    with pytest.raises(OSError) as caught:
        dmabuf.Domain.open(where)
    assert caught.value.errno == errno.ELOOP
    assert target.read_text() == "somebody's"


def test_a_directory_in_place_of_the_domains_file_is_eisdir(where: Path) -> None:
    where.mkdir(mode=0o700)
    (where / FILE).mkdir()
    with pytest.raises(OSError) as caught:
        dmabuf.Domain.open(where)
    assert caught.value.errno == errno.EISDIR


# ---- files that make no sense ----


def make(path: Path, data: bytes) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    (path / FILE).write_bytes(data)


def empty_domain() -> bytes:
    fd = os.memfd_create("empty")
    try:
        place.format_file(fd, place.new_identity())
        return os.pread(fd, _native.HEADER_BYTES, 0)
    finally:
        os.close(fd)


def opened_with_a_warning(path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"corrupt.*renamed to"):
        visit(path)


def spoilt_header(at: int, data: bytes) -> bytes:
    whole = bytearray(empty_domain())
    whole[at : at + len(data)] = data
    return bytes(whole)


SPOILT = {
    "version": spoilt_header(8, struct.pack("<I", _native.VERSION + 1)),
    "magic": spoilt_header(0, b"NOTADMBF"),
    "header": spoilt_header(12, struct.pack("<I", 4096)),
    "geometry": spoilt_header(_native.OFF_GEOMETRY, b"\1\0\0\0"),
    "identity": spoilt_header(_native.OFF_ID, b"NO IDENTITY HERE"),
    "too many chunks": spoilt_header(_native.OFF_NCHUNKS, struct.pack("<I", _native.MAX_CHUNKS + 1)),
    "chunks that are not there": spoilt_header(_native.OFF_NCHUNKS, struct.pack("<I", 3)),
    "truncated": empty_domain()[: _native.HEADER_BYTES - 1],
    "one byte": b"D",
    "text": b"hello, world\n" * 1000,
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_file_that_makes_no_sense_is_set_aside(where: Path, what: str) -> None:
    make(where, SPOILT[what])
    in_process(lambda: opened_with_a_warning(where))
    assert left(where) == [FILE, FILE + ".corrupt"]
    assert (where / f"{FILE}.corrupt").read_bytes() == SPOILT[what]


def test_an_empty_file_is_no_corrupt_one(where: Path) -> None:
    make(where, b"")
    in_process(lambda: visit(where))
    assert left(where) == [FILE]


def test_at_most_one_corrupt_file_is_kept(where: Path) -> None:
    for what in ("text", "truncated", "magic"):
        make(where, SPOILT[what])
        in_process(lambda: opened_with_a_warning(where))
    assert left(where) == [FILE, FILE + ".corrupt"]
    assert (where / f"{FILE}.corrupt").read_bytes() == SPOILT["magic"]


def test_random_bytes_without_a_process_are_set_aside_or_emptied(where: Path) -> None:
    whole = empty_domain()

    def open_it() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            visit(where)

    for seed in range(40):
        rng = random.Random(seed)
        data = bytearray(whole) + rng.randbytes(rng.choice((0, 0, 1, 32768, 40000)))
        for _ in range(rng.choice((1, 8, 64))):
            start = rng.choice((rng.randrange(128), rng.randrange(len(data))))
            piece = rng.randbytes(rng.choice((1, 4, 512, 65536)))[: len(data) - start]
            data[start : start + len(piece)] = piece
        make(where, bytes(data))
        in_process(open_it)
        assert set(left(where)) <= {FILE, FILE + ".corrupt"}
        assert (where / FILE).stat().st_size <= MIB


@contextlib.contextmanager
def inhabitant(path: Path) -> Iterator[int]:
    """A process that lives in the domain."""
    r, w = os.pipe()
    there, here = os.pipe()

    def live() -> None:
        os.close(w)
        os.close(there)
        domain = dmabuf.Domain.open(path)
        buf = dmabuf.allocate(4096, domain=domain, name="inhabited")
        os.write(here, b"x")
        os.read(r, 1)
        buf.close()
        domain.leave()

    pid = fork(live)
    os.close(r)
    os.close(here)
    assert os.read(there, 1) == b"x"
    os.close(there)
    try:
        yield pid
    finally:
        os.close(w)
        reap(pid)


@pytest.mark.parametrize("what", ["magic", "version", "header", "geometry", "identity", "too many chunks"])
def test_a_header_spoilt_under_a_living_process_is_euclean_and_touches_nothing(where: Path, what: str) -> None:
    at = {"magic": 0, "version": 8, "header": 12, "geometry": _native.OFF_GEOMETRY, "identity": _native.OFF_ID}.get(
        what, _native.OFF_NCHUNKS
    )
    with inhabitant(where):
        with open(where / FILE, "r+b") as f:
            f.seek(at)
            right = f.read(4)
            f.seek(at)
            f.write(b"\xff" * 4)
            f.flush()
            error = refused(where)
            assert error.errno == errno.EUCLEAN
            assert "end the processes" in str(error)
            f.seek(at)
            f.write(right)
    assert left(where) == [FILE]


def test_random_bytes_under_a_living_process_never_hang_or_crash_an_opener(where: Path) -> None:
    def look() -> None:
        with warnings.catch_warnings(), contextlib.suppress(OSError, dmabuf.ContractError):
            warnings.simplefilter("ignore")
            domain = dmabuf.Domain.open(where)
            buf = dmabuf.allocate(4096, domain=domain)
            with buf.write(timeout=0):
                pass
            domain.sweep()
            buf.close()
            domain.leave()

    for seed in range(20):
        rng = random.Random(seed)
        with inhabitant(where) as pid:
            with open(where / FILE, "r+b") as f:
                size = os.fstat(f.fileno()).st_size
                for _ in range(rng.choice((1, 16, 200))):
                    f.seek(rng.randrange(64, size - 8))
                    f.write(rng.randbytes(8))
            in_process(look)
            os.kill(pid, signal.SIGKILL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            in_process(look)
        assert set(left(where)) <= {FILE, FILE + ".corrupt"}


# ---- when everybody has gone ----


def test_the_last_one_out_leaves_one_empty_file(where: Path) -> None:
    in_process(lambda: visit(where))
    assert left(where) == [FILE]
    assert (where / FILE).read_bytes()[:8] == _native.MAGIC.encode()
    assert (where / FILE).stat().st_size <= MIB
    assert (where / FILE).stat().st_blocks * 512 <= MIB


def test_an_interpreter_that_just_ends_leaves_one_empty_file(where: Path) -> None:
    script = "import dmabuf; buf = dmabuf.allocate(4096); t = dmabuf.Timeline(); f = [t.fence() for _ in range(3000)]; v = buf.mmap()"
    env = {**os.environ, "DMABUF_DOMAIN": str(where), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, env=env, capture_output=True, text=True)
    assert done.stderr == ""
    assert left(where) == [FILE]
    assert (where / FILE).stat().st_size <= MIB


def test_a_killed_last_process_is_cleaned_up_after_by_the_next_opener(where: Path) -> None:
    assert reap(fork(lambda: die_inside(where))) == -signal.SIGKILL
    assert (where / FILE).stat().st_size > _native.HEADER_BYTES

    def look() -> None:
        domain = dmabuf.Domain.open(where)
        assert domain.shm.rec_list() == []
        assert domain.shm.load32(_native.OFF_NCHUNKS) == 1  # the life of the opener
        domain.leave()

    in_process(look)
    assert left(where) == [FILE]
    assert (where / FILE).stat().st_size == _native.HEADER_BYTES


def test_a_domain_keeps_its_identity_when_it_is_emptied(where: Path) -> None:
    seen = set()
    for _ in range(3):
        in_process(lambda: visit(where))
        with open(where / FILE, "rb") as f:
            seen.add(place.read_header(f.fileno()))
    assert len(seen) == 1


def test_read_header_accepts_a_file_that_grows_before_each_of_its_reads(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(lambda: visit(where))
    with open(where / FILE, "r+b") as f:
        fd, chunks = f.fileno(), itertools.count(1)
        real = {"pread": os.pread, "fstat": os.fstat}

        def grown(name: str) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                count = next(chunks)  # as growth does: the memory first, the count after it
                os.ftruncate(fd, _native.HEADER_BYTES + count * _native.CHUNK_BYTES)
                os.pwrite(fd, struct.pack("<I", count), _native.OFF_NCHUNKS)
                return real[name](*arguments)

            return call

        for name in real:
            monkeypatch.setattr(place.os, name, grown(name))
        identity, wrong = place.read_header(fd)
        monkeypatch.undo()
        assert next(chunks) > 3
    assert (len(identity), wrong) == (16, "")


def come_and_go(path: Path) -> None:
    domain = dmabuf.Domain.open(path)
    domain.leave()


@pytest.mark.crash
def test_death_at_every_step_of_coming_and_going_leaves_a_domain_that_opens(where: Path) -> None:
    for prepare in (lambda: None, lambda: make(where, b""), lambda: reap(fork(lambda: die_inside(where)))):
        prepare()
        steps = trace(lambda: come_and_go(where))
        assert {"domain_filled", "domain_formatted", "domain_replaced"} & set(steps)
        for nth in range(1, len(steps) + 1):
            prepare()
            killed_at(lambda: come_and_go(where), nth)
            in_process(lambda: visit(where))
            assert [name for name in left(where) if name != FILE + ".new"] == [FILE]
            in_process(lambda: visit(where))
            assert (where / FILE).stat().st_size <= MIB


@pytest.mark.crash
def test_whoever_stands_at_the_door_sees_a_whole_domain(where: Path) -> None:
    """Held at each step of coming and going, and another one comes and goes meanwhile (once it may)."""
    for nth in itertools.count(1):
        with Held(lambda: come_and_go(where)) as first:
            if first.run_to_nth(nth) is None:
                break  # it has come and gone before
            other = fork(lambda: visit(where))
            first.go_on()
            first.release()
            assert first.code == 0
            assert reap(other) == 0
        assert left(where) == [FILE]
    assert nth > 5


@pytest.mark.crash
def test_many_who_come_and_go_at_once_find_one_domain(where: Path) -> None:
    def crowd() -> None:
        for _ in range(20):
            visit(where)
            gc.collect()

    for pid in [fork(crowd) for _ in range(6)]:
        assert reap(pid) == 0
    assert left(where) == [FILE]
    assert (where / FILE).stat().st_size <= MIB


@pytest.mark.crash
def test_an_opener_waits_for_nobody_but_who_is_at_the_door(where: Path) -> None:
    with inhabitant(where) as pid:
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        in_process(lambda: visit(where))
        os.kill(pid, signal.SIGCONT)


# ---- memory that can't be had ----


def test_a_header_that_ends_in_the_middle_of_a_page_stays_when_the_rest_is_given_back(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As it does where pages are larger than the 4 KiB that the header is a multiple of (arm64: 16 or 64 KiB).
    header, rest = _native.HEADER_BYTES + 512, 5 * _native.CHUNK_BYTES
    monkeypatch.setattr(place, "HEADER_BYTES", header)
    where.mkdir(mode=0o700)
    file = where / FILE
    file.write_bytes(b"h" * header + b"c" * rest)
    directory = place.open_directory(where)
    try:
        place._empty_file(directory)
    finally:
        os.close(directory)
    assert file.read_bytes() == b"h" * header + bytes(rest)
    assert file.stat().st_blocks * 512 < header + rest


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_full_file_system_is_enospc_with_a_remedy(where: Path) -> None:
    where.mkdir(mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k,mode=0700", "none", where], check=False, capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    try:

        def fill() -> None:
            domain = dmabuf.Domain.open(where)
            buf = dmabuf.allocate(4096, domain=domain)
            timeline = dmabuf.Timeline("full", domain=domain)
            made: list[dmabuf.DmaFence] = []
            try:
                while True:
                    made.append(timeline.fence())
            except OSError as e:
                if e.errno != errno.ENOSPC or "room" not in str(e):
                    raise
            with buf.resv.locked():
                pass
            count = len(made)
            for fence in made:
                fence.signal()
            made.clear()
            del fence
            made = [timeline.fence() for _ in range(count)]
            for fence in made:
                fence.signal()
            buf.close()
            domain.leave()

        in_process(fill)
        in_process(lambda: visit(where))
        assert left(where) == [FILE]
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_file_system_without_room_for_a_domain_is_enospc_with_a_remedy(where: Path) -> None:
    where.mkdir(mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "none", where], check=False, capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    try:
        error = refused(where)
        assert error.errno == errno.ENOSPC
        assert "DMABUF_DOMAIN" in str(error)
    finally:
        subprocess.run(["umount", where], check=True)
