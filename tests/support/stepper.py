"""Two processes stepped through the orders of what they do.

A `Stepped` is a forked child that lives as long as its test and runs *programs* on command: it stops at every named step (the "hold"
mode of the step harness) until the test grants it the next one. A `Program` says what to make ready before, what to run step by step,
and what to clean up after; only the steps it calls interesting are stops, the rest pass at once.

An *order* is a sequence of 0 and 1: whose turn it is. `run_order` grants accordingly. A process that went to sleep in a wait (it says so
with "~name") or has ended does not take its turn: the turn is skipped until it moves on by itself, which nobody but the other process
can bring about. After the last turn both run free to their end. So nothing depends on time; the watchdog is a bound on moves and, for a
process that says nothing any more, on silence.
"""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import socket
import struct
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import dmabuf
from dmabuf import _native
from tests.support.steps import fork, reap

BEGIN = "begin"  # a stop before the first one of every program
SILENCE_S = 100  # a held process says something at once, a sleeping one at its next tick
MOVES = 3000  # of one run: a process that wakes at every tick for two minutes is stuck


class Program:
    """What one process does in an order. The hooks run in the child; `interesting` None: every step is a stop."""

    name = ""
    interesting: frozenset[str] | None = None

    def ready(self) -> None:
        """Before the order, unstepped."""

    def run(self) -> Any:
        """Stepped; its result goes to the test as text."""

    def clean(self) -> None:
        """After the test has looked, unstepped."""


class Stuck(AssertionError):
    """A process neither went on nor ended."""


class Stepped:
    """A child with a program."""

    def __init__(self, program: Program) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", SILENCE_S, 0))
        self._text = b""
        self.at: str | None = None  # the step it stands at
        self.asleep = False
        self.result: str | None = None
        self.passed: list[str] = []
        ours = self.sock.fileno()
        self.pid = fork(lambda: _serve(theirs, program), lambda: os.close(ours))
        theirs.close()

    def command(self, letter: bytes) -> None:
        """b"p" get ready, b"r" run, b"c" clean up."""
        self.sock.sendall(letter)

    def answer(self) -> str:
        """The answer to a command that passes no stops; AssertionError with the child's traceback if it failed."""
        while b"\n" not in self._text:
            self._receive()
        line, _, self._text = self._text.partition(b"\n")
        assert line[:1] == b"!", line
        return line[1:].decode()

    def start(self) -> None:
        """Begin the program; it stands at its first step, sleeps, or has ended when this returns."""
        self.at = self.result = None
        self.asleep = False
        self.passed = []
        self.command(b"r")
        self.read()

    def grant(self) -> None:
        """One step further."""
        assert self.at is not None
        self.at = None
        self.sock.send(b"g")
        self.read()

    @property
    def ended(self) -> bool:
        return self.result is not None

    def read(self) -> None:
        """Until it stands, sleeps or has ended."""
        while self.at is None and not self.ended:
            if b"\n" in self._text:
                self._line()
            elif self.asleep:
                return
            else:
                self._receive()

    def look(self) -> bool:
        """What it said meanwhile, without waiting; True if it was anything."""
        found = False
        while self.at is None and not self.ended:
            if b"\n" not in self._text:
                if not select.select([self.sock], [], [], 0)[0]:
                    return found
                self._receive()
            else:
                found = True
                self._line()
                self.read()
        return found

    def _line(self) -> None:
        line, _, self._text = self._text.partition(b"\n")
        text = line.decode()
        if text.startswith("!"):
            self.result = text[1:]
            self.asleep = False
        elif text.startswith("~"):
            self.asleep = True
            self.passed.append(text)
        else:
            self.asleep = False
            self.passed.append(text)
            self.at = text

    def _receive(self) -> None:
        try:
            piece = self.sock.recv(4096)
        except BlockingIOError:
            raise Stuck(f"process {self.pid} says nothing; it passed {self.passed[-20:]}") from None
        if not piece:
            raise Stuck(f"process {self.pid} has died; it passed {self.passed[-20:]}")
        self._text += piece

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        reap(self.pid)
        self.sock.close()


def _serve(sock: socket.socket, program: Program) -> None:
    """The child: commands are letters, and everything it says is a line on the same socket."""
    fd = sock.fileno()
    stops = "*" if program.interesting is None else ",".join([BEGIN, "~", *sorted(program.interesting)])
    dmabuf.Domain.default().join()  # so that who lives in the domain stays the same
    while letter := sock.recv(1):
        try:
            if letter == b"r":
                _native.step_arm("hold", stops, fd)
                try:
                    _native.step(BEGIN)
                    answer = program.run()
                finally:
                    _native.step_disarm()
            else:
                answer = (program.ready if letter == b"p" else program.clean)()
        except BaseException as e:
            traceback.print_exc()
            answer = f"failed: {e!r}"
        sock.sendall(b"!" + str(answer).replace("\n", " ").encode() + b"\n")


class Pair:
    """Two children and what they do to each other."""

    def __init__(self, first: Program, second: Program) -> None:
        self.sides = (Stepped(first), Stepped(second))
        for side in self.sides:
            side.command(b"c")
            side.answer()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for side in self.sides:
            side.end()

    def both(self, letter: bytes) -> None:
        """An unstepped command to both, one after the other."""
        for side in self.sides:
            side.command(letter)
            answer = side.answer()
            assert not answer.startswith("failed"), answer

    def run_order(self, order: Sequence[int]) -> tuple[str, str]:
        """Step both through an order, then let them run to their end; their results."""
        a, b = self.sides
        for side in self.sides:
            side.start()
        for turn in order:
            for side in self.sides:
                if side.asleep:
                    side.look()
            if self.sides[turn].at is not None:
                self.sides[turn].grant()
        for moves in itertools.count():
            if a.ended and b.ended:
                break
            if moves > MOVES:
                raise Stuck(f"no end in sight: {a.result}, {b.result}; {a.passed[-40:]} and {b.passed[-40:]}")
            standing = [side for side in self.sides if side.at is not None]
            for side in standing:
                side.grant()
            if not standing:
                sleeping = [side.sock for side in self.sides if not side.ended]
                if not select.select(sleeping, [], [], SILENCE_S)[0]:
                    raise Stuck(f"both sleep: {a.passed[-20:]} and {b.passed[-20:]}")
                for side in self.sides:
                    side.look()
        assert a.result is not None
        assert b.result is not None
        return a.result, b.result


def all_orders(n: int, m: int) -> Iterator[tuple[int, ...]]:
    """Every sequence of n zeros and m ones."""
    for where in itertools.combinations(range(n + m), n):
        order = [1] * (n + m)
        for i in where:
            order[i] = 0
        yield tuple(order)


def random_order(n: int, m: int, seed: int) -> tuple[int, ...]:
    """A shuffled sequence of n zeros and m ones, always the same for a seed."""
    order = [0] * n + [1] * m
    random.Random(seed).shuffle(order)
    return tuple(order)
