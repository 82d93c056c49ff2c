"""What `dmabuf doctor` looks at."""

import errno
import grp
import os
from pathlib import Path

import pytest

from dmabuf import _native
from dmabuf.domain import limits, proved
from dmabuf.heap import budget
from dmabuf.observe import machine
from dmabuf.observe.machine import MISSING, OK, WARNING, Check, checks
from dmabuf.observe.units import age, size
from tests.support.mounts import mounted


def named(found: list[Check], name: str) -> Check:
    (check,) = (check for check in found if check.name == name)
    return check


def file_system(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return str(proved.file_system(fd))
    finally:
        os.close(fd)


def test_here_everything_required_is_there() -> None:
    found = checks()
    assert [check.name for check in found if check.required] == ["kernel", "/proc", "memfd", "OFD locks", "domain"]
    assert all(check.status == OK for check in found if check.required)


def test_what_is_not_ok_has_a_remedy() -> None:
    for check in checks():
        assert check.detail
        assert check.status in (OK, MISSING, WARNING)
        assert check.remedy or check.status != MISSING


def test_the_cost_of_a_wake_is_measured_and_affinity_put_back() -> None:
    before = os.sched_getaffinity(0)
    assert "µs" in named(checks(), "cpus").detail
    assert os.sched_getaffinity(0) == before


def test_a_domain_that_could_be_made_is_ok_and_not_made(tmp_path: Path) -> None:
    check = named(checks(domain_path=tmp_path / "new"), "domain")
    assert (check.status, check.required) == (OK, True)
    assert not (tmp_path / "new").exists()


def test_domain_is_tried_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "domain").mkdir(mode=0o700)
    kind = file_system(tmp_path)
    for path in (tmp_path / "domain", tmp_path / "new"):
        check = named(checks(domain_path=path), "domain")
        assert check.status == OK
        assert f" on {kind}" in check.detail
    assert [p.name for p in tmp_path.rglob("*")] == ["domain"]


def test_domain_on_overlayfs_is_ok_and_says_what_keeps_the_locks(tmp_path: Path) -> None:
    with mounted("overlay", tmp_path / "merged", base=tmp_path) as path:
        check = named(checks(domain_path=path / "domain"), "domain")
        assert check.status == OK
        assert f"overlay at {path}" in check.detail
        assert "a thread of each process keeps its lock" in check.detail


def test_domain_where_it_cannot_work_is_missing_and_names_what_and_a_remedy(tmp_path: Path) -> None:
    with mounted("ramfs", tmp_path / "ramfs") as path:
        check = named(checks(domain_path=path / "domain"), "domain")
        assert check.status == MISSING
        assert check.required
        assert f"ramfs at {path}" in check.detail
        assert "fallocate" in check.detail
        assert "DMABUF_DOMAIN" in check.remedy
        assert check.remedy not in check.detail


def test_default_domain_is_ok_in_the_second_place_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DMABUF_DOMAIN")
    memory = tmp_path / "memory"
    with mounted("ramfs", tmp_path / "run") as run:
        monkeypatch.setattr(machine.place, "default_places", lambda: [run / "dmabuf", memory])
        check = named(checks(), "domain")
        assert check.status == OK
        assert check.detail.startswith(str(memory))
        assert f"ramfs at {run}" in check.detail
        monkeypatch.setattr(machine.place, "default_places", lambda: [run / "dmabuf"])
        assert named(checks(), "domain").status == MISSING


def test_inotify_that_is_refused_is_missing_but_not_required(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(checks(), "inotify").status == OK

    def refused() -> object:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(machine, "watch_open", refused)
    check = named(checks(), "inotify")
    assert (check.status, check.required) == (MISSING, False)
    monkeypatch.setattr(machine, "watch_open", _native.watch_open)
    monkeypatch.setattr(machine, "watch_read", lambda watch: b"")
    assert named(checks(), "inotify").status == MISSING


def test_deaths_that_nobody_can_hear_of_are_looked_for_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    found = named(checks(), "deaths")
    assert (found.status, found.required, found.remedy) == (OK, False, "")

    def refused(fd: int) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(machine, "hears_closes", refused)
    found = named(checks(), "deaths")
    assert (found.status, found.required) == (WARNING, False)
    assert "25 times a second, because it can't hear of them (EMFILE" in found.detail
    assert "fs.inotify.max_user_instances" in found.remedy
    monkeypatch.setattr(machine, "hears_closes", lambda fd: False)
    assert named(checks(), "deaths").status == WARNING


def test_a_directory_that_others_may_read_is_no_domain(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    check = named(checks(domain_path=tmp_path), "domain")
    assert check.status == MISSING
    assert "mode 0755" in check.detail
    assert "DMABUF_DOMAIN" in check.remedy


def test_a_file_is_no_domain(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is not a directory" in named(checks(domain_path=tmp_path / "file"), "domain").detail


def test_a_link_is_no_domain(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert named(checks(domain_path=tmp_path / "link"), "domain").status == MISSING


def test_a_domain_without_a_parent_can_not_be_made(tmp_path: Path) -> None:
    check = named(checks(domain_path=tmp_path / "no" / "domain"), "domain")
    assert check.status == MISSING
    assert f"there is no {tmp_path / 'no'}" in check.detail


def test_without_proc_something_required_is_missing(tmp_path: Path) -> None:
    check = named(checks(proc=tmp_path), "/proc")
    assert (check.status, check.required) == (MISSING, True)
    assert "mount" in check.remedy


@pytest.mark.parametrize("name", ["udmabuf", "dma_heap", "dri", "video"])
def test_a_device_that_is_not_there_is_missing_but_not_required(tmp_path: Path, name: str) -> None:
    check = named(checks(dev=tmp_path), name)
    assert (check.status, check.required) == (MISSING, False)
    assert check.remedy


@pytest.mark.parametrize("name", ["udmabuf", "dma_heap/system", "dri/card0", "dri/renderD128", "video0"])
def test_a_device_that_may_be_opened_is_ok(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert named(checks(dev=tmp_path), name).status == OK


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_a_device_that_may_not_be_opened_names_who_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    node = tmp_path / "video0"
    node.touch()
    node.chmod(mode)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    check = named(checks(dev=tmp_path), "video0")
    assert check.status == MISSING
    assert "no permission" in check.detail
    assert ("usermod -aG" if mode == 0o660 and os.getgid() else "chgrp video") in check.remedy


@pytest.mark.parametrize("member", [True, False])
@pytest.mark.parametrize(
    ("name", "group"), [("udmabuf", "kvm"), ("dma_heap/system", "video"), ("dri/card0", "video"), ("dri/renderD128", "render")]
)
def test_a_device_of_root_alone_names_the_usual_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, group: str, member: bool
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch(mode=0o600)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    usual = grp.struct_group((group, "x", 4711, []))
    monkeypatch.setattr(grp, "getgrnam", {group: usual}.__getitem__)
    monkeypatch.setattr(os, "getgroups", lambda: [4711] if member else [])
    remedy = named(checks(dev=tmp_path), name).remedy
    assert f"chgrp {group} " in remedy
    assert (f"usermod -aG {group} " in remedy) == (not member)


@pytest.mark.parametrize(
    ("size_limit", "list_limit", "says"),
    [
        ("64", "1024", "up to 64.0 MiB a buffer of at most 1024 ranges"),
        ("2147483647", "-1", "of at most 4294967295 ranges"),
        ("-1", "1024", "memfds"),
        (None, None, "memfds"),
    ],
    ids=["default", "lifted", "size lifted", "not loaded"],
)
def test_the_limits_of_udmabuf_are_told(tmp_path: Path, size_limit: str | None, list_limit: str | None, says: str) -> None:
    (tmp_path / "udmabuf").touch()
    if size_limit is not None and list_limit is not None:
        (tmp_path / "size_limit_mb").write_text(size_limit + "\n")
        (tmp_path / "list_limit").write_text(list_limit + "\n")
    assert says in named(checks(dev=tmp_path, parameters=tmp_path), "udmabuf").detail


def test_a_proc_that_shows_processes_only_is_named(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    check = named(checks(proc=tmp_path), "OFD locks")
    assert (check.status, check.detail) == ("missing", f"{tmp_path} shows processes only, and not locks")
    assert "subset=pid" in check.remedy


def test_memory_that_cannot_be_read_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def least(_: object) -> object:
        raise limits.no_proc("allocate", "/proc/meminfo", errno.ENOENT)

    monkeypatch.setattr(budget.Budget, "least", least)
    check = named(checks(), "memory")
    assert (check.status, check.required) == ("missing", True)
    assert "subset=pid" in check.remedy
    assert "subset=pid" not in check.detail


def test_a_pid_namespace_is_recognised(tmp_path: Path) -> None:
    assert named(checks(proc=tmp_path), "pid namespace").detail == "the kernel has none"
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").touch()
    assert "a separate one" in named(checks(proc=tmp_path), "pid namespace").detail


def test_a_user_namespace_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "uid_map").write_text("         0       1000          1\n")
    assert "a separate one" in named(checks(proc=tmp_path), "user namespace").detail


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (4 << 20, "4.0 MiB"), ((1 << 30) - 1, "1.0 GiB"), (3 << 60, "3.0 EiB")],
)
def test_sizes_in_words(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (-1, "0 ms"),
        (4_000_000, "4 ms"),
        (999_900_000, "1.0 s"),
        (61 * 10**9, "61 s"),
        (600 * 10**9, "10 min"),
        (7200 * 10**9, "2 h"),
        (3 * 86400 * 10**9, "3 d"),
    ],
)
def test_times_in_words(ns: int, text: str) -> None:
    assert age(ns) == text
