"""A process that forks itself for each child of a test run: a fork costs a fraction of what a fresh interpreter costs.

The zygote is an interpreter that imports modules, above all those of the children's functions, and does nothing else. For each child it
forks twice. The process in the middle ends at once, so that the child gets the test run as its parent, which must be a subreaper. The child
ends with the test run, however that ends. The test run asks for a child by a message, and sends along the child's descriptors and its own
descriptors 1 and 2.

A forked child is as good as a fresh interpreter:

- The zygote has one thread, and no descriptor that a child could inherit. It checks that before each fork. If an import has started a
  thread or opened a descriptor, it refuses to fork and says so.
- A process inherits its environment, working directory, limits, user, signal mask, namespaces and the like. `Zygote.usable` compares
  those of the test run with the zygote's. While they differ, the caller starts a fresh interpreter instead.
- A forked child ends as an interpreter does: it joins its threads, runs the functions of `atexit` and flushes its files.

Two things differ: all children of one zygote have the same addresses and the same hash seed, and a child ends without finalizing its
modules. `--fresh-children` (tests/plugin.py) starts interpreters only.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from tests.support.parents import end_with

_MESSAGE_BYTES = 65536  # of one message; an answer with a traceback is the longest
_STDIO = (1, 2)

# The lines of /proc/thread-self/status with what a new process inherits.
_INHERITED = tuple(
    f"{name}:".encode()
    for name in (
        *("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
        *("NoNewPrivs", "Seccomp", "Cpus_allowed", "Mems_allowed"),
    )
)


class ZygoteFailed(Exception):
    """The zygote has died, or it refuses to fork; the text says why."""


def _surroundings() -> object:
    """What a new process inherits from this thread, except for descriptors."""
    status = Path("/proc/thread-self/status").read_bytes().splitlines()
    return (
        [line for line in status if line.startswith(_INHERITED)],
        Path("/proc/self/limits").read_bytes(),
        _cgroup(),
        [os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")],
        os.readlink("/proc/self/root"),
        os.getcwd(),
        os.getpriority(os.PRIO_PROCESS, 0),
        _environment(),
        list(sys.path),
    )


def _cgroup() -> bytes:
    """The control groups of this process; empty on a kernel without any, such as the guests' (cgroups(7))."""
    try:
        return Path("/proc/self/cgroup").read_bytes()
    except FileNotFoundError:
        return b""


def _environment() -> dict[str, str]:
    # pytest changes this one with each test.
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


class Forked:
    """A child that the zygote has forked, with those methods of `subprocess.Popen` that its user needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._waiting = threading.Lock()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the child has been reaped."""
        if self._waiting.acquire(blocking=False):
            try:
                self._reap(os.WNOHANG)
            finally:
                self._waiting.release()
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # another thread waits, and has just reaped it
                os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait until the child has ended. Return its exit status, negative for a signal."""
        with self._waiting:
            self._reap(0)
        assert self.returncode is not None
        return self.returncode

    def _reap(self, options: int) -> None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)


class Zygote:
    """The test run's end. The process that makes a zygote must be a subreaper, and is the only one that may use it.

    Args:
        entry: ``"module:function"``. A child calls the function with the numbers of its descriptors.
        prepare: ``"module:function"``. The zygote calls the function once, to import what most children need.
    """

    def __init__(self, entry: str, prepare: str = "") -> None:
        self._owner = os.getpid()
        self._surroundings = _surroundings()
        self._asking = threading.Lock()
        self._sock, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", __name__, str(there.fileno()), str(self._owner), entry, prepare],
                stdin=subprocess.DEVNULL,
                pass_fds=(there.fileno(),),
                process_group=0,
                # OpenBLAS starts its threads when numpy is imported.
                env={**_environment(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
            )

    def usable(self) -> bool:
        """Whether a child forked now is like a fresh interpreter started by this thread."""
        try:
            return os.getpid() == self._owner and _surroundings() == self._surroundings
        except OSError:  # for example, a working directory that was removed
            return False

    def fork(self, module: str, descriptors: tuple[int, ...]) -> Forked:
        """Fork a child. ``module`` is imported in the zygote first, so that the next child of this module finds it there.

        Raises:
            ZygoteFailed: The zygote has died, or refuses to fork.
        """
        with self._asking:
            try:
                socket.send_fds(self._sock, [module.encode()], [*_STDIO, *descriptors])
                answer = json.loads(self._sock.recv(_MESSAGE_BYTES) or "null")
            except (BrokenPipeError, ConnectionResetError):
                answer = None
        match answer:
            case int(pid):
                return Forked(pid)
            case str(reason):
                raise ZygoteFailed(reason)
        raise ZygoteFailed(f"the zygote of the test run has died: exit status {self._process.wait()}")

    def close(self) -> None:
        """End the zygote. Its children go on."""
        with contextlib.suppress(OSError):
            # The end of the line for the zygote even while a forked child of this process has the socket too.
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._process.wait()


def _unwanted(descriptors: set[str]) -> str | None:
    """Why the zygote can't fork now; None if it can. ``descriptors``: the ones that it should have."""
    threads = [thread.name for thread in threading.enumerate()]
    count = len(os.listdir("/proc/self/task"))
    if count != 1:
        return f"it has {count} threads, of which Python knows {threads}"
    opened = {name: os.readlink(f"/proc/self/fd/{name}") for name in _open() - descriptors}
    return f"it has descriptors open that a child would inherit: {opened}" if opened else None


def _open() -> set[str]:
    # The listing has its own descriptor in it, which is closed by now.
    return {name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


def _answer(control: socket.socket, answer: int | str) -> None:
    control.send(json.dumps(answer).encode()[:_MESSAGE_BYTES])


def _serve(control: socket.socket, run: int) -> list[int]:
    """Fork a child for each request. Return in the children only: the descriptors of the request."""
    descriptors = _open()
    while True:
        module, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 16)
        if not module:
            os._exit(0)
        if module.decode() not in sys.modules:
            # A module that can't be imported says so in the child, as in a fresh interpreter.
            with contextlib.suppress(Exception):
                importlib.import_module(module.decode())
            gc.collect()
            gc.freeze()
        reason = _unwanted(descriptors | {str(fd) for fd in fds})
        if reason is not None:
            _answer(control, f"the zygote of the test run can't fork after the import of {module.decode()}: {reason}")
        else:
            here, there = os.pipe()
            adopted, adopting = os.pipe()
            middle = os.fork()
            if not middle:
                os.close(here)
                os.close(adopting)
                if _in_the_middle(there):
                    control.close()
                    os.read(adopted, 1)
                    os.close(adopted)
                    end_with(run)
                    return fds
            os.close(there)
            os.close(adopted)
            # The end of the process in the middle gives the child its parent.
            os.waitpid(middle, 0)
            os.close(adopting)
            pid = os.read(here, 100)
            os.close(here)
            _answer(control, int(pid) if pid else "the zygote of the test run could not fork; see its stderr")
        for fd in fds:
            os.close(fd)


def _in_the_middle(there: int) -> bool:
    """Fork the child, tell its pid and end. Return in the child only."""
    try:
        pid = os.fork()
        if not pid:
            os.close(there)
            os.setpgid(0, 0)
            return True
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the child may have done so, or may be dead
            os.setpgid(pid, pid)
        os.write(there, str(pid).encode())
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def _end(status: object) -> NoReturn:
    """End as an interpreter does, except that the modules, which belong to the zygote, are not finalized."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status if isinstance(status, int) else status is not None)


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def main(control: int, run: int, entry: str, prepare: str) -> NoReturn:
    """Be the zygote, and each of its children. ``run``: the pid of the test run."""
    function = _function(entry)
    if prepare:
        _function(prepare)()
    os.set_inheritable(control, False)
    received = _serve(socket.socket(fileno=control), run)
    for number, fd in zip(_STDIO, received[: len(_STDIO)], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    fds = received[len(_STDIO) :]
    try:
        function(*fds)
    except SystemExit as end:
        _end(end.code)
    except BaseException:
        traceback.print_exc()
        _end(1)
    _end(0)


if __name__ == "__main__":
    # Under its real name, so that there is one copy of it.
    importlib.import_module("tests.support.zygote").main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5])
