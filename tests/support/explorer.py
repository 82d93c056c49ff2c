"""Orders of the threads of one process, each drawn from a seed.

One thread has the *baton* and runs; the others wait for it. At every *point* the seed decides whether the baton goes to another thread. A
point is an instruction of the package's code that may look at something which threads share: an attribute, a global name, an item, a call,
and so every native call. The interpreter itself switches threads at some of these places only, and rarely at the same.

A thread that blocks, in a native wait or for a lock, gives the baton up, because the kernel says that it sleeps. It waits for its turn at
its next point. Threads that the package starts take part from their first point on.

A `Program` is run once for each seed, in a forked process, so that what is made at first use is made each time. The same seed gives the
same order as long as no thread blocks for a time that another process decides.

    python -m tests.support.explorer tests.crash.test_schedules:FirstDispatcher 0 500     the seeds from 0 to 499, until one fails
    python -m tests.support.explorer tests.crash.test_schedules:FirstDispatcher 17        this one
"""

from __future__ import annotations

import contextlib
import dis
import faulthandler
import gc
import importlib
import os
import random
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import dmabuf
from tests.support.steps import fork, reap
from tests.support.waiting import thread_state

# Instructions that look at, change or call something that other threads may reach.
_LOOKS_AT = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_SUPER", "BINARY_SUBSCR", "CONTAINS_OP", "FOR_ITER", "GET_ITER")
_CHANGES = ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "STORE_SUBSCR", "DELETE_", "LIST_EXTEND", "SET_UPDATE")
_CALLS = ("CALL", "SEND", "RETURN_VALUE", "BEFORE_WITH", "WITH_EXCEPT_START")
_SHARED = frozenset(number for name, number in dis.opmap.items() if name.startswith((*_LOOKS_AT, *_CHANGES, *_CALLS)))
_AT_STEPS = 0.25
_monitoring: Any = getattr(sys, "monitoring", None)  # from 3.12 on
_TOOL = 4  # a free number of sys.monitoring
_LOOK_S = 0.0005  # between two looks at whether the thread with the baton sleeps
_HANG_S = 100.0  # for a run that doesn't even notice its own limit
_scheduler: Scheduler | None = None


def _pause(seconds: float) -> None:
    select.select([], [], [], seconds)


def may_switch() -> None:
    """A point in a program's own code."""
    if _scheduler is not None:
        _scheduler.point(0.5)


class Program:
    """What the threads of one run do; made in the run's process."""

    code = str(Path(dmabuf.__file__).parent)  # the points are in the files whose names begin so
    limit_s = 30.0  # for a run, which takes milliseconds: a thread that still waits then waits forever

    def bodies(self) -> Sequence[Callable[[], object]]:
        """Make ready, and return what each thread does. What a body raises fails the run."""
        raise NotImplementedError

    def check(self) -> None:
        """After all have ended, in the main thread."""


class Stuck(AssertionError):
    """No thread goes on."""


class _Thread:
    def __init__(self, priority: float) -> None:
        self.tid = threading.get_native_id()
        self.priority = priority
        self.turn = threading.Lock()
        self.turn.acquire()
        self.ready = False  # waits for its turn
        self.status = os.open(f"/proc/self/task/{self.tid}/status", os.O_RDONLY | os.O_CLOEXEC)
        self.asleep: object = None  # its state at the last look, if it slept

    def sleeps(self) -> bool:
        """Does it sleep, and has it since the last look?"""
        state = thread_state(self.status)
        before, self.asleep = self.asleep, state if state is not None and state[0] == b"S" else None
        return state is None or (self.asleep is not None and self.asleep == before)


class Scheduler:
    """Who has the baton. Its fields are changed under the interpreter's lock, which no thread gives up in the middle of a change."""

    def __init__(self, seed: int, code: str) -> None:
        self._of = code
        self._random = random.Random(seed)
        # How often the one with the baton falls behind all others: there are orders with few switches, and with one at every third point.
        self._rate = self._random.choice((1 / 3, 1 / 10, 1 / 30, 1 / 100, 1 / 300))
        self._lowest = 0.0
        self._pid = os.getpid()
        self._threads: dict[int, _Thread] = {}
        self._all: list[_Thread] = []  # those that have ended too
        self._holder: _Thread | None = None
        self._running = 0
        self._main = threading.get_ident()
        self._rates: dict[CodeType, dict[int, float]] = {}
        self.points = 0
        self.errors: list[BaseException] = []

    # ---- what threads call ----

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self._of):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._at

    def _at(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self._at_instruction(frame.f_code, frame.f_lasti)
        return self._at

    def _at_instruction(self, code: CodeType, offset: int) -> Any:
        rates = self._rates.get(code)
        if rates is None:
            if not code.co_filename.startswith(self._of):
                return None if _monitoring is None else _monitoring.DISABLE
            rates = self._rates[code] = self._rates_of(code)
        rate = rates.get(offset)
        if rate is not None and threading.get_ident() != self._main:
            self.point(rate)
        return None

    def _trace_threads(self, on: bool) -> None:
        """Have each instruction of every thread begin at a point. A trace function misses the first run of each function in 3.13."""
        if _monitoring is None:
            threading.settrace(self._trace if on else None)
            return
        instruction = _monitoring.events.INSTRUCTION
        if on:
            _monitoring.use_tool_id(_TOOL, "explorer")
            _monitoring.register_callback(_TOOL, instruction, self._at_instruction)
            _monitoring.restart_events()
        _monitoring.set_events(_TOOL, instruction if on else 0)
        if not on:
            _monitoring.register_callback(_TOOL, instruction, None)
            _monitoring.free_tool_id(_TOOL)

    def _rates_of(self, code: CodeType) -> dict[int, float]:
        """How likely a thread that comes to an instruction falls behind; more likely at a named step, where something is half done."""
        text = code.co_code
        rates = {at: self._rate for at in range(0, len(text), 2) if text[at] in _SHARED}
        if "step" in code.co_names:
            steps = [found.offset for found in dis.get_instructions(code) if found.opname == "LOAD_GLOBAL" and found.argval == "step"]
            rates |= dict.fromkeys(steps, max(self._rate, _AT_STEPS))
        return rates

    def point(self, rate: float) -> None:
        """Another thread may run here, and does so with this probability."""
        if os.getpid() != self._pid:
            return  # a forked child of the program: it has one thread
        me = self._me()
        if self._holder is not me:
            self._await(me)
            return
        self.points += 1
        if self._random.random() < rate:
            self._lowest -= 1
            me.priority = self._lowest
            self._let_return(me)
            best = self._best()
            if self._holder is me and best is not None and best.priority > me.priority:
                self._give(best)
            if self._holder is not me:
                self._await(me)

    def _me(self) -> _Thread:
        ident = threading.get_ident()
        found = self._threads.get(ident)
        if found is None:
            found = self._threads[ident] = _Thread(self._random.random() + 1)
            self._all.append(found)
        return found

    def _await(self, me: _Thread) -> None:
        if self._holder is None:
            self._holder = me
            return
        me.ready = True
        me.turn.acquire()

    def _best(self) -> _Thread | None:
        return max((thread for thread in self._threads.values() if thread.ready), key=lambda thread: thread.priority, default=None)

    def _give(self, to: _Thread | None) -> None:
        self._holder = to
        if to is not None:
            to.ready = False
            to.asleep = None
            to.turn.release()

    def _let_return(self, me: _Thread) -> None:
        """Until each thread that was blocked still is, or waits for its turn: this one keeps the interpreter's lock from them."""
        for thread in list(self._threads.values()):
            while thread is not me and not thread.ready and not thread.sleeps():
                _pause(_LOOK_S / 4)

    def _body(self, function: Callable[[], object]) -> None:
        if _monitoring is None:
            sys.settrace(None)
        self._await(self._me())
        if _monitoring is None:
            sys.settrace(self._trace)
        try:
            function()
        except BaseException as e:
            self.errors.append(e)
        finally:
            if _monitoring is None:
                sys.settrace(None)
            gone = self._threads.pop(threading.get_ident())
            self._running -= 1
            if self._holder is gone:
                self._give(self._best())

    # ---- what the main thread does ----

    def run(self, functions: Sequence[Callable[[], object]], limit_s: float) -> None:
        """Run each function in a thread of its own, all by the seed's order, until the last has ended."""
        sys.setswitchinterval(1000)
        self._trace_threads(True)
        self._holder = self._me()  # nobody begins before all are there
        self._running = len(functions)
        for function in functions:
            threading.Thread(target=self._body, args=(function,), daemon=True).start()
        while sum(thread.ready for thread in self._all) < len(functions):
            _pause(_LOOK_S)
        del self._threads[threading.get_ident()]
        self._give(self._best())
        self._watch(limit_s)
        self._trace_threads(False)
        self._pid = -1  # from now on a point is nothing
        for thread in self._threads.values():
            if thread.ready:
                thread.turn.release()
        for thread in self._all:
            os.close(thread.status)
        sys.setswitchinterval(0.005)

    def _watch(self, limit_s: float) -> None:
        """Take the baton from who sleeps, until the last body has ended."""
        end = time.monotonic() + limit_s
        while self._running:
            _pause(_LOOK_S)
            holder = self._holder
            if (holder is None or holder.sleeps()) and self._holder is holder:
                self._give(self._best())
            if time.monotonic() > end:
                raise Stuck(f"{self._running} threads have not ended within {limit_s:g} s, after {self.points} points")


def _run(program: Callable[[], Program], seed: int, report: int) -> None:
    """In the run's process: say what went wrong, nothing if all is well."""
    gc.disable()  # garbage is collected where a program says so: a finalizer inside the scheduler would be a thread that nobody switches
    global _scheduler
    try:
        made = program()
        scheduler = _scheduler = Scheduler(seed, made.code)
        scheduler.run(made.bodies(), made.limit_s)
        for error in scheduler.errors:
            raise error
        made.check()
    except BaseException as e:
        with os.fdopen(os.dup(report), "w") as to:
            traceback.print_exc(file=to)
            if isinstance(e, Stuck):
                to.flush()
                faulthandler.dump_traceback(to, all_threads=True)


def outcome(program: Callable[[], Program], seed: int) -> str:
    """Run a program by a seed's order in a forked process. Return what went wrong, "" if nothing did."""
    with tempfile.TemporaryFile() as report:
        pid = fork(lambda: _run(program, seed, report.fileno()))
        end = os.pidfd_open(pid)
        try:
            hung = not select.select([end], [], [], _HANG_S)[0]
        finally:
            os.close(end)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status = reap(pid)
        report.seek(0)
        text = report.read().decode(errors="replace")
    if not text and (hung or status):
        text = f"the process hangs in native code, or has died: exit status {status}"
    return text


def explore(program: Callable[[], Program], seeds: Iterable[int]) -> None:
    """Run a program by the order of each seed.

    Raises:
        AssertionError: An order failed; the text has the seed and what happened.
    """
    for seed in seeds:
        text = outcome(program, seed)
        assert not text, f"seed {seed} of {getattr(program, '__name__', program)}: {text}"


def main(arguments: Sequence[str]) -> int:
    """Explore a named program. Return 1 if a seed fails."""
    module, _, name = arguments[0].partition(":")
    program = getattr(importlib.import_module(module), name)
    first, end = int(arguments[1]), int(arguments[2]) if len(arguments) > 2 else int(arguments[1]) + 1
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        os.environ["DMABUF_DOMAIN"] = directory
        for seed in range(first, end):
            if text := outcome(program, seed):
                print(f"seed {seed}: {text}")
                return 1
    print(f"nothing found with the seeds from {first} to {end - 1}")
    return 0


if __name__ == "__main__":
    from tests.support.children import prepare

    prepare()
    sys.exit(importlib.import_module("tests.support.explorer").main(sys.argv[1:]))
