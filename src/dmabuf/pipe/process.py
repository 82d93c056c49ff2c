"""``Worker``: the parent's side of one process of a stage."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Final, Literal, Protocol

from dmabuf.pipe.board import Counters
from dmabuf.pipe.kind import Kind
from dmabuf.pipe.plan import Spec
from dmabuf.sharing.passing import recv, send

if TYPE_CHECKING:
    from dmabuf.sharing.passing import Sent
    from dmabuf.stream.stream import Stream

State = Literal["starting", "running", "done", "failed", "killed"]


ENDING: Final = frozenset({signal.SIGINT, signal.SIGTERM})  # a terminal, `timeout` and systemd send them to the whole group


class Process(Protocol):
    """What the parent needs of a process."""

    pid: int

    def wait(self) -> int: ...
    def kill(self) -> None: ...


def spawned(sock: socket.socket, stdout: int | IO[Any] | None) -> Process:
    """Start the interpreter of a stage, which gets a socket. The signals that end a pipeline are blocked in it until it ignores them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "dmabuf.pipe.stage", str(sock.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            pass_fds=(sock.fileno(),),
            # This process may have found the package by a path that only it has.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    finally:
        sock.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass(eq=False)
class Worker:
    """One place in a stage, and the process that has it now.

    ``lane``: its number among the workers. ``block``: its numbers on the board. ``stream``, ``kind``: into which it puts frames, once it
    has said so. ``attached``: the readers of its stream that have their places, by (stage, lane). ``text``, ``traceback``: how it failed.
    ``usage``: the command line was to blame. ``pids``: of all its processes.
    """

    spec: Spec
    lane: int
    block: int
    counters: Counters
    state: State = "starting"
    process: Process | None = None
    sock: socket.socket | None = None
    pidfd: int = -1
    stream: Stream | None = None
    kind: Kind | None = None
    attached: set[tuple[str, int]] = field(default_factory=set)
    going: bool = False
    ended: bool = False
    restarts: int = 0
    exit: int | None = None
    text: str = ""
    traceback: str | None = None
    usage: bool = False
    told_done: bool = False
    result: Any = None
    checksum: str | None = None
    pids: list[int] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether its last process has ended."""
        return self.state in ("done", "failed", "killed")

    def start(self, stdout: int | IO[Any] | None) -> None:
        """Start a process."""
        self.sock, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = spawned(there, stdout)
        self.pids.append(self.process.pid)
        self.pidfd = os.pidfd_open(self.process.pid)
        self.state, self.exit, self.told_done, self.text, self.traceback = "starting", None, False, "", None

    def tell(self, op: str, *objects: Sent, **fields: Any) -> None:
        """Send it a message; nothing if it has ended."""
        if self.sock is None:
            return
        try:
            send(self.sock, *objects, meta={"op": op, **fields})
        except ConnectionError:
            pass  # its descriptor says so too

    def hear(self) -> tuple[dict[str, Any], list[Any]] | None:
        """Return its next message; None if it has ended."""
        assert self.sock is not None
        for _ in range(2):
            try:
                objects = recv(self.sock)
            except EOFError:
                return None
            except ConnectionError:  # it has ended without reading what it was sent; what it said comes after this error
                continue
            return objects.meta, list(objects)
        return None

    def reap(self) -> int:
        """Wait for the process, and return its exit status."""
        assert self.process is not None
        self.exit = self.process.wait()
        os.close(self.pidfd)
        self.pidfd = -1
        self.hang_up()
        return self.exit

    def hang_up(self) -> None:
        """Close the line. A process that is still there ends by itself."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def close(self) -> None:
        """End its process, whatever it does, and close what the parent has of it."""
        if self.process is not None and self.pidfd >= 0:
            self.process.kill()
            self.reap()
            self.state = "killed"
        self.hang_up()
        if self.stream is not None:
            self.stream.close()
        self.counters.close()


def signal_name(status: int) -> str:
    """Return the name of the signal in a negative exit status."""
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
