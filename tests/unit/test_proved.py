"""What a domain needs of its place is tried, and what keeps a life's lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import _native
from dmabuf.domain import lives, place, proved
from dmabuf.domain.ofd import ofd_lock, ofd_locked, reopen
from tests.support.budget import times
from tests.support.mounts import mounted
from tests.support.places import in_process, left
from tests.support.scenarios import Ghost
from tests.support.steps import fork, killed_at, reap, trace
from tests.support.waiting import until

BYTE = 1 << 40


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, 4096)
    yield fd
    os.close(fd)


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A directory on overlayfs, as the root of a container is."""
    with mounted("overlay", tmp_path / "merged", base=tmp_path) as path:
        yield path


def held(fd: int, by_thread: bool = False) -> proved.Hold:
    """Hold the lock on BYTE. ``by_thread``: as on overlayfs, what is mapped is another file."""
    own = _native.OwnedFd(os.memfd_create("below") if by_thread else reopen(fd))
    if by_thread:
        os.ftruncate(own.fileno(), 4096)
    assert own.set_lock(fcntl.F_WRLCK, BYTE)
    hold = proved.Hold(own, fd, BYTE)
    assert hold.by_thread == by_thread
    assert own.number == -1
    return hold


# ---- what keeps a lock ----


@pytest.mark.parametrize("by_thread", [False, True])
def test_hold_keeps_the_lock_until_it_is_dropped(file: int, by_thread: bool) -> None:
    hold = held(file, by_thread)
    assert ofd_locked(file, BYTE)
    assert not ofd_locked(file, BYTE + 1)
    hold.drop()
    assert not ofd_locked(file, BYTE)
    hold.drop()


def test_hold_uses_a_thread_on_overlayfs(overlay: Path) -> None:
    fd = os.open(overlay / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, 4096)
    own = _native.OwnedFd(reopen(fd))
    assert own.set_lock(fcntl.F_WRLCK, BYTE)
    hold = proved.Hold(own, fd, BYTE)
    assert hold.by_thread
    assert ofd_locked(fd, BYTE)
    hold.drop()
    assert not ofd_locked(fd, BYTE)
    os.close(fd)


def test_hold_reports_enotsup_with_file_system_and_remedy(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(own: _native.OwnedFd, fd: int, byte: int, hold: object) -> None:
        own.close()
        raise OSError(errno.ENOTSUP, "lost")

    monkeypatch.setattr(proved, "hold_keep", lost)
    with pytest.raises(dmabuf.DmaBufError) as caught:
        held(file)
    assert caught.value.errno == errno.ENOTSUP
    assert str(proved.file_system(file)) in str(caught.value)
    assert f"/dev/shm/dmabuf-{os.geteuid()}" in str(caught.value)


def test_hold_releases_the_lock_when_the_thread_cannot_start(file: int) -> None:
    def child() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        if not os.geteuid():
            os.setresuid(12345, 12345, 12345)
        with pytest.raises(dmabuf.DmaBufError, match="a thread can't keep it"):
            held(file, by_thread=True)
        assert not ofd_locked(file, BYTE)

    os.chmod(f"/proc/self/fd/{file}", 0o666)
    assert reap(fork(child)) == 0


def ends_the_hold(file: int, by_thread: bool, end: Callable[[], object]) -> None:
    """The lock ends with the process, although a child of it that inherited everything lives on."""
    ready, go = os.pipe(), os.pipe()

    def parent() -> None:
        held(file, by_thread)
        if not os.fork():
            os.close(ready[0])
            os.close(go[1])
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        end()

    pid = fork(parent)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ofd_lock(file, 1, BYTE)  # F_WRLCK: nobody has it
    ofd_lock(file, 2, BYTE)
    os.close(go[1])
    reap(pid)
    for fd in (*ready, go[0]):
        os.close(fd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, 0)  # the orphan is this process's (tests/plugin.py)


@pytest.mark.parametrize("by_thread", [False, True])
@pytest.mark.parametrize("end", ["_exit", "kill"])
def test_held_lock_ends_with_its_process_not_with_its_children(file: int, by_thread: bool, end: str) -> None:
    ends_the_hold(file, by_thread, (lambda: os._exit(0)) if end == "_exit" else (lambda: os.kill(os.getpid(), signal.SIGKILL)))


@pytest.mark.parametrize("by_thread", [False, True])
def test_held_lock_stays_when_every_descriptor_is_closed(file: int, by_thread: bool) -> None:
    ready, go = os.pipe(), os.pipe()

    def child() -> None:
        hold = held(file, by_thread)
        os.dup2(ready[1], 0)
        os.dup2(go[0], 1)
        os.closerange(2, 4096)
        os.write(0, b"x")
        os.read(1, 1)
        assert hold.by_thread == by_thread

    pid = fork(child)
    os.read(ready[0], 1)
    assert ofd_locked(file, BYTE)
    os.close(go[1])
    os.close(go[0])
    assert reap(pid) == 0
    assert not ofd_locked(file, BYTE)
    for fd in ready:
        os.close(fd)


@pytest.mark.parametrize("by_thread", [False, True])
def test_held_lock_ends_with_exec(file: int, by_thread: bool) -> None:
    there, here = os.pipe()
    r, w = os.pipe()

    def child() -> None:
        held(file, by_thread)
        os.dup2(r, 0)
        os.dup2(here, 1)
        os.close(w)
        os.execv("/bin/sh", ["sh", "-c", "echo ready; read line"])

    pid = fork(child)
    os.close(here)
    assert os.read(there, 5) == b"ready"
    assert not ofd_locked(file, BYTE)
    os.close(w)
    reap(pid)
    os.close(there)
    os.close(r)


def test_hold_by_thread_keeps_nothing_else_open(file: int) -> None:
    r, w = os.pipe()
    hold = held(file, by_thread=True)
    os.close(w)
    assert os.read(r, 1) == b""
    os.close(r)
    hold.drop()


# ---- the end of a life that a thread keeps ----


@pytest.fixture
def overlaid(overlay: Path) -> Iterator[dmabuf.Domain]:
    domain = dmabuf.Domain.open(overlay / "domain")
    yield domain
    domain.leave()


def test_life_by_thread_is_reaped_when_its_process_has_stopped(overlaid: dmabuf.Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(lives.time, "monotonic", lambda: now)
    ghost = Ghost(overlaid)
    life = ghost.live()
    assert ghost.shm.load64(lives.slot_offset(lives.index_of(life)) + _native.LIFE_START) & proved.BY_THREAD
    ghost.die()  # the lock is free, and the process that the slot names runs: as in the last moment of a dying process
    index = lives.index_of(life)
    assert not lives.reap(overlaid.shm, index, lambda _: None)
    now += proved.DYING_S / 2
    assert not lives.reap(overlaid.shm, index, lambda _: None)
    assert index in lives.alive_slots(overlaid.shm)
    now += proved.DYING_S / 2  # it has executed another program
    assert lives.reap(overlaid.shm, index, lambda _: None)
    assert index not in lives.alive_slots(overlaid.shm)


def test_life_by_thread_of_a_killed_process_is_reaped_at_once(overlaid: dmabuf.Domain) -> None:
    def die() -> None:
        assert overlaid.join().load64(lives.slot_offset(lives.index_of(overlaid.life)) + _native.LIFE_START) & proved.BY_THREAD
        os.kill(os.getpid(), signal.SIGKILL)

    pid = fork(die)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert overlaid.reap_dead() == 1  # while it is a zombie
    assert reap(pid) == -signal.SIGKILL


@pytest.mark.crash
def test_life_by_thread_is_reaped_only_when_no_thread_writes_any_more(overlaid: dmabuf.Domain) -> None:
    with dmabuf.allocate(4096, domain=overlaid) as buf, buf.mmap() as mapping:
        view = memoryview(mapping).cast("Q")

        def write() -> None:
            overlaid.join()
            while True:
                view[0] += 1

        for _ in range(times(quick=10, full=200)):
            start = view[0]
            pid = fork(write)
            until(lambda start=start: view[0] > start + 1000)
            os.kill(pid, signal.SIGKILL)
            while not overlaid.reap_dead():
                os.sched_yield()
            seen = view[0]
            os.waitpid(pid, 0)
            assert view[0] == seen
        view.release()


def test_life_by_mapping_is_reaped_while_its_process_runs(domain: dmabuf.Domain) -> None:
    ghost = Ghost(domain)
    life = ghost.live()
    ghost.die()
    assert lives.reap(domain.shm, lives.index_of(life), lambda _: None)


def test_still_runs_tells_a_process_from_another_with_its_number() -> None:
    mine = proved.process(os.getpid())
    assert mine is not None
    assert proved.still_runs(os.getpid(), mine.start)
    assert proved.still_runs(os.getpid(), mine.start | proved.BY_THREAD)
    assert not proved.still_runs(os.getpid(), mine.start + 1)
    assert not proved.still_runs(0, mine.start)


# ---- the place ----


@pytest.fixture
def directory(where: Path) -> Iterator[int]:
    with place.open_directory(where) as own:
        yield own.number


def test_prove_accepts_memory_and_leaves_nothing(directory: int, where: Path) -> None:
    assert proved.prove(directory, where) == (proved.file_system(directory), False)
    assert left(where) == []


@pytest.mark.crash
def test_domain_is_made_after_death_while_its_place_is_proved(where: Path) -> None:
    steps = trace(lambda: dmabuf.Domain.open(where).leave())
    assert steps.count("place_tried") == len(ATTEMPTS)
    for nth in [i + 1 for i, step in enumerate(steps) if step == "place_tried"]:
        path = where.with_name(f"killed-{nth}")
        killed_at(lambda path=path: dmabuf.Domain.open(path).leave(), nth)
        assert any(name.startswith(proved.PROOF) for name in left(path))
        foreign = path / "proof-of-something"
        foreign.write_text("somebody's")
        in_process(lambda path=path: dmabuf.Domain.open(path).leave())
        assert left(path) == [place.FILE, foreign.name]


def test_prove_accepts_overlayfs(overlay: Path) -> None:
    with place.open_directory(overlay / "domain") as own:
        assert proved.prove(own.number, overlay / "domain") == (("overlay", str(overlay)), True)
    assert left(overlay / "domain") == []


def test_prove_refuses_ramfs_which_cannot_allocate(tmp_path: Path) -> None:
    with mounted("ramfs", tmp_path / "ramfs") as path:
        with pytest.raises(dmabuf.DmaBufError) as caught:
            dmabuf.Domain.open(path / "domain")
        assert caught.value.errno == errno.ENOTSUP
        assert f"ramfs at {path}" in str(caught.value)
        assert "fallocate" in str(caught.value)
        assert f"/dev/shm/dmabuf-{os.geteuid()} " not in str(caught.value).split(";")[0]
        assert left(path / "domain") == []


ATTEMPTS = [what for what, _ in proved._ATTEMPTS]


@pytest.mark.parametrize("nth", range(len(ATTEMPTS)), ids=ATTEMPTS)
def test_prove_is_enotsup_naming_what_is_missing(directory: int, where: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    def attempt(directory: int, name: str, fds: list[_native.OwnedFd]) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    attempts = list(proved._ATTEMPTS)
    attempts[nth] = (attempts[nth][0], attempt)
    monkeypatch.setattr(proved, "_ATTEMPTS", tuple(attempts))
    with pytest.raises(dmabuf.DmaBufError) as caught:
        proved.prove(directory, where)
    assert caught.value.errno == errno.ENOTSUP
    assert ATTEMPTS[nth] in str(caught.value)
    assert str(proved.file_system(directory)) in str(caught.value)
    assert "tmpfs in DMABUF_DOMAIN" in str(caught.value)
    assert left(where) == []


def stale_mapping(real: Callable[..., mmap.mmap]) -> Callable[..., object]:
    return lambda fd, length: real(-1, length)  # private memory in place of the file


@pytest.mark.parametrize(
    ("says", "name", "broken"),
    [
        ("has no mappings that processes share", "mmap", type("mmap", (), {"mmap": staticmethod(stale_mapping(mmap.mmap))})),
        ("has no locks", "ofd_locked", lambda *_: False),
        ("has no locks", "ofd_lock", lambda *_: True),
        ("can't free a part", "punch", lambda *_: None),
        ("can't allocate", "allocate_range", lambda *_: None),
    ],
)
def test_prove_notices_a_place_that_only_pretends(
    directory: int, where: Path, monkeypatch: pytest.MonkeyPatch, says: str, name: str, broken: object
) -> None:
    monkeypatch.setattr(proved, name, broken)
    with pytest.raises(dmabuf.DmaBufError, match=says):
        proved.prove(directory, where)
    assert left(where) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EROFS, errno.EACCES])
def test_prove_keeps_the_errno_of_what_can_be_mended(directory: int, where: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def attempt(directory: int, name: str, fds: list[_native.OwnedFd]) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(proved, "_ATTEMPTS", (("fails", attempt),))
    with pytest.raises(dmabuf.DmaBufError) as caught:
        proved.prove(directory, where)
    assert caught.value.errno == number


def test_file_system_names_the_mount(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "here") as path:
        fd = os.open(path, os.O_RDONLY)
        assert proved.file_system(fd) == ("tmpfs", str(path))
        os.close(fd)


def test_file_system_is_unknown_of_a_bad_descriptor() -> None:
    assert str(proved.file_system(1 << 20)) == "an unknown file system"


def test_domain_on_overlayfs_excludes_and_notices_deaths(overlay: Path) -> None:
    script = """
import errno, os, signal, sys
import dmabuf
with dmabuf.allocate(4096) as buf:
    with buf.write():
        pid = os.fork()
        if not pid:
            try:
                with buf.read(timeout=0.1):
                    os._exit(1)
            except TimeoutError:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    pid = os.fork()
    if not pid:
        with buf.write():
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        with buf.read(timeout=30):
            sys.exit("granted")
    except OSError as e:
        assert e.errno == errno.EOWNERDEAD
"""
    env = {**os.environ, "DMABUF_DOMAIN": str(overlay / "d"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", script], check=True, env=env)
