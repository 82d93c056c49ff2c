"""What the tests of queues, pools and kept descriptors share."""

import contextlib
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import dmabuf
from dmabuf.sharing import fetching, kept
from tests.sharing.conftest import SIZE
from tests.support.budget import budget
from tests.support.waiting import until

METHODS = ["fork", "forkserver", "spawn"]
# How processes start that inherit nothing, where no more depends on it: an interpreter takes several times the CPU of the server's fork.
ANEW = multiprocessing.get_context({"quick": "forkserver", "full": "spawn"}[budget()])


@contextlib.contextmanager
def running(process: Any) -> Iterator[Any]:
    process.start()
    yield process
    process.join()
    process.close()


def stamped(stamp: int, name: str | None = None) -> dmabuf.DmaBuf:
    buf = dmabuf.allocate(SIZE, name=name)
    with buf.write() as view:
        view[0] = stamp
    return buf


def stamp(buf: dmabuf.DmaBuf) -> int:
    with buf, buf.read() as view:
        return int(view[0])


_STAY = ("multiprocessing.forkserver", "multiprocessing.resource_tracker", "tests.support.zygote")


def family() -> dict[str, str]:
    """Return the arguments of every process that descends from this one, by pid."""
    listed = subprocess.run(["/bin/ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=False)
    processes = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    found: dict[str, str] = {}
    parents = {str(os.getpid())}
    while parents:
        new = {pid: " ".join(args) for pid, parent, *args in processes if parent in parents and pid not in found}
        found |= new
        parents = set(new)
    return {pid: args for pid, args in found.items() if not args.startswith("/bin/ps ")}


@contextlib.contextmanager
def keepers_reaped() -> Iterator[None]:
    """Wait at the end until what the block started has ended, and reap it.

    A keeper is a child of whoever looks after orphans, in a test run the run itself, from the end of its parent on.
    """
    before = family()

    def gone() -> bool:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        return not any(pid not in before and not any(name in args for name in _STAY) for pid, args in family().items())

    yield
    until(gone)


def asks_sender() -> bool:
    """Whether a thread of this process asks a sender for a descriptor."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is fetching._asked.__code__:
                return True
            frame = frame.f_back  # type: ignore[assignment]
    return False


def without_answers() -> None:
    """In a worker: what is kept is never handed out."""
    kept.answer = lambda *_: threading.Event().wait()  # type: ignore[assignment]


_hoarded: list[int] = []


def hoard() -> int:
    """Take all descriptors of a worker, for its next task."""
    _hoarded.clear()
    dmabuf.allocate(SIZE).close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with contextlib.suppress(OSError):
        while True:
            _hoarded.append(os.open("/dev/null", os.O_RDONLY))
    return len(_hoarded)


def leave_room() -> None:
    """Give back what hoard() took."""
    while _hoarded:
        os.close(_hoarded.pop())
