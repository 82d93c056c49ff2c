"""tools/kernel: which kernel is meant, what a machine lacks, and a guest that hangs or dies is told from one that fails."""

import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tools.kernel import guest, make, needs, place

HOUR = 3600
PORTIONS = ["#!/bin/sh", 'echo "@@NOW tests/kernel/test_x.py::test_the_first"', 'echo "@@NOW tests/kernel/test_x.py::test_the_second"']


def fake(tmp_path: Path, *lines: str) -> list[str]:
    """A program that speaks as a guest's console does."""
    program = tmp_path / "guest"
    program.write_text("\n".join([*PORTIONS, *lines]) + "\n")
    program.chmod(0o755)
    return [str(program)]


def test_a_guest_that_hangs_is_ended_and_what_it_was_doing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    both, real = threading.Event(), subprocess.Popen.wait

    def progress(now: str) -> None:
        heard.append(now)
        if len(heard) == 2:
            both.set()

    def wait(self: Any, timeout: float | None = None) -> int:
        """Its time is over when it has said both, however slow this machine is."""
        if timeout is None:
            return real(self)
        both.wait()
        raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    outcome = guest._watch(fake(tmp_path, "read forever < /dev/zero"), tmp_path, 3, progress)
    assert outcome.status == guest.TIMED_OUT
    assert outcome.now == "tests/kernel/test_x.py::test_the_second"
    assert len(heard) == 2
    assert "did not end in time; the last it began: tests/kernel/test_x.py::test_the_second" in guest.explain(outcome)


def test_a_guest_that_dies_shows_its_console(tmp_path: Path) -> None:
    outcome = guest._watch(fake(tmp_path, "echo 'Kernel panic - not syncing'"), tmp_path, HOUR, lambda _: None)
    assert outcome.status == guest.DIED
    assert "Kernel panic" in guest.explain(outcome)


def test_the_commands_own_status_and_output_come_back(tmp_path: Path) -> None:
    lines = ["cd $(dirname $0)", "printf out > stdout", "printf err > stderr", "echo 3 > rc"]
    outcome = guest._watch(fake(tmp_path, *lines), tmp_path, HOUR, lambda _: None)
    assert (outcome.status, outcome.stdout, outcome.stderr, guest.explain(outcome)) == (3, b"out", b"err", "")


def test_an_unknown_kernel_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMABUF_KERNEL_CACHE", str(tmp_path))
    with pytest.raises(place.Trouble, match=r"no kernel '7\.0'"):
        make.kernel("7.0")


def test_the_newest_of_a_kind_is_taken_and_an_unfinished_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMABUF_KERNEL_CACHE", str(tmp_path))
    for name in ("6.12.117-uml", "6.12.9-uml", ".6.12.200-uml", "6.12.9+deb12-amd64"):
        (tmp_path / "kernels" / name).mkdir(parents=True)
    found = make._ready("uml")
    assert found is not None
    assert found.name == "6.12.117-uml"
    assert make._ready("full") is None


def test_what_a_machine_lacks_is_said_by_package_to_who_may_not_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(place.Trouble, match="apt-get install --no-install-recommends flexible"):
        needs.require({"flexible": "/nowhere/flexible", "dash": "/bin/sh"})


@pytest.mark.parametrize(("machine", "possible"), [("x86_64", True), ("aarch64", False)])
def test_only_x86_64_has_a_judge(monkeypatch: pytest.MonkeyPatch, machine: str, possible: bool) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert (needs.check_machine() is None) == possible


def test_the_cache_is_outside_of_the_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DMABUF_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert place.cache() == tmp_path / "dmabuf-oracle"
