"""The process that forks the children of a test run: a child is as good as a fresh interpreter, or is one."""

import atexit
import multiprocessing
import os
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.children import ENTRY, Nursery, Parent
from tests.support.parents import adopt_orphans, end_with
from tests.support.steps import fork, reap
from tests.support.zygote import Zygote, ZygoteFailed


@pytest.fixture(scope="module")
def own() -> Iterator[Zygote]:
    """A zygote, even in a run that starts fresh interpreters only."""
    zygote = Zygote(ENTRY)
    yield zygote
    zygote.close()


@pytest.fixture
def forking(own: Zygote) -> Iterator[Nursery]:
    with Nursery(own) as nursery:
        yield nursery


def started_as(parent: Parent) -> str:
    """The module that the child's interpreter was started with."""
    return Path("/proc/self/cmdline").read_bytes().split(b"\0")[4].decode()


def inherited(parent: Parent) -> tuple[int, list[str], int, bool]:
    fds = [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
    kinds = sorted(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0] for fd in fds)
    return len(os.listdir("/proc/self/task")), kinds, os.getppid(), os.getpgid(0) == os.getpid()


def waits(parent: Parent) -> None:
    parent.recv()


def writes(parent: Parent) -> None:
    print("on stdout")
    print("on stderr", file=sys.stderr)


def ends_late(parent: Parent) -> None:
    """A thread goes on after the function, and a function of atexit after that."""

    def later() -> None:
        threading.main_thread().join()
        os.write(fd, b"thread ")

    _, (fd,), _, _ = socket.recv_fds(parent.sock, 1, 1)
    atexit.register(lambda: os.write(fd, b"atexit"))
    threading.Thread(target=later).start()


def spins(parent: Parent) -> None:
    parent.send(os.getpid())
    while True:
        pass


def starts_with_the_zygote(parent: Parent) -> None:
    """A test run of its own, with a child that spins. The zygote ends with it too."""
    adopt_orphans()
    zygote = Zygote(ENTRY)
    parent.send([Nursery(zygote)(spins).recv(), zygote._process.pid])
    parent.recv()


def starts_with_a_fork(parent: Parent) -> None:
    here, there = multiprocessing.Pipe()
    fork(lambda: spins(Parent(there, parent.sock)))
    parent.send([here.recv()])
    parent.recv()


def is_forked(nursery: Nursery) -> bool:
    return nursery(started_as).result() == "tests.support.zygote"


def test_forked_child_inherits_what_a_fresh_interpreter_does(forking: Nursery) -> None:
    assert is_forked(forking)
    with Nursery() as fresh:
        assert not is_forked(fresh)
        assert forking(inherited).result() == fresh(inherited).result()


@contextmanager
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARK", "set")
        yield


@contextmanager
def directory() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("/")
        yield


@contextmanager
def limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def ignored() -> Iterator[None]:
    old = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGUSR1, old)


@contextmanager
def blocked() -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


@contextmanager
def mask() -> Iterator[None]:
    old = os.umask(0o77)
    yield
    os.umask(old)


@contextmanager
def path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("/nowhere")
        yield


@pytest.mark.parametrize("change", [environment, directory, limit, ignored, blocked, mask, path])
def test_child_is_fresh_interpreter_while_surroundings_differ(forking: Nursery, change: Callable[[], AbstractContextManager[None]]) -> None:
    assert is_forked(forking)
    with change():
        assert not is_forked(forking)
    assert is_forked(forking)


def test_stdout_and_stderr_are_those_of_the_run(forking: Nursery, capfd: pytest.CaptureFixture[str]) -> None:
    forking(writes).result()
    assert capfd.readouterr() == ("on stdout\n", "on stderr\n")


@pytest.mark.parametrize("forked", [True, False])
def test_child_joins_threads_and_runs_atexit_at_its_end(forking: Nursery, forked: bool) -> None:
    nursery = forking if forked else Nursery()
    with nursery:
        other = nursery(ends_late)
        read, write = os.pipe()
        socket.send_fds(other.sock, [b"x"], [write])
        os.close(write)
        other.result()
        with open(read, "rb") as pipe:
            assert pipe.read() == b"thread atexit"


def test_killed_child_has_status_of_the_signal(forking: Nursery) -> None:
    other = forking(waits)
    other.kill()
    assert other.wait() == -signal.SIGKILL


def test_signal_to_an_ended_child_is_dropped(forking: Nursery) -> None:
    other = forking(started_as)
    other.result()
    other.send_signal(signal.SIGTERM)
    assert other.wait() == 0


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import threading\nthreading.Thread(target=threading.Event().wait, name='stays', daemon=True).start()", "2 threads.*'stays'"),
        ("import os\nfd = os.open('/dev/full', os.O_RDONLY)", "descriptors open.*/dev/full"),
    ],
)
def test_zygote_refuses_to_fork_after_an_import_with_side_effects(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, says: str
) -> None:
    (tmp_path / "module_with_side_effects.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    zygote = Zygote(ENTRY)
    with pytest.raises(ZygoteFailed, match=f"(?s)module_with_side_effects: .*{says}"):
        zygote.fork("module_with_side_effects", ())
    zygote.close()


def test_dead_zygote_is_an_error_that_says_so() -> None:
    zygote = Zygote("no_such_module:function")
    with pytest.raises(ZygoteFailed, match="died: exit status 1"):
        zygote.fork("os", ())
    zygote.close()


def test_forked_process_starts_fresh_interpreters() -> None:
    zygote = Zygote(ENTRY)
    pid = os.fork()
    if not pid:
        os._exit(zygote.usable())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert zygote.usable()
    zygote.close()


@pytest.mark.parametrize("starts", [starts_with_the_zygote, starts_with_a_fork])
def test_children_end_with_a_test_run_that_is_killed(starts: Callable[[Parent], None]) -> None:
    with Nursery() as nursery:
        run = nursery(starts)
        pids = run.recv()
        end = os.pidfd_open(pids[0])
        run.kill()
        ended = bool(select.select([end], [], [], 30)[0])
        os.close(end)
        os.kill(pids[0], signal.SIGKILL)  # ours now, and not waited for
        assert [reap(pid) for pid in pids] == [-signal.SIGKILL, 0][: len(pids)]
    assert ended


def test_process_whose_parent_is_gone_ends_at_once() -> None:
    assert reap(fork(lambda: None, lambda: end_with(os.getpid()))) == -signal.SIGKILL
