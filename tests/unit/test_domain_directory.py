"""What stands in a domain's directory is looked at before it is used, whatever the umask, the parent and other programs made of it."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf.domain import directory as things
from dmabuf.domain import place
from dmabuf.sharing.server import Server
from tests.support.budget import some_of
from tests.support.places import FILE, in_process, inhabitant, left, make, refused, visit
from tests.support.steps import fork, killed_at, reap, trace

# ---- what may stand at a name ----


def fifo(at: Path) -> None:
    os.mkfifo(at, 0o600)


def folder(at: Path) -> None:
    at.mkdir()


def link(at: Path) -> None:
    target = at.parent.with_name("target")
    target.write_text("somebody's")
    at.symlink_to(target)


def dangling(at: Path) -> None:
    at.symlink_to(at.parent.with_name("nothing"))


def hard_link(at: Path) -> None:
    target = at.parent.with_name("target")
    target.write_text("somebody's")
    os.link(target, at)


def bound(at: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(at))


def device(at: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can make a device")
    os.mknod(at, 0o600 | stat.S_IFCHR, os.makedev(1, 3))


def given(at: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    at.write_text("somebody's")
    os.chown(at, 12345, 12345)


THINGS = {
    "fifo": (fifo, errno.EUCLEAN, "a FIFO"),
    "directory": (folder, errno.EISDIR, "a directory"),
    "link": (link, errno.ELOOP, "a link"),
    "dangling link": (dangling, errno.ELOOP, "a link"),
    "hard link": (hard_link, errno.EUCLEAN, "2 names"),
    "socket": (bound, errno.EUCLEAN, "a socket"),
    "device": (device, errno.EUCLEAN, "a device"),
    "file of another user": (given, errno.EACCES, "uid 12345"),
}
each_thing = pytest.mark.parametrize("what", THINGS)


def state(path: Path) -> dict[str, tuple[int, int, int]]:
    """What stands in a directory, and beside it."""
    found = {}
    for one in [*path.iterdir(), *path.parent.iterdir()]:
        st = one.lstat()
        found[one.name] = (st.st_ino, st.st_mode, st.st_size if stat.S_ISREG(st.st_mode) else 0)
    return found


@each_thing
def test_thing_in_place_of_the_domains_file_is_refused_and_stays(where: Path, what: str) -> None:
    stand, number, says = THINGS[what]
    where.mkdir(mode=0o700)
    stand(where / FILE)
    before = state(where)
    error = refused(where)
    assert error.errno == number
    assert says in str(error)
    assert str(where / FILE) in str(error)
    assert "DMABUF_DOMAIN" in str(error)
    assert state(where) == before


@each_thing
def test_thing_in_place_of_the_fresh_file_is_refused_and_stays(where: Path, what: str) -> None:
    stand, number, says = THINGS[what]
    where.mkdir(mode=0o700)
    stand(where / f"{FILE}.new")
    before = state(where)
    error = refused(where)
    assert error.errno == number
    assert says in str(error)
    after = state(where)
    assert after.pop(FILE)[2] == 0
    assert after == before


def test_fresh_file_of_a_dead_process_is_replaced(where: Path) -> None:
    where.mkdir(mode=0o700)
    (where / f"{FILE}.new").write_bytes(b"half")
    in_process(lambda: visit(where))
    assert left(where) == [FILE]


def test_directory_in_place_of_the_corrupt_file_is_an_error_that_says_so(where: Path) -> None:
    make(where, b"no domain")
    (where / f"{FILE}.corrupt").mkdir()
    (where / f"{FILE}.corrupt" / "something").write_text("somebody's")
    error = refused(where)
    assert error.errno in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST)
    assert f"{FILE}.corrupt" in str(error)
    assert (where / FILE).read_bytes() == b"no domain"
    assert (where / f"{FILE}.corrupt" / "something").read_text() == "somebody's"


FOREIGN = [
    "server-notes.txt",
    "server-",
    "server-0000000g",
    "sync-",
    "sync-notes.txt",
    "sync-0123456789abcdef-0123456789abcdef.txt",
    "sync-0123456789abcdef-0123456789abcde.done",
    "proof-",
    "domain-0",
    ".hidden",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_name_is_left_alone(where: Path, name: str) -> None:
    def use() -> None:
        domain = dmabuf.Domain.open(where)
        timeline = dmabuf.Timeline("t", domain=domain)
        fence = timeline.fence()
        sync_file = dmabuf.SyncFile(fence)
        sync_file.fileno()
        fence.signal()
        domain.sweep()
        sync_file.close()
        domain.leave()

    in_process(lambda: visit(where))
    (where / name).write_text("somebody's")
    in_process(use)
    in_process(lambda: visit(where))
    assert (where / name).read_text() == "somebody's"
    assert left(where) == sorted([FILE, name])


@each_thing
def test_thing_among_the_sync_files_hangs_nobody(where: Path, what: str) -> None:
    """At each name that a sync file may have: those who sweep and those who reap go on, and other sync files become readable."""
    stand, _, _ = THINGS[what]
    where.mkdir(mode=0o700)
    stem = "sync-0123456789abcdef-0123456789abcdef"
    for ending in ("0000000000000001", "done", "sock", "new01234567"):
        stand(where / f"{stem}.{ending}")
        for name in ("target", "nothing"):
            with contextlib.suppress(FileNotFoundError):
                (where.parent / name).unlink()

    def use() -> None:
        domain = dmabuf.Domain.open(where)
        fence = dmabuf.Timeline("t", domain=domain).fence()
        sync_file = dmabuf.SyncFile(fence)
        fd = sync_file.fileno()
        pid = fork(lambda: (domain.join(), os.kill(os.getpid(), signal.SIGKILL)))
        reap(pid)
        domain.sweep()
        fence.signal()
        assert select.select([fd], [], [], 60)[0]
        sync_file.close()
        domain.leave()

    in_process(use)


@each_thing
def test_thing_in_place_of_a_server_socket_is_eaddrinuse_and_stays(where: Path, what: str) -> None:
    stand, _, _ = THINGS[what]

    def use() -> None:
        domain = dmabuf.Domain.open(where)
        at = where / place.socket_name(domain.life)
        stand(at)
        before = at.lstat()
        if what == "socket":  # of a dead process: nobody else has this name
            Server(domain)
            assert at.lstat().st_ino != before.st_ino
        else:
            with pytest.raises(dmabuf.DmaBufError) as caught:
                Server(domain)
            assert caught.value.errno == errno.EADDRINUSE
            assert str(at) in str(caught.value)
            assert (at.lstat().st_ino, at.lstat().st_mode) == (before.st_ino, before.st_mode)
        domain.leave()
        assert os.path.lexists(at) == (what != "socket")

    in_process(use)


# ---- the umask and the parent ----


def as_user(function: Callable[[], object]) -> None:
    """Run a function in a process that is not root's, to which rights mean something."""

    def lower() -> None:
        if not os.geteuid():
            os.setgroups([])
            os.setresgid(12345, 12345, 12345)
            os.setresuid(12345, 12345, 12345)

    assert reap(fork(function, lower)) == 0


@pytest.fixture
def open_to_all(where: Path) -> Iterator[Path]:
    where.parent.chmod(0o777)
    yield where
    where.parent.chmod(0o700)


UMASKS = [0, 0o022, 0o077, 0o177, 0o277, 0o377, 0o477, 0o577, 0o677, 0o777]


@pytest.mark.parametrize("mask", UMASKS, ids=oct)
def test_domain_works_with_every_umask(open_to_all: Path, mask: int) -> None:
    where = open_to_all

    def use() -> None:
        os.umask(mask)
        domain = dmabuf.Domain.open(where)
        assert stat.S_IMODE(where.stat().st_mode) == 0o700
        assert stat.S_IMODE((where / FILE).stat().st_mode) == 0o600
        fence = dmabuf.Timeline("t", domain=domain).fence()
        sync_file = dmabuf.SyncFile(fence)
        fd = sync_file.fileno()
        assert reap(fork(lambda: os._exit(bool(select.select([fd], [], [], 0)[0])))) == 0
        fence.signal()
        assert select.select([fd], [], [], 60)[0]
        sync_file.close()
        visit(where)
        domain.leave()

    as_user(use)
    as_user(lambda: visit(where))
    assert left(where) == [FILE]
    assert left(where.parent) == [where.name]


def test_directory_keeps_the_setgid_bit_of_its_parent(where: Path) -> None:
    where.parent.chmod(0o2770)
    in_process(lambda: visit(where))
    assert stat.S_IMODE(where.stat().st_mode) == 0o2700
    in_process(lambda: visit(where))


@pytest.mark.crash
@pytest.mark.parametrize("mask", [0o022, 0o777], ids=oct)
def test_next_process_opens_after_death_while_the_directory_is_made(open_to_all: Path, mask: int) -> None:
    where = open_to_all

    def all_deaths() -> None:
        os.umask(mask)
        steps = trace(lambda: dmabuf.Domain.open(where.with_name("traced")).leave())
        assert ("directory_made" in steps) == bool(mask & 0o700)
        for nth in some_of(len(steps), quick=10):
            path = where.with_name(f"killed-{nth}")
            killed_at(lambda path=path: dmabuf.Domain.open(path).leave(), nth)
            assert reap(fork(lambda path=path: visit(path))) == 0

    as_user(all_deaths)


def test_file_that_its_dead_maker_left_without_rights_is_opened(open_to_all: Path) -> None:
    where = open_to_all

    def leave_it() -> None:
        where.mkdir(mode=0o700)
        os.close(os.open(where / FILE, os.O_CREAT | os.O_RDWR, 0))

    as_user(leave_it)
    as_user(lambda: visit(where))
    assert stat.S_IMODE((where / FILE).stat().st_mode) == 0o600


def test_umask_is_read_without_changing_it() -> None:
    old = os.umask(0o027)
    try:
        assert things._umask() == 0o027
    finally:
        os.umask(old)


def test_a_process_lives_on_while_things_appear_and_go(where: Path) -> None:
    with inhabitant(where):
        fifo(where / "sync-0123456789abcdef-0123456789abcdef.0000000000000001")
        in_process(lambda: visit(where))
        (where / "sync-0123456789abcdef-0123456789abcdef.0000000000000001").unlink(missing_ok=True)
    assert left(where) == [FILE]
