"""The parent's side of the demo: makes the rings, starts the stages, watches them, and checks what is left.

The parent takes no part in the hand-over. It keeps one fence pending while the demo goes on (every stage looks at it before each frame),
and waits for one fence of each stage, which ends when the stage does, however that happens.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dmabuf.cli.demo_pipeline.counters import BLOCK_BYTES, Counters, State
from dmabuf.cli.demo_pipeline.ring import DRIVER, HEADER_BYTES, SLOTS, announce, find
from dmabuf.cli.demo_pipeline.stage import PARENT
from dmabuf.cli.demo_pipeline.video import Clip
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.fence.timeline import Timeline
from dmabuf.domain.domain import Domain
from dmabuf.heap.recommended import allocate
from dmabuf.observe.records import buffers
from dmabuf.sharing.passing import send

STAGES: Final = ("decode", "filter", "histogram", "encode")
# The rings of each stage: (ring, whether it writes, the stages that it waits for).
PORTS: Final[dict[str, tuple[tuple[str, bool, tuple[str, ...]], ...]]] = {
    "decode": (("frames", True, ("filter", "histogram")),),
    "filter": (("frames", False, ("decode",)), ("edges", True, ("encode",))),
    "histogram": (("frames", False, ("decode",)),),
    "encode": (("edges", False, ("filter",)),),
}
REFRESH_S: Final = 0.1  # of the progress bars; nothing else depends on it


class StartFailed(Exception):
    """A stage ended before the first frame."""


@dataclass(frozen=True)
class Plan:
    """What to run. ``part``: the encoder's file; ``limit``: frames, None for all; ``kill``: the stage to kill at frame ``kill_at``."""

    clip: Clip
    part: Path
    limit: int | None
    kill: str | None
    kill_at: int


@dataclass(frozen=True)
class StageResult:
    """The result of a stage. ``exit``: its status, negative for a signal; ``counts``: see :class:`Counters`."""

    name: str
    pid: int
    exit: int
    state: State
    text: str
    digest: bytes
    counts: dict[str, int]

    @property
    def killed(self) -> bool:
        return self.exit < 0

    @property
    def seconds(self) -> float:
        """The seconds from its first frame to its end, 0 for a killed stage."""
        return max(0, self.counts["ended_ns"] - self.counts["started_ns"]) / 1e9 if self.counts["ended_ns"] else 0.0

    @property
    def rate(self) -> float:
        """The frames per second."""
        return self.counts["frames"] / self.seconds if self.seconds else 0.0


@dataclass
class Outcome:
    """The result of the demo. ``buffers``, ``buffer_bytes``: all that was allocated; ``left``: what was left behind, a line each."""

    stages: list[StageResult] = field(default_factory=list)
    seconds: float = 0.0
    buffer_bytes: int = 0
    buffers: int = 0
    left: list[str] = field(default_factory=list)

    def stage(self, name: str) -> StageResult:
        return next(s for s in self.stages if s.name == name)


@dataclass
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    sock: socket.socket
    counters: Counters


def run(plan: Plan, progress: Callable[[dict[str, int]], None]) -> Outcome:
    """Run the four stages to their end. ``progress`` is called with the frames of each stage, about ten times a second.

    Raises:
        StartFailed: A stage ended before the first frame.
        DmaBufError: The memory of the rings can't be allocated.
    """
    outcome = Outcome()
    inos: set[int] = set()
    pids: list[int] = []
    try:
        with ExitStack() as stack:
            _pipeline(plan, stack, outcome, inos, pids, progress)
    finally:
        outcome.left = left_behind(inos, pids)
    return outcome


def _pipeline(
    plan: Plan, stack: ExitStack, outcome: Outcome, inos: set[int], pids: list[int], progress: Callable[[dict[str, int]], None]
) -> None:
    board = stack.enter_context(allocate(BLOCK_BYTES * len(STAGES), name="demo-counters"))
    rings = {
        name: [stack.enter_context(allocate(HEADER_BYTES + size, name=f"demo-{name}-{k}")) for k in range(SLOTS)]
        for name, size in (("frames", plan.clip.frame_bytes), ("edges", plan.clip.pixels))
    }
    every = [board, *(slot for ring in rings.values() for slot in ring)]
    inos.update(buf.ino for buf in every)
    outcome.buffers, outcome.buffer_bytes = len(every), sum(buf.size for buf in every)
    timeline = stack.enter_context(Timeline(PARENT, driver=DRIVER))
    goes_on = announce(board, timeline)
    children = [stack.enter_context(_started(name, i, board)) for i, name in enumerate(STAGES)]
    pids.extend(child.process.pid for child in children)
    try:
        for child in children:
            _set_up(child, plan, board, rings)
        # The two meeting points: no stage goes on before all are there (see `ring`, set-up).
        for _ in range(2):
            for child in children:
                _hear(child)
            for child in children:
                _tell(child)
        over = [find(board, child.name) for child in children]
        for child in children:
            child.sock.close()
        began = time.monotonic_ns()
        for fence in over:
            while fence is not None and not fence.is_signaled():
                fence.wait(REFRESH_S)
                progress({child.name: child.counters["frames"] for child in children})
        outcome.seconds = (time.monotonic_ns() - began) / 1e9
    except BaseException:
        goes_on.signal(error=-errno.ECANCELED)
        raise
    finally:
        for child in children:
            child.sock.close()
        for child in children:
            child.process.wait()
        if not goes_on.is_signaled():
            goes_on.signal()
    outcome.stages = [_result(child) for child in children]
    progress({s.name: s.counts["frames"] for s in outcome.stages})


def _spawned(sock: socket.socket) -> subprocess.Popen[bytes]:
    """Start a stage's interpreter. Ctrl-C is for the parent: a stage starts with it blocked, and then ignores it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "dmabuf.cli.demo_pipeline.stage", str(sock.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(sock.fileno(),),
            # This process may have found the package by a path that only it has.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    finally:
        sock.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _started(name: str, index: int, board: DmaBuf) -> Iterator[_Child]:
    """Run a stage's process, which gets only a socket. It has ended when the block ends."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    counters = Counters(board, index)
    try:
        process = _spawned(there)
        try:
            yield _Child(name, process, here, counters)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    finally:
        here.close()
        counters.close()


def _set_up(child: _Child, plan: Plan, board: DmaBuf, rings: dict[str, list[DmaBuf]]) -> None:
    """Send a stage its job and its buffers."""
    ports = PORTS[child.name]
    message: dict[str, Any] = {
        "name": child.name,
        "index": STAGES.index(child.name),
        "clip": {"path": str(plan.clip.path), "width": plan.clip.width, "height": plan.clip.height, "rate": str(plan.clip.rate)},
        "limit": plan.limit,
        "output": str(plan.part),
        "kill_at": plan.kill_at if plan.kill == child.name else None,
        "slots": SLOTS,
        "rings": [{"name": name, "writes": writes, "peers": peers} for name, writes, peers in ports],
    }
    with _startup(child):
        child.sock.send(json.dumps(message).encode())
        send(child.sock, board, *(slot for name, _, _ in ports for slot in rings[name]))


def _tell(child: _Child) -> None:
    with _startup(child):
        child.sock.send(b"1")


def _hear(child: _Child) -> None:
    with _startup(child):
        if not child.sock.recv(1):
            raise ConnectionResetError


@contextlib.contextmanager
def _startup(child: _Child) -> Iterator[None]:
    """Turn an error of the socket into one that says how the stage ended."""
    try:
        yield
    except ConnectionError:
        status = child.process.wait()
        how = f"by {signal_name(status)}" if status < 0 else f"with exit status {status}"
        raise StartFailed(f"{child.name} ended {how} before the first frame") from None


def signal_name(status: int) -> str:
    """Return the name of the signal in a negative exit status."""
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _result(child: _Child) -> StageResult:
    c = child.counters
    return StageResult(
        child.name, child.process.pid, child.process.returncode, c.state, c.text, c.digest, {name: c[name] for name in _NUMBERS}
    )


_NUMBERS: Final = ("frames", "waits", "wait_ns", "started_ns", "ended_ns", "copied_between", "copied_inside", "shared")


def left_behind(inos: set[int], pids: list[int]) -> list[str]:
    """Return what is left of the demo's buffers and processes, a line each, as `dmabuf ls` and /proc show it."""
    domain = Domain.default()
    lines = [
        f"buffer {seen.ino} ({seen.name}), held by {', '.join(str(h.pid) for h in seen.holders) or 'no visible process'}"
        for seen in buffers(domain=domain)
        if seen.ino in inos
    ]
    lines += [f"process {pid}" for pid in pids if Path(f"/proc/{pid}").exists()]
    return lines
