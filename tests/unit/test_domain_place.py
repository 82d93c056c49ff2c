"""Where a domain lives, whom it refuses, and what becomes of a file that makes no sense."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import stat
import struct
import warnings
from pathlib import Path

import pytest

import dmabuf
from dmabuf import DmaBufError, _native
from dmabuf.domain import domain as domain_module
from dmabuf.domain import place, proved
from dmabuf.errors import fail
from tests.support.budget import some_of
from tests.support.places import FILE, MIB, in_process, inhabitant, left, make, refused, visit
from tests.support.waiting import Background

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


@pytest.fixture
def two_places(where: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The default places of a user who is logged in."""
    places = (where.with_name("run"), where.with_name("memory"))
    monkeypatch.delenv("DMABUF_DOMAIN", raising=False)
    monkeypatch.setattr(place, "default_places", lambda: list(places))
    monkeypatch.setattr(domain_module, "_default", None)  # in children, which inherit it
    return places


def test_default_places_are_two_when_the_user_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DMABUF_DOMAIN", raising=False)
    memory = Path(f"/dev/shm/dmabuf-{os.geteuid()}")
    monkeypatch.setattr(place, "_runtime_directory", lambda uid: None)
    assert place.default_places() == [memory]
    monkeypatch.setattr(place, "_runtime_directory", lambda uid: tmp_path)
    assert place.default_places() == [tmp_path / "dmabuf", memory]


def test_default_place_is_the_first_when_nobody_lives_in_either(two_places: tuple[Path, Path]) -> None:
    run, memory = two_places
    assert place.default_path() == run
    for path in (memory, run):
        in_process(lambda path=path: visit(path))
        assert place.default_path() == run


def test_default_place_stays_where_somebody_lives_after_a_login(two_places: tuple[Path, Path]) -> None:
    run, memory = two_places
    with inhabitant(memory):
        assert place.default_path() == memory
        in_process(lambda: exit_unless(dmabuf.Domain.default().path == memory))
        with inhabitant(run):
            assert place.default_path() == run
        assert place.default_path() == memory
    assert place.default_path() == run
    in_process(lambda: exit_unless(dmabuf.Domain.default().path == run))


def test_default_place_stays_where_a_forked_child_may_join(two_places: tuple[Path, Path]) -> None:
    run, memory = two_places
    r, w = os.pipe()

    def leave_a_child() -> None:
        domain = dmabuf.Domain.open(memory)
        if not os.fork():
            os.close(w)
            os.read(r, 1)  # it has not used the library since the fork
            os._exit(0)
        domain.leave()

    in_process(leave_a_child)
    assert place.lived_in(memory)
    assert place.default_path() == memory
    os.close(w)
    os.close(r)
    os.wait()  # the orphan is this process's (tests/plugin.py)
    assert place.default_path() == run


def exit_unless(expected: bool) -> None:
    assert expected


@pytest.mark.parametrize("mode", [0o755, 0o000])
def test_default_place_of_another_mode_is_not_lived_in(two_places: tuple[Path, Path], mode: int) -> None:
    run, memory = two_places
    memory.mkdir()
    memory.chmod(mode)
    assert not place.lived_in(memory)
    assert place.default_path() == run
    memory.chmod(0o700)


def test_lived_in_makes_nothing(where: Path) -> None:
    assert not place.lived_in(where)
    assert not where.exists()
    where.mkdir(mode=0o700)
    assert not place.lived_in(where)
    assert left(where) == []


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EROFS])
def test_default_domain_is_in_the_second_place_when_the_first_never_works(
    two_places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run, memory = two_places
    real = proved.prove

    def prove(directory: int, path: Path) -> proved.Proof:
        if path == run:
            raise fail(number, "open domain", path)
        return real(directory, path)

    monkeypatch.setattr(proved, "prove", prove)
    in_process(lambda: exit_unless(dmabuf.Domain.default().path == memory))
    assert left(run) == []
    assert left(memory) == [FILE]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_default_domain_is_an_error_when_the_first_place_may_work_later(
    two_places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def prove(directory: int, path: Path) -> proved.Proof:
        raise fail(number, "open domain", path)

    def refused_default() -> None:
        with pytest.raises(DmaBufError) as caught:
            dmabuf.Domain.default()
        assert caught.value.errno == number

    monkeypatch.setattr(proved, "prove", prove)
    in_process(refused_default)
    assert not two_places[1].exists()


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


def test_domain_is_one_object_by_whatever_path(where: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(where.parent)
    domain = dmabuf.Domain.open(where)
    assert dmabuf.Domain.open(tmp_path / "link" / where.name) is domain
    assert dmabuf.Domain.open(where.parent / ".." / where.parent.name / where.name) is domain
    domain.leave()


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


def opened_by_the_hook_too(where: Path) -> None:
    seen: list[dmabuf.Domain] = []

    def hook(*_: object, **__: object) -> None:
        with Background(lambda: seen.append(dmabuf.Domain.open(where))):
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = hook
        domain = dmabuf.Domain.open(where)
    assert seen == [domain]
    domain.leave()


def test_warning_of_a_corrupt_file_runs_its_hook_under_no_lock(where: Path) -> None:
    make(where, SPOILT["text"])
    in_process(lambda: opened_by_the_hook_too(where))
    assert left(where) == [FILE, FILE + ".corrupt"]


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

    for seed in some_of(40, quick=15):
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


@pytest.mark.parametrize("what", ["magic", "version", "header", "geometry", "identity", "too many chunks"])
def test_corrupt_header_under_a_living_process_is_euclean(where: Path, what: str) -> None:
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

    for seed in some_of(20, quick=8):
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
