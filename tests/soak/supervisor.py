"""Starts the workers of a soak, kills them at random moments, replaces them, and looks after what they leave.

A run is a row of *epochs*. In each, workers come and go in one domain until its time is over; then all end, some by a signal, and nothing
may be left: no process, no file but one small domain file, no buffer, no descriptor. The next epoch starts with an empty domain, which
grows again.

The supervisor has one thread and never opens the domain, so that it can fork: what a worker does at its start is what any program does.
Now and then a worker is a fresh interpreter all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.soak import life
from tests.soak.board import Board, Line, Outcome
from tests.soak.operations import OPERATIONS, outcomes
from tests.support.parents import adopt_orphans

WORKERS: Final = 6
FRESH: Final = 24  # of so many workers one is a fresh interpreter, which costs as much as twenty forks
HANG: Final = 60.0  # s without a round, or without an end: on a loaded machine a round takes a second or two
RUSH: Final = 0.7  # s at the start of an epoch, in which the domain grows fastest: with visitors, who join and go at once
PAUSE: Final = 0.03  # s between two deeds of the supervisor, at most
EMPTY: Final = 1 << 20  # bytes of a domain file that nobody uses, at most (docs/promises.md)


class FaultError(AssertionError):
    """The soak has found something."""


@dataclass
class Slot:
    """A place for a worker."""

    line: Line
    pid: int = 0
    killed: bool = False
    rounds: int = -1
    moved: float = 0.0  # when its rounds were seen to change last


@dataclass
class Report:
    """What a run has done."""

    seed: str
    seconds: float = 0.0
    epochs: int = 0
    started: int = 0
    fresh: int = 0
    killed: int = 0
    slowest_end: float = 0.0  # s that the processes of an epoch took to go
    slowest_look: float = 0.0  # s until the next process saw nothing of them
    outcomes: Counter[Outcome] = field(default_factory=Counter)

    def __str__(self) -> str:
        well = sum(count for outcome, count in self.outcomes.items() if not outcome.number)
        errors = sorted((str(outcome), count) for outcome, count in self.outcomes.items() if outcome.number and count)
        lines = [
            f"seed {self.seed}: {self.seconds:.0f} s, {self.epochs} epochs, {well} operations",
            f"{self.started} processes started ({self.fresh} fresh interpreters), {self.killed} killed",
            f"after an epoch all had gone within {self.slowest_end:.1f} s, and nothing of them was seen within {self.slowest_look:.1f} s",
            "expected errors: " + (", ".join(f"{name} {count}" for name, count in errors) or "none"),
        ]
        never = sorted(str(outcome) for outcome, count in self.outcomes.items() if not outcome.number and not count)
        if never:
            lines.append("never done: " + ", ".join(never))
        return "\n".join(lines)


class Supervisor:
    """One run. ``where``: a fresh directory for it, on the file system where the domain is to be."""

    def __init__(self, seed: str, where: Path, longest: float) -> None:
        self.seed, self.where, self.longest = seed, where, longest
        self.rng = random.Random(seed)
        self.board = Board(WORKERS, outcomes())
        self.slots = [Slot(self.board.line(i)) for i in range(WORKERS)]
        self.report = Report(seed)
        self.log_of: dict[int, Path] = {}
        self.anchors: set[int] = set()
        self.rope = -1  # closed, it lets the anchors go
        for name in ("peers", "logs"):
            (where / name).mkdir()
        os.environ["DMABUF_DOMAIN"] = str(where / "domain")
        # The children of a killed worker become ours, so that none is lost from sight.
        adopt_orphans()
        self.descriptors = set(os.listdir("/proc/self/fd"))

    # ---- the run ----

    def run(self, seconds: float) -> Report:
        start = time.monotonic()
        try:
            while (now := time.monotonic()) - start < seconds:
                self.epoch(min(seconds - (now - start), self.rng.uniform(1, self.longest)))
                self.report.epochs += 1
        finally:
            self.end_all()
            self.report.seconds = time.monotonic() - start
            self.report.outcomes = self.board.total()
        return self.report

    def epoch(self, seconds: float) -> None:
        start = time.monotonic()
        self.drop_anchors()
        while (now := time.monotonic()) < start + seconds:
            if now < start + RUSH:
                self.start_visitor()
            for slot in self.slots:
                if not slot.pid:
                    self.start(slot)
            pause(self.rng.uniform(0, PAUSE))
            self.look_after()
            if self.rng.random() < 0.2:
                self.kill(self.rng.choice(self.slots))
        asked = time.monotonic()
        self.finish()
        gone = time.monotonic()
        self.check_nothing_left()
        self.report.slowest_end = max(self.report.slowest_end, gone - asked)
        self.report.slowest_look = max(self.report.slowest_look, time.monotonic() - gone)

    def drop_anchors(self) -> None:
        """Two processes that join, do nothing, and leave when all others have ended.

        So somebody is in the domain all the time. What processes share about a buffer is forgotten with the last process that has joined,
        even if a child that hasn't joined yet has the buffer open; a soak isn't the place to see that again.
        """
        told, self.rope = os.pipe()
        for number in range(2):
            log = self.new_log(f"anchor {number}")
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                os.close(self.rope)
                life.anchor(told, log)
            os.close(log)
            self.anchors.add(pid)
            self.log_of[pid] = self.where / "logs" / f"anchor {number}"
        os.close(told)

    def start_visitor(self) -> None:
        self.report.started += 1
        log = self.new_log(f"{self.report.started}")
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            life.visit(log)
        os.close(log)
        self.log_of[pid] = self.where / "logs" / f"{self.report.started}"

    def new_log(self, name: str) -> int:
        return os.open(self.where / "logs" / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def start(self, slot: Slot) -> None:
        self.report.started += 1
        seed = f"{self.seed}/{self.report.started}"
        log = self.new_log(f"{self.report.started}")
        number = self.slots.index(slot)
        sys.stdout.flush()
        if self.report.started % FRESH == 0:
            self.report.fresh += 1
            program = subprocess.Popen(
                [sys.executable, "-m", "tests.soak.life", str(self.where), seed, str(number), str(self.board.fd)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self.board.fd],
                process_group=0,
            )
            slot.pid, program.returncode = program.pid, 0  # waited for here, with the others
        else:
            slot.pid = os.fork()
            if not slot.pid:
                life.in_fork(self.where, seed, self.board, number, log)
        os.close(log)
        slot.killed, slot.rounds, slot.moved = False, -1, time.monotonic()
        self.log_of[slot.pid] = self.where / "logs" / f"{self.report.started}"

    def kill(self, slot: Slot) -> None:
        """At whatever point of whatever it does."""
        if slot.pid:
            slot.killed = True
            self.report.killed += 1
            os.kill(slot.pid, signal.SIGKILL)

    def look_after(self) -> None:
        """Reap who has ended; FaultError if somebody ended badly, or hangs."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            self.ended(pid, os.waitstatus_to_exitcode(status))
        now = time.monotonic()
        for slot in self.slots:
            if slot.line.rounds != slot.rounds:
                slot.rounds, slot.moved = slot.line.rounds, now
            elif slot.pid and now - slot.moved > HANG:
                raise FaultError(f"a worker hangs in {OPERATIONS[slot.line.doing].name}:\n{self.stacks(slot.pid)}")

    def ended(self, pid: int, code: int) -> None:
        self.anchors.discard(pid)
        slot = next((slot for slot in self.slots if slot.pid == pid), None)
        killed = slot.killed if slot is not None else True  # a stranger may have killed itself
        if slot is not None:
            slot.pid = 0
        with contextlib.suppress(FileNotFoundError):
            (self.where / "peers" / str(pid)).unlink()
        log = self.log_of.pop(pid, None)
        if code and not (killed and code == -signal.SIGKILL):
            doing = f" after {OPERATIONS[slot.line.doing].name}" if slot is not None else ""
            text = log.read_text(errors="replace") if log else self.last_logs()
            raise FaultError(f"a worker ended with {code}{doing}:\n{text}")

    # ---- the end of an epoch ----

    def finish(self) -> None:
        """Ask all to go, and kill up to two of them while they do; more would hide one that hangs."""
        kills = self.rng.randint(0, 2)
        (self.where / "stop").touch()
        begun = time.monotonic()
        while True:
            self.look_after()
            left = set(children())
            if self.rope >= 0 and not left - self.anchors:
                os.close(self.rope)  # the last to leave are two at once
                self.rope = -1
            if not left:
                break
            if time.monotonic() - begun > HANG:
                raise FaultError("these don't end:\n" + "\n".join(map(self.stacks, left)))
            pause(self.rng.uniform(0, PAUSE / 10))
            if kills and self.rng.random() < 0.05:
                kills -= 1
                self.kill(self.rng.choice(self.slots))
        (self.where / "stop").unlink()
        for log in (self.where / "logs").iterdir():
            log.unlink()

    def end_all(self) -> None:
        """Kill every process that is left, without questions."""
        while left := children():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)

    def check_nothing_left(self) -> None:
        """FaultError if the domain isn't as a domain is that nobody uses."""
        peers = os.listdir(self.where / "peers")
        if peers:
            raise FaultError(f"left by the soak itself: sockets {peers}")
        found = self.inspected()
        if found["buffers"]:
            raise FaultError(f"buffers are left: {found['buffers']}")
        files = {path.name: path.lstat().st_size for path in (self.where / "domain").iterdir()}
        if len(files) != 1 or max(files.values()) > EMPTY:
            raise FaultError(f"the domain's directory has {files}; one file of at most {EMPTY} bytes was expected")
        descriptors = set(os.listdir("/proc/self/fd"))
        if descriptors != self.descriptors:
            raise FaultError(f"the supervisor has other descriptors: {descriptors ^ self.descriptors}")

    def inspected(self) -> dict[str, list[str]]:
        """What a process sees that comes when all others have gone."""
        here, there = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(here)
            life.inspect(there)
        os.close(there)
        with open(here, "rb") as answer:
            ready, _, _ = select.select([here], [], [], HANG)
            text = answer.read() if ready else b""
            _, status = os.waitpid(pid, 0 if ready else os.WNOHANG)
        if not text or status:
            raise FaultError(f"the next process can't look at the domain: {self.stacks(pid) if not ready else text.decode() or status}")
        found: dict[str, list[str]] = json.loads(text)
        return found

    # ---- what to say about a fault ----

    def stacks(self, pid: int) -> str:
        """Where every thread of a process is, as it says itself; and the kernel's word for it."""
        log = self.log_of.get(pid)
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGUSR1)
        pause(1)
        waits = []
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                waits.append(f"{task.name} in {(task / 'wchan').read_text()}")
        return f"process {pid}: {', '.join(waits)}\n{log.read_text(errors='replace') if log else self.last_logs()}"

    def last_logs(self) -> str:
        """What the processes have written last: a child of a killed worker writes into its parent's."""
        logs = sorted((self.where / "logs").iterdir(), key=lambda path: path.stat().st_mtime)
        return "\n".join(text for log in logs[-4:] if (text := log.read_text(errors="replace")))


def pause(seconds: float) -> None:
    select.select([], [], [], seconds)


def children() -> list[int]:
    """All processes that are waited for here."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def soak(seconds: float, seed: str, longest: float = 4.0, base: Path = Path("/dev/shm")) -> Report:
    """Run one. ``longest``: seconds of an epoch, at most. FaultError: it has found something."""
    where = Path(tempfile.mkdtemp(prefix="dmabuf-soak-", dir=base if os.access(base, os.W_OK) else None))
    supervisor = Supervisor(seed, where, longest)
    try:
        return supervisor.run(seconds)
    except FaultError as e:
        raise FaultError(f"{e}\n\n{supervisor.report}") from None
    finally:
        shutil.rmtree(where, ignore_errors=True)


__all__ = ["FaultError", "Report", "soak"]
