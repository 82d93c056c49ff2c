"""Forked processes that are killed or held at the named steps of a change (the step harness of dmabuf._native).

`Stepper` runs a function in a forked child. `trace` lists the steps that it passes; `killed_at(k)` lets it die by SIGKILL at the k-th;
`held` stops it at each step until it is told to go on. A fork, not a fresh interpreter: hundreds of deaths in a test must be cheap,
and what a fork inherits is part of what is tested.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from dmabuf import _native
from tests.support.budget import budget, some_of
from tests.support.parents import end_with

Action = Callable[[], Any]


def fork(action: Action, before: Action | None = None) -> int:
    """The pid of a child that runs `action` and exits 0, or 1 with a traceback if it raises. It ends with this process at the latest."""
    parent, in_main = os.getpid(), threading.current_thread() is threading.main_thread()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+: a fork with threads; the child runs only this
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if in_main:
            end_with(parent)
        if before is not None:
            before()
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def reap(pid: int) -> int:
    """The exit code of a child; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def trace(action: Action) -> list[str]:
    """The steps that an action passes, in order; the action must end by itself."""
    with Held(action) as held:
        steps = []
        while (name := held.next_step()) is not None:
            if not name.startswith("~"):
                steps.append(name)
                held.go_on()
        assert held.code == 0
    return steps


def numbers(action: Action, *, quick: int) -> Iterable[int]:
    """The numbers of an action's steps, in order: without an end with the full budget, and some with the quick one if there are more."""
    count = len(trace(action)) if budget() == "quick" else 0
    return sorted(some_of(count, quick=quick)) if count > quick else itertools.count(1)


def killed_at(action: Action, count: int) -> int:
    """Run an action in a child that dies at its count-th step; the exit code, -SIGKILL when it got there."""
    return reap(fork(action, lambda: _native.step_arm("kill", "*", count)))


class Held:
    """A child that stops at every step (or those named `only`) until `go_on`."""

    def __init__(self, action: Action, only: str = "*") -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

        def arm() -> None:
            ours.close()
            _native.step_arm("hold", only, theirs.detach())

        self.sock = ours
        self.pid = fork(action, arm)
        theirs.close()
        self.code: int | None = None
        self._text = b""

    def next_step(self) -> str | None:
        """The name of the step it stands at, "~name" as it goes to sleep in a wait, None when it has ended."""
        while b"\n" not in self._text:
            piece = self.sock.recv(4096) if self.code is None else b""
            if not piece:
                self.wait()
                return None
            self._text += piece
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    def pending(self) -> bool:
        """Is there something to read: a step, or its end?"""
        return b"\n" in self._text or self.code is not None or bool(select.select([self.sock], [], [], 0)[0])

    def run_to(self, name: str, nth: int = 1) -> bool:
        """Let it go on until it stands at the nth `name`; False when it ended before."""
        while (step := self.next_step()) is not None:
            if step == name:
                nth -= 1
                if not nth:
                    return True
            if not step.startswith("~"):
                self.go_on()
        return False

    def run_to_nth(self, nth: int) -> str | None:
        """Let it go on until it stands at its nth step of all; the step's name, None when it ended before."""
        while (step := self.next_step()) is not None:
            if step.startswith("~"):
                continue
            nth -= 1
            if not nth:
                return step
            self.go_on()
        return None

    def go_on(self) -> None:
        self.sock.send(b"g")

    def release(self) -> None:
        """Let it run to its end."""
        while (step := self.next_step()) is not None:
            if self.code is None and not step.startswith("~"):
                try:
                    self.go_on()
                except BrokenPipeError:
                    break

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        if self.code is None:
            self.code = reap(self.pid)
        return self.code

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.sock.close()
