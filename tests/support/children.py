"""Child processes that run one function of a test module.

    def writer(parent: Parent, rounds: int) -> str:
        (buf,) = dmabuf.recv(parent.sock)
        parent.send("mapped")
        parent.recv()                     # until the test says go on
        return "done"

    def test_…(child: Spawn) -> None:
        other = child(writer, 10)
        dmabuf.send(other.sock, buf)
        assert other.recv() == "mapped"
        other.kill()                      # or other.send("go on"), and other.result() == "done"

A child inherits nothing by accident: it is a fork of the zygote (tests/support/zygote.py) or a fresh interpreter. Whether mapped memory may
move (`moving`) is in it as it is in the test. It has a process group of its own. Messages are pickled as multiprocessing does; `sock` is a
SOCK_SEQPACKET socket pair for descriptors. There is no timeout: `recv()` from a dead child raises EOFError at once, and the test's watchdog
ends the rest. At the end of the test every child, and whatever it forked, is killed and reaped; an exception that the test didn't ask about
fails the test.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Concatenate, ParamSpec, Protocol, Self

from tests.support.zygote import Forked, Zygote

P = ParamSpec("P")

# For the zygote: what a child runs, `run(messages_fd, sock_fd)`, and what runs once before.
ENTRY, PREPARE = f"{__name__}:run", f"{__name__}:prepare"


class ChildFailed(AssertionError):
    """The child's function raised; the text is the child's traceback."""


@dataclass(frozen=True)
class _Returned:
    value: Any


@dataclass(frozen=True)
class _Raised:
    text: str


class _Link:
    """One end of the line between a test and its child."""

    def __init__(self, messages: "Connection[Any, Any]", sock: socket.socket) -> None:
        self._messages = messages
        self.sock = sock

    def send(self, message: Any = None) -> None:
        """Send one picklable object; never waits for it to be read (small ones)."""
        self._messages.send(message)

    def recv(self) -> Any:
        """The next object from the other side. EOFError: the other side is gone."""
        try:
            return self._messages.recv()
        except ConnectionResetError:
            # Killed with messages of ours unread: for a waiter that is the same as a plain end.
            raise EOFError from None

    def has_sent(self) -> bool:
        """Is there something to receive, or is the other side gone?"""
        return self._messages.poll()

    def close(self) -> None:
        """Close this end; idempotent."""
        self._messages.close()
        self.sock.close()


class Parent(_Link):
    """What the child's function is given: its line to the test."""


class Child(_Link):
    """What the test holds: its line to the child, and the child's process."""

    def __init__(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any], zygote: Zygote | None = None
    ) -> None:
        here, there = multiprocessing.Pipe()
        sock, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(here, sock)
        self._outcome: _Returned | _Raised | None = None
        self._asked = False
        try:
            self._process = _start(function.__module__, there.fileno(), other.fileno(), zygote)
        except BaseException:
            self.close()
            raise
        finally:
            # Held by the child alone from here on: its death is our end of file.
            there.close()
            other.close()
        # The key lets buffers be pickled both ways, as between a multiprocessing parent and its child.
        key = bytes(multiprocessing.current_process().authkey)
        self._messages.send((key, _moves(), function.__module__, function.__qualname__, arguments, keywords))

    @property
    def pid(self) -> int:
        return self._process.pid

    def recv(self) -> Any:
        """The next message. ChildFailed: the function raised instead. EOFError: it returned or died instead."""
        if self._outcome is None:
            message = super().recv()
            if not isinstance(message, _Returned | _Raised):
                return message
            self._outcome = message
        self._asked = True
        if isinstance(self._outcome, _Raised):
            raise ChildFailed(self._outcome.text)
        raise EOFError("the child's function has returned; ask for result()")

    def result(self) -> Any:
        """Wait for the function to return; its value. Messages not yet read are dropped. EOFError: the child was killed."""
        with contextlib.suppress(EOFError):
            while self._outcome is None:
                self.recv()
        self.wait()
        self._asked = True
        match self._outcome:
            case _Returned(value):
                return value
            case _Raised(text):
                raise ChildFailed(text)
            case None:
                raise EOFError(f"child {self.pid} died before its function returned: exit status {self._process.returncode}")

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing if the child has been reaped."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until the child is gone."""
        self.send_signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        """SIGSTOP, and wait until the child stands still."""
        self.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        self.send_signal(signal.SIGCONT)

    def wait(self) -> int:
        """Wait until the child has ended; its exit status, negative for a signal."""
        return self._process.wait()

    def end(self) -> str | None:
        """Kill and reap whatever is left of the child; the traceback of an exception that nobody asked about."""
        with contextlib.suppress(EOFError, OSError):
            while self._outcome is None and self._messages.poll():
                message = self._messages.recv()
                if isinstance(message, _Returned | _Raised):
                    self._outcome = message
        # What the child forked became ours when the child died (the test run is a subreaper). While one of them, or the child, is there to
        # be waited for, the group's number is not given to anybody else.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PGID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-self.pid, 0)
        self.close()
        return self._outcome.text if isinstance(self._outcome, _Raised) and not self._asked else None


def _start(module: str, messages: int, sock: int, zygote: Zygote | None) -> "subprocess.Popen[bytes] | Forked":
    if zygote is not None and zygote.usable():
        return zygote.fork(module, (messages, sock))
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-m", __name__, str(messages), str(sock)],
        stdin=subprocess.DEVNULL,
        pass_fds=(messages, sock),
        process_group=0,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


class Spawn(Protocol):
    """The `child` fixture: starts `function(parent, *arguments)` in a new process."""

    def __call__(self, function: Callable[Concatenate[Parent, P], Any], /, *arguments: P.args, **keywords: P.kwargs) -> Child: ...


class Nursery:
    """All children of one test. ``zygote``: forks them; None: each is a fresh interpreter."""

    def __init__(self, zygote: Zygote | None = None) -> None:
        self._zygote = zygote
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __call__(self, function: Callable[Concatenate[Parent, P], Any], /, *arguments: P.args, **keywords: P.kwargs) -> Child:
        child = Child(function, arguments, keywords, self._zygote)
        self._children.append(child)
        return child

    def __exit__(self, *_: object) -> None:
        texts = [text for child in reversed(self._children) if (text := child.end()) is not None]
        if texts:
            raise ChildFailed("\n".join(texts))


# The module is imported by what attaches a device, and by nothing else.
_ATTACHMENT = "dmabuf.core.attach.attachment"


def _moves() -> bool | None:
    """The switch of this process; None if nobody can have set it."""
    module: Any = sys.modules.get(_ATTACHMENT)
    return None if module is None else module.MOVE_NOTIFY


def _set_moves(moves: bool | None) -> None:
    if moves is not None and moves != (os.environ.get("DMABUF_MOVE_NOTIFY") != "0"):
        module: Any = importlib.import_module(_ATTACHMENT)
        module.MOVE_NOTIFY = moves


def prepare() -> None:
    """Import all of dmabuf, which imports a name's module at the first use. It opens nothing and starts no thread."""
    import dmabuf

    for name in dmabuf.__all__:
        getattr(dmabuf, name)


def run(messages_fd: int, sock_fd: int) -> None:
    """Run the function that the first message names, in the child."""
    for fd in (messages_fd, sock_fd):
        os.set_inheritable(fd, False)
    messages: Connection[Any, Any] = Connection(messages_fd)
    key, moves, module, name, arguments, keywords = messages.recv()
    multiprocessing.current_process().authkey = key
    _set_moves(moves)
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    # As in the test itself, but not for the imports of others.
    warnings.simplefilter("error")
    parent = Parent(messages, socket.socket(fileno=sock_fd))
    try:
        outcome: _Returned | _Raised = _Returned(function(parent, *arguments, **keywords))
    except EOFError:
        # The test went away first: nobody is there to hear about it.
        raise SystemExit(1) from None
    except BaseException:
        outcome = _Raised(f"in child {os.getpid()}:\n{traceback.format_exc()}")
    with contextlib.suppress(BrokenPipeError):
        parent.send(outcome)
    parent.close()
    raise SystemExit(isinstance(outcome, _Raised))


if __name__ == "__main__":
    # Under its real name, so that what it pickles is what the test unpickles.
    importlib.import_module("tests.support.children").run(int(sys.argv[1]), int(sys.argv[2]))
