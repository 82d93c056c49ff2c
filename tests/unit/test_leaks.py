"""The leak check names what is left, and says nothing when nothing is."""

import gc
import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.leaks import Holdings, LeakCheck, rest


def looked(domain: Path) -> Holdings:
    """A look while no other thread is in the middle of anything."""
    rest()
    return Holdings.now(domain)


@contextmanager
def open_fd(_: Path) -> Iterator[None]:
    fd = os.open("/dev/null", os.O_RDONLY)
    yield
    os.close(fd)


@contextmanager
def shared_mapping(_: Path) -> Iterator[None]:
    fd = os.memfd_create("leaks")
    os.ftruncate(fd, mmap.PAGESIZE)
    with mmap.mmap(fd, mmap.PAGESIZE):
        os.close(fd)
        yield


@contextmanager
def zombie(_: Path) -> Iterator[None]:
    pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], os.environ)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield
    os.waitpid(pid, 0)


@contextmanager
def thread(_: Path) -> Iterator[None]:
    done = threading.Event()
    running = threading.Thread(target=done.wait)
    running.start()
    yield
    done.set()
    running.join()


@contextmanager
def file_in_the_domain(domain: Path) -> Iterator[None]:
    (domain / "left").touch()
    yield
    (domain / "left").unlink()


@contextmanager
def another_domain_named(_: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DMABUF_DOMAIN")
        yield


@pytest.mark.parametrize(
    ("hold", "says"),
    [
        (open_fd, "left open: /dev/null"),
        (shared_mapping, "mapping left: /memfd:leaks"),
        (zombie, "child left"),
        (thread, "thread left"),
        (file_in_the_domain, "file left"),
        (another_domain_named, "DMABUF_DOMAIN: was /"),
    ],
)
def test_what_is_left_is_named_until_it_is_gone(tmp_path: Path, hold: Callable[[Path], AbstractContextManager[None]], says: str) -> None:
    before = looked(tmp_path)
    with hold(tmp_path):
        lines = before.lost(looked(tmp_path), tmp_path)
    assert any(says in line for line in lines)
    assert before.lost(looked(tmp_path), tmp_path) == []


def test_a_descriptor_closed_under_its_owner_is_named(tmp_path: Path) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    before = looked(tmp_path)
    os.close(fd)
    assert before.lost(looked(tmp_path), tmp_path) == [f"fd {fd}: was /dev/null, is closed"]


def test_what_a_thread_has_for_a_moment_is_not_left(tmp_path: Path) -> None:
    """It is in the middle of something when the test ends, for longer than all the looks take that don't wait for it."""
    check = LeakCheck(tmp_path)
    check.begin()
    fd = os.open("/dev/null", os.O_RDONLY)

    def ends_late() -> None:
        for _ in range(500):
            os.sched_yield()
        os.close(fd)

    running = threading.Thread(target=ends_late, daemon=True)
    running.start()
    assert check.end() == []
    running.join()


def test_threads_brief_descriptor_before_the_test_is_not_missed(tmp_path: Path) -> None:
    check = LeakCheck(tmp_path)
    fd = os.open("/dev/null", os.O_RDONLY)
    check.begin()
    os.close(fd)
    assert check.end() == []


def test_what_was_there_for_a_whole_test_is_missed_after_the_next(tmp_path: Path) -> None:
    check = LeakCheck(tmp_path)
    fd = os.open("/dev/null", os.O_RDONLY)
    check.begin()
    assert check.end() == []
    check.begin()
    os.close(fd)
    assert check.end() == [f"fd {fd}: was /dev/null, is closed"]


def test_what_took_the_number_of_a_momentary_descriptor_is_left(tmp_path: Path) -> None:
    check = LeakCheck(tmp_path)
    fd = os.open("/dev/null", os.O_RDONLY)
    check.begin()
    left = os.memfd_create("left")
    os.dup2(left, fd)
    os.close(left)
    assert check.end() == [f"fd {fd}: left open: /memfd:left (deleted)"]
    os.close(fd)


@pytest.mark.parametrize("forgotten", [False, True])
def test_last_look_is_first_of_the_next_test_unless_forgotten(tmp_path: Path, forgotten: bool) -> None:
    check = LeakCheck(tmp_path)
    check.begin()
    assert check.end() == []
    fd = os.open("/dev/null", os.O_RDONLY)
    if forgotten:
        check.forget()
    check.begin()
    assert check.end() == ([] if forgotten else [f"fd {fd}: left open: /dev/null"])
    os.close(fd)


def test_what_exists_is_hidden_from_the_collector_after_32_tests(tmp_path: Path) -> None:
    check = LeakCheck(tmp_path)
    before = gc.get_freeze_count()
    kept = [[object()] for _ in range(1000)]
    for _ in range(32):
        check.begin()
        assert check.end() == []
    assert gc.get_freeze_count() >= before + len(kept)


def test_a_mapping_of_a_domain_that_grew_is_no_leak(tmp_path: Path) -> None:
    file = tmp_path / "domain"
    file.write_bytes(bytes(mmap.PAGESIZE))
    before = Holdings.now(tmp_path)
    with file.open("r+b") as f:
        f.truncate(2 * mmap.PAGESIZE)
        with mmap.mmap(f.fileno(), mmap.PAGESIZE):
            lines = before.lost(Holdings.now(tmp_path), tmp_path)
    assert not any(line.startswith("mapping") for line in lines)
